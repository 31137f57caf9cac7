"""What the tests of this room compare with: points, and similarities, losses and divergences by plain loops over
lists of Python floats, written from the formulas in the papers."""

from __future__ import annotations

import math

import torch


def points(rows: int, columns: int = 3, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """(rows, columns) normal numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def views(pairs: int, columns: int = 3, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (pairs, columns) that lie near each other, in float64."""
    first = points(pairs, columns, seed, scale)
    return first, first + 0.3 * points(pairs, columns, seed + 1000, scale)


def far_points(rows: int = 6) -> torch.Tensor:
    """(rows, 3) in float32: three points 1e4 away from the others, which coincide."""
    far = torch.zeros(rows, 3)
    far[0, 0] = 1e4
    far[1, 1] = -1e4
    far[-2, 2] = 1e4
    return far


def squared_distance(a: list[float], b: list[float]) -> float:
    return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))


def similarity(kernel: str, temperature: float, dof: float = math.inf):
    """The kernel itself, not its logarithm, as a function of two points."""

    def cosine(a, b):
        return math.exp(
            math.fsum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature
        )

    def gaussian(a, b):
        return math.exp(-squared_distance(a, b) / temperature)

    def student_t(a, b):
        return (1 + squared_distance(a, b) / (temperature * dof)) ** (-(dof + 1) / 2)

    return {"cosine": cosine, "gaussian": gaussian, "student_t": student_t}[kernel]


def matrix(x: torch.Tensor, y: torch.Tensor, function) -> torch.Tensor:
    """function(list, list) -> float of every pair of rows."""
    return torch.tensor([[function(a, b) for b in y.tolist()] for a in x.tolist()], dtype=torch.float64)


def info_nce_per_anchor(view_1, view_2, kernel, weights=None) -> float:
    n = len(view_1)
    z = view_1.tolist() + view_2.tolist()
    weights = [1.0] * n if weights is None else weights.tolist()
    total = 0.0
    for i in range(2 * n):
        denominator = sum(kernel(z[i], z[k]) for k in range(2 * n) if k != i)
        total -= weights[i % n] * math.log(kernel(z[i], z[(i + n) % (2 * n)]) / denominator)
    return total / 2 / sum(weights)


def info_nce_joint(view_1, view_2, kernel, weights=None) -> float:
    n = len(view_1)
    z = view_1.tolist() + view_2.tolist()
    weights = [1.0] * n if weights is None else weights.tolist()
    denominator = sum(kernel(z[j], z[k]) for j in range(2 * n) for k in range(2 * n) if j != k)
    return sum(-w * math.log(kernel(z[i], z[i + n]) / denominator) for i, w in enumerate(weights)) / sum(weights)


def moco(queries, keys, queue, kernel) -> float:
    total = 0.0
    for query, key in zip(queries.tolist(), keys.tolist(), strict=True):
        positive = kernel(query, key)
        total -= math.log(positive / (positive + sum(kernel(query, other) for other in queue.tolist())))
    return total / len(queries)


def clip(image, text, kernel) -> float:
    x = image.tolist()
    y = text.tolist()
    total = 0.0
    for i in range(len(x)):
        total -= math.log(kernel(x[i], y[i]) / sum(kernel(x[i], other) for other in y))
        total -= math.log(kernel(x[i], y[i]) / sum(kernel(other, y[i]) for other in x))
    return total / (2 * len(x))


def sup_con(embeddings, labels, kernel) -> float:
    rows = embeddings.tolist()
    terms = []
    for i in range(len(rows)):
        positives = [p for p in range(len(rows)) if p != i and labels[p] == labels[i]]
        if positives:
            denominator = sum(kernel(rows[i], rows[a]) for a in range(len(rows)) if a != i)
            terms.append(-sum(math.log(kernel(rows[i], rows[p]) / denominator) for p in positives) / len(positives))
    return sum(terms) / len(terms)


def divergence(p: list[float], q: list[float], name: str, alpha: float) -> float:
    """Straight from the definitions, over the pairs where both are defined (q > 0)."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if b == 0:
            continue
        m = (a + b) / 2
        if name == "kl":
            total += a * math.log(a / b) if a else 0
        elif name == "reverse_kl":
            total += b * math.log(b / a)
        elif name == "jensen_shannon":
            total += ((a * math.log(a / m) if a else 0) + b * math.log(b / m)) / 2
        elif name == "chi_square":
            total += (a - b) ** 2 / b
        else:
            total += (a**alpha * b ** (1 - alpha) if a else 0) / (alpha * (alpha - 1))
    return total - 1 / (alpha * (alpha - 1)) if name == "alpha" else total


def close(value, expected: float, tolerance: float = 1e-10) -> bool:
    return math.isclose(float(value), expected, rel_tol=tolerance, abs_tol=tolerance)


def field_by_loops(generated, real, negatives, weights, *, kernel, scales, dof, symmetric) -> list[list[float]]:
    """The formula of drifting.py, for one set, in lists of floats."""
    targets = [*real, *negatives, *generated]
    weights = [*weights, *[1.0] * len(generated)]
    own = len(real) + len(negatives)
    pairs = [(i, j) for i in range(len(generated)) for j in range(len(targets)) if j != own + i]
    distance = {(i, j): math.sqrt(squared_distance(generated[i], targets[j])) for i, j in pairs}
    mean = math.fsum(weights[j] * d for (_, j), d in distance.items()) / math.fsum(weights[j] for _, j in pairs)
    unit = mean / math.sqrt(len(real[0]))
    total = [[0.0] * len(real[0]) for _ in generated]
    for scale in scales:
        k_of = {"exponential": lambda a, b, s=scale: math.exp(-abs(b[0] - a[0]) / s)}
        k_of = k_of.get(kernel) or similarity(kernel, scale, dof)
        k = {pair: k_of([0.0], [d / mean]) for pair, d in distance.items()}
        rows = [math.fsum(weights[j] * k[i, j] for a, j in pairs if a == i) for i in range(len(generated))]
        columns = [math.fsum(k[i, j] for i, b in pairs if b == j) for j in range(len(targets))]
        affinity = {
            (i, j): weights[j]
            * (math.sqrt(k[i, j] / rows[i] * k[i, j] / columns[j]) if symmetric else k[i, j] / rows[i])
            for i, j in pairs
        }
        raw = []
        for i in range(len(generated)):
            attracting = math.fsum(affinity[i, j] for a, j in pairs if a == i and j < len(real))
            repelling = math.fsum(affinity[i, j] for a, j in pairs if a == i and j >= len(real))
            of_target = {
                j: a * repelling if j < len(real) else -a * attracting for (b, j), a in affinity.items() if b == i
            }
            assert abs(math.fsum(of_target.values())) < 1e-14
            raw.append([math.fsum(w * targets[j][d] for j, w in of_target.items()) / unit for d in range(len(real[0]))])
        size = math.sqrt(math.fsum(v * v for row in raw for v in row) / (len(raw) * len(raw[0])))
        total = [[t + v / size for t, v in zip(*both, strict=True)] for both in zip(total, raw, strict=True)]
    return total
