"""Evaluation protocols: arrays and callables in, dict[str, float] out; no model class is known here."""

from .codebook import codebook_usage
from .generation import class_consistency, copies, diversity
from .geometry import alignment, effective_rank, uniformity
from .loading import MODULES, load
from .neighbours import knn, nearest_neighbours
from .probes import few_shot, linear_probe
from .reconstruction import psnr

__all__ = [
    "MODULES",
    "alignment",
    "class_consistency",
    "codebook_usage",
    "copies",
    "diversity",
    "effective_rank",
    "few_shot",
    "knn",
    "linear_probe",
    "load",
    "nearest_neighbours",
    "psnr",
    "uniformity",
]
