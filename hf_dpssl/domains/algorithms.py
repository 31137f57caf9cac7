"""Learning from several domains for another: what each algorithm descends, side by side.

    l_d: mean cross-entropy of domain d's minibatch, of M domains; z = featurizer(x); logits = classifier(z)

| algorithm | one step descends | source |
|---|---|---|
| ERM | cross-entropy of all minibatches as one | Vapnik 1998 |
| IRM | mean l_d + weight x mean (dl_d/ds, even rows)(dl_d/ds, odd rows), s = 1 a factor of the logits | 1907.02893 |
| GroupDRO | sum q_d l_d / M, where q_d grows by the factor exp(eta l_d) and sums to 1 | 1911.08731 |
| Mixup | cross-entropy of u x_i + (1 - u) x_j of two domains, for both labels; u ~ Beta(alpha, alpha) | 2001.00677 |
| MMD | mean l_d + gamma x mean squared distance of two domains' z under Gaussian kernels | Li et al. 2018 |
| SagNet | cross-entropy of z in another's style; then z is made to hold no class in its style | 1910.11645 |
| ARM | as ERM, on pictures beside the mean context of their batch | 2007.02931 |
| VREx | mean l_d + weight x variance of l_d over domains | 2003.00688 |
| RSC | cross-entropy of z whose largest gradients, in the pictures that change most, are muted | 2007.02454 |

The details are those of DomainBed at its commit 7df6f06, which made its published tables; the tests compare loss and
parameters step by step. What a step draws depends on the seed and the number of the step alone. SWAD is ERM whose
weights are averaged (swad.py); other averages are in soups.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.matrix_products import differentiable_product

Minibatches = Sequence[tuple[Tensor, Tensor]]


class ERM(nn.Module):
    """Featurizer, classifier and Adam; `update` is a step on a minibatch of each domain.

    Args:
        featurizer: images (n, C, H, W), or whatever the minibatches hold, to z (n, F).
        classifier: z (n, F) to logits (n, classes).
        learning_rate, weight_decay: of Adam.
        seed: of what the steps draw.

    Attributes:
        adapts: whether `predict` learns from the batch it is given; tables say so.
        steps: updates so far.
    """

    adapts = False

    def __init__(
        self,
        featurizer: nn.Module,
        classifier: nn.Module,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.featurizer = featurizer
        self.classifier = classifier
        self.adam = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
        self.seed = seed
        self.steps = 0
        self.forget_moments()

    def forget_moments(self) -> None:
        """Begin Adam anew, from the weights as they are."""
        learning = [*self.featurizer.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.Adam(learning, **self.adam)

    def predict(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, C, H, W)."""
        return self.classifier(self.featurizer(images))

    def loss(self, minibatches: Minibatches) -> Tensor:
        """What a step descends, a scalar."""
        images, labels = _as_one(minibatches)
        return F.cross_entropy(self.predict(images), labels)

    def update(self, minibatches: Minibatches) -> Tensor:
        """One step; returns the loss before it, without gradient.

        Args:
            minibatches: of each domain images (n, C, H, W) and labels (n,), n of at least 2. Of one domain alone there
                is nothing to compare: IRM is then within the domain, and MMD and VREx are ERM.

        Raises:
            ValueError: no minibatch, or one without two labelled images.
        """
        if not len(minibatches):
            raise ValueError("an update needs a minibatch of each domain, got none.")
        for number, (images, labels) in enumerate(minibatches):
            if len(images) < 2 or labels.shape != images.shape[:1]:
                shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
                raise ValueError(f"minibatch {number} needs two images or more and a label of each, got {shapes}.")
        loss = self._step(minibatches)
        self.steps += 1
        return loss

    def _step(self, minibatches: Minibatches) -> Tensor:
        loss = self.loss(minibatches)
        _descend(loss, self.optimizer)
        return loss.detach()

    def _random(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.steps])

    def _losses(self, minibatches: Minibatches) -> tuple[Tensor, list[Tensor]]:
        """l_d (M,), and the logits of each domain, from one pass over all of them."""
        images, _ = _as_one(minibatches)
        logits = self.predict(images).split([len(labels) for _, labels in minibatches])
        losses = [F.cross_entropy(part, labels) for part, (_, labels) in zip(logits, minibatches, strict=True)]
        return torch.stack(losses), list(logits)


class IRM(ERM):
    """Invariant risk minimisation: one classifier is to be optimal in every domain.

    Args:
        penalty, anneal: weight of the second term after so many steps, 1 before; Adam begins anew at the switch.
    """

    def __init__(self, *args, penalty: float = 100.0, anneal: int = 500, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty, self.anneal = penalty, anneal

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Mean loss, and how far one factor of the logits is from the best of each domain."""
        losses, logits = self._losses(minibatches)
        slopes = [_slope(part, labels) for part, (_, labels) in zip(logits, minibatches, strict=True)]
        return losses.mean() + _annealed(self) * torch.stack(slopes).mean()


class GroupDRO(ERM):
    """Group distributionally robust optimisation: the domains that do worst weigh most.

    Args:
        eta: how fast the weights follow the losses.
    """

    def __init__(self, *args, eta: float = 0.01, **kwargs):
        super().__init__(*args, **kwargs)
        self.eta = eta
        self.register_buffer("weights", torch.empty(0))

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Losses by the weights of their domains, which this call changes."""
        losses = torch.stack([F.cross_entropy(self.predict(images), labels) for images, labels in minibatches])
        if not len(self.weights):
            self.weights = torch.ones_like(losses.detach())
        grown = self.weights * (self.eta * losses.detach()).exp()
        self.weights = grown / grown.sum()
        return self.weights @ losses / len(minibatches)


class Mixup(ERM):
    """Inter-domain Mixup: pictures between those of two domains.

    Args:
        alpha: of the Beta distribution; small values mix little.
    """

    def __init__(self, *args, alpha: float = 0.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha = alpha

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Mean over the pairs of neighbours in a random circle of the domains."""
        random = self._random()
        order = random.permutation(len(minibatches))
        total = 0.0
        for first, second in zip(order, np.roll(order, -1), strict=True):
            size = min(len(minibatches[first][0]), len(minibatches[second][0]))
            images, labels = (part[:size] for part in minibatches[first])
            others, other_labels = (part[:size] for part in minibatches[second])
            share = float(random.beta(self.alpha, self.alpha))
            logits = self.predict(share * images + (1 - share) * others)
            total = total + share * F.cross_entropy(logits, labels)
            total = total + (1 - share) * F.cross_entropy(logits, other_labels)
        return total / len(minibatches)


class MMD(ERM):
    """Features of all domains are to have one distribution, by the maximum mean discrepancy.

    Args:
        gamma: weight of the discrepancy.
    """

    def __init__(self, *args, gamma: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Mean loss, and mean discrepancy of all pairs of domains."""
        features = [self.featurizer(images) for images, _ in minibatches]
        logits = [self.classifier(part) for part in features]
        losses = [F.cross_entropy(part, labels) for part, (_, labels) in zip(logits, minibatches, strict=True)]
        pairs = [_discrepancy(first, second) for i, first in enumerate(features) for second in features[i + 1 :]]
        return torch.stack(losses).mean() + self.gamma * sum(pairs) / max(len(pairs), 1)


class SagNet(ERM):
    """Style-agnostic network: style is mean and variance of z, content is the rest.

    Content is classified under styles of other pictures; a second classifier learns to tell classes from style alone,
    and the featurizer learns to leave it at chance.

    Args:
        classifier: a linear layer; the second one is another of its kind.
        adversary: weight of that last term.
    """

    def __init__(self, featurizer: nn.Module, classifier: nn.Linear, *, adversary: float = 0.1, **kwargs):
        super().__init__(featurizer, classifier, **kwargs)
        self.adversary = adversary
        self.style_classifier = copy.deepcopy(classifier)
        self.style_classifier.reset_parameters()
        self.style_optimizer = torch.optim.Adam(self.style_classifier.parameters(), **self.adam)
        # The featurizer's Adam takes two steps an update, the classifier's one.
        self.feature_optimizer = torch.optim.Adam(self.featurizer.parameters(), **self.adam)
        self.optimizer = torch.optim.Adam(self.classifier.parameters(), **self.adam)

    def loss(self, minibatches: Minibatches) -> Tensor:
        """The first of its three: cross-entropy of content under other styles."""
        return self._losses_of_styles(minibatches, self._random(), "content")

    def _step(self, minibatches: Minibatches) -> Tensor:
        random = self._random()
        content = self._losses_of_styles(minibatches, random, "content")
        _descend(content, self.feature_optimizer, self.optimizer)
        style = self._losses_of_styles(minibatches, random, "style")
        _descend(style, self.style_optimizer)
        at_chance = self._losses_of_styles(minibatches, random, "adversary")
        _descend(self.adversary * at_chance, self.feature_optimizer)
        return content.detach()

    def _losses_of_styles(self, minibatches: Minibatches, random: np.random.Generator, what: str) -> Tensor:
        images, labels = _as_one(minibatches)
        features = self.featurizer(images)  # (n, F)
        share = torch.from_numpy(random.random((len(features), 1))).to(features, non_blocking=True)
        other = torch.from_numpy(random.permutation(len(features))).to(features.device, non_blocking=True)
        if what == "content":
            return F.cross_entropy(self.classifier(_other_style(features, share, other)), labels)
        logits = self.style_classifier(_other_content(features, other))
        return F.cross_entropy(logits, labels) if what == "style" else -F.log_softmax(logits, 1).mean()


class ARM(ERM):
    """Adaptive risk minimisation: what a batch has in common, its domain, is seen beside each of its pictures.

    It adapts to batches of the target at test time, so that its predictions depend on what they are made with.

    Args:
        featurizer: takes images (n, C + K, H, W).
        context: images (n, C, H, W) to (n, K, H, W). As at 7df6f06, where Adam is not given it, it does not learn.
        support: pictures of one domain that stand one after the other; a batch of another number counts as one domain.
    """

    adapts = True

    def __init__(self, featurizer: nn.Module, classifier: nn.Module, context: nn.Module, *, support: int, **kwargs):
        super().__init__(featurizer, classifier, **kwargs)
        self.context = context
        self.support = support

    def predict(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, C, H, W), which are of one domain or stand by `support` together."""
        size = self.support if len(images) % self.support == 0 else len(images)
        context = self.context(images).unflatten(0, (-1, size)).mean(1)  # (domains, K, ...)
        return super().predict(torch.cat([images, context.repeat_interleave(size, 0)], 1))


class VREx(ERM):
    """Risk extrapolation: the loss is to be the same in all domains.

    Args:
        penalty, anneal: weight of the variance after so many steps, 1 before; Adam begins anew at the switch.
    """

    def __init__(self, *args, penalty: float = 10.0, anneal: int = 500, **kwargs):
        super().__init__(*args, **kwargs)
        self.penalty, self.anneal = penalty, anneal

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Mean loss, and the variance of the losses."""
        losses, _ = self._losses(minibatches)
        return losses.mean() + _annealed(self) * losses.var(correction=0)


class RSC(ERM):
    """Representation self-challenging: the features that decide are taken away, so that others learn.

    Args:
        features, pictures: shares that are muted: of a picture's features those with the largest gradients of its
            class, in those pictures whose probability of their class falls most without them.
    """

    def __init__(self, *args, features: float = 1 / 3, pictures: float = 1 / 3, **kwargs):
        super().__init__(*args, **kwargs)
        self.muted = {"features": features, "pictures": pictures}

    def loss(self, minibatches: Minibatches) -> Tensor:
        """Cross-entropy of what is left of the features."""
        images, labels = _as_one(minibatches)
        features = self.featurizer(images)  # (n, F)
        logits = self.classifier(features)
        of_class = logits.gather(1, labels[:, None]).sum()
        gradients = torch.autograd.grad(of_class, features)[0]
        with torch.no_grad():
            limit = gradients.quantile(1 - self.muted["features"], dim=1, keepdim=True)
            kept = gradients < limit  # (n, F)
            before = logits.softmax(1).gather(1, labels[:, None])
            after = self.classifier(features * kept).softmax(1).gather(1, labels[:, None])
            changes = before - after  # (n, 1)
            unchanged = changes < changes.quantile(1 - self.muted["pictures"])
        return F.cross_entropy(self.classifier(features * (kept | unchanged)), labels)


ALGORITHMS = {
    "erm": ERM,
    "irm": IRM,
    "group_dro": GroupDRO,
    "mixup": Mixup,
    "mmd": MMD,
    "sagnet": SagNet,
    "arm": ARM,
    "vrex": VREx,
    "rsc": RSC,
    "swad": ERM,
}


def _as_one(minibatches: Minibatches) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in minibatches]), torch.cat([labels for _, labels in minibatches])


def _descend(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _annealed(algorithm: IRM | VREx) -> float:
    """Weight of the penalty at this step."""
    if algorithm.steps == algorithm.anneal:
        algorithm.forget_moments()  # gradients jump here, and Adam divides by their old size
    return algorithm.penalty if algorithm.steps >= algorithm.anneal else 1.0


def _slope(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared derivative of the loss by a factor of the logits, without bias: each factor from its half of the rows."""
    factor = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    halves = [F.cross_entropy(factor * logits[half::2], labels[half::2]) for half in (0, 1)]
    even, odd = (torch.autograd.grad(half, factor, create_graph=True)[0] for half in halves)
    return even * odd


_WIDTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def _discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of (n, F) and (m, F), for the sum of exp(-g |a - b|^2) over widths g."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * differentiable_product(a, b)
        squares = squares.clamp_min(1e-30)  # below it there is no gradient, as of a point from itself
        return torch.stack([torch.exp(-width * squares) for width in _WIDTHS]).sum(0).mean()

    return kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(1, keepdim=True), features.var(1, keepdim=True)


def _other_style(features: Tensor, share: Tensor, other: Tensor) -> Tensor:
    """z (n, F), normalised, with mean and variance between its own and those of picture `other` (n,)."""
    mean, variance = _moments(features)
    normal = (features - mean) / (variance + 1e-5).sqrt()
    mean = share * mean + (1 - share) * mean[other]
    variance = share * variance + (1 - share) * variance[other]
    return normal * (variance + 1e-5).sqrt() + mean


def _other_content(features: Tensor, other: Tensor) -> Tensor:
    """z (n, F) of picture `other` (n,), normalised, without gradient, with each picture's own mean and variance."""
    mean, variance = _moments(features)
    normal = (features - mean) / (variance + 1e-5).sqrt()
    return normal[other].detach() * (variance + 1e-5).sqrt() + mean
