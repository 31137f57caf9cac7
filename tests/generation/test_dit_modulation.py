"""Modulations of all steps at once: the same predictions as diffusers' own forward pass."""

import torch
from cases import for_each
from diffusers import DiTTransformer2DModel
from tiny_pipelines import generator, make_dit

from hf_dpssl.generation.dit_modulation import Modulations, Predictor, can_be_split


def make_transformer(**options) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    size = dict(num_attention_heads=2, attention_head_dim=16, num_layers=3, sample_size=8, num_embeds_ada_norm=5)
    transformer = DiTTransformer2DModel(**size | options)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@for_each("options", [{}, {"out_channels": 8}, {"patch_size": 4, "in_channels": 3, "attention_bias": False}])
@for_each("labels", [[2], [4, 0, 4], [1, 1, 1]])
@torch.no_grad()
def test_predictions_equal_those_of_the_whole_model(options, labels):
    transformer, labels = make_transformer(**options), torch.tensor(labels)
    channels, timesteps = transformer.config.in_channels, torch.tensor([999.0, 500.5, 20.0])
    latents = torch.randn(len(labels), channels, 8, 8, generator=generator())
    predict = Predictor(transformer, timesteps, labels, None, null_class=5, precompute=True)
    assert predict.modulations is not None
    for step, timestep in enumerate(timesteps):
        for guided in (True, False):
            found, without = predict(latents, step, guided)
            times = timestep.expand(len(labels))
            expected = transformer(latents, timestep=times, class_labels=labels).sample
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            if guided:
                expected = transformer(latents, timestep=times, class_labels=torch.full_like(labels, 5)).sample
                torch.testing.assert_close(without, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            else:
                assert without is None


@torch.no_grad()
def test_table_in_rounds_equals_the_table_at_once():
    transformer, timesteps = make_transformer(), torch.linspace(999, 0, 7)
    labels = torch.tensor([3, 0, 5, 3])
    whole = Modulations(transformer, timesteps, labels)
    rounds = Modulations(transformer, timesteps, labels, memory_limit=2 * 3 * (6 * 3 + 2) * 32 * 4)
    assert whole.steps_at_once >= 7 and rounds.steps_at_once == 2 and len(whole.rows) == 3
    for step in (0, 1, 2, 3, 4, 5, 6, 0):
        for one, other in zip(whole.at(step), rounds.at(step), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_blended_class_equals_a_class_whose_label_rows_are_the_mean():
    transformer, other = make_transformer(), make_transformer()
    for block in other.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[4] = 0.75 * table[0] + 0.25 * table[2]
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=generator()), torch.tensor([300.0])
    blend = (torch.tensor([2]), torch.tensor([0.25]))
    found, _ = Predictor(transformer, timesteps, torch.tensor([0]), blend, None, precompute=False)(latents, 0, False)
    expected = other(latents, timestep=timesteps, class_labels=torch.tensor([4])).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_models_with_hooks_or_compilation_are_called_as_they_are():
    assert can_be_split(make_transformer())
    assert not can_be_split(torch.compile(make_transformer(), backend="eager"))
    compiled, hooked, offloaded = make_transformer(), make_transformer(), make_dit()
    compiled.compile(backend="eager")
    hooked.transformer_blocks[1].register_forward_hook(lambda module, args, output: output)
    offloaded.enable_model_cpu_offload(device="cpu")
    assert not any(can_be_split(model) for model in (compiled, hooked, offloaded.transformer))


def test_latents_are_those_without_precomputing():
    pipeline = make_dit()
    options = {
        "guidance_scale": 4.0,
        "num_inference_steps": 10,
        "output_type": "latent",
        "guidance_interval": (0.2, 0.8),
    }
    found = pipeline([0, 2, 2], generator=1, **options).images
    pipeline.precompute_modulations = False
    expected = pipeline([0, 2, 2], generator=1, **options).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
