"""The map of the matching lab: against scikit-learn's t-SNE, loops, and what the page promises."""

from dataclasses import replace
from itertools import product
from statistics import median

import pytest
import torch
from cases import for_each
from sklearn.manifold import TSNE

from hf_dpssl.contrastive.matching import DIVERGENCES, KERNELS, NORMALIZATIONS
from hf_dpssl.pages.live_map import DATA, SIMILARITIES, LiveMap, MapSettings, class_gap, map_data


@pytest.mark.parametrize(
    "seeds, count, perplexity, steps", [(3, 100, 10, 300), pytest.param(8, 256, 20, 400, marks=pytest.mark.extended)]
)
def test_default_settings_reach_the_divergence_of_scikit_learns_t_sne_in_the_median_of_seeds(
    seeds, count, perplexity, steps
):
    points, labels = map_data("digits", count)
    settings = MapSettings(perplexity=perplexity)
    reached = [LiveMap(points, labels, seed=seed).advance(settings, steps) for seed in range(seeds)]
    peer = TSNE(perplexity=perplexity, method="exact", random_state=0).fit(points.numpy())
    assert median(reached) < 1.1 * peer.kl_divergence_


@pytest.mark.extended
def test_student_t_leaves_larger_gaps_between_digits_than_the_gaussian_within_80_steps():
    points, labels = map_data("digits")
    gaps = {}
    for kernel in ("gaussian", "student_t"):
        one = LiveMap(points, labels)
        one.advance(MapSettings(kernel=kernel), 80)
        gaps[kernel] = class_gap(one.places(kernel), labels)
    assert gaps["student_t"] > 1.5 * gaps["gaussian"] > 1.5


def test_a_change_of_settings_goes_on_from_the_same_places():
    points, labels = map_data("clusters", 60)
    one = LiveMap(points, labels)
    one.advance(MapSettings(perplexity=10), 20)
    before = one.embeddings.detach().clone()
    one.advance(MapSettings(perplexity=10, dof=5.0, divergence="jensen_shannon"), 1)
    assert 0 < float((one.embeddings.detach() - before).abs().max()) < 1
    assert len(one.losses) == 21


def test_two_maps_of_one_seed_are_equal_and_of_two_seeds_are_not():
    points, labels = map_data("rings", 60)
    maps = [LiveMap(points, labels, seed=seed) for seed in (3, 3, 4)]
    for one in maps:
        one.advance(MapSettings(perplexity=10), 5)
    assert torch.equal(maps[0].embeddings, maps[1].embeddings)
    assert not torch.allclose(maps[0].embeddings, maps[2].embeddings)


@for_each(
    "similarities, kernel, normalization", list(product(SIMILARITIES, KERNELS, NORMALIZATIONS))
)  # every cell that the page offers
def test_every_cell_moves_the_map_or_says_why_not(similarities, kernel, normalization):
    points, labels = map_data("digits", 40)
    for divergence in DIVERGENCES:
        one = LiveMap(points, labels)
        settings = MapSettings(similarities, 8.0, kernel, normalization, 1.0, 1.0, divergence)
        try:
            one.advance(settings, 3)
        except ValueError as error:
            assert "too large" in str(error)
        assert bool(one.embeddings.isfinite().all()) and len(one.losses) in (0, 1, 2, 3)
        assert one.losses, f"{divergence} takes no step from the start"


def test_a_divergence_that_overflows_is_refused_and_the_map_stays():
    points, labels = map_data("digits", 40)
    one = LiveMap(points, labels)
    one.embeddings.data *= 1e5
    before = one.embeddings.detach().clone()
    settings = MapSettings(perplexity=8.0, kernel="gaussian", divergence="chi_square")
    with pytest.raises(ValueError, match="too large for a number"):
        one.advance(settings)
    assert torch.equal(one.embeddings.detach(), before)


@for_each("change", [{"similarities": "friends"}, {"perplexity": 500.0}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(change):
    points, labels = map_data("digits", 40)
    with pytest.raises(ValueError):
        LiveMap(points, labels).advance(replace(MapSettings(perplexity=8.0), **change))


@for_each("name", DATA)
def test_second_half_of_the_data_repeats_the_classes_of_the_first(name):
    points, labels = map_data(name, 64)
    assert points.shape[0] == 64 and bool(points.isfinite().all())
    assert torch.equal(labels[:32], labels[32:]) and len(labels.unique()) == (3 if name == "rings" else 10)


def test_data_of_unknown_name_or_odd_number_are_refused():
    with pytest.raises(ValueError, match="digits"):
        map_data("faces")
    with pytest.raises(ValueError, match="even"):
        map_data("digits", 63)


def test_class_gap_equals_a_loop_over_points():
    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(15, 2, generator=generator), torch.arange(15) % 3
    gaps = []
    for i in range(15):
        distances = [(float((points[i] - points[j]).norm()), j) for j in range(15) if j != i]
        own = min(d for d, j in distances if labels[j] == labels[i])
        gaps.append(min(d for d, j in distances if labels[j] != labels[i]) / own)
    assert class_gap(points, labels) == pytest.approx(sorted(gaps)[7], rel=1e-5)


def test_cosine_maps_are_drawn_on_a_circle():
    points, labels = map_data("digits", 40)
    places = LiveMap(points, labels).places("cosine")
    torch.testing.assert_close(places.norm(dim=1), torch.ones(40))
