"""Images from latents: a DiT by diffusion or in one step, a token transformer.

Read pipeline_vq_dit.py first, the whole inference story; then bulk_sampling.py (`hf-dpssl sample`) and
generator_evaluation.py (`hf-dpssl evaluate`). May import rooms up to autoencoder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
