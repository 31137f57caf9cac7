"""Training of autoencoders, jointly or decoupled (DAE: the encoder against a weak decoder, frozen, then the real one).

Read training.py first (arms, budgets, stages), then adversarial_term.py and perceptual.py (VQGAN's terms) and
measures.py (what a latent is worth). latent_codec.py is one face for our autoencoders and diffusers'. May import
rooms up to embedding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
