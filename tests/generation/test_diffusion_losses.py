"""Losses against loops from the formulas in float64, and diffusers' own scheduler."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from hf_dpssl.generation.diffusion import make_scheduler, make_transformer, training_example
from hf_dpssl.generation.diffusion_losses import log_variance_range, min_snr_weights, objective_loss, variational_bound

STEPS = [0, 1, 2, 10, 250, 998, 999]


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


@pytest.mark.parametrize("objective", ["flow", "epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [0.5, 5.0])
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
