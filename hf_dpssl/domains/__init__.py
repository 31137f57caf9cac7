"""What features are worth across domains (photo, sketch, ...): arrays in, scores out; no encoder is known here.

Read ranking.py first: the score of one encoder by leaving each domain out once, from labels and features. It is made of
evidence.py (Bayesian linear model) and density.py (Gaussian with shrinkage), both from the sums that
domain_statistics.py gathers batch by batch. baselines.py: LogME, H-score, kNN across domains. May import models, data
and evaluation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
