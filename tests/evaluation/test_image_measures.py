"""Kernel distance, inception score, overlaps and their collection: peers, loops and closed forms."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_dpssl.evaluation import (
    frechet_distance_of_features,
    image_quality,
    inception_score,
    kernel_distance,
    manifold,
    manifold_overlap,
    polynomial_mmd,
    quality_fingerprint,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 2, 3), (1100, 1030, 6)])
def test_polynomial_mmd_equals_the_sum_over_pairs(shape):
    first = random(shape[0], shape[2]).double().numpy()
    second = random(shape[1], shape[2], seed=1).double().numpy() + 0.5

    def kernel(x, y):
        return (np.einsum("id,jd->ij", x, y) / shape[2] + 1) ** 3

    def without_own(x):
        return (kernel(x, x).sum() - sum(kernel(r[None], r[None])[0, 0] for r in x)) / (len(x) * (len(x) - 1))

    expected = without_own(first) + without_own(second) - 2 * kernel(first, second).mean()
    assert polynomial_mmd(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected, rel=1e-9)


def test_one_subset_of_everything_equals_torch_fidelity_and_torchmetrics():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    first, second = random(300, 10).double(), 0.3 + random(300, 10, seed=1).double()
    found = kernel_distance(first, second)
    options = {"kid_subsets": 3, "kid_subset_size": 300, "kid_kernel": "poly", "verbose": False, "rng_seed": 0}
    theirs = metric_kid.kid_features_to_metric(first, second, **options)
    assert found["kid"] == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found["kid"] == pytest.approx(float(kid.poly_mmd(first, second)), rel=1e-9)
    assert found["kid_std"] == 0


def test_kernel_distance_over_subsets_is_unbiased_with_the_spread_of_torch_fidelity():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    first, second = random(600, 8).double(), 0.2 + random(700, 8, seed=1).double()
    found = kernel_distance(first, second, subsets=300, subset_size=60)
    options = {"kid_subsets": 300, "kid_subset_size": 60, "kid_kernel": "poly", "verbose": False, "rng_seed": 0}
    theirs = metric_kid.kid_features_to_metric(first, second, **options)
    assert found["kid_std"] == pytest.approx(theirs[metric_kid.KEY_METRIC_KID_STD], rel=0.15)
    assert abs(found["kid"] - polynomial_mmd(first, second)) < 4 * found["kid_std"] / math.sqrt(300)
    assert found == kernel_distance(first, second, subsets=300, subset_size=60)
    other = kernel_distance(first, second, subsets=300, subset_size=60, generator=torch.Generator().manual_seed(1))
    assert other["kid"] != found["kid"]


def test_inception_score_equals_torch_fidelity():
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * random(103, 7)
    order = torch.randperm(103, generator=torch.Generator().manual_seed(0))
    for splits in (1, 10):
        theirs = metric_isc.isc_features_to_metric(logits[order], splits, shuffle=False)
        found = inception_score(logits, splits=splits)
        assert found["inception_score"] == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-9)
        assert found["inception_score_std"] == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-12)


def test_inception_score_lies_between_1_and_the_number_of_classes():
    sure = 1e4 * torch.eye(5).repeat(20, 1)  # probabilities of 0 underflow
    assert inception_score(sure, splits=1)["inception_score"] == pytest.approx(5)
    assert inception_score(torch.zeros(30, 5))["inception_score"] == pytest.approx(1)


def test_precision_and_recall_equal_torch_fidelity():
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = random(1100, 5).double(), 0.5 + 0.8 * random(900, 5, seed=1).double()
    for k in (1, 5):
        found = manifold_overlap(real, generated, k=k)
        theirs = metric_prc.calculate_precision_recall_full(generated, real, k)
        assert (found["precision"], found["recall"]) == pytest.approx(theirs, abs=1e-6)


def clouds() -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Pairs of clouds and k: what is enclosed by products, what is not, and ties, of which all or none count."""
    real, generated = random(40, 3), 0.4 + random(50, 3, seed=1)
    lattice = torch.cartesian_prod(*[torch.arange(4)] * 3).float()
    outlier = torch.cat([real, torch.full((1, 3), 3e4)])  # beside which all others are near
    wide, other = random(60, 300), random(50, 300, seed=1)
    collapsed = generated[:2].repeat(30, 1)
    return {
        "random": (real, generated, 4),
        "float64": (real.double() / 3, generated.double() / 3, 4),
        "many neighbours": (real, generated, 30),
        "wide": (wide, 0.97 * other, 5),
        "outlier": (outlier, generated, 2),
        "far": (real + 1000, generated + 1000, 3),
        "tiny": (1e-30 * real, 1e-30 * generated, 3),
        "large": (1e30 * real, 1e30 * generated, 3),
        "lattice": (lattice, lattice[::2] + 1, 3),
        "the same": (real, real, 3),
        "collapsed": (real, collapsed, 3),
        "points": (torch.zeros(6, 2), torch.zeros(5, 2), 2),
    }


@pytest.mark.parametrize("chunk", [1024, 7])
def test_overlaps_equal_the_loops(chunk, monkeypatch):
    monkeypatch.setattr(manifold, "_CHUNK", chunk)
    monkeypatch.setattr(manifold, "_MANY", 20 * chunk)
    for name, (real, generated, k) in clouds().items():
        assert manifold_overlap(real, generated, k=k) == overlaps_by_loops(real, generated, k), name


def overlaps_by_loops(real: torch.Tensor, generated: torch.Tensor, k: int) -> dict[str, float]:
    """In float64, pair by pair."""
    real, generated = real.double(), generated.double()
    distance = [[float((x - y).norm()) for y in generated] for x in real]

    def radius(x, i):
        return sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    generated_radii = [radius(generated, j) for j in range(len(generated))]
    inside = [[d <= r for d in row] for row, r in zip(distance, real_radii, strict=True)]
    recalled = [any(d <= r for d, r in zip(row, generated_radii, strict=True)) for row in distance]
    return {
        "precision": sum(any(column) for column in zip(*inside, strict=True)) / len(generated),
        "recall": sum(recalled) / len(real),
        "density": sum(map(sum, inside)) / len(generated) / k,
        "coverage": sum(map(any, inside)) / len(real),
    }


def test_overlaps_of_equal_distributions_have_their_closed_forms():
    real, fresh = random(2000, 6), random(2000, 6, seed=1)
    found = manifold_overlap(real, fresh, k=5)
    expected = 1 - math.prod((2000 - i) / (4000 - i) for i in range(1, 6))
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["coverage"] == pytest.approx(expected, abs=0.02)
    far = manifold_overlap(real, fresh + 100, k=5)
    assert set(far.values()) == {0.0}


class Pixels:
    """An extractor that the library does not know: mean and spread of each channel, classified by brightness."""

    name, fingerprint = "pixels", "1"

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        return torch.stack([features[:, 0], -features[:, 0]], 1)


def test_image_quality_collects_the_measures_under_the_extractors_name():
    real, generated = random(60, 3, 4, 4).tanh(), random(50, 3, 4, 4, seed=1).tanh()
    pixels = Pixels()
    found = image_quality(real, generated, pixels)
    first, second = pixels.features(real), pixels.features(generated)
    assert found["fid_pixels"] == pytest.approx(frechet_distance_of_features(first, second), rel=1e-9)
    assert found["kid_pixels"] == kernel_distance(first, second)["kid"]
    assert found["inception_score_pixels"] == inception_score(pixels.head(second))["inception_score"]
    overlap = manifold_overlap(first, second)
    assert {f"{key}_pixels": value for key, value in overlap.items()}.items() <= found.items()
    assert image_quality(real.split(7), iter(generated.split(11)), pixels) == pytest.approx(found, rel=1e-6)
    without_scores = {key: value for key, value in found.items() if "inception" not in key}
    assert image_quality(first, second, "pixels") == pytest.approx(without_scores, rel=1e-9)


def test_only_inception_gives_plain_keys_and_a_prefix_stands_before_all():
    inception = SimpleNamespace(name="inception", fingerprint="2", features=Pixels().features, head=None)
    images = random(40, 3, 4, 4).tanh(), random(40, 3, 4, 4, seed=1).tanh()
    found = image_quality(*images, inception, measures=("fid", "kid"), prefix="r")
    assert set(found) == {"rfid", "rkid", "rkid_std"}
    judged = image_quality(*images, inception, measures=("inception_score",), classifier=Pixels())
    assert set(judged) == {"inception_score_pixels", "inception_score_std_pixels"}


def test_fewer_images_than_dimensions_are_warned_about_with_numbers():
    with pytest.warns(
        UserWarning, match=r"30 images for features of 64 dimensions: the covariance has rank 29"
    ) as seen:
        found = image_quality(random(30, 64), random(40, 64, seed=1), "some")
    assert seen[0].filename == __file__ and math.isfinite(found["fid_some"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_quality(random(30, 64), random(40, 64, seed=1), "some", measures=("kid", "manifold"))
        image_quality(random(65, 64), random(70, 64, seed=1), "some", measures=("fid",))


def test_fingerprints_differ_where_figures_do_not_compare():
    given = {"reference": "digits test", "num_real": 100, "num_generated": 50, "seed": 0, "k": 5}
    found = quality_fingerprint(Pixels(), **given)
    assert json.loads(json.dumps(found)) == found and found["versions"]["torch"] == torch.__version__.split("+")[0]
    changed = [given | change for change in ({"num_real": 99}, {"reference": "digits train"}, {"seed": 1}, {"k": 3})]
    assert len({found["sha256"], *(quality_fingerprint(Pixels(), **other)["sha256"] for other in changed)}) == 5


def test_bad_input_is_refused_with_what_was_given():
    cloud = random(10, 3)
    for call, message in (
        (lambda: manifold_overlap(cloud, cloud, k=10), r"k must lie in \[1, 9\]"),
        (lambda: manifold_overlap(cloud, random(10, 4)), r"\(10, 3\), \(10, 4\)"),
        (lambda: kernel_distance(cloud, cloud.log()), "finite"),
        (lambda: kernel_distance(cloud, cloud, subsets=0), "subsets"),
        (lambda: inception_score(cloud, splits=11), "splits"),
        (lambda: inception_score(cloud / 0), "finite"),
        (lambda: image_quality(cloud, cloud, "some", measures=("lpips",)), r"measures must be among.*lpips"),
        (lambda: image_quality(random(4, 3, 2, 2), cloud, "some"), "features"),
        (lambda: image_quality([], [], Pixels()), "no real images"),
        (lambda: image_quality(random(1, 3, 2, 2).tanh(), random(4, 3, 2, 2).tanh(), Pixels()), "N >= 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
