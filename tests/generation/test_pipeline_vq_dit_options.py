"""The pipeline's options: guidance, micro-batches, callbacks, pictures, masks, mixtures, devices, and bad input."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import for_each
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from tiny_pipelines import NAMES, draw_dit, generator, make_dit

from hf_dpssl import VQDiTPipeline
from hf_dpssl.generation.guidance import Guidance


@pytest.fixture(scope="module")
def pipeline():
    return make_dit()


def latents_of(pipeline, labels, **options):
    return draw_dit(pipeline, labels, **{"output_type": "latent", "guidance_scale": 3.0} | options)


def predictions(pipeline, labels, **options):
    """(timestep, prediction) of each step, at latents that are 1."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((float(timestep), tensors["prediction"]))
        return {"latents": torch.ones(len(labels), 4, 8, 8)}

    wanted = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ("prediction",)}
    latents_of(pipeline, labels, latents=torch.ones(len(labels), 4, 8, 8), **wanted, **options)
    return seen


def test_guidance_acts_inside_its_interval_only(pipeline):
    options = {"num_inference_steps": 8}
    everywhere, nowhere = (
        predictions(pipeline, [0, 1], **options),
        predictions(pipeline, [0, 1], guidance_scale=1.0, **options),
    )
    for (time, found), guided, plain in zip(
        predictions(pipeline, [0, 1], guidance_interval=(0.25, 0.75), **options), everywhere, nowhere, strict=True
    ):
        expected = guided[1] if 250 <= time <= 750 else plain[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.equal(guided[1], plain[1])


def test_steps_outside_the_interval_run_on_half_of_the_batch(pipeline):
    rows, hook = [], pipeline.transformer.pos_embed.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    try:
        latents_of(pipeline, [0, 1], guidance_interval=(0.4, 1.0), num_inference_steps=4)  # at 1, 2/3, 1/3, 0
    finally:
        hook.remove()
    assert rows == [4, 4, 2, 2]


def test_rescaled_guidance_equals_that_of_diffusers():
    with_class, without = torch.randn(2, 3, 4, 8, 8, generator=generator()).unbind(0)
    guided = without + 3 * (with_class - without)
    expected = rescale_noise_cfg(guided, with_class, guidance_rescale=0.7)
    torch.testing.assert_close(Guidance(3.0, None, 0.7).combine(with_class, without, 4), expected)
    variance = torch.randn(3, 4, 8, 8, generator=generator(1))
    found = Guidance(3.0).combine(torch.cat([with_class, variance], 1), torch.cat([without, -variance], 1), 4)
    assert torch.equal(found[:, :4], guided) and torch.equal(found[:, 4:], variance)


def test_images_per_label_follow_one_another_and_seeds_stand_for_generators(pipeline):
    several = latents_of(pipeline, ["dog", 0], num_images_per_label=2, generator=[3, 4, 5, 6])
    repeated = latents_of(pipeline, [1, 1, 0, 0], generator=[generator(seed) for seed in (3, 4, 5, 6)])
    assert torch.equal(several, repeated)


@for_each("output_type", ["pil", "np", "pt", "latent"])
def test_micro_batches_give_the_same_images(pipeline, output_type):
    whole = draw_dit(pipeline, [0, 1, 2, 0, 1], output_type=output_type)
    parts = draw_dit(pipeline, [0, 1, 2, 0, 1], output_type=output_type, batch_size=2)
    assert len(parts) == 5 and type(parts) is type(whole)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64), atol=1e-4)


def test_callback_sees_each_step_and_may_replace_latents(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"]))
        return {"latents": torch.zeros(1, 4, 8, 8)} if step == 3 else None

    found = latents_of(pipeline, [0], callback_on_step_end=callback)
    assert torch.equal(found, torch.zeros(1, 4, 8, 8)) and pipeline.num_timesteps == 4
    assert [entry[0] for entry in seen] == [0, 1, 2, 3]
    scheduler = copy.deepcopy(pipeline.scheduler)
    scheduler.set_timesteps(4)
    assert [entry[1] for entry in seen] == scheduler.timesteps.tolist()


def test_interrupt_stops_the_steps_and_leaves_out_what_was_not_begun(pipeline):
    trace = []

    def callback(pipe, step, timestep, tensors):
        trace.append(tensors["latents"])
        pipe._interrupt = step == 1

    found = latents_of(pipeline, [0, 1, 2], batch_size=2, callback_on_step_end=callback)
    assert len(trace) == 2 and torch.equal(found, trace[-1]) and len(found) == 2 and pipeline.interrupt
    assert len(latents_of(pipeline, [0, 1, 2], batch_size=2)) == 3


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def test_pictures_of_all_kinds_mean_the_same_and_strength_says_how_much_stays(pipeline):
    image, options = picture(), {"quantize": False, "generator": generator()}
    found = draw_dit(pipeline, [0], image=image, strength=0.5, **options)
    array = np.asarray(image, dtype=np.float32) / 255
    for other in ([image], array, array[None], torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(
            found, draw_dit(pipeline, [0], image=other, strength=0.5, **options | {"generator": generator()})
        )
    with torch.no_grad():
        known = pipeline.vae.normalize_latents(
            pipeline.vae.encode_latents(torch.from_numpy(array).permute(2, 0, 1)[None] * 2 - 1)
        )
    distance = [
        float((latents_of(pipeline, [0], image=image, strength=s, num_inference_steps=20) - known).abs().mean())
        for s in (0.05, 0.4, 0.9)
    ]
    assert distance[0] < 0.1 and distance[0] < distance[1] < distance[2]


def test_inpainting_keeps_all_pixels_outside_the_mask_bit_by_bit(pipeline):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (3, 3, 9, 12))
    images = [picture(0), picture(1)]
    found = draw_dit(pipeline, [0, 1], image=images, mask_image=mask, output_type="pil")
    outside = np.asarray(mask) == 0
    for given, painted in zip(images, found, strict=True):
        assert np.array_equal(np.asarray(given)[outside], np.asarray(painted)[outside])
        assert not np.array_equal(np.asarray(given)[~outside], np.asarray(painted)[~outside])


def test_interpolation_ends_in_the_images_of_its_classes_and_seeds(pipeline):
    options = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    found = pipeline.interpolate("cat", "horse", 5, generator=[1, 2], **options).images
    ends = [pipeline(label, generator=seed, **options).images for label, seed in (("cat", 1), ("horse", 2))]
    torch.testing.assert_close(found[[0, -1]], torch.cat(ends), rtol=0, atol=1e-4)
    steps = (found[1:] - found[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < (found[-1] - found[0]).norm()
    same_noise = pipeline.interpolate("cat", None, 3, generator=1, **options).images
    torch.testing.assert_close(same_noise[:1], ends[0], rtol=0, atol=1e-4)
    assert pipeline.interpolate(None, None, 2, generator=[1, 2], **options).images.shape == (2, 4, 8, 8)


@pytest.mark.extended
def test_compiled_and_offloaded_models_give_the_same_images():
    pipeline = make_dit()
    expected = latents_of(pipeline, [0, 1])
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(latents_of(pipeline, [0, 1]), expected, rtol=0, atol=1e-4)
    mixed = latents_of(pipeline, [("cat", "dog", 0.5)])
    pipeline = make_dit()
    torch.testing.assert_close(mixed, latents_of(pipeline, [("cat", "dog", 0.5)]), rtol=0, atol=1e-4)
    whole = draw_dit(pipeline, [0, 1], image=picture(), strength=0.5)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert "forward" in vars(pipeline.transformer)
    torch.testing.assert_close(draw_dit(pipeline, [0, 1], image=picture(), strength=0.5), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["flow", "epsilon"])
def test_one_pipeline_gives_several_threads_the_images_it_gives_one(objective):
    pipeline = make_dit(objective=objective)
    runs = [
        {"generator": seed, "num_inference_steps": steps, "guidance_scale": scale, "class_labels": label}
        for seed, (steps, scale, label) in enumerate(
            [(5, 1.0, [0]), (9, 3.0, [1]), (7, 5.0, [("cat", "dog", 0.3)]), (6, 2.0, [2])]
        )
    ]
    alone = [pipeline(output_type="latent", **run).images for run in runs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = pool.map(lambda run: pipeline(output_type="latent", **run).images, runs)
            for found, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_hooks_run_also_for_mixtures_of_classes_and_change_no_image():
    for label, guidance in (([("cat", "dog", 0.3)], 3.0), ([("cat", None, 0.5), "dog"], 1.0)):
        pipeline = make_dit()
        expected = latents_of(pipeline, label, guidance_scale=guidance)
        calls = []
        for module in (pipeline.transformer, pipeline.transformer.transformer_blocks[1]):
            module.register_forward_hook(lambda module, args, output, calls=calls: calls.append(module))
        found = latents_of(pipeline, label, guidance_scale=guidance)
        assert calls == [pipeline.transformer.transformer_blocks[1], pipeline.transformer] * 4
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        embedders = [block.norm1.emb.class_embedder for block in pipeline.transformer.transformer_blocks]
        assert not any(embedder._forward_hooks for embedder in embedders), "ours are gone"
    offloaded = make_dit()
    offloaded.enable_model_cpu_offload(device="cpu")
    options = {"class_labels": [("cat", "dog", 0.3)], "generator": 0, "num_inference_steps": 3, "output_type": "pt"}
    torch.testing.assert_close(offloaded(**options).images, make_dit()(**options).images, rtol=0, atol=1e-4)


def test_a_callback_changes_the_guidance_from_its_step_on(pipeline):
    def change(to, at):
        def callback(pipe, step, timestep, tensors):
            if step == at:
                pipe._guidance_scale = to
            seen.append(pipe.guidance_scale)
            return {}

        return callback

    for start, to, at in ((3.0, 0.0, 1), (1.0, 4.0, 0), (2.0, 5.0, 2)):
        seen = []
        found = latents_of(pipeline, [0], guidance_scale=start, callback_on_step_end=change(to, at))
        assert seen[: at + 1] == [start] * at + [to] and pipeline.guidance_scale == max(1, to)
        first, second = ({"guidance_scale": max(1.0, scale)} for scale in (start, to))
        trace = []

        def keep(pipe, step, timestep, tensors, trace=trace):
            trace.append(tensors["latents"])
            return {}

        latents_of(pipeline, [0], **first, callback_on_step_end=keep)
        before = trace[at].clone()
        trace.clear()

        def jump(pipe, step, timestep, tensors, before=before, at=at):
            return {"latents": before} if step == at else {}

        expected = latents_of(pipeline, [0], **second, callback_on_step_end=jump)  # as if it had come here by the first
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_parts_that_are_replaced_are_checked_at_the_call_and_components_keep_names_and_fingerprint():
    pipeline, other = make_dit(), make_dit(seed=1)
    again = VQDiTPipeline(**pipeline.components)
    assert again.class_names == NAMES and dict(again.config) == dict(pipeline.config)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw_dit(again, ["dog"]), draw_dit(pipeline, ["dog"]))
    with pytest.raises(ValueError, match="is not the one the transformer was trained on"):
        VQDiTPipeline(**pipeline.components | {"vae": other.vae})
    own = pipeline.vae
    pipeline.vae = other.vae
    with pytest.raises(ValueError, match="is not the one the transformer was trained on"):
        draw_dit(pipeline, [0])
    pipeline.vae = copy.deepcopy(own)
    draw_dit(pipeline, [0])
    pipeline.vae.config.latent_channels = 3
    with pytest.raises(ValueError, match="do not belong together"):
        draw_dit(pipeline, [0])


def test_precision_moves_keep_the_noise(pipeline):
    half = make_dit().to(torch.bfloat16)
    shown = []
    half.transformer.pos_embed.register_forward_hook(lambda module, args, out: shown.append(args[0]))
    latents = latents_of(half, [0])
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    assert latents.dtype == torch.float32 and torch.equal(shown[0][:1], noise.bfloat16())
    exact = latents_of(make_dit(), [0])
    assert (latents - exact).abs().mean() < 0.05 * exact.abs().mean()


BAD = [
    ({"guidance_scale": float("nan")}, "guidance_scale must be at least 1"),
    ({"guidance_interval": (0.7, 0.3)}, "0 <= low < high <= 1"),
    ({"guidance_rescale": 2.0}, r"guidance_rescale must lie in \[0, 1\]"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be at least 1, got 2.5"),
    ({"num_images_per_label": 0}, "num_images_per_label must be at least 1"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"generator": -1}, r"seeds must lie in \[0, 2\^63\), got -1"),
    ({"generator": [1, -2]}, "got -2"),
    ({"generator": "seed"}, "torch.Generators or seeds"),
    ({"generator": [1, 2, 3]}, "2 images need one generator or 2, got 3"),
    ({"image": picture(mode="L")}, r"mode RGB and 16 x 16 pixels, got mode L and 16 x 16: `image.convert\('RGB'\)"),
    ({"image": picture().resize((8, 16))}, "got mode RGB and 8 x 16"),
    ({"image": torch.zeros(3, 8, 8)}, r"got shape \(1, 3, 8, 8\)"),
    ({"image": torch.full((3, 16, 16), 2.0)}, r"image must lie in \[0, 1\], got \[2, 2\]"),
    ({"image": np.zeros((16, 16, 3), dtype=np.uint8)}, "give floats in"),
    ({"image": [picture()] * 3}, "one picture or one for each of 2 images, got 3"),
    ({"image": "cat.png"}, "must be PIL images, an array or a tensor, got str"),
    ({"image": picture(), "strength": 0.0}, r"strength must lie in \(0, 1\]"),
    ({"image": picture(), "strength": 0.1}, "leaves none: take at least 0.25"),
    ({"image": picture(), "mask_image": Image.new("L", (16, 16))}, "mask_image is black"),
    ({"image": picture(), "mask_image": picture()}, "mask_image must be of mode L"),
    ({"mask_image": Image.new("L", (16, 16), 255)}, "are for a given image"),
    ({"callback_on_step_end_tensor_inputs": ("noise",)}, r"can be given \('latents', 'prediction'\)"),
]  # fmt: skip


@for_each("options, message", BAD)
def test_bad_options_are_refused_saying_what_is_allowed(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        draw_dit(pipeline, [0, 1], **options)


@for_each(
    "labels, message",
    [
        ([1.5], "an id .integer. or a name, got 1.5"),
        ([("cat", "dog", 1.5)], "share of the other"),
        ([("cat", "dog")], "share of the other"),
    ],
)
def test_bad_labels_are_refused(pipeline, labels, message):
    with pytest.raises(ValueError, match=message):
        draw_dit(pipeline, labels)


def test_parts_that_do_not_belong_together_are_refused(pipeline):
    with pytest.raises(ValueError, match="has 3 classes, but id2label names 2"):
        VQDiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler, {0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="ids 0 to 2, but 0 is missing"):
        VQDiTPipeline(pipeline.transformer, pipeline.vae, pipeline.scheduler, {1: "cat", 2: "dog", 3: "horse"})
    other = make_dit().vae
    other.config.image_size = 32
    with pytest.raises(
        ValueError, match="latents of 4 channels and side 16, the transformer takes 4 channels and side 8"
    ):
        VQDiTPipeline(pipeline.transformer, other, pipeline.scheduler, dict(enumerate(NAMES)))
    with pytest.raises(ValueError, match="at least 2 images"):
        pipeline.interpolate("cat", "dog", 1)


@pytest.mark.parametrize("names", [NAMES, []])
def test_folder_of_an_earlier_version_loads_and_draws_the_same(tmp_path, names):
    """Without prediction_type and noise_schedule in model_index.json, which the scheduler then tells."""
    pipeline = make_dit(names, objective="epsilon")
    pipeline.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    content = json.loads(index.read_text())
    assert content.pop("prediction_type") == "epsilon" and content.pop("noise_schedule")["beta_end"] == 0.02
    index.write_text(json.dumps(content))
    again = VQDiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.class_names == names and again.config.prediction_type == "epsilon"
    labels = names[:2] or None
    assert torch.equal(latents_of(again, labels), latents_of(pipeline, labels))


def test_given_noise_levels_are_used_and_refused_where_the_scheduler_takes_none(pipeline):
    times = []
    wanted = {"callback_on_step_end": lambda pipe, step, timestep, tensors: times.append(float(timestep))}
    latents_of(pipeline, [0], sigmas=[1.0, 0.5, 0.25], **wanted)
    assert times == [1000.0, 500.0, 250.0]
    other = make_dit(objective="epsilon")
    with pytest.raises(ValueError, match="DDIMScheduler takes no sigmas"):
        latents_of(other, [0], sigmas=[1.0, 0.5])
