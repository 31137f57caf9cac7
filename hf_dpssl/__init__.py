"""Distance-preserving self-supervised learning for the Hugging Face ecosystem.

Public names are imported when they are first used: `import hf_dpssl` loads no other library, `from hf_dpssl import
info_nce` torch only. transformers' AutoConfig and AutoModel find the classes of this package once one of
hf_dpssl.models has been imported, or from the start where transformers was imported before.
"""

import sys

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if "transformers" in sys.modules:
    # They register themselves.
    from .models import modeling_contrastive, modeling_discriminator, modeling_vaegan, modeling_vq  # noqa: F401
