"""The pipeline: classes, guidance, schedulers, generators, outputs, save and load."""

import copy
import json

import numpy as np
import pytest
import torch
from cases import for_each
from diffusers import (
    DPMSolverMultistepScheduler,
)
from tiny_pipelines import NAMES, draw_dit, generator, make_dit, make_drift

from hf_dpssl import VQDiTPipeline


@pytest.fixture(scope="module")
def pipeline():
    return make_dit()


def test_names_ids_and_mixtures_mean_the_same(pipeline):
    by_id = draw_dit(pipeline, [0, 2, 1])
    assert torch.equal(by_id, draw_dit(pipeline, ["cat", "horse", "dog"]))
    assert torch.equal(by_id, draw_dit(pipeline, ["cat", 2, 1]))
    assert draw_dit(pipeline, "dog").shape == (1, 3, 16, 16)  # a name is not split into letters


@for_each(
    "labels, message",
    [
        (["hors"], "known are for example \\['horse'\\]"),
        ([3], r"class ids lie in \[0, 2\], got 3"),
        ([-1], "got -1"),
        ([], "class_labels is empty"),
    ],
)
def test_unknown_classes_are_refused_with_what_is_known(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        draw_dit(pipeline, labels)


@for_each(
    "options",
    [
        {"guidance_scale": 0.5},
        {"num_inference_steps": 0},
        {"output_type": "jpeg"},
        {"generator": [generator()]},
        {"latents": torch.zeros(2, 4, 4, 4)},
        {"num_images": 2},
    ],
)
def test_bad_options_are_refused(pipeline, options):
    with pytest.raises(ValueError, match="got|num_images"):
        draw_dit(pipeline, [0, 1], **options)


def reference(pipeline, ids, guidance_scale, steps=4):
    """Euler integration of the guided flow written out, one image at a time."""
    images = []
    noise = torch.randn(len(ids), 4, 8, 8, generator=generator())
    sigmas = pipeline.scheduler.__class__.from_config(pipeline.scheduler.config)
    sigmas.set_timesteps(steps)
    for latents, class_id in zip(noise, ids, strict=True):
        latents = latents[None]
        for now, after in zip(sigmas.sigmas[:-1], sigmas.sigmas[1:], strict=True):
            time = torch.full((1,), float(now) * 1000)

            def velocity(label, x=latents, time=time):
                return pipeline.transformer(x, timestep=time, class_labels=torch.tensor([label])).sample

            with torch.no_grad():
                with_class, without = velocity(class_id), velocity(3)
            latents = latents + (after - now) * (without + guidance_scale * (with_class - without))
        with torch.no_grad():
            latents = latents * torch.tensor([1.0, 2.0, 0.5, 1.5]).view(1, 4, 1, 1)
            latents = latents + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
            decoded = pipeline.vae.decode(pipeline.vae.quantize(latents).quantized).pixel_values
        images.append((decoded / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pipeline_equals_the_sampler_written_out(pipeline, guidance_scale):
    found = draw_dit(pipeline, [0, 2], guidance_scale=guidance_scale)
    torch.testing.assert_close(found, reference(pipeline, [0, 2], guidance_scale), rtol=0, atol=1e-4)


def test_guidance_and_classes_change_images_and_no_class_uses_the_null_row(pipeline):
    assert not torch.equal(draw_dit(pipeline, [0, 1]), draw_dit(pipeline, [0, 1], guidance_scale=4.0))
    assert not torch.equal(draw_dit(pipeline, [0]), draw_dit(pipeline, [1]))
    unconditional = draw_dit(pipeline, None, num_images=2)
    ids = torch.full((2,), pipeline.null_class)
    assert unconditional.shape == (2, 3, 16, 16) and ids.tolist() == [3, 3]
    torch.testing.assert_close(unconditional, reference(pipeline, [3, 3], 1.0), rtol=0, atol=1e-4)


def test_unlabelled_model_generates_without_classes(tmp_path):
    unlabelled = make_dit(names=[])
    assert unlabelled.class_names == [] and draw_dit(unlabelled, None).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="pass None"):
        draw_dit(unlabelled, [0])


def test_flow_model_runs_with_dpm_solver_on_flow_sigmas(pipeline):
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    other = VQDiTPipeline(pipeline.transformer, pipeline.vae, solver, dict(enumerate(NAMES)))
    other.set_progress_bar_config(disable=True)
    close = draw_dit(other, [0, 1], num_inference_steps=60, output_type="latent")
    euler = draw_dit(pipeline, [0, 1], num_inference_steps=200, output_type="latent")
    assert float((close - euler).abs().mean()) < 0.05 * float(euler.abs().mean())


def test_image_of_its_own_generator_does_not_depend_on_the_batch(pipeline):
    together = draw_dit(pipeline, [0, 1, 2], generator=[generator(s) for s in (5, 6, 7)], output_type="latent")
    alone = draw_dit(pipeline, [1], generator=[generator(6)], output_type="latent")
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4)


def test_output_types_agree(pipeline):
    tensors = draw_dit(pipeline, [0, 1])
    arrays = draw_dit(pipeline, [0, 1], output_type="np")
    pictures = draw_dit(pipeline, [0, 1], output_type="pil")
    latents = draw_dit(pipeline, [0, 1], output_type="latent")
    assert arrays.shape == (2, 16, 16, 3) and latents.shape == (2, 4, 8, 8)
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(pictures[1]), (arrays[1] * 255).round().astype("uint8"))
    assert isinstance(pipeline([0], num_inference_steps=1, return_dict=False), tuple)


def test_quantize_snaps_to_codes_and_can_be_switched_off(pipeline):
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    snapped, free = draw_dit(pipeline, [0, 1], latents=noise), draw_dit(pipeline, [0, 1], latents=noise, quantize=False)
    assert not torch.equal(snapped, free)


def test_saved_and_reloaded_pipeline_is_bit_identical(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    reloaded = VQDiTPipeline.from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    assert reloaded.class_names == NAMES
    for options in ({}, {"guidance_scale": 3.0}):
        assert torch.equal(draw_dit(reloaded, ["dog", 2], **options), draw_dit(pipeline, ["dog", 2], **options))


def test_foreign_autoencoder_is_refused(pipeline):
    other = make_dit(seed=1)
    with pytest.raises(ValueError, match="is not the one the transformer was trained on"):
        VQDiTPipeline(pipeline.transformer, other.vae, pipeline.scheduler, {}, pipeline.config.vae_fingerprint)


@for_each("make", [make_dit, make_drift])
def test_an_autoencoder_that_normalises_otherwise_is_refused_and_a_folder_of_before_loads_as_ever(make, tmp_path):
    pipeline = make()
    other = copy.deepcopy(pipeline.vae)
    other.config.latent_std = [3.0] * 4
    assert other.fingerprint() == pipeline.vae.fingerprint()  # encoder and codebook are the same
    folder = tmp_path / make.__name__
    pipeline.save_pretrained(folder)
    said = r"latent_std is \[3, 3, 3, 3\] and was \[1, 2, 0.5, 1.5\]. Load the one saved with it"
    with pytest.raises(ValueError, match=said):
        type(pipeline).from_pretrained(folder, vae=other)
    type(pipeline).from_pretrained(folder)(["cat"], generator=[0])
    own, pipeline.vae = pipeline.vae, other
    with pytest.raises(ValueError, match=said):
        pipeline(["cat"], generator=[0])
    index = json.loads((folder / "model_index.json").read_text())
    held = {name: getattr(own.config, name) for name in ("latent_mean", "latent_std")}
    assert index.pop("latent_statistics") == held
    (folder / "model_index.json").write_text(json.dumps(index))
    type(pipeline).from_pretrained(folder)(["cat"], generator=[0])
    type(pipeline).from_pretrained(folder, vae=other)(["cat"], generator=[0])  # nothing is there to compare with


def test_bfloat16_pipeline_loads_and_draws(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    half = VQDiTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.vae.quantizer.codebook.dtype == torch.float32
    assert torch.isfinite(draw_dit(half, [0]).float()).all()
