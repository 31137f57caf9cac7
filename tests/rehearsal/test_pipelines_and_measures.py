"""Pipelines' calls and measures on a GPU that is not there: devices agree, and the values are those of a CPU."""

import pytest
import torch
from tiny_pipelines import make_dit, make_drift, make_tokens

from hf_dpssl import evaluation
from hf_dpssl.runs.rehearsal import rehearsal


def _drawn():
    return torch.Generator().manual_seed(0)


def _measures():
    generator = _drawn()
    first, second = torch.randn(60, 6, generator=generator), torch.randn(50, 6, generator=generator)
    of_first, of_second = torch.arange(60) % 3, torch.arange(50) % 3
    images, others = torch.rand(2, 40, 3, 16, 16, generator=generator)
    ids = torch.arange(40) % 4
    one_by_one = first[:50], second
    of_frechet = evaluation.frechet_distance_of_features
    kernel = {"subsets": 5, "subset_size": 20}
    cases = {
        "knn": (lambda a, b, i, j: evaluation.knn(a, i, b, j, k=5), (first, second, of_first, of_second)),
        "few_shot": (lambda *of: evaluation.few_shot(*of, shots=(1, 5)), (first, of_first, second, of_second)),
        "linear_probe": (evaluation.linear_probe, (first, of_first, second, of_second)),
        "linear_probe sgd": (
            lambda *of: evaluation.linear_probe(*of, solver="sgd", epochs=3),
            (first, of_first, second, of_second),
        ),
        "frechet_distance": (lambda *of: {"": of_frechet(*of)}, (first, second)),
        "frechet_interval": (evaluation.frechet_interval, (first, second)),
        "frechet_extrapolation": (evaluation.frechet_extrapolation, (first, second)),
        "kernel_distance": (lambda *of: evaluation.kernel_distance(*of, **kernel, generator=_drawn()), (first, second)),
        "trustworthiness": (evaluation.trustworthiness, one_by_one),
        "continuity": (evaluation.continuity, one_by_one),
        "gromov_wasserstein": (evaluation.gromov_wasserstein, one_by_one),
        "cai_lim": (evaluation.cai_lim, one_by_one),
        "uniformity": (evaluation.uniformity, (first,)),
        "effective_rank": (evaluation.effective_rank, (first,)),
        "alignment": (evaluation.alignment, (first[:50], second)),
        "manifold_overlap": (evaluation.manifold_overlap, (first, second)),
        "polynomial_mmd": (lambda *of: {"": evaluation.polynomial_mmd(*of)}, (first, second)),
        "inception_score": (lambda of: evaluation.inception_score(of, splits=2), (first,)),
        "class_consistency": (evaluation.class_consistency, (first, of_first)),
        "codebook_usage": (lambda of: evaluation.codebook_usage(of, 3), (of_first,)),
        "psnr": (evaluation.psnr, (2 * images - 1, 2 * others - 1)),
        "ssim": (evaluation.ssim, (2 * images - 1, 2 * others - 1)),
        "copies": (evaluation.copies, (images, others, images.flip(0))),
        "diversity": (evaluation.diversity, (images, ids, others, ids)),
    }
    for name, (measure, given) in cases.items():
        expected = measure(*given)
        with rehearsal() as rehearsed:
            found = measure(*map(rehearsed.fake_of, given))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), name
        if name in ("manifold_overlap", "polynomial_mmd"):  # features of 2,048 numbers stay where they are
            assert not [line for line in rehearsed.syncs if line.endswith("_to_copy")], name


def _pipelines():
    for make, options in (
        (make_dit, {"num_inference_steps": 3, "guidance_scale": 2.0}),
        (make_drift, {}),
        (make_tokens, {"guidance_scale": 2.0, "top_p": 0.9}),
    ):
        pipeline = make()
        pipeline.set_progress_bar_config(disable=True)
        options |= {"generator": [0, 1], "output_type": "pt"}
        expected = pipeline(["dog", "cat"], **options).images
        with rehearsal() as rehearsed:
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    rehearsed.fake_module_(part)
            found = pipeline(["dog", "cat"], **options).images
            assert found.device.type == "cuda", make.__name__
        torch.testing.assert_close(found.rehearsed, expected, rtol=0, atol=1e-5)


def test_measures_mix_no_devices_and_have_the_values_of_a_cpu(rehearse):
    rehearse(_measures)


@pytest.mark.extended
def test_pipelines_mix_no_devices_and_draw_the_images_of_a_cpu(rehearse):
    rehearse(_pipelines)
