"""What others rank encoders by: LogME, H-score, NCE, TransRate, and accuracy where nothing or everything is new."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
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
    rows, one_hot = checked_samples(features, labels)
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
    rows, one_hot = checked_samples(features, labels)
    rows = rows - rows.mean(0)
    counts = one_hot.sum(0)
    means = (one_hot.T @ rows) / counts[:, None]
    between = (means * counts[:, None]).T @ means
    tolerance = max(rows.shape) * np.finfo(np.float64).eps
    return float((np.linalg.pinv(rows.T @ rows, rcond=tolerance, hermitian=True) * between).sum())


def trans_rate(features: Tensor, labels: Tensor, *, epsilon: float = 1e-4) -> float:
    """TransRate (Huang et al. 2022): coding rate of the features less its mean over the classes, in nats.

    The rate of n samples is log det(I + F'F / (n epsilon)) / 2, F centred by the mean of all samples. Features are
    taken as they are: their scale counts.

    Args:
        features, labels: as of `log_me`.
        epsilon: squared distortion, larger than 0.

    Raises:
        ValueError: other shapes or values.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be larger than 0, got {epsilon}.")
    rows, one_hot = checked_samples(features, labels)
    rows = rows - rows.mean(0)

    def rate(part: np.ndarray) -> float:
        small = part @ part.T if len(part) < part.shape[1] else part.T @ part  # the same but for zeros
        return 0.5 * float(np.linalg.slogdet(np.eye(len(small)) + small / (len(part) * epsilon))[1])

    return rate(rows) - float(np.mean([rate(rows[column > 0]) for column in one_hot.T]))


def nce(source_labels: Tensor, labels: Tensor) -> float:
    """Negative conditional entropy (Tran et al. 2019): minus the entropy of labels given source labels, in nats.

    Args:
        source_labels: (N,) ids that the encoder gives, of its own classes or of clusters. labels: (N,) class ids.

    Raises:
        ValueError: other shapes or values.
    """
    check_labels(labels, source_labels)
    if labels.ndim != 1 or labels.shape != source_labels.shape or not len(labels):
        raise ValueError(f"one source label per label is needed, got {source_labels.shape} and {labels.shape}.")
    _, rows = torch.unique(source_labels, return_inverse=True)
    _, columns = torch.unique(labels, return_inverse=True)
    joint = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.float64, device=rows.device)
    joint.index_put_((rows, columns), torch.tensor(1 / len(labels), dtype=torch.float64), accumulate=True)
    return float(torch.xlogy(joint, joint / joint.sum(1, keepdim=True)).sum())


def nce_of_clusters(features: Tensor, labels: Tensor, domains: Tensor, *, seed: int = 0) -> float:
    """`nce` of encoders without classes of their own: source labels are k-means clusters of the features.

    There are as many clusters as classes times domains, and no more than samples.

    Args:
        features, labels: as of `log_me`. domains: (N,) ids. seed: of the first centres.
    """
    rows, one_hot = checked_samples(features, labels)
    clusters = min(one_hot.shape[1] * len(domains.unique()), len(np.unique(rows, axis=0)))
    found = KMeans(clusters, n_init=1, random_state=seed).fit_predict(rows.astype(np.float32))
    return nce(torch.from_numpy(found.astype(np.int64)), labels.cpu())


def accuracy_in_domain(features: Tensor, labels: Tensor) -> float:
    """Percent of samples that a linear model of all OTHER samples, of all domains, classifies right.

    Each sample is left out once, in closed form. The model is ridge regression of 0/1 labels with a bias; the strength
    of each class is that of the largest evidence on all samples.

    Args and errors as of `log_me`.
    """
    rows, one_hot = checked_samples(features, labels)
    count = len(rows)
    rows = rows - rows.mean(0)
    targets = one_hot - one_hot.mean(0)
    if rows.shape[1] > count:
        rows = np.linalg.qr(rows.T, mode="r").T
    spectrum, vectors = spectrum_of(count, rows.T @ rows, rows.T @ targets, (targets**2).sum(0))
    alpha, beta = maximise_evidence(spectrum)
    turned = rows @ vectors
    shrunk = 1 / (spectrum.eigenvalues[:, None] + alpha / beta)  # (D, C)
    fitted = turned @ (shrunk * (turned.T @ targets))
    leverage = 1 / count + turned**2 @ shrunk  # (N, C) of each label on its own prediction
    left_out = one_hot - (targets - fitted) / (1 - leverage).clip(1e-12)
    return 100 * float((left_out.argmax(1) == one_hot.argmax(1)).mean())


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


def checked_samples(features: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and 0/1 labels (N, C), of the classes that have samples, in float64."""
    check_clouds(features)
    check_labels(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must be ({len(features)},), one per row of the features, got {tuple(labels.shape)}.")
    classes, ids = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("all samples are of one class: two or more are needed.")
    return features.double().cpu().numpy(), np.eye(len(classes))[ids.cpu().numpy()]
