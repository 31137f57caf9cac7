"""The transformer that is trained, the objectives, class dropout; losses against loops from the formulas in float64."""

import math

import pytest
import torch
from cases import for_each
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding

from hf_dpssl.generation.pipeline_vq_dit import switch_off_label_dropout_
from hf_dpssl.latent_training.diffusion import (
    dropped_labels,
    log_variance_range,
    make_scheduler,
    make_transformer,
    min_snr_weights,
    objective_loss,
    training_example,
    variational_bound,
)

STEPS = [0, 1, 2, 10, 250, 998, 999]
SIZE = dict(num_layers=2, width=32, num_heads=2, patch_size=2, latent_channels=4, latent_size=8)


def inputs(batch: int = 6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.linspace(0, 999, batch), torch.arange(batch) % 10


def test_output_is_exactly_zero_before_training_and_every_parameter_learns():
    torch.manual_seed(0)
    transformer = make_transformer(num_classes=10, **SIZE).train()
    latents, timesteps, labels = inputs()
    assert bool((transformer(latents, timestep=timesteps, class_labels=labels).sample == 0).all())
    before = {name: parameter.detach().clone() for name, parameter in transformer.named_parameters()}
    optimizer = torch.optim.SGD(transformer.parameters(), lr=1.0)
    for _ in range(4):
        loss = (transformer(latents, timestep=timesteps, class_labels=labels).sample - latents).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, parameter in transformer.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(before)


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


# Losses.


def draws(*names: str, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(STEPS), 2, 3, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in names]


def normal_kl(mean_1: float, variance_1: float, mean_2: float, variance_2: float) -> float:
    ratio = variance_1 / variance_2
    return 0.5 * (ratio - 1 - math.log(ratio) + (mean_1 - mean_2) ** 2 / variance_2)


def test_bound_is_the_kl_divergence_from_the_true_posterior():
    scheduler = make_scheduler("epsilon", learned_variance=True)
    clean, noise, predicted, variance = draws("clean", "noise", "predicted", "variance")
    variance = variance.tanh()
    found = variational_bound(predicted, variance, noise, torch.tensor(STEPS), scheduler)
    betas = scheduler.betas.double().tolist()
    for image, t in enumerate(STEPS):
        kept = math.prod(1 - beta for beta in betas[: t + 1])
        before = kept / (1 - betas[t])
        terms = []
        for x, e, guess, v in zip(
            *(values[image].flatten().tolist() for values in (clean, noise, predicted, variance)), strict=True
        ):
            noised = math.sqrt(kept) * x + math.sqrt(1 - kept) * e
            x_guess = (noised - math.sqrt(1 - kept) * guess) / math.sqrt(kept)
            at = max(t, 1)
            kept_at = math.prod(1 - beta for beta in betas[: at + 1])
            low = betas[at] * (1 - kept_at / (1 - betas[at])) / (1 - kept_at)
            learned = math.exp((v + 1) / 2 * math.log(betas[t]) + (1 - v) / 2 * math.log(low))
            if t == 0:
                terms.append(0.5 * math.log(2 * math.pi * learned) + (x - x_guess) ** 2 / (2 * learned))
                continue
            means = [
                math.sqrt(before) * betas[t] / (1 - kept) * value
                + math.sqrt(1 - betas[t]) * (1 - before) / (1 - kept) * noised
                for value in (x, x_guess)
            ]
            terms.append(normal_kl(means[0], low, means[1], learned))
        expected = sum(terms) / len(terms) / math.log(2)
        assert float(found[image]) == pytest.approx(expected, rel=1e-6), t
    in_single = variational_bound(*(x.float() for x in (predicted, variance, noise)), torch.tensor(STEPS), scheduler)
    torch.testing.assert_close(in_single.double(), found, rtol=1e-4, atol=1e-5)


def test_learned_variance_is_the_one_diffusers_samples_with():
    scheduler = make_scheduler("epsilon", learned_variance=True)
    low, high = log_variance_range(scheduler)
    stock = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    for t in range(1, 1000, 37):
        for v in (-1.0, -0.3, 1.0):
            share = (v + 1) / 2
            expected = stock._get_variance(t, predicted_variance=torch.tensor(v))
            assert float(share * high[t] + (1 - share) * low[t]) == pytest.approx(float(expected), abs=2e-3)
    assert scheduler.config.variance_type == "learned_range" and not scheduler.config.clip_sample


def test_hybrid_loss_teaches_the_variance_by_the_bound_and_the_mean_by_the_squared_error_alone():
    scheduler = make_scheduler("epsilon", learned_variance=True)
    noise, predicted, variance = draws("noise", "predicted", "variance", dtype=torch.float32)
    prediction = torch.cat([predicted, variance.tanh()], 1).requires_grad_()
    parts = objective_loss(prediction, noise, torch.tensor(STEPS), objective="epsilon", scheduler=scheduler)
    parts["loss"].backward()
    assert parts["loss"].item() == pytest.approx((parts["simple"] + parts["vlb"]).item())
    torch.testing.assert_close(prediction.grad[:, :2], 2 * (predicted - noise) / noise.numel())
    assert bool((prediction.grad[:, 2:] != 0).all())


def test_variance_of_the_posterior_is_the_best_for_an_exact_mean():
    scheduler = make_scheduler("epsilon", learned_variance=True)
    (noise,) = draws("noise")
    steps = torch.tensor(STEPS)
    bounds = [variational_bound(noise, torch.full_like(noise, v), noise, steps, scheduler) for v in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(bounds[0][1:], torch.zeros(len(STEPS) - 1, dtype=torch.float64))
    assert bool((bounds[0][1:] <= bounds[1][1:]).all() and (bounds[1][1:] <= bounds[2][1:]).all())


@for_each("objective", ["flow", "epsilon", "v_prediction"])
@for_each("gamma", [0.5, 5.0])
def test_min_snr_weighs_errors_of_the_clean_latents_by_the_clipped_ratio(objective, gamma):
    scheduler = make_scheduler(objective)
    clean, error = draws("clean", "error")
    clean, error, ids = clean.float(), 0.1 * error, torch.arange(len(STEPS))
    noised, timesteps, target = training_example(clean, ids, 0, seed=3, objective=objective, scheduler=scheduler)
    weights = min_snr_weights(timesteps, objective=objective, scheduler=scheduler, gamma=gamma)
    for i in range(len(STEPS)):
        if objective == "flow":
            signal, noise = 1 - float(timesteps[i]) / 1000, float(timesteps[i]) / 1000
        else:
            kept = float(scheduler.alphas_cumprod[timesteps[i]])
            signal, noise = math.sqrt(kept), math.sqrt(1 - kept)
        x, guess = noised[i].double(), target[i].double() + error[i]
        if objective == "flow":
            restored = x - noise * guess
        elif objective == "epsilon":
            restored = (x - noise * guess) / signal
        else:
            restored = signal * x - noise * guess
        expected = min(signal**2 / noise**2, gamma) * (restored - clean[i]).square().mean()
        # The small difference of large numbers leaves float32's error of x and target in `restored`.
        assert float(weights[i] * error[i].square().mean()) == pytest.approx(float(expected), rel=1e-3)
    prediction = (target + error).float()
    options = dict(objective=objective, scheduler=scheduler, min_snr_gamma=gamma)
    found = objective_loss(prediction, target, timesteps, **options)["loss"]
    expected = (weights * error.square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_logit_normal_timesteps_have_the_stated_mean_and_spread():
    ids = torch.arange(20_000)
    options = dict(seed=0, objective="flow", scheduler=None, logit_normal=(0.5, 2.0))
    _, timesteps, _ = training_example(torch.zeros(len(ids), 1, 1, 1), ids, 0, **options)
    logits = (timesteps.double() / 1000).logit()
    assert float(logits.mean()) == pytest.approx(0.5, abs=4 * 2 / math.sqrt(len(ids)))
    assert float(logits.std()) == pytest.approx(2.0, rel=0.03)
    assert float(timesteps.min()) > 0 and float(timesteps.max()) < 1000


def test_output_with_learned_variance_is_zero_before_training():
    size = dict(num_layers=1, width=16, num_heads=2, patch_size=2, latent_channels=4, latent_size=4, num_classes=3)
    transformer = make_transformer(**size, learned_variance=True)
    sample = transformer(
        torch.randn(2, 4, 4, 4), timestep=torch.tensor([1, 9]), class_labels=torch.tensor([0, 3])
    ).sample
    assert sample.shape == (2, 8, 4, 4) and bool((sample == 0).all())


# What is refused.


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        make_transformer(num_classes=10, **(SIZE | {"width": 33}))
    with pytest.raises(ValueError, match="patches of 3"):
        make_transformer(num_classes=10, **(SIZE | {"patch_size": 3}))
    with pytest.raises(ValueError, match="'flow', 'epsilon', 'v_prediction'"):
        make_scheduler("score")


def test_what_does_not_go_together_is_refused():
    wide = torch.zeros(1, 4, 2, 2)
    flow = dict(objective="flow", scheduler=make_scheduler("flow"))
    with pytest.raises(ValueError, match="learned variance belongs to the objective 'epsilon', got 'flow'"):
        objective_loss(wide, wide[:, :2], torch.zeros(1), **flow)
    with pytest.raises(ValueError, match="4 channels predict neither the 3"):
        objective_loss(wide, wide[:, :3], torch.zeros(1), **flow)
    with pytest.raises(ValueError, match="must be positive"):
        min_snr_weights(torch.zeros(1), gamma=0, **flow)
    with pytest.raises(ValueError, match="got 'v_prediction'"):
        make_scheduler("v_prediction", learned_variance=True)
    with pytest.raises(ValueError, match="logit-normal timesteps are for the objective 'flow'"):
        training_example(
            wide, torch.zeros(1).long(), 0, seed=0, objective="epsilon", scheduler=None, logit_normal=(0, 1)
        )


@pytest.mark.extended
def test_forward_of_the_transformer_is_one_graph():
    """By torch's tracer alone: fullgraph refuses a second one; nothing is compiled."""
    transformer = make_transformer(num_classes=10, **SIZE).train()
    for parameter in transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    latents, timestep, labels = inputs()
    expected = transformer(latents, timestep=timestep, class_labels=labels).sample
    compiled = torch.compile(transformer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(latents, timestep=timestep, class_labels=labels).sample, expected)
    assert expected.abs().max() > 0.1
