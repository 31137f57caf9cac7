"""Token pipeline: codes against a loop without cache, sampling against the softmax, guidance, classes, saving."""

import accelerate
import numpy as np
import pytest
import torch
from cases import for_each
from scipy.stats import chi2
from tiny_pipelines import CODES, NAMES, TOKENS, generator, make_token_model, make_tokens, make_vae
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from hf_dpssl import VQTokenPipeline
from hf_dpssl.generation.pipeline_vq_token import CodeSampler, code_nats, token_sequences


@pytest.fixture(scope="module")
def pipelines():
    return [make_tokens(architecture=architecture) for architecture in ("gpt2", "llama")]


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines[0]


def draw(pipeline, labels, **options):
    return pipeline(labels, **({"output_type": "codes", "generator": generator()} | options)).images


@torch.no_grad()
def reference(pipeline, ids, guidance_scale=1.0, temperature=1.0, generators=None):
    """Codes (N, h*w) without cache or batch: both passes over the whole sequence for each code of each image."""
    drawn = []
    for number, class_id in enumerate(ids):
        codes = []
        for _ in range(TOKENS):
            logits = [
                pipeline.language_model(torch.tensor([[start, *codes]]), use_cache=False).logits[0, -1, :CODES]
                for start in (CODES + class_id, CODES + 3)
            ]
            scores = (logits[1] + guidance_scale * (logits[0] - logits[1])) / (temperature or 1)
            if temperature:
                scores = scores - torch.empty(CODES).exponential_(generator=generators[number]).log()
            codes.append(int(scores.argmax()))
        drawn.append(codes)
    return torch.tensor(drawn)


@for_each("guidance_scale, temperature", [(1.0, 1.0), (3.0, 1.0), (2.0, 0.5), (1.5, 0.0)])
def test_codes_equal_the_loop_without_cache(pipelines, guidance_scale, temperature):
    for pipeline in pipelines:
        options = dict(guidance_scale=guidance_scale, temperature=temperature)
        found = draw(pipeline, [0, 2, 1], generator=[generator(s) for s in (5, 6, 7)], **options)
        expected = reference(pipeline, [0, 2, 1], generators=[generator(s) for s in (5, 6, 7)], **options)
        assert found.shape == (3, 4, 4) and found.dtype == torch.int64
        assert torch.equal(found.flatten(1), expected)


def test_guidance_of_one_is_no_guidance_and_more_changes_the_codes(pipeline):
    plain = draw(pipeline, [0, 1], temperature=0.0)
    assert torch.equal(plain, draw(pipeline, [0, 1], guidance_scale=1.0, temperature=0.0))
    assert not torch.equal(plain, draw(pipeline, [0, 1], guidance_scale=5.0, temperature=0.0))
    without = draw(pipeline, None, num_images=2, temperature=0.0)
    assert torch.equal(without[0], without[1]) and not torch.equal(plain[0], without[0])


def test_greedy_guided_codes_equal_transformers_own_processor(pipelines):
    for pipeline in pipelines:
        prompt = torch.tensor([[CODES], [CODES + 2]])
        null = torch.full((2, 1), CODES + 3)
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            2.5, pipeline.language_model, unconditional_ids=null, use_cache=False
        )
        tokens = pipeline.language_model.generate(
            prompt, logits_processor=LogitsProcessorList([processor]), max_new_tokens=TOKENS, do_sample=False
        )
        assert torch.equal(draw(pipeline, [0, 2], guidance_scale=2.5, temperature=0.0).flatten(1), tokens[:, 1:])


def test_small_temperatures_approach_the_most_probable_codes(pipeline):
    greedy = draw(pipeline, [0, 1, 2], temperature=0.0)
    assert torch.equal(greedy, draw(pipeline, [0, 1, 2], temperature=1e-4))
    assert not torch.equal(greedy, draw(pipeline, [0, 1, 2], temperature=2.0))


def frequencies(scores, options, draws=20_000):
    """Counts (K,) of the first code over many images whose scores are the same."""
    sampler = CodeSampler(CODES, generator(1), **options)
    sampled = sampler(None, scores.expand(draws, -1)).argmax(1)
    return torch.bincount(sampled, minlength=CODES).double()


WARPED = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
]


@for_each("options", WARPED)
def test_draws_follow_the_softmax_of_transformers_warpers(options):
    scores = torch.randn(1, CODES + 4, generator=generator(2)) * 1.5
    makers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    warpers = LogitsProcessorList([makers[name](value) for name, value in options.items()])
    expected = warpers(None, scores[:, :CODES]).softmax(1)[0].double()
    counts = frequencies(scores, options)
    assert bool((counts[expected == 0] == 0).all()) and float(counts.sum()) == 20_000
    likely = expected > 0
    statistic = ((counts - 20_000 * expected).pow(2) / (20_000 * expected))[likely].sum()
    assert float(statistic) < chi2.ppf(0.9999, int(likely.sum()) - 1)


def test_whole_images_follow_the_models_distribution():
    """Chi-square over all 81 images of 2 x 2 codes of a codebook of 3, against their exact probabilities."""
    model = make_token_model([], num_codes=3, num_tokens=4)
    for parameter in model.parameters():
        parameter.data.mul_(0.3)  # no image so rare that its count says nothing
    pipeline = VQTokenPipeline(model, make_vae(num_codes=3, image_size=8))
    images = torch.cartesian_prod(*[torch.arange(3)] * 4)  # (81, 4)
    with torch.no_grad():
        nats = code_nats(model, images, torch.zeros(81, dtype=torch.int64), 3).double().sum(1)
    drawn = draw(pipeline, None, num_images=40_000).flatten(1)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81).double()
    expected = 40_000 * nats.neg().exp()
    assert float(expected.sum()) == pytest.approx(40_000) and float(expected.min()) > 5
    assert float(expected.max() / expected.min()) > 2
    assert float(((counts - expected).pow(2) / expected).sum()) < chi2.ppf(0.9999, 80)


def test_image_of_its_own_generator_does_not_depend_on_the_batch(pipelines):
    for pipeline in pipelines:
        together = draw(pipeline, [0, 1, 2], generator=[generator(s) for s in (5, 6, 7)], guidance_scale=2.0)
        alone = draw(pipeline, [1], generator=[generator(6)], guidance_scale=2.0)
        assert torch.equal(together[1:2], alone)
        state = torch.get_rng_state()
        draw(pipeline, [0])
        assert torch.equal(state, torch.get_rng_state())


def test_seeds_lists_and_tuples_stand_for_their_generators(pipeline):
    assert torch.equal(draw(pipeline, [0, 1], generator=7), draw(pipeline, [0, 1], generator=generator(7)))
    expected = draw(pipeline, [0, 1], generator=[generator(5), generator(6)])
    for given in ([5, 6], (5, generator(6))):
        assert torch.equal(draw(pipeline, [0, 1], generator=given), expected)


def test_components_make_the_same_pipeline_and_a_replaced_autoencoder_is_checked_at_the_call():
    pipeline = make_tokens()
    again = VQTokenPipeline(**pipeline.components)
    assert again.class_names == NAMES and torch.equal(draw(again, [1]), draw(pipeline, [1]))
    again.vae = make_vae(seed=1)
    with pytest.raises(ValueError, match="not the one the language model was trained on"):
        draw(again, [1])
    again.vae = make_vae(num_codes=CODES + 1)
    with pytest.raises(ValueError, match="belongs to another codebook"):
        draw(again, [1])


def test_images_depend_on_no_generation_config_and_leave_it_alone():
    pipeline = make_tokens()
    codes = pipeline([0, 1], generator=[1, 2], output_type="codes").images
    config = pipeline.language_model.generation_config
    config.eos_token_id = int(codes[0, 0, 0])
    config.suppress_tokens = "of a damaged file"
    before = config.to_dict()
    assert torch.equal(pipeline([0, 1], generator=[1, 2], output_type="codes").images, codes)
    assert pipeline.language_model.generation_config is config and config.to_dict() == before


def test_names_ids_and_mixtures_mean_the_same(pipeline):
    by_id = draw(pipeline, [0, 2, 1])
    assert torch.equal(by_id, draw(pipeline, ["cat", "horse", "dog"]))
    assert torch.equal(by_id, draw(pipeline, ["cat", 2, 1]))
    assert draw(pipeline, "dog").shape == (1, 4, 4)


@for_each(
    "labels, options, message",
    [
        (["hors"], {}, "known are for example \\['horse'\\]"),
        ([3], {}, r"class ids lie in \[0, 2\], got 3"),
        ([], {}, "class_labels is empty"),
        (None, {"num_images": 0}, "empty"),
        ([0], {"num_images": 2}, "num_images is for images without class"),
        ([0], {"guidance_scale": 0.5}, "got 0.5"),
        ([0], {"temperature": -1.0}, "must not be negative"),
        ([0], {"top_k": 0}, "top_k must be at least 1"),
        ([0], {"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ([0], {"output_type": "latent"}, "or 'codes', got 'latent'"),
        ([0, 1], {"generator": [generator()]}, "2 images need one generator or 2, got 1"),
    ],
)
def test_bad_requests_are_refused(pipeline, labels, options, message):
    with pytest.raises(ValueError, match=message):
        draw(pipeline, labels, **options)


def test_offloaded_by_model_and_layer_by_layer_it_draws_the_same_images(pipeline):
    options = {"generator": [0, 1], "output_type": "pt"}
    moved = make_tokens()
    moved.enable_model_cpu_offload(device="cpu")
    brought = []
    for name in ("language_model", "vae"):
        hook = getattr(moved, name)._hf_hook
        bring = hook.pre_forward
        hook.pre_forward = lambda *args, name=name, bring=bring, **more: (brought.append(name), bring(*args, **more))[1]
    assert torch.equal(moved(["cat", 1], **options).images, pipeline(["cat", 1], **options).images)
    assert brought[0] == "language_model" and brought[-1] == "vae"
    for update in ("ema", "gradient"):  # the codebook is a buffer, or a parameter
        pipe = VQTokenPipeline(make_token_model(), make_vae(codebook_update=update), dict(enumerate(NAMES)))
        expected = pipe(["cat", 1], **options).images
        for model in (pipe.vae, pipe.language_model):  # as enable_sequential_cpu_offload does it
            accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        for _ in range(2):
            assert torch.equal(pipe(["cat", 1], **options).images, expected)
        assert update == "ema" or pipe.vae.quantizer.codebook.is_meta, "and is put away again"


def test_parts_that_do_not_belong_together_are_refused():
    vae, other, model = make_vae(), make_vae(seed=1), make_token_model()
    names = dict(enumerate(NAMES))
    with pytest.raises(ValueError, match="is not the one the language model was trained on"):
        VQTokenPipeline(model, other, names, vae.fingerprint())
    with pytest.raises(ValueError, match="has no codes"):
        VQTokenPipeline(model, make_vae(quantizer="none"), names)
    with pytest.raises(ValueError, match="20 tokens, but 16 codes, 2 classes and the null token make 19"):
        VQTokenPipeline(model, vae, {0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="17 positions, but an image of this autoencoder has 64 codes"):
        VQTokenPipeline(model, make_vae(image_size=32), names)
    with pytest.raises(ValueError, match="architecture must be one of"):
        make_token_model(architecture="bert")
    with pytest.raises(ValueError, match="width 30 must be a multiple of num_heads 4"):
        make_token_model(width=30, num_heads=4)


def test_saved_pipeline_draws_the_same_and_its_model_loads_with_transformers_alone(pipelines, tmp_path):
    for pipeline in pipelines:
        pipeline.save_pretrained(tmp_path)
        reloaded = VQTokenPipeline.from_pretrained(tmp_path)
        assert reloaded.class_names == NAMES
        for options in ({}, {"guidance_scale": 3.0, "top_k": 7}):
            assert torch.equal(draw(reloaded, ["dog", 2], **options), draw(pipeline, ["dog", 2], **options))
        model = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="language_model")
        tokens = model.generate(torch.tensor([[CODES + 1]] * 50), do_sample=True)  # by itself: an image of codes only
        assert tokens.shape == (50, 1 + TOKENS) and int(tokens[:, 1:].max()) < CODES
        greedy = model.generate(torch.tensor([[CODES + 1]]), do_sample=False)
        assert torch.equal(greedy[0, 1:], draw(pipeline, [1], temperature=0.0).flatten())


def test_output_types_agree_and_codes_decode_to_the_images(pipeline):
    codes, tensors = draw(pipeline, [0, 1]), draw(pipeline, [0, 1], output_type="pt")
    with torch.no_grad():
        decoded = (pipeline.vae.decode_codes(codes).pixel_values / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(tensors, decoded)
    arrays = draw(pipeline, [0, 1], output_type="np")
    np.testing.assert_array_equal(arrays, tensors.permute(0, 2, 3, 1).numpy())
    pictures = draw(pipeline, [0, 1], output_type="pil")
    np.testing.assert_array_equal(np.asarray(pictures[1]), (arrays[1] * 255).round().astype("uint8"))
    assert isinstance(pipeline([0], return_dict=False), tuple)


def test_nats_are_those_of_the_tokens_one_by_one(pipelines):
    for pipeline in pipelines:
        codes, labels = torch.randint(0, CODES, (2, 4, 4), generator=generator()), torch.tensor([1, 3])
        with torch.no_grad():
            found = code_nats(pipeline.language_model, codes, labels, CODES)
            inputs, targets = token_sequences(codes, labels, CODES)
            assert inputs[:, 0].tolist() == [CODES + 1, CODES + 3] and torch.equal(targets, codes.flatten(1))
            for image in range(2):
                for place in range(TOKENS):
                    scores = pipeline.language_model(inputs[image : image + 1, : place + 1]).logits[0, -1, :CODES]
                    expected = -scores.log_softmax(0)[targets[image, place]]
                    torch.testing.assert_close(found[image, place], expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_model_draws_without_classes_in_bfloat16_too():
    unlabelled = make_tokens(names=[])
    assert unlabelled.null_token == CODES and draw(unlabelled, None, num_images=2, guidance_scale=4.0).shape[0] == 2
    with pytest.raises(ValueError, match="pass None"):
        draw(unlabelled, [0])
    half = unlabelled.to(torch.bfloat16)
    assert torch.isfinite(draw(half, None, output_type="pt").float()).all()
