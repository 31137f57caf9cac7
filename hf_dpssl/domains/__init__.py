"""Pictures of several domains (photo, sketch, ...) or data sets, and how to learn for one that is new.

Read algorithms.py first: ERM, IRM, VREx ... side by side; cells.py runs them on the pictures that domain_data.py finds,
swad.py and soups.py average weights, selection.py makes the table. transfer.py: an encoder on nine data sets
(transfer_sets.py), with fine_tuning.py. May import rooms up to embedding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
