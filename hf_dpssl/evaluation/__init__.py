"""Evaluation protocols: arrays and callables in, dict[str, float] out; no model class is known here."""

from .cai_lim import cai_lim, gaussian_cai_lim
from .code_prior import code_prior
from .codebook import codebook_usage
from .feature_statistics import FeatureStatistics
from .frechet import frechet_distance, frechet_distance_of_features
from .frechet_uncertainty import frechet_extrapolation, frechet_interval
from .generation import class_consistency, copies, diversity
from .generator_complexity import generator_complexity
from .geometry import alignment, effective_rank, spectrum, uniformity
from .gromov import gromov_wasserstein
from .image_quality import image_quality, quality_fingerprint
from .inception_score import inception_score
from .kernel_distance import kernel_distance, polynomial_mmd
from .lipschitz import lipschitz, lipschitz_pair, lipschitz_pair_values, local_lipschitz_values
from .loading import MODULES, load, write_space
from .manifold import manifold_overlap
from .neighbours import knn, nearest_neighbours
from .operator_norms import operator_norm, operator_norms
from .preservation import continuity, trustworthiness
from .probes import few_shot, linear_probe
from .reconstruction import lpips, psnr, ssim

__all__ = [
    "FeatureStatistics",
    "MODULES",
    "alignment",
    "cai_lim",
    "class_consistency",
    "code_prior",
    "codebook_usage",
    "continuity",
    "copies",
    "diversity",
    "effective_rank",
    "few_shot",
    "frechet_distance",
    "frechet_distance_of_features",
    "frechet_extrapolation",
    "frechet_interval",
    "gaussian_cai_lim",
    "generator_complexity",
    "gromov_wasserstein",
    "image_quality",
    "inception_score",
    "kernel_distance",
    "knn",
    "linear_probe",
    "lipschitz",
    "lipschitz_pair",
    "lipschitz_pair_values",
    "load",
    "local_lipschitz_values",
    "lpips",
    "manifold_overlap",
    "nearest_neighbours",
    "operator_norm",
    "operator_norms",
    "polynomial_mmd",
    "psnr",
    "quality_fingerprint",
    "spectrum",
    "ssim",
    "trustworthiness",
    "uniformity",
    "write_space",
]
