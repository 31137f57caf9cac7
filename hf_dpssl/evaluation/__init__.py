"""Evaluation protocols: arrays and callables in, dict[str, float] out; no model class is known here."""

from .codebook import codebook_usage
from .generation import class_consistency, copies, diversity
from .neighbours import knn, nearest_neighbours
from .reconstruction import psnr

__all__ = ["class_consistency", "codebook_usage", "copies", "diversity", "knn", "nearest_neighbours", "psnr"]
