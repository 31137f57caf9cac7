"""Mean flow: its target against a closed form and against finite differences, its draws, its samples in any steps."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny_pipelines import make_vae

from hf_dpssl.generation.interval_channel import latent_channels, takes_interval, with_interval
from hf_dpssl.generation.pipeline_vq_dit import VQDiTPipeline
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer
from hf_dpssl.latent_training.mean_flow import mean_flow_example, mean_flow_loss, mean_flow_target

SIZE = dict(num_layers=2, width=32, num_heads=2, patch_size=2, latent_channels=4, latent_size=4, num_classes=3)
SPREAD = 0.6  # of normally distributed latents


def width_at(time):
    """Standard deviation of the noised latents: (1 - t)^2 s^2 + t^2."""
    return ((1 - time) ** 2 * SPREAD**2 + time**2).sqrt()


def true_mean_velocity(hidden_states, timestep, class_labels=None):
    """Of normal latents: along the path z is proportional to its width, so u = z (1 - width_r / width_t) / (t - r)."""
    latents, interval = hidden_states[:, :-1], hidden_states[:, -1:]
    time = timestep.view(-1, 1, 1, 1)
    share = (1 - width_at(time - interval) / width_at(time)) / interval
    return Transformer2DModelOutput(sample=latents * share)


def transformer(**options):
    torch.manual_seed(0)
    found = make_transformer(**SIZE, mean_flow=True, **options).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def draws(batch=6):
    generator = torch.Generator().manual_seed(1)
    latents, velocity = torch.randn(2, batch, 4, 4, 4, generator=generator, dtype=torch.float64)
    times = torch.linspace(0.3, 0.95, batch, dtype=torch.float64)
    return latents, times, times * torch.linspace(0, 0.9, batch, dtype=torch.float64), velocity


def test_the_true_mean_velocity_of_normal_latents_is_its_own_target(monkeypatch):
    """With the true velocity the identity holds exactly: every sign and unit of the target enters."""
    model = transformer()
    monkeypatch.setattr(model, "forward", true_mean_velocity)
    latents, times, intervals, _ = draws()
    intervals = intervals + 0.01
    sigma = times.view(-1, 1, 1, 1)
    velocity = latents * (sigma - (1 - sigma) * SPREAD**2) / width_at(sigma) ** 2
    target = mean_flow_target(model, latents, times, intervals, velocity, torch.zeros(6).long())
    expected = true_mean_velocity(with_interval(latents, intervals), times).sample
    assert float((expected - velocity).abs().max()) > 0.05
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-7)


class SmoothTimes(torch.nn.Module):
    """A timestep embedding in float64, where diffusers' own is in float32."""

    def forward(self, timesteps):
        angles = timesteps[:, None].double() * torch.linspace(0, 3, 128, dtype=torch.float64)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def test_target_equals_central_differences_along_the_path():
    model = transformer().eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj = SmoothTimes()
    latents, times, intervals, velocity = draws()
    labels = torch.tensor([0, 1, 2, 3, 3, 0])

    @torch.no_grad()
    def moved(step):
        inputs = with_interval(latents + step * velocity, intervals + step)
        return model(inputs, timestep=times + step, class_labels=labels).sample

    slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
    expected = velocity - intervals.view(-1, 1, 1, 1) * slope
    found = mean_flow_target(model, latents, times, intervals, velocity, labels)
    assert torch.equal(found[0], velocity[0]) and not found.requires_grad  # r = t: the velocity itself
    assert float((slope[1:] * intervals[1:].view(-1, 1, 1, 1)).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_quarter_of_the_images_have_an_interval_and_draws_belong_to_the_image():
    ids = torch.arange(20_000)
    latents = torch.zeros(len(ids), 1, 1, 1)
    noised, times, intervals, velocity = mean_flow_example(latents, ids, 3, seed=0)
    assert abs(float((intervals > 0).double().mean()) - 0.25) < 0.01
    assert 0 < float(times.min()) and float(times.max()) < 1 and bool((intervals < times).all())
    torch.testing.assert_close(noised, times.view(-1, 1, 1, 1) * velocity)  # of latents 0 the velocity is the noise
    logits = torch.logit(times.double())  # the larger of two normal numbers: mean + spread / sqrt(pi)
    assert float(logits.mean()) == pytest.approx(-0.4 + 1 / math.sqrt(math.pi), abs=0.02)
    alone = mean_flow_example(latents[7:8], ids[7:8], 3, seed=0)
    assert all(
        torch.equal(part[7:8], one) for part, one in zip((noised, times, intervals, velocity), alone, strict=True)
    )
    other = mean_flow_example(latents[7:8], ids[7:8], 4, seed=0)
    assert not torch.equal(other[1], alone[1]) and not torch.equal(other[3], alone[3])


def test_loss_weighs_each_image_by_its_own_error():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(5, 4, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randn(5, 4, 4, 4, generator=generator, dtype=torch.float64)
    losses = mean_flow_loss(prediction, target)
    losses["loss"].backward()
    for row in range(5):
        difference = prediction.detach()[row] - target[row]
        expected = 2 * difference / (float(difference.square().sum()) + 1e-3) / 5
        torch.testing.assert_close(prediction.grad[row], expected, rtol=1e-5, atol=1e-8)
    errors = (prediction.detach() - target).square().mean()
    assert float(losses["error"]) == pytest.approx(float(errors), rel=1e-6)


def test_the_true_mean_velocity_draws_the_same_images_in_any_number_of_steps(monkeypatch):
    model = transformer().float()
    vae = make_vae()
    pipeline = VQDiTPipeline(model, vae, make_scheduler("mean_flow"), {})
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.prediction_type == "mean_flow" and takes_interval(model) and latent_channels(model) == 4
    monkeypatch.setattr(model, "forward", true_mean_velocity)
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    levels = []
    drawing = {"num_images": 3, "latents": noise, "output_type": "latent"}
    drawing["callback_on_step_end"] = lambda pipe, step, time, tensors: levels.append(float(time) / 1000)
    for steps in (1, 2, 7):
        drawn = pipeline(num_inference_steps=steps, **drawing).images
        torch.testing.assert_close(drawn, SPREAD * noise, rtol=1e-4, atol=1e-5)
    assert levels[:3] == [1, 1, 0.5] and levels[3:] == pytest.approx([1 - step / 7 for step in range(7)])


def test_solvers_of_momentary_velocities_and_other_transformers_are_refused():
    vae = make_vae()
    names = {number: str(number) for number in range(3)}
    pipeline = VQDiTPipeline(transformer().float(), vae, make_scheduler("mean_flow"), names)
    pipeline.scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="mean velocities"):
        pipeline(num_images=1)
    with pytest.raises(ValueError, match="one channel more than it gives"):
        VQDiTPipeline(make_transformer(**SIZE), vae, make_scheduler("flow"), names, prediction_type="mean_flow")
    with pytest.raises(ValueError, match="one channel more than it gives"):
        VQDiTPipeline(transformer().float(), vae, DDIMScheduler(), names, prediction_type="epsilon")
