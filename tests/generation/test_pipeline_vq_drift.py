"""The one-step pipeline: what it computes, classes and seeds, the start of training, save, load and commands."""

import json

import pytest
import torch
from tiny_checkpoints import save_checkpoints
from tiny_pipelines import NAMES, make_dit

from hf_dpssl import VQDiTPipeline, VQDriftPipeline
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.cli.commands import main
from hf_dpssl.latent_training.diffusion import make_transformer


@pytest.fixture(scope="module")
def flow() -> VQDiTPipeline:
    return make_dit()


@pytest.fixture(scope="module")
def pipeline(flow) -> VQDriftPipeline:
    return VQDriftPipeline(flow.transformer, flow.vae, dict(enumerate(NAMES)), flow.vae.fingerprint())


def test_one_pass_is_one_euler_step_of_a_flow(flow, pipeline):
    labels = ["cat", 2, ("dog", None, 0.3)]
    options = {"generator": [0, 1, 2], "output_type": "latent"}
    one_step = flow(labels, guidance_scale=1.0, num_inference_steps=1, **options).images
    torch.testing.assert_close(pipeline(labels, **options).images, one_step, rtol=1e-5, atol=1e-5)
    without = flow(num_images=2, num_inference_steps=1, generator=3, output_type="latent").images
    torch.testing.assert_close(pipeline(num_images=2, generator=3, output_type="latent").images, without)
    assert not torch.allclose(one_step[0], one_step[1])


def test_pictures_are_the_decoded_codes_in_batches_of_any_size_and_of_any_output_type(pipeline):
    latents = pipeline([0, 1, 2], generator=[5, 6, 7], output_type="latent").images
    expected = (latent_codec.decode(pipeline.vae, latents, True) / 2 + 0.5).clamp(0, 1).detach()
    found = pipeline([0, 1, 2], generator=[5, 6, 7], output_type="pt", batch_size=2).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    (images,) = pipeline("dog", generator=6, num_images_per_label=2, return_dict=False)
    assert [image.size for image in images] == [(16, 16)] * 2
    assert pipeline([1], generator=[6], output_type="np").images.shape == (1, 16, 16, 3)


def test_interpolation_ends_in_the_images_of_its_classes_and_seeds(pipeline):
    path = pipeline.interpolate("cat", "horse", 4, generator=[3, 4], output_type="latent").images
    for image, label, seed in ((path[0], "cat", 3), (path[-1], "horse", 4)):
        torch.testing.assert_close(image, pipeline(label, generator=seed, output_type="latent").images[0])
    assert not torch.allclose(path[1], path[2])


def test_samples_start_at_unit_deviation_driven_by_the_noise_for_transformers_of_any_size():
    noise = torch.randn(256, 4, 8, 8)
    for layers, width, patch, classes in ((1, 16, 8, 0), (4, 64, 2, 10), (2, 32, 1, 1000)):
        size = {"num_layers": layers, "width": width, "num_heads": 2, "patch_size": patch}
        transformer = make_transformer(**size, latent_channels=4, latent_size=8, num_classes=classes)
        vae = make_dit().vae
        pipeline = VQDriftPipeline(transformer, vae)
        labels = torch.arange(256) % max(1, classes) if classes else None
        pipeline.register_to_config(id2label={str(i): str(i) for i in range(classes)})
        count = {"num_images": 256} if labels is None else {}
        samples = pipeline(labels, latents=noise, output_type="latent", **count).images
        assert torch.equal(samples, noise)


def test_a_saved_pipeline_loads_and_gives_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "VQDriftPipeline" and index["vae"] == ["hf_dpssl", "VQAutoencoder"]
    loaded = VQDriftPipeline.from_pretrained(tmp_path)
    assert loaded.class_names == NAMES
    options = {"generator": 1, "output_type": "pt"}
    assert torch.equal(loaded(["cat", "dog"], **options).images, pipeline(["cat", "dog"], **options).images)


def test_bad_requests_and_parts_are_named(flow, pipeline):
    cases = [
        (lambda: pipeline("hors"), "known are for example \\['horse'\\]"),
        (lambda: pipeline([0], latents=torch.zeros(1, 4, 4, 4)), "latents must have shape"),
        (lambda: pipeline([0, 1], generator=[1]), "2 images need one generator or 2"),
        (lambda: pipeline([0], output_type="jpeg"), "output_type must be"),
        (lambda: pipeline([0], batch_size=0), "batch_size must be at least 1"),
        (lambda: pipeline.interpolate(0, 1, 1), "at least 2 images"),
        (lambda: VQDriftPipeline(flow.transformer, flow.vae, {0: "a"}), "has 3 classes, but id2label names 1"),
        (lambda: VQDriftPipeline(flow.transformer, flow.vae, vae_fingerprint="0" * 64), "is not the one"),
        (
            lambda: VQDriftPipeline(make_dit(objective="epsilon", learned_variance=True).transformer, flow.vae),
            "8 channels for 4",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="num_inference_steps"):
        pipeline([0], num_inference_steps=4)


def test_sample_and_evaluate_take_a_one_step_generator(tmp_path, capsys):
    folder = save_checkpoints(tmp_path, ("drift", "encoder"))
    out = ["--output_dir", str(tmp_path / "out")]
    assert main(["sample", str(folder["drift"]), "--num_images", "5", "--batch_size", "2", *out]) == 0
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 5
    refused = ["sample", str(folder["drift"]), "--num_images", "2", "--num_inference_steps", "3"]
    assert main([*refused, "--output_dir", str(tmp_path / "other")]) == 2
    assert "does not take ['num_inference_steps']" in capsys.readouterr().err
    judged = ["evaluate", str(folder["drift"]), "--num_images", "12", "--evaluation_images", "12", "--json"]
    assert main([*judged, "--extractor", str(folder["encoder"])]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["kind"] == "drift" and any(name.startswith("fid_") for name in entry["metrics"])
