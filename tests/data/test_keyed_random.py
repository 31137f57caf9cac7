"""The generator against its published vectors, its distributions against SciPy, and what keys the numbers."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from hf_dpssl.data.keyed_random import derive_seed, normal, permutation, philox_4x32, seed_step, uniform

IDS = torch.arange(20_000)
KEY = dict(seed=5, stream="test", epoch=3)

# Random123, kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def test_philox_gives_the_published_vectors():
    for counter, key, expected in KNOWN_ANSWERS:
        assert philox_4x32(torch.tensor(words(counter)), tuple(words(key))).tolist() == words(expected)


def test_philox_of_a_batch_is_that_of_each_counter():
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS]).view(3, 1, 4)
    key = tuple(words(KNOWN_ANSWERS[2][1]))
    together = philox_4x32(counters, key)
    assert together.shape == (3, 1, 4)
    assert all(torch.equal(together[i, 0], philox_4x32(counters[i, 0], key)) for i in range(3))
    assert together[2, 0].tolist() == words(KNOWN_ANSWERS[2][2])


def test_uniform_numbers_are_uniform():
    values = uniform(IDS, 5, **KEY)
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    assert all(stats.kstest(column.numpy(), "uniform").pvalue > 1e-3 for column in values.T)


def test_uniform_numbers_are_multiples_of_2_to_the_minus_24():
    values = uniform(IDS, 4, **KEY).double() * 2**24
    assert torch.equal(values, values.round())
    assert stats.chisquare(torch.bincount(values.flatten().long() % 16).numpy()).pvalue > 1e-3  # also the lowest bits


def test_normal_numbers_are_standard_normal():
    values = normal(IDS, (5,), **KEY)
    assert values.dtype == torch.float32 and values.isfinite().all()
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3
    assert all(stats.kstest(column.numpy(), "norm").pvalue > 1e-3 for column in values.T)


def test_normal_moments_and_tails_are_those_of_the_normal_distribution():
    values = normal(IDS, (50,), **KEY).double().numpy()
    assert abs(values.mean()) < 4 / values.size**0.5
    assert abs(values.std() - 1) < 4 / (2 * values.size) ** 0.5
    for bound in (3.0, 4.0):
        expected = values.size * 2 * stats.norm.sf(bound)
        assert abs((np.abs(values) > bound).sum() - expected) < 4 * expected**0.5


def assert_uncorrelated(columns, values=IDS):
    correlations = np.corrcoef(np.stack([np.asarray(column) for column in columns]))
    others = correlations[~np.eye(len(correlations), dtype=bool)]
    assert np.abs(others).max() < 5 / len(values) ** 0.5


def test_seeds_streams_and_epochs_are_independent():
    for draw in [lambda **key: uniform(IDS, 1, **key)[:, 0], lambda **key: normal(IDS, (), **key)]:
        keys = itertools.product((0, 1, 2**40), ("crop", "noise"), (0, 1, 7))
        assert_uncorrelated([draw(seed=seed, stream=stream, epoch=epoch) for seed, stream, epoch in keys])


def test_numbers_of_a_sample_and_of_its_neighbours_are_independent():
    for draw in [uniform, lambda ids, count, **key: normal(ids, (count,), **key)]:
        values = draw(IDS, 9, **KEY).numpy()
        assert_uncorrelated(values.T)
        shifted = [np.roll(values[:, 0], shift) for shift in (0, 1, 2, 4, 16)]
        assert_uncorrelated(shifted)


def test_no_number_repeats_among_samples_epochs_and_streams():
    drawn = [
        uniform(torch.arange(200), 4, seed=0, stream=stream, epoch=epoch)
        for stream, epoch in itertools.product("ab", range(5))
    ]
    rows = {tuple(row) for values in drawn for row in values.tolist()}
    assert len(rows) == 200 * 2 * 5


def test_numbers_do_not_depend_on_the_batch():
    for draw in [lambda ids: uniform(ids, 6, **KEY), lambda ids: normal(ids, (2, 3), **KEY)]:
        together, order = draw(IDS[:100]), torch.from_numpy(np.random.default_rng(0).permutation(100))
        assert torch.equal(draw(IDS[:100][order]), together[order])
        assert torch.equal(torch.cat([draw(part) for part in IDS[:100].split(7)]), together)
        assert torch.equal(draw(torch.tensor([42, 42])), together[[42, 42]])


def test_numbers_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first, state = normal(IDS[:10], (4,), **KEY), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(normal(IDS[:10], (4,), **KEY), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nor do they advance it


def test_large_and_negative_sample_ids_have_numbers_of_their_own():
    ids = torch.tensor([1, 2**32 + 1, 2**33 + 1, -1, 2**31, 2**63 - 1])
    values = uniform(ids, 4, **KEY)
    assert len(torch.unique(values, dim=0)) == len(ids)
    assert values.min() >= 0 and values.max() < 1


def test_uniform_has_the_shape_asked_for():
    for count in [0, 1, 4, 5, 16]:
        assert uniform(IDS[:3], count, **KEY).shape == (3, count)
        assert uniform(IDS[:0], count, **KEY).shape == (0, count)


def test_normal_has_the_shape_asked_for():
    for shape in [(), (1,), (3,), (4, 5), (3, 5, 7)]:
        values = normal(IDS[:3], shape, **KEY)
        assert values.shape == (3, *shape) and len(values.unique()) == values.numel()


def test_sample_ids_of_another_kind_are_refused():
    for ids, found in [
        (torch.arange(3, dtype=torch.int32), r"shape \(3,\) of torch.int32"),
        (torch.rand(3), "float32"),
        (torch.zeros(2, 2, dtype=torch.int64), r"shape \(2, 2\)"),
    ]:
        for draw in (lambda ids: uniform(ids, 1, **KEY), lambda ids: normal(ids, (2,), **KEY)):
            with pytest.raises(ValueError, match=f"1-D int64 tensor, got .*{found}"):
                draw(ids)


def test_permutation_visits_everything_once():
    for size in [0, 1, 2, 1000]:
        order = permutation(size, seed=0, epoch=0)
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(size))


def test_permutation_is_a_function_of_seed_and_epoch():
    keys = [dict(seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    orders = [permutation(100, **key) for key in keys]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    torch.rand(3)
    assert all(torch.equal(permutation(100, **key), order) for key, order in zip(keys, orders, strict=True))


def test_every_place_of_a_permutation_is_equally_likely():
    orders = torch.stack([permutation(6, seed=0, epoch=epoch) for epoch in range(3000)])
    for place in range(6):
        assert stats.chisquare(torch.bincount(orders[:, place], minlength=6).numpy()).pvalue > 1e-3
    assert_uncorrelated([orders[:-1, 0], orders[1:, 0]], orders)  # one epoch says nothing about the next


def test_derived_seeds_differ_in_every_part_and_fit_into_63_bits():
    parts = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (0, "a", 1, 1), (12, 3), (1, 23)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(derive_seed(0, i) for i in range(200)) > 2**62  # all 63 bits are in use


def test_seed_step_makes_the_global_generator_a_function_of_step_and_process():
    def drawn(*key):
        seed_step(*key)
        return tuple(torch.rand(3).tolist())

    keys = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    first = [drawn(*key) for key in keys]
    assert len(set(first)) == 4 and [drawn(*key) for key in keys] == first
