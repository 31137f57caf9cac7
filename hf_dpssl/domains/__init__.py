"""Pictures of several domains (photo, sketch, ...): which encoder to take for them, and how to learn for a new one.

Read ranking.py first: the score of one encoder by leaving each domain out once, from the sums that domain_statistics.py
gathers. It is made of evidence.py and tridiagonal.py (Bayesian linear model) and density.py (Gaussian with shrinkage);
baselines.py: LogME, H-score, kNN ... zoo.py ranks encoders on the pictures that domain_data.py finds; zood.py chooses
and combines them, feature_selection.py selects. transfer.py: nine data sets (transfer_sets.py), with fine_tuning.py.
algorithms.py: ERM, IRM, VREx ... side by side; cells.py runs them, swad.py and soups.py average weights, selection.py
makes the table. May import rooms up to embedding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
