"""Which encoder to take for pictures of several domains (photo, sketch, ...), and what its features are worth there.

Read ranking.py first: the score of one encoder by leaving each domain out once, from labels and features. It is made of
evidence.py (Bayesian linear model) and density.py (Gaussian with shrinkage), both from the sums that
domain_statistics.py gathers batch by batch. baselines.py: LogME, H-score, kNN across domains. zoo.py ranks encoders on
the pictures that domain_data.py finds, ranking_plot.py draws it. May import rooms up to embedding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
