"""How generators are trained in latents: what their flags are, on what, by which loss, and what is seen meanwhile.

Read diffusion.py first (what a DiT is trained to predict), then latent_run.py and latent_cache.py (on what);
drift_training.py: one-step generators; gan_training.py; token_alignment.py; generation_monitor.py validates. The flags
of the scripts are in *_arguments.py. May import rooms up to generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
