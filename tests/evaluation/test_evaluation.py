"""Codebook usage, generated images and reconstructions, against loops and closed forms."""

import math

import pytest
import torch

from hf_dpssl.evaluation import class_consistency, codebook_usage, copies, diversity, psnr
from hf_dpssl.evaluation.generated_images import nearest_distances


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("error", "value_range"), [(0.5, 2.0), (0.01, 2.0), (0.1, 1.0), (25.5, 255.0)])
def test_psnr_of_a_constant_error_has_its_closed_form(error, value_range):
    images = random(3, 1, 4, 4)
    expected = 20 * math.log10(value_range / error)
    assert psnr(images.double(), images.double() + error, value_range=value_range)["psnr"] == pytest.approx(expected)


def test_psnr_is_the_mean_over_images_and_not_that_of_the_mean_error():
    images, noisy = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    noisy[0], noisy[1] = 0.2, 0.002
    assert psnr(images, noisy)["psnr"] == pytest.approx((20 + 60) / 2)


def test_psnr_of_equal_images_is_infinite():
    assert psnr(torch.ones(2, 1, 2, 2), torch.ones(2, 1, 2, 2))["psnr"] == math.inf


@pytest.mark.parametrize("shape", [(2, 1, 2, 3), (1, 1, 2, 2), (1, 2, 2)])
def test_psnr_refuses_unequal_shapes(shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        psnr(torch.zeros(2, 1, 2, 2), torch.zeros(shape))


def test_evenly_used_codebook_has_full_usage_and_perplexity_of_its_size():
    usage = codebook_usage(torch.arange(16).repeat(3).view(3, 4, 4), 16)
    assert usage == pytest.approx({"code_usage": 100, "code_perplexity": 16, "dead_codes": 0})


def test_one_used_code_has_perplexity_one():
    usage = codebook_usage(torch.full((2, 4, 4), 3), 16)
    assert usage == pytest.approx({"code_usage": 6.25, "code_perplexity": 1, "dead_codes": 15})


def test_perplexity_of_uneven_codes_is_exp_of_their_entropy():
    usage = codebook_usage(torch.tensor([0, 0, 0, 1]), 4)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert usage == pytest.approx({"code_usage": 50, "code_perplexity": math.exp(entropy), "dead_codes": 2})


@pytest.mark.parametrize("codes", [[], [4], [-1, 2]])
def test_codebook_usage_refuses_codes_that_do_not_exist(codes):
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        codebook_usage(torch.tensor(codes, dtype=torch.int64), 4)


def test_class_consistency_is_the_share_of_images_in_the_asked_for_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert class_consistency(logits, torch.tensor([0, 1, 0, 0])) == {"class_consistency": 75.0}


@pytest.mark.parametrize(("logits", "class_ids"), [((4, 2), (3,)), ((4,), (4,)), ((4, 2), (4, 1))])
def test_class_consistency_refuses_shapes_that_do_not_fit(logits, class_ids):
    with pytest.raises(ValueError, match="logits"):
        class_consistency(torch.zeros(logits), torch.zeros(class_ids, dtype=torch.int64))


def test_nearest_distances_equal_the_loop():
    images, references = random(520, 1, 3, 3, seed=0), random(9, 1, 3, 3, seed=1)  # more than one chunk
    distances = nearest_distances(images, references)
    for i in (0, 7, 515):
        expected = min(float((images[i].double() - other.double()).norm()) for other in references)
        assert float(distances[i]) == pytest.approx(expected)


def test_exact_training_images_are_found_among_generated_ones():
    training, held_out = random(200, 1, 4, 4, seed=0), random(200, 1, 4, 4, seed=1)
    generated = random(20, 1, 4, 4, seed=2) + 3  # nothing like a training image
    generated[:7] = training[50:57]
    result = copies(generated, training, held_out)
    assert result["copies"] == pytest.approx(35)
    assert result["copy_distance"] > 0


def test_exact_copies_are_found_also_where_held_out_images_repeat_training_images():
    training, held_out = random(100, 1, 4, 4, seed=0), random(100, 1, 4, 4, seed=1)
    held_out[:5] = training[:5]
    generated = torch.cat([training[10:14], random(4, 1, 4, 4, seed=2) + 3])
    assert copies(generated, training, held_out)["copies"] == pytest.approx(50)


@pytest.mark.parametrize("percentile", [1.0, 5.0, 50.0])
def test_fresh_real_images_count_as_copies_about_as_often_as_the_percentile(percentile):
    training = random(300, 1, 2, 2, seed=0)
    held_out, fresh = random(4000, 1, 2, 2, seed=1), random(4000, 1, 2, 2, seed=2)
    share = copies(fresh, training, held_out, percentile=percentile)["copies"]
    standard_error = math.sqrt(2 * percentile * (100 - percentile) / 4000)
    assert abs(share - percentile) < 4 * standard_error


def mean_distance_by_loop(images) -> float:
    pairs = [(a, b) for a in range(len(images)) for b in range(a)]
    return sum(float((images[a].double() - images[b].double()).norm()) for a, b in pairs) / len(pairs)


def test_diversity_equals_the_loop_over_classes():
    generated, real = random(11, 1, 3, 3, seed=0), random(14, 1, 3, 3, seed=1)
    generated_ids, real_ids = torch.arange(11) % 3, torch.arange(14) % 3
    ratios = [
        mean_distance_by_loop(generated[generated_ids == c]) / mean_distance_by_loop(real[real_ids == c])
        for c in range(3)
    ]
    assert diversity(generated, generated_ids, real, real_ids)["diversity"] == pytest.approx(sum(ratios) / 3)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_diversity_scales_with_the_spread_of_generated_images(factor):
    real, ids = random(12, 1, 3, 3), torch.arange(12) % 2
    assert diversity(factor * real + 5, ids, real, ids)["diversity"] == pytest.approx(factor, abs=1e-6)


def test_diversity_of_copies_of_one_image_per_class_is_zero():
    real, ids = random(12, 1, 3, 3), torch.arange(12) % 2
    assert diversity(real[ids], ids, real, ids)["diversity"] == 0


def test_diversity_counts_only_classes_with_two_images_of_each_kind():
    real, real_ids = random(6, 1, 3, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    generated, generated_ids = torch.cat([2 * real[:3], real[3:]]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert diversity(generated, generated_ids, real, real_ids)["diversity"] == pytest.approx(2)
    with pytest.raises(ValueError, match="at least two generated and two real"):
        diversity(generated, torch.arange(6), real, real_ids)
