"""Contrastive learning as neighbour embedding: similarities P are matched by similarities Q under a divergence.

Read matching.py first, then losses.py, whose functions are its named cells; tiles.py makes them O(N D) in memory,
modeling_pretraining.py trains an encoder by them. May import models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
