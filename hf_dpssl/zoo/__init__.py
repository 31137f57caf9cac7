"""A zoo is a list of encoders: which one to take for one's own pictures, and what several are worth together.

Read ranking.py first: the score of one encoder by leaving each domain out once, from the sums that domain_statistics.py
gathers. It is made of evidence.py and tridiagonal.py (Bayesian linear model) and density.py (Gaussian with shrinkage);
view_likelihood.py: without labels; baselines.py: LogME, H-score, kNN ... zoo_ranking.py ranks the encoders of a
zoo_list.py; zood.py chooses and combines them, feature_selection.py selects. May import rooms up to domains."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
