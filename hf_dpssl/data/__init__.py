"""Which images: from `--dataset` to splits, and from splits to batches of uint8 tensors and augmented views.

Read image_data.py first (names, folders, columns, classes), then batches.py (order, workers, streams) and views.py
(augmentation on the device). All randomness is keyed_random's. May import nothing above models and contrastive."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
