"""What the Spaces of spaces/ share: the page, pictures, uploads, maps, and views of models.

Read space_page.py first. Needs gradio for pages: see spaces/README.md. May import rooms up to generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
