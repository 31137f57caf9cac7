"""Any image encoder over any data set: vectors, search among them, and what they are worth.

Read embedder.py first: pictures to vectors by encoders of ours, timm and transformers. feature_extractors.py gives
the features that image measures compare. May import rooms up to runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
