"""Evaluation protocols: arrays and callables in, dict[str, float] out; no model class is known here.

Features: neighbours.py (kNN) first, probes.py, geometry.py, codes.py, feature_checks.py. Images: image_measures.py
first, which collects frechet.py (its moments: feature_statistics.py), maximum_mean_discrepancy.py, manifold.py and
classifier_scores.py; generated_images.py, reconstruction.py. Geometry between spaces: preservation.py,
lipschitz_constants.py, gromov.py, cai_lim_distance.py. Means over runs: student_interval.py. `load`
(loading.py) finds the `evaluate` modules of modules/. May import models, contrastive and data."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
