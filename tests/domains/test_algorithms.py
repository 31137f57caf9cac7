"""Losses and updates of the algorithms: by hand, against transcriptions of DomainBed's steps, and against DomainBed.

DOMAINBED_PATH is the path of a checkout of facebookresearch/DomainBed at commit 7df6f06.
"""

import copy
import importlib
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from torch import nn

from hf_dpssl.domains.algorithms import ALGORITHMS, ARM, ERM, IRM, MMD, RSC, GroupDRO, Mixup, SagNet, VREx

METHODS = [name for name in ALGORITHMS if name != "swad"]  # whose steps are those of erm
SETTINGS = {"irm": {"anneal": 1}, "vrex": {"anneal": 1}, "group_dro": {"eta": 0.5}, "mixup": {"alpha": 0.7}}
LOG_2 = math.log(2)


def fixed(weight, bias=None) -> nn.Linear:
    """A linear layer of these weights."""
    weight = torch.tensor(weight, dtype=torch.float64)
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None).double()
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


def minibatch(images, labels):
    return torch.tensor(images, dtype=torch.float64), torch.tensor(labels)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# Features are the images; the logit of class 1 is the first of them, that of class 0 is 0.
READ = {"featurizer": fixed([[1, 0], [0, 1]]), "classifier": fixed([[0, 0], [1, 0]])}
ONE = minibatch([[2.0, 0.0], [1.0, 0.0]], [1, 0])
TWO = minibatch([[0.0, 0.0], [0.0, 5.0]], [1, 0])
ONE_LOSS = (softplus(-2) + softplus(1)) / 2  # of ONE; that of TWO is log 2


def by_hand():
    """(algorithm, loss) on ONE and TWO."""
    read = copy.deepcopy(READ)
    mean = (ONE_LOSS + LOG_2) / 2
    yield ERM(**read), mean
    # d/ds of softplus(-2 s) and softplus(s) at 1: the margins are 2 and -1. TWO has logits of 0, and no slope.
    slope = -2 * sigmoid(-2) * sigmoid(1)
    yield IRM(**read, penalty=7.0, anneal=0), mean + 7 * slope / 2
    yield IRM(**read, penalty=7.0, anneal=1), mean + slope / 2
    grown = [math.exp(0.3 * ONE_LOSS), math.exp(0.3 * LOG_2)]
    weighted = (grown[0] * ONE_LOSS + grown[1] * LOG_2) / sum(grown)
    yield GroupDRO(**read, eta=0.3), weighted / 2
    yield VREx(**read, penalty=7.0, anneal=0), mean + 7 * ((ONE_LOSS - LOG_2) / 2) ** 2
    # Squared distances: 1 in ONE, 25 in TWO, 4, 1 and 29, 26 between them; each mean has the two zeros of a diagonal.
    widths = [10.0**power for power in range(-3, 4)]

    def kernel(*squares):
        return sum(math.exp(-width * square) for width in widths for square in squares) / len(squares)

    distance = kernel(0, 0, 1, 1) + kernel(0, 0, 25, 25) - 2 * kernel(4, 1, 29, 26)
    yield MMD(**read, gamma=3.0), mean + 3 * distance


@for_each("algorithm, wanted", by_hand())
def test_losses_are_those_worked_by_hand(algorithm, wanted):
    assert algorithm.loss([ONE, TWO]).item() == pytest.approx(wanted, rel=1e-12)


def test_mixup_mixes_pictures_and_labels_of_two_domains(monkeypatch):
    """Share 1/4: logits 1/4 (2, 1) + 3/4 (0, 0), both ways round 3/4 (2, 1)."""
    algorithm = Mixup(**copy.deepcopy(READ))
    monkeypatch.setattr(algorithm, "_random", lambda: Drawn(order=[0, 1], shares=[0.25, 0.25]))
    first = (softplus(-0.5) + softplus(0.25)) / 2
    second = (softplus(-1.5) + softplus(0.75)) / 2
    assert algorithm.loss([ONE, TWO]).item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_sagnet_gives_a_picture_the_style_of_another(monkeypatch):
    """Content (1, -1) / sqrt(2) and its negative; styles of mean 1 and 3, variance 2 and 8; share 0, swapped."""
    algorithm = SagNet(**copy.deepcopy(READ))
    monkeypatch.setattr(algorithm, "_random", lambda: Drawn(order=[1, 0], shares=[[0.0], [0.0]]))
    domains = [minibatch([[2.0, 0.0]], [1]), minibatch([[1.0, 5.0]], [0])]
    wanted = (softplus(-(3 + 2)) + softplus(1 - 1)) / 2  # mean 3 + 2 (std sqrt 8 times 1 / sqrt 2); mean 1 - 1
    assert algorithm.loss(domains).item() == pytest.approx(wanted, rel=1e-4)


def test_arm_sees_the_mean_context_of_its_batch():
    """Image x, context of x alone 3 x: the logit is x - mean over the support of 3 x."""
    algorithm = ARM(fixed([[1, -1]]), fixed([[0], [1]]), fixed([[3]]), support=2)
    logits = algorithm.predict(torch.tensor([[1.0], [3.0], [10.0], [20.0]]).double())
    assert logits[:, 1].tolist() == [1 - 6, 3 - 6, 10 - 45, 20 - 45]
    three = algorithm.predict(torch.tensor([[1.0], [2.0], [6.0]]).double())  # no multiple of 2: one domain
    assert three[:, 1].tolist() == [1 - 9, 2 - 9, 6 - 9]


def test_rsc_mutes_what_decides_where_it_decides():
    """Gradients of class 1 are (1, 0): the first feature is muted where that changes most, in the first picture."""
    algorithm = RSC(**copy.deepcopy(READ), features=0.5, pictures=0.5)
    domains = [minibatch([[2.0, 0.0]], [1]), minibatch([[1.0, 0.0]], [1])]
    assert algorithm.loss(domains).item() == pytest.approx((LOG_2 + softplus(-1)) / 2, rel=1e-12)


class Drawn:
    """Stands for a generator: draws that are known."""

    def __init__(self, order, shares):
        self.order, self.shares = np.array(order), list(shares)

    def permutation(self, count):
        return self.order

    def beta(self, *_):
        return self.shares.pop(0)

    def random(self, _):
        return np.array(self.shares)


# Steps of 7df6f06 on a network of two layers, in float64, with Adam as its paper writes it.


def features_of(weights, images):
    return torch.relu(images.flatten(1) @ weights[0].T + weights[1])


def logits_of(weights, features):
    return features @ weights[2].T + weights[3]


def entropy(logits, labels):
    return (logits.logsumexp(1) - logits[range(len(labels)), labels]).mean()


class Adam:
    def __init__(self):
        self.count, self.first, self.second = 0, 0.0, 0.0

    def __call__(self, weight, gradient, rate=1e-3, decay=0.01):
        gradient = gradient + decay * weight.detach()
        self.count += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        mean, square = self.first / (1 - 0.9**self.count), self.second / (1 - 0.999**self.count)
        return (weight.detach() - rate * mean / (square.sqrt() + 1e-8)).requires_grad_()


class Transcribed:
    """One method's steps; `weights` are those of featurizer, classifier and, for sagnet, second classifier."""

    def __init__(self, method, weights, context, settings, seed):
        self.method, self.context, self.settings, self.seed = method, context, settings, seed
        self.weights = [weight.detach().clone().requires_grad_() for weight in weights]
        self.adams = [Adam() for _ in weights]
        self.step, self.domain_weights = 0, None

    def update(self, domains) -> float:
        random = np.random.default_rng([self.seed, self.step])
        value = getattr(self, self.method)(domains, random)
        if torch.is_tensor(value):
            self.descend(value, range(4))
        self.step += 1
        return value.item() if torch.is_tensor(value) else value

    def descend(self, loss, places):
        gradients = torch.autograd.grad(loss, [self.weights[i] for i in places])
        for i, gradient in zip(places, gradients, strict=True):
            self.weights[i] = self.adams[i](self.weights[i], gradient)

    def losses(self, domains):
        return [entropy(logits_of(self.weights, features_of(self.weights, x)), y) for x, y in domains]

    def erm(self, domains, _):
        x, y = (torch.cat(parts) for parts in zip(*domains, strict=True))
        return entropy(logits_of(self.weights, features_of(self.weights, x)), y)

    def annealed(self):
        if self.step == self.settings["anneal"]:
            self.adams = [Adam() for _ in self.weights]
        return self.settings["penalty"] if self.step >= self.settings["anneal"] else 1.0

    def irm(self, domains, _):
        total = sum(self.losses(domains)) / len(domains)
        slopes = []
        for x, y in domains:
            logits = logits_of(self.weights, features_of(self.weights, x))
            chances = logits.softmax(1)  # the derivative of the cross-entropy by a factor of the logits, at 1
            each = (chances * logits).sum(1) - logits[range(len(y)), y]
            slopes.append(each[0::2].mean() * each[1::2].mean())
        return total + self.annealed() * sum(slopes) / len(domains)

    def vrex(self, domains, _):
        losses = self.losses(domains)
        mean = sum(losses) / len(losses)
        return mean + self.annealed() * sum((loss - mean) ** 2 for loss in losses) / len(losses)

    def group_dro(self, domains, _):
        losses = self.losses(domains)
        grown = [
            (1.0 if self.domain_weights is None else self.domain_weights[i]) * math.exp(self.settings["eta"] * loss)
            for i, loss in enumerate(losses)
        ]
        self.domain_weights = [weight / sum(grown) for weight in grown]
        return sum(q * loss for q, loss in zip(self.domain_weights, losses, strict=True)) / len(losses)

    def mixup(self, domains, random):
        order, total = random.permutation(len(domains)), 0.0
        for place in range(len(order)):
            (x, y), (other_x, other_y) = domains[order[place]], domains[order[(place + 1) % len(order)]]
            n = min(len(y), len(other_y))
            share = random.beta(self.settings["alpha"], self.settings["alpha"])
            logits = logits_of(
                self.weights, features_of(self.weights, share * x[:n] + other_x[:n] - share * other_x[:n])
            )
            total = total + share * entropy(logits, y[:n]) + (1 - share) * entropy(logits, other_y[:n])
        return total / len(domains)

    def mmd(self, domains, _):
        features = [features_of(self.weights, x) for x, _ in domains]
        pairs = [(a, b) for i, a in enumerate(features) for b in features[i + 1 :]]

        def mean_kernel(a, b):
            squares = ((a[:, None] - b[None]) ** 2).sum(2)
            return sum(torch.exp(-(10.0**power) * squares) for power in range(-3, 4)).mean()

        distances = [mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b) for a, b in pairs]
        return sum(self.losses(domains)) / len(domains) + self.settings["gamma"] * sum(distances) / len(pairs)

    def sagnet(self, domains, random):
        x, y = (torch.cat(parts) for parts in zip(*domains, strict=True))
        n, values = len(y), []
        for stage in range(3):
            z = features_of(self.weights, x)
            share = torch.from_numpy(random.random((n, 1)))
            other = random.permutation(n)
            mean, variance = z.mean(1)[:, None], z.var(1)[:, None]
            content = (z - mean) / (variance + 1e-5) ** 0.5
            if stage == 0:
                mean, variance = (share * part + (1 - share) * part[other] for part in (mean, variance))
            else:
                content = content[other].detach()
            mixed = content * (variance + 1e-5) ** 0.5 + mean
            if stage == 0:
                values.append(entropy(logits_of(self.weights, mixed), y))
                self.descend(values[0], range(4))
            else:
                logits = logits_of([None, None, *self.weights[4:]], mixed)
                if stage == 1:
                    self.descend(entropy(logits, y), range(4, 6))
                else:
                    uniform = (logits.logsumexp(1, keepdim=True) - logits).mean()
                    self.descend(self.settings["adversary"] * uniform, range(2))
        return float(values[0])

    def arm(self, domains, _):
        seen = []
        for x, _ in domains:
            context = self.context(x).mean(0, keepdim=True)
            seen.append(torch.cat([x, context.expand(len(x), *context.shape[1:])], 1))
        y = torch.cat([y for _, y in domains])
        return entropy(logits_of(self.weights, features_of(self.weights, torch.cat(seen))), y)

    def rsc(self, domains, _):
        x, y = (torch.cat(parts) for parts in zip(*domains, strict=True))
        z = features_of(self.weights, x)
        gradients = self.weights[2][y].detach()  # of the logit of the class by the features
        limits = np.percentile(gradients.numpy(), 100 * (1 - self.settings["features"]), axis=1)
        kept = gradients < torch.from_numpy(limits)[:, None]
        chances = [logits_of(self.weights, part).softmax(1)[range(len(y)), y] for part in (z, z * kept)]
        changes = (chances[0] - chances[1]).detach()
        limit = np.percentile(changes.numpy(), 100 * (1 - self.settings["pictures"]))
        kept = kept | (changes < limit)[:, None]
        return entropy(logits_of(self.weights, torch.where(kept, z, torch.zeros_like(z))), y)


SHAPE, CLASSES, FEATURES = (2, 5, 5), 3, 11


def three_domains(sizes=(6, 6, 6), dtype=torch.float64, shape=SHAPE):
    return [
        (torch.randn(n, *shape, dtype=dtype) + place, torch.randint(0, CLASSES, (n,))) for place, n in enumerate(sizes)
    ]


def made(method, dtype=torch.float64, **settings):
    channels = SHAPE[0] + (method == "arm")
    featurizer = nn.Sequential(nn.Flatten(), nn.Linear(channels * 25, FEATURES), nn.ReLU()).to(dtype)
    classifier = nn.Linear(FEATURES, CLASSES).to(dtype)
    if method == "arm":
        settings |= {"context": nn.Conv2d(SHAPE[0], 1, 3, padding=1).to(dtype), "support": 6}
    return ALGORITHMS[method](featurizer, classifier, weight_decay=0.01, seed=5, **settings).to(dtype)


def steps_beside(method, domains):
    """Largest difference of losses, and of weights, in three steps from the same weights."""
    ours = made(method, **SETTINGS.get(method, {}))
    weights = [*ours.featurizer.parameters(), *ours.classifier.parameters()]
    weights += [*ours.style_classifier.parameters()] if method == "sagnet" else []
    defaults = {"penalty": {"irm": 100.0, "vrex": 10.0}.get(method), "gamma": 1.0, "adversary": 0.1}
    settings = defaults | {"features": 1 / 3, "pictures": 1 / 3} | SETTINGS.get(method, {})
    theirs = Transcribed(method, weights, getattr(ours, "context", None), settings, seed=5)
    loss_error = max(abs(float(ours.update(part)) - theirs.update(part)) for part in domains)
    pairs = zip(weights, theirs.weights, strict=True)
    return loss_error, max((own - other).abs().max().item() for own, other in pairs)


@for_each("method", METHODS)
def test_steps_are_those_of_a_transcription(method):
    sizes = (6, 4, 8) if method != "arm" else (6, 6, 6)
    errors = steps_beside(method, [three_domains(sizes) for _ in range(3)])
    assert max(errors) < 1e-11, errors


@pytest.fixture(scope="module")
def domain_bed():
    """DomainBed's modules algorithms and networks."""
    path = os.environ.get("DOMAINBED_PATH")
    if not path:
        pytest.skip("DOMAINBED_PATH is not set: give the path of a checkout at commit 7df6f06")
    if "losses, self.q) / len(minibatches)" not in Path(path, "domainbed/algorithms.py").read_text(encoding="utf-8"):
        raise FileNotFoundError(f"DOMAINBED_PATH={path} is no checkout of DomainBed at commit 7df6f06.")
    sys.path.insert(0, path)
    yield {name: importlib.import_module(f"domainbed.{name}") for name in ("algorithms", "networks")}
    sys.path.remove(path)


THEIRS = {
    "erm": ("ERM", {}),
    "irm": ("IRM", {"irm_lambda": 100.0, "irm_penalty_anneal_iters": 1}),
    "group_dro": ("GroupDRO", {"groupdro_eta": 0.5}),
    "mixup": ("Mixup", {"mixup_alpha": 0.7}),
    "mmd": ("MMD", {"mmd_gamma": 1.0}),
    "sagnet": ("SagNet", {"sag_w_adv": 0.1}),
    "arm": ("ARM", {"batch_size": 6}),
    "vrex": ("VREx", {"vrex_lambda": 10.0, "vrex_penalty_anneal_iters": 1}),
    "rsc": ("RSC", {"rsc_f_drop_factor": 1 / 3, "rsc_b_drop_factor": 1 / 3}),
}


@for_each("method", METHODS)
def test_steps_are_those_of_domain_bed_itself(method, domain_bed, monkeypatch):
    """Three steps of its network for 28 x 28 pictures, in float64, with our draws: same losses, same parameters."""
    name, hparams = THEIRS[method]
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    torch.set_default_dtype(torch.float64)
    try:
        hparams = {"lr": 1e-3, "weight_decay": 0.01} | hparams
        theirs = getattr(domain_bed["algorithms"], name)((2, 28, 28), CLASSES, 3, hparams)
        parts = (theirs.network_f, theirs.network_c) if method == "sagnet" else (theirs.featurizer, theirs.classifier)
        settings = dict(SETTINGS.get(method, {}))
        if method == "arm":
            settings |= {"context": copy.deepcopy(theirs.context_net), "support": 6}
        ours = ALGORITHMS[method](*copy.deepcopy(parts), weight_decay=0.01, seed=5, **settings)
        if method == "sagnet":
            ours.style_classifier.load_state_dict(theirs.network_s.state_dict())
        for step in range(3):
            domains = three_domains(shape=(2, 28, 28))
            random = np.random.default_rng([5, step])
            with monkeypatch.context() as patched:
                _draw_from(random, domain_bed, patched, method)
                found = theirs.update(domains)
            loss = float(ours.update(domains))
            wanted = found["loss_c"] if method == "sagnet" else found["loss"]
            wanted += found["penalty"] if method == "mmd" else 0.0
            assert loss == pytest.approx(wanted, rel=1e-10), step
        pairs = list(zip(ours.featurizer.parameters(), parts[0].parameters(), strict=True))
        pairs += zip(ours.classifier.parameters(), parts[1].parameters(), strict=True)
        if method == "sagnet":
            pairs += zip(ours.style_classifier.parameters(), theirs.network_s.parameters(), strict=True)
        error = max((own - other).abs().max().item() for own, other in pairs)
        images = three_domains(shape=(2, 28, 28))[0][0]
        assert error < 1e-9, error
        assert (ours.eval().predict(images) - theirs.eval().predict(images)).abs().max() < 1e-8
        print(f"{method}: parameters differ by {error:.1e} at most")
    finally:
        torch.set_default_dtype(torch.float32)


def _draw_from(random, domain_bed, patched, method):
    """DomainBed draws from this generator what ours draws, in the same order."""
    if method == "mixup":

        def pairs(minibatches):
            order = random.permutation(len(minibatches))
            return [(minibatches[i], minibatches[j]) for i, j in zip(order, np.roll(order, -1), strict=True)]

        patched.setattr(domain_bed["algorithms"], "random_pairs_of_minibatches", pairs)
        patched.setattr(np.random, "beta", random.beta)
    if method == "sagnet":
        patched.setattr(torch, "rand", lambda *size: torch.from_numpy(random.random(size)))
        patched.setattr(torch, "randperm", lambda count: torch.from_numpy(random.permutation(count)))


def test_an_update_refuses_what_is_no_minibatch_of_each_domain():
    algorithm = made("erm")
    images, labels = three_domains()[0]
    for wrong, message in [
        ([], "got none"),
        ([(images, labels), (images[:0], labels[:0])], "minibatch 1 needs two images"),
        ([(images[:1], labels[:1]), (images, labels)], "minibatch 0 needs two images"),
        ([(images, labels[1:]), (images, labels)], "a label of each"),
    ]:
        with pytest.raises(ValueError, match=message):
            algorithm.update(wrong)
    assert algorithm.steps == 0
    for method in METHODS:  # one domain is what is left of three when two are held out
        assert torch.isfinite(made(method).update(three_domains()[:1])), method


def test_cross_entropy_of_the_transcription_is_torchs():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert float(entropy(logits, labels)) == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_every_optimiser_updates_all_weights_at_once():
    for name, method in ALGORITHMS.items():
        context = {"context": torch.nn.Linear(4, 4), "support": 2} if name == "arm" else {}
        algorithm = method(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2), **context)
        found = [value for value in vars(algorithm).values() if isinstance(value, torch.optim.Optimizer)]
        assert found and all(group["fused"] for optimizer in found for group in optimizer.param_groups), name
