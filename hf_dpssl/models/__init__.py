"""What travels with weights: the encoder, the VQ autoencoder, VAEGAN and their parts.

Read modeling_vq.py and modeling_contrastive.py first. transformers copies a model's file and the siblings that it
imports next to published weights, so files here import siblings and other libraries only, never another room.
Importing a model registers it with AutoConfig and AutoModel (registration.py)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
