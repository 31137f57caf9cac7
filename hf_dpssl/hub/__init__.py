"""Publish and describe: what goes to the Hub, model cards, facts of checkpoints, and the pair that replays them.

Read publishing.py first, then model_card.py and replay.py. May import rooms up to generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
