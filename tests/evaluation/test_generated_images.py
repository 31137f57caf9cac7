"""What generated images are like, against loops and closed forms."""

import math

import pytest
import torch

from hf_dpssl.evaluation import class_consistency, copies, diversity
from hf_dpssl.evaluation.generated_images import nearest_distances


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_consistency_is_the_share_of_images_in_the_asked_for_class():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    assert class_consistency(logits, torch.tensor([0, 1, 0, 0])) == {"class_consistency": 75.0}


def test_class_consistency_refuses_shapes_that_do_not_fit():
    for logits, class_ids in (((4, 2), (3,)), ((4,), (4,)), ((4, 2), (4, 1))):
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


def test_fresh_real_images_count_as_copies_about_as_often_as_the_percentile():
    training = random(300, 1, 2, 2, seed=0)
    held_out, fresh = random(4000, 1, 2, 2, seed=1), random(4000, 1, 2, 2, seed=2)
    for percentile in (1.0, 50.0):
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


def test_diversity_scales_with_the_spread_of_generated_images():
    real, ids = random(12, 1, 3, 3), torch.arange(12) % 2
    for factor in (0.0, 0.5, 2.0):
        assert diversity(factor * real + 5, ids, real, ids)["diversity"] == pytest.approx(factor, abs=1e-6)
    assert diversity(real[ids], ids, real, ids)["diversity"] == 0  # copies of one image per class


def test_diversity_counts_only_classes_with_two_images_of_each_kind():
    real, real_ids = random(6, 1, 3, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    generated, generated_ids = torch.cat([2 * real[:3], real[3:]]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert diversity(generated, generated_ids, real, real_ids)["diversity"] == pytest.approx(2)
    with pytest.raises(ValueError, match="at least two generated and two real"):
        diversity(generated, torch.arange(6), real, real_ids)
