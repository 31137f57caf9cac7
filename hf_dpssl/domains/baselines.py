"""What others rank encoders by: LogME, H-score, and nearest neighbours in the other domains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..evaluation.feature_checks import check_clouds, check_labels
from ..evaluation.neighbours import knn
from .evidence import log_evidence, maximise_evidence, spectrum_of


def log_me(features: Tensor, labels: Tensor) -> float:
    """LogME (You et al. 2021): largest log evidence of 0/1 labels given the features, mean over classes and samples.

    Neither is centred, as in their code; domains are not known.

    Args:
        features: (N, D), finite. labels: (N,) class ids; classes without samples are left out.

    Raises:
        ValueError: other shapes or values.
    """
    rows, one_hot = _checked(features, labels)
    squares = one_hot.sum(0)
    if rows.shape[1] > len(rows):  # the same points in fewer coordinates
        rows = np.linalg.qr(rows.T, mode="r").T
    spectrum, _ = spectrum_of(len(rows), rows.T @ rows, rows.T @ one_hot, squares)
    return float(log_evidence(spectrum, *maximise_evidence(spectrum)).mean() / len(rows))


def h_score(features: Tensor, labels: Tensor) -> float:
    """H-score (Bao et al. 2019): trace of cov(f)^-1 cov(E[f | y]), at most the number of classes less one.

    Directions without variance are left out of the inverse. Without shrinkage it is at its largest wherever the
    features have more dimensions than there are samples.

    Args and errors as of `log_me`.
    """
    rows, one_hot = _checked(features, labels)
    rows = rows - rows.mean(0)
    counts = one_hot.sum(0)
    means = (one_hot.T @ rows) / counts[:, None]
    between = (means * counts[:, None]).T @ means
    tolerance = max(rows.shape) * np.finfo(np.float64).eps
    return float((np.linalg.pinv(rows.T @ rows, rcond=tolerance, hermitian=True) * between).sum())


def knn_across_domains(features: Tensor, labels: Tensor, domains: Tensor, *, k: int = 20) -> list[float]:
    """Percent of each domain's samples that their k nearest neighbours (cosine) in the other domains classify right.

    Args:
        features: (N, D). labels, domains: (N,) ids from 0 on. k: at most so many neighbours as the other domains have.

    Raises:
        ValueError: other shapes or values.
    """
    found = []
    for left_out in domains.unique().tolist():
        new = domains == left_out
        size = min(k, int((~new).sum()))
        result = knn(features[~new], labels[~new], features[new], labels[new], k=size)
        found.append(result["knn_top1"])
    return found


def _checked(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and 0/1 labels (N, C), of the classes that have samples, in float64."""
    check_clouds(features)
    check_labels(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be ({len(features)},), one per row of the features, got {tuple(labels.shape)}.")
    classes, ids = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("all samples are of one class: two or more are needed.")
    return features.double().cpu().numpy(), np.eye(len(classes))[ids.cpu().numpy()]
