"""The transformer that is trained, the objectives, and class dropout."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from hf_dpssl.generation.diffusion import dropped_labels, make_scheduler, make_transformer, training_example
from hf_dpssl.generation.pipeline_vq_dit import switch_off_label_dropout_

SIZE = dict(num_layers=2, width=32, num_heads=2, patch_size=2, latent_channels=4, latent_size=8)


def inputs(batch: int = 6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.linspace(0, 999, batch), torch.arange(batch) % 10


def test_output_is_exactly_zero_before_training_and_every_parameter_but_embedders_can_learn():
    torch.manual_seed(0)
    transformer = make_transformer(num_classes=10, **SIZE).train()
    latents, timesteps, labels = inputs()
    assert bool((transformer(latents, timestep=timesteps, class_labels=labels).sample == 0).all())
    optimizer = torch.optim.SGD(transformer.parameters(), lr=1.0)
    for _ in range(3):
        loss = (transformer(latents, timestep=timesteps, class_labels=labels).sample - latents).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(
        float(p.grad.abs().sum()) > 0 for p in transformer.transformer_blocks[1].attn1.parameters() if p.ndim > 1
    )


def test_blocks_other_than_initialisation_are_the_librarys_own():
    ours = make_transformer(num_classes=10, **SIZE)
    stock = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    assert torch.equal(ours.pos_embed.pos_embed, stock.pos_embed.pos_embed)


def test_all_blocks_see_the_same_labels_in_train_mode_also_after_reload(tmp_path):
    torch.manual_seed(0)
    transformer = make_transformer(num_classes=10, **SIZE)
    torch.nn.init.normal_(transformer.proj_out_2.weight)
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.1)
    transformer.save_pretrained(tmp_path)
    reloaded = DiTTransformer2DModel.from_pretrained(tmp_path)
    switch_off_label_dropout_(reloaded)
    latents, timesteps, labels = inputs(64)
    timesteps = torch.linspace(0, 999, 64)
    for model in (transformer, reloaded):
        in_training = model.train()(latents[:1].expand(64, -1, -1, -1), timestep=timesteps, class_labels=labels).sample
        in_evaluation = model.eval()(latents[:1].expand(64, -1, -1, -1), timestep=timesteps, class_labels=labels).sample
        assert torch.equal(in_training, in_evaluation)
    tables = [m for m in transformer.modules() if isinstance(m, LabelEmbedding)]
    assert all(len(table.embedding_table.weight) == 11 for table in tables)  # the null row stays


def test_flow_example_is_the_straight_line_between_latents_and_noise():
    latents, _, _ = inputs()
    ids = torch.arange(6)
    noised, timesteps, target = training_example(
        latents, ids, 3, seed=0, objective="flow", scheduler=make_scheduler("flow")
    )
    sigma = (timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noised, latents + sigma * target)
    torch.testing.assert_close(noised + (1 - sigma) * target, target + latents)  # sigma = 1 is pure noise


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_ddpm_examples_follow_the_closed_form(objective):
    latents, _, _ = inputs()
    scheduler = make_scheduler(objective)
    noised, timesteps, target = training_example(
        latents, torch.arange(6), 0, seed=0, objective=objective, scheduler=scheduler
    )
    alpha = DDPMScheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    if objective == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x, and x_t = sqrt(a) x + sqrt(1 - a) eps
        noise = (target + (1 - alpha).sqrt() * latents) / alpha.sqrt()
    else:
        noise = target
    torch.testing.assert_close(noised, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, rtol=1e-4, atol=1e-4)


def test_example_of_a_sample_does_not_depend_on_its_batch():
    latents, _, labels = inputs()
    ids, options = torch.arange(6), dict(seed=5, objective="flow", scheduler=None)
    whole = training_example(latents, ids, 2, **options)
    part = training_example(latents[2:4], ids[2:4], 2, **options)
    assert all(torch.equal(a[2:4], b) for a, b in zip(whole, part, strict=True))
    other_epoch = training_example(latents, ids, 3, **options)
    assert not torch.equal(whole[0], other_epoch[0])


def test_labels_are_dropped_with_the_stated_probability_and_unlabelled_always():
    ids = torch.arange(20_000)
    labels = ids % 10
    dropped = dropped_labels(labels, ids, 0, seed=0, probability=0.1, null_class=10)
    share = float((dropped == 10).double().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 20_000)
    assert bool((dropped[dropped < 10] == labels[dropped < 10]).all())
    assert bool((dropped_labels(-torch.ones_like(labels), ids, 0, seed=0, probability=0, null_class=1) == 1).all())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        make_transformer(num_classes=10, **(SIZE | {"width": 33}))
    with pytest.raises(ValueError, match="patches of 3"):
        make_transformer(num_classes=10, **(SIZE | {"patch_size": 3}))
    with pytest.raises(ValueError, match="'flow', 'epsilon', 'v_prediction'"):
        make_scheduler("score")
