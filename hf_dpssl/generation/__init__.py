"""Images from latents: a DiT by diffusion or in one step, a token transformer, GANs.

Read pipeline_vq_dit.py first, the whole inference story; then diffusion.py (what is trained), latent_cache.py (on what)
and bulk_sampling.py (`hf-dpssl sample`). May import rooms up to autoencoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
