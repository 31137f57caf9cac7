"""How much a simple classifier gets out of frozen features: linear probe, and few labelled examples per class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from tqdm.auto import tqdm

from ..models.codebook_search import nearest_codes
from .choices import CLASSIFIERS, SOLVERS
from .feature_checks import check_labels, finite_norms
from .student_interval import student_interval

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C of scikit-learn: larger is less regularised
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_ITERATIONS = 1000  # at most, of the logistic solver


def linear_probe(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    solver: str = "logistic",
    grid: Sequence[float] | None = None,
    validation: float = 0.1,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of a linear classifier trained on `bank`, on standardised features.

    One strength of regularisation (or learning rate) is chosen on a validation part of the bank; the classifier is
    then trained on all of it. `features` are read once, at the end.

    Args:
        bank: (M, D) features of training images; their mean and deviation standardise both sets.
        bank_labels: (M,) integer classes, at least 0; two classes at least.
        features: (N, D) features to classify.
        labels: (N,) integer classes, at least 0.
        solver: "logistic": multinomial logistic regression by L-BFGS (scikit-learn), `grid` holds C, inverse
            strengths of the L2 penalty. "sgd": cross-entropy by SGD with momentum 0.9 and a cosine schedule on the
            bank's device, `grid` holds learning rates; the last epoch counts, not the best.
        grid: values tried; default STRENGTHS or LEARNING_RATES. A single one is used without validation.
        validation: share of the bank, in (0, 1), held out to choose, at least one row of each class of two rows.
        epochs, batch_size: of "sgd" (100 and 256 in the protocol of He et al. 2020).
        seed: of the split, and of the order of "sgd".

    Returns:
        {"linear_top1": percent correct, "linear_c" or "linear_learning_rate": the chosen value}.

    Raises:
        ValueError: shapes that do not fit, unknown options, one class only, negative labels, or features that
            are not finite.
    """
    grid = list(grid) if grid is not None else list(STRENGTHS if solver == "logistic" else LEARNING_RATES)
    _check_probe(solver, grid, validation, epochs, batch_size)
    bank, features, classes, targets = _prepare(bank, bank_labels, features, labels)

    def fit(values: list[float], x: Tensor, y: Tensor) -> list[Callable[[Tensor], Tensor]]:
        if solver == "logistic":
            return [_fit_logistic(value, x, y) for value in values]
        return _fit_sgd(values, x, y, len(classes), epochs, batch_size, seed)

    best = grid[0]
    if len(grid) > 1:
        held_out = _validation_rows(targets, validation, seed)
        candidates = fit(grid, bank[~held_out], targets[~held_out])
        hits = [int((predict(bank[held_out]) == targets[held_out]).sum()) for predict in candidates]
        best = grid[hits.index(max(hits))]  # the first: the most regularised, or the smallest step
    (predict,) = fit([best], bank, targets)
    accuracy = 100 * float((classes[predict(features)] == labels).double().mean())
    return {"linear_top1": accuracy, "linear_c" if solver == "logistic" else "linear_learning_rate": best}


def few_shot(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    shots: Sequence[int] = (1, 5, 10),
    trials: int = 20,
    classifier: str = "centroid",
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy with n labelled examples per class, over random draws of the examples.

    Args:
        bank, bank_labels: (M, D) features and (M,) classes that examples are drawn from.
        features, labels: (N, D) and (N,), all classified in each trial.
        shots: examples per class.
        trials: draws, at least 2; trial i draws the same rows for every encoder.
        classifier: on L2-normalised features. "centroid": the class whose mean is nearest (prototypes, Snell et
            al. 2017, section 2): nothing to tune, and with one example the nearest neighbour. "logistic": logistic
            regression with C = 1 (Tian et al. 2020, section 3): stronger from about 5 examples on, slower.
        seed: of the draws.

    Returns:
        {"few_shot_top1_<n>": mean percent correct over trials, "few_shot_top1_<n>_ci95": half the width of its 95 %
        interval (Student-t over trials: the spread of the draws, not that of the images)} for each n.

    Raises:
        ValueError: as `linear_probe`, and a class with fewer than n examples.
    """
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier is one of {CLASSIFIERS}, got {classifier!r}.")
    if trials < 2 or not shots or min(shots) < 1:
        raise ValueError(f"at least 2 trials and shots of at least 1 are needed, got {trials} and {tuple(shots)}.")
    _check_features(bank, bank_labels, features, labels)
    bank, features = F.normalize(bank.float(), dim=1), F.normalize(features.float(), dim=1)
    classes, targets = torch.unique(bank_labels, return_inverse=True)
    counts = torch.bincount(targets)
    if int(counts.min()) < max(shots):
        raise ValueError(
            f"class {int(classes[counts.argmin()])} has {int(counts.min())} examples in the bank, fewer than the "
            f"{max(shots)} asked for."
        )
    scores: dict[int, list[float]] = {shot: [] for shot in shots}
    for trial in tqdm(range(trials), "few-shot trials", leave=False, delay=5):
        order = _shuffled_by_class(targets, len(classes), [seed, trial])  # (classes) lists of rows
        for shot in shots:
            rows = torch.cat([row[:shot] for row in order])
            x, y = bank[rows], targets[rows]
            if classifier == "centroid":
                means = torch.stack([x[y == c].mean(0) for c in range(len(classes))])
                predicted = nearest_codes(features, means)
            else:
                predicted = _fit_logistic(1.0, x, y)(features)
            scores[shot].append(100 * float((classes[predicted] == labels).double().mean()))
    report = {}
    for shot, values in scores.items():
        interval = student_interval(values)
        report[f"few_shot_top1_{shot}"] = interval["mean"]
        report[f"few_shot_top1_{shot}_ci95"] = interval["high"] - interval["mean"]
    return report


def _fit_logistic(strength: float, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    model = LogisticRegression(C=strength, max_iter=_ITERATIONS)
    with warnings.catch_warnings():  # weakly regularised ones need not converge, and lose on the validation part
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x.cpu().numpy(), y.cpu().numpy())
    return lambda z: torch.from_numpy(model.predict(z.cpu().numpy())).to(z.device)


def _fit_sgd(rates, x: Tensor, y: Tensor, num_classes: int, epochs: int, batch_size: int, seed: int) -> list[Callable]:
    """One linear classifier per learning rate, all on the same batches; starting from zero, so only order is random."""
    weights = [torch.zeros(x.shape[1] + 1, num_classes, device=x.device, requires_grad=True) for _ in rates]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)], momentum=0.9)
    x = F.pad(x, (0, 1), value=1.0)  # (M, D + 1) the last column carries the bias
    batches = -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(epochs), "linear probe", unit="epoch", leave=False, delay=5):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
            logits = x[rows] @ torch.cat(weights, 1)  # (B, rates * classes)
            parts = logits.split(num_classes, dim=1)
            loss = sum(F.cross_entropy(part, y[rows]) for part in parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return [partial(_linear_classes, weight.detach()) for weight in weights]


def _linear_classes(weight: Tensor, z: Tensor) -> Tensor:
    return (F.pad(z, (0, 1), value=1.0) @ weight).argmax(1)


def _prepare(bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Standardised bank and features, the classes of the bank, and its labels as positions among them."""
    _check_features(bank, bank_labels, features, labels)
    classes, targets = torch.unique(bank_labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"a classifier needs two classes, the bank holds only class {int(classes[0])}.")
    bank, features = bank.double(), features.double()
    deviation, mean = torch.std_mean(bank, dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return ((bank - mean) / deviation).float(), ((features - mean) / deviation).float(), classes, targets


def _validation_rows(targets: Tensor, share: float, seed: int) -> Tensor:
    """(M,) bool: a share of each class, at least one row where it has two, never all of them."""
    held_out = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    for rows in _shuffled_by_class(targets, int(targets.max()) + 1, [seed]):
        if len(rows) > 1:
            held_out[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    if not held_out.any():
        raise ValueError("no class has two rows, one of them for validation: pass a grid of one value.")
    return held_out


def _shuffled_by_class(targets: Tensor, num_classes: int, seed: list[int]) -> list[Tensor]:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(targets))).to(targets.device)
    return [order[targets[order] == c] for c in range(num_classes)]


def _check_features(bank: Tensor, bank_labels: Tensor, features: Tensor, labels: Tensor) -> None:
    if bank.ndim != 2 or features.ndim != 2 or bank.shape[1] != features.shape[1]:
        raise ValueError(f"bank and features must be (M, D) and (N, D), got {bank.shape} and {features.shape}.")
    if bank_labels.shape != bank.shape[:1] or labels.shape != features.shape[:1]:
        raise ValueError(f"one label per row is needed, got {bank_labels.shape} and {labels.shape}.")
    if len(bank) == 0 or len(features) == 0:
        raise ValueError("there are no features: bank and features need a row each.")
    check_labels(bank_labels, labels)
    finite_norms(bank.float(), "bank")
    finite_norms(features.float(), "features")


def _check_probe(solver: str, grid: list[float], validation: float, epochs: int, batch_size: int) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver is one of {SOLVERS}, got {solver!r}.")
    if not grid or min(grid) <= 0 or not math.isfinite(max(grid)):
        raise ValueError(f"grid must hold positive numbers, got {grid}.")
    if not 0 < validation < 1:
        raise ValueError(f"validation is a share of the bank in (0, 1), got {validation}.")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
