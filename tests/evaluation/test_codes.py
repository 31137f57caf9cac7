"""Use of a codebook; nats per image of codes of known entropy: independent, constant, and a planted Markov chain."""

import math

import numpy as np
import pytest
import torch

from hf_dpssl.evaluation import code_prior, codebook_usage

CODES, LENGTH, IMAGES = 8, 9, 1200


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(rows: int, sharpness: float) -> torch.Tensor:
    """(rows, CODES) random distributions, float64."""
    return torch.softmax(sharpness * torch.randn(rows, CODES, generator=generator(1), dtype=torch.double), 1)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


@pytest.mark.extended
def test_independent_codes_cost_their_entropy():
    p = distributions(1, 1.0)[0]
    codes = torch.multinomial(p, 2 * IMAGES * LENGTH, True, generator=generator()).view(2, IMAGES, 3, 3)
    found = code_prior(codes[0], codes[1], CODES, steps=40)
    expected = LENGTH * float(entropy(p))
    assert found["prior_nats"] == pytest.approx(expected, rel=0.02)
    assert found["prior_nats_unigram"] == pytest.approx(expected, rel=0.02)
    assert found["prior_nats_position"] == pytest.approx(expected, rel=0.02)
    assert found["prior_nats_uniform"] == pytest.approx(LENGTH * math.log(CODES))


@pytest.mark.extended
def test_constant_codes_cost_nothing():
    codes = torch.full((IMAGES, 3, 3), 5)
    found = code_prior(codes, codes[:100], CODES, steps=60)
    assert 0 <= found["prior_nats"] < 1e-2
    assert found["prior_nats_unigram"] == pytest.approx(-LENGTH * math.log1p(-7 / (IMAGES * LENGTH + 8)))


@pytest.mark.extended
def test_markov_chain_costs_its_entropy_rate_and_counts_alone_do_not_see_it():
    first, following = torch.full((CODES,), 1 / CODES, dtype=torch.double), distributions(CODES, 2.0)
    draws = generator()
    chain = [torch.multinomial(first, 2 * IMAGES, True, generator=draws)]
    marginal, expected, independent = first, float(entropy(first)), float(entropy(first))
    for _ in range(LENGTH - 1):
        chain.append(torch.multinomial(following[chain[-1]], 1, generator=draws)[:, 0])
        expected += float(marginal @ entropy(following))
        marginal = marginal @ following
        independent += float(entropy(marginal))
    codes = torch.stack(chain, 1)
    found = code_prior(codes[:IMAGES], codes[IMAGES:], CODES, steps=120)
    assert expected < 0.85 * independent
    assert found["prior_nats"] == pytest.approx(expected, rel=0.05)
    assert found["prior_nats_position"] == pytest.approx(independent, rel=0.02)


def test_counts_equal_laplace_smoothing_written_out():
    train = torch.randint(0, 5, (40, 4), generator=generator())
    test = torch.randint(0, 6, (30, 4), generator=generator(2))
    found = code_prior(train, test, 6, steps=1)
    whole, each = 0.0, 0.0
    for image in test.numpy():
        for position, code in enumerate(image):
            seen = train.numpy()
            whole -= math.log((np.sum(seen == code) + 1) / (160 + 6))
            each -= math.log((np.sum(seen[:, position] == code) + 1) / (40 + 6))
    assert found["prior_nats_unigram"] == pytest.approx(whole / 30)
    assert found["prior_nats_position"] == pytest.approx(each / 30)


def test_it_is_a_function_of_codes_and_seed_and_leaves_the_global_random_state():
    codes = torch.randint(0, CODES, (200, 4), generator=generator())
    torch.manual_seed(1)
    first, after = code_prior(codes, codes, CODES, steps=5), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert code_prior(codes.view(200, 2, 2), codes, CODES, steps=5) == first
    assert code_prior(codes, codes, CODES, steps=5, seed=1)["prior_nats"] != first["prior_nats"]


def test_bad_codes_are_refused():
    for train, test, message in (
        (torch.zeros(4, 2, 2), torch.zeros(4, 2, 2), "latents without a codebook have no nats"),
        (torch.zeros(0, 4).long(), torch.zeros(4, 4).long(), "one row per image"),
        (torch.full((4, 4), 8), torch.zeros(4, 4).long(), r"lie in \[0, 7\], got \[8, 8\]"),
        (torch.zeros(4, 4).long(), torch.full((4, 4), -1), "test_codes must lie"),
        (torch.zeros(4, 4).long(), torch.zeros(4, 9).long(), "4 codes in train_codes and 9 in test_codes"),
    ):
        with pytest.raises(ValueError, match=message):
            code_prior(train, test, CODES)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        code_prior(torch.zeros(4, 4).long(), torch.zeros(4, 4).long(), CODES, steps=0)
    for codes in ([], [4], [-1, 2]):
        with pytest.raises(ValueError, match=r"\[0, 3\]"):
            codebook_usage(torch.tensor(codes, dtype=torch.int64), 4)


def test_use_of_a_codebook_and_exp_of_the_entropy_of_its_codes():
    even = codebook_usage(torch.arange(16).repeat(3).view(3, 4, 4), 16)
    assert even == pytest.approx({"code_usage": 100, "code_perplexity": 16, "dead_codes": 0})
    one = codebook_usage(torch.full((2, 4, 4), 3), 16)
    assert one == pytest.approx({"code_usage": 6.25, "code_perplexity": 1, "dead_codes": 15})
    uneven = codebook_usage(torch.tensor([0, 0, 0, 1]), 4)
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert uneven == pytest.approx({"code_usage": 50, "code_perplexity": expected, "dead_codes": 2})
