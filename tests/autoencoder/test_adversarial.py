"""Adversarial losses, penalties and weights against formulas, closed forms and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from torch import nn

from hf_dpssl.autoencoder.adversarial_losses import (
    ADVERSARIAL_LOSSES,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
    r1_penalty,
    r1_penalty_of_logits,
)  # fmt: skip
from hf_dpssl.autoencoder.adversarial_term import AdversarialTerm, Adversary, ReconstructionGuard
from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hinge_losses_equal_their_loops():
    real, fake = logits(3, 1, 2, 2), logits(5, 1, 2, 2, seed=1)
    on_real = [max(0.0, 1 - value) for value in real.flatten().tolist()]
    on_fake = [max(0.0, 1 + value) for value in fake.flatten().tolist()]
    expected = (sum(on_real) / len(on_real) + sum(on_fake) / len(on_fake)) / 2
    assert float(hinge_discriminator(real, fake)) == pytest.approx(expected)
    assert float(hinge_generator(fake)) == pytest.approx(-sum(fake.flatten().tolist()) / 20)


def test_non_saturating_losses_equal_binary_cross_entropy_with_logits():
    real, fake = logits(4, 1), logits(4, 1, seed=1)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(non_saturating_discriminator(real, fake), (bce(real, ones) + bce(fake, zeros)) / 2)
    torch.testing.assert_close(non_saturating_generator(fake), bce(fake, ones))
    undecided = non_saturating_discriminator(zeros, zeros)
    assert float(undecided) == pytest.approx(math.log(2))


def test_r1_penalty_of_a_linear_discriminator_is_half_its_squared_weight():
    layer = nn.Linear(12, 1).double()
    penalty = r1_penalty(lambda x: layer(x.flatten(1)), logits(5, 3, 2, 2))
    torch.testing.assert_close(penalty, layer.weight.pow(2).sum() / 2)
    penalty.backward()
    torch.testing.assert_close(layer.weight.grad, layer.weight.detach())


def test_adaptive_weight_equals_the_ratio_of_finite_difference_gradients_and_is_capped():
    weight = logits(2, 3).requires_grad_()
    x = logits(3, seed=1)

    def losses(w):
        out = torch.tanh(w @ x)
        return (out - 1).pow(2).mean(), -(3 * out).sum()

    step = 1e-6
    gradients = []
    for which in (0, 1):
        gradient = torch.zeros(6, dtype=torch.float64)
        for i in range(6):
            shift = torch.zeros(6, dtype=torch.float64)
            shift[i] = step
            shift = shift.view(2, 3)
            gradient[i] = (losses(weight + shift)[which] - losses(weight - shift)[which]).detach() / (2 * step)
        gradients.append(gradient.norm())
    found = adaptive_weight(*losses(weight), weight)
    torch.testing.assert_close(found, gradients[0] / (gradients[1] + 1e-6), rtol=1e-6, atol=0)
    assert float(adaptive_weight(*losses(weight), weight, cap=1e-3)) == pytest.approx(1e-3)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="cap"):
        adaptive_weight(*losses(weight), weight, cap=0)


def test_term_starts_with_the_discriminator_and_reaches_the_generator_after_its_warm_up():
    term = AdversarialTerm(start=10, warmup=5)
    assert [term.trains_discriminator(step) for step in (9, 10)] == [False, True]
    assert [term.reaches_generator(step) for step in (14, 15)] == [False, True]
    for options in ({"loss": "wasserstein"}, {"weight": -1}, {"cap": 0}, {"r1_interval": 0}):
        with pytest.raises(ValueError):
            AdversarialTerm(**options)


def make_discriminator(**options) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(PatchDiscriminatorConfig(width=8, image_size=16, **options))


@pytest.mark.parametrize("loss", sorted(ADVERSARIAL_LOSSES))
def test_generator_term_gives_the_discriminator_no_gradient_and_scales_by_weight_and_adaptive_factor(loss):
    discriminator, last_layer = make_discriminator(), nn.Conv2d(3, 3, 1)
    fake = last_layer(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    target = fake.pow(2).mean()
    term, value, factor = AdversarialTerm(loss, weight=0.5).generator_loss(
        discriminator, fake, target, last_layer.weight
    )
    torch.testing.assert_close(term, 0.5 * factor * value)
    of_value = ADVERSARIAL_LOSSES[loss][1](discriminator(fake).logits)
    (expected,) = torch.autograd.grad(0.5 * factor.detach() * of_value, last_layer.weight, retain_graph=True)
    term.backward()
    torch.testing.assert_close(last_layer.weight.grad, expected)
    assert expected.abs().min() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_feature_error_is_that_of_the_reconstructions_and_reaches_the_images_only():
    discriminator = make_discriminator()
    real, made = (torch.rand(n, 3, 16, 16) * 2 - 1 for n in (2, 5))
    made.requires_grad_()
    value, error = AdversarialTerm("hinge").value_and_feature_error(discriminator, made, real)
    wanted, found = (discriminator(x).hidden.detach() for x in (real, made))
    expected = sum(float((a - b) ** 2) for a, b in zip(wanted.flatten(), found[:2].flatten(), strict=True))
    assert float(error.detach()) == pytest.approx(expected / wanted.numel(), rel=1e-5)
    torch.testing.assert_close(value, hinge_generator(discriminator(made).logits))
    (gradient,) = torch.autograd.grad(error, made)
    assert bool(gradient[:2].abs().sum() > 0) and not bool(gradient[2:].any())
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_discriminator_loss_of_both_halves_in_one_forward_equals_two_forwards():
    discriminator = make_discriminator(norm="group")
    real, fake = (torch.rand(n, 3, 16, 16) * 2 - 1 for n in (2, 3))
    found = AdversarialTerm("hinge").discriminator_loss(discriminator, real, fake)
    torch.testing.assert_close(found, hinge_discriminator(discriminator(real).logits, discriminator(fake).logits))


@pytest.mark.parametrize("loss", sorted(ADVERSARIAL_LOSSES))
def test_penalty_is_taken_every_so_many_steps_with_so_many_times_the_weight(loss):
    discriminator = make_discriminator()
    real, fake = (torch.rand(n, 3, 16, 16) * 2 - 1 for n in (2, 3))
    plain = ADVERSARIAL_LOSSES[loss][0](discriminator(real).logits, discriminator(fake).logits)
    penalty = r1_penalty(lambda x: discriminator(x).logits, real)
    term = AdversarialTerm(loss, start=2, r1_weight=0.5, r1_interval=4)
    for step, share in ((2, 4), (3, 0), (5, 0), (6, 4)):
        found = term.discriminator_loss(discriminator, real, fake, step)
        torch.testing.assert_close(found, plain + 0.5 * share * penalty)
    assert not real.requires_grad


def penalised_gradients() -> dict:
    """A process's gradients of a wrapped discriminator, whose halves of the batch differ."""
    from torch.nn.parallel import DistributedDataParallel

    bare = make_discriminator().double()
    term = AdversarialTerm("non_saturating", r1_weight=1.0)
    real, fake = penalised_batch()
    rank = torch.distributed.get_rank()
    wrapped = DistributedDataParallel(bare, broadcast_buffers=False)
    term.discriminator_loss(wrapped, *(x.chunk(2)[rank] for x in (real, fake))).backward()
    return {name: p.grad for name, p in bare.named_parameters()}


def penalised_batch() -> torch.Tensor:
    return torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double() * 2 - 1


@pytest.mark.extended
def test_penalty_over_two_processes_has_the_gradients_of_one(run_in_two):
    bare = make_discriminator().double()
    AdversarialTerm("non_saturating", r1_weight=1.0).discriminator_loss(bare, *penalised_batch()).backward()
    for found in run_in_two(penalised_gradients):
        for name, parameter in bare.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)


def test_guard_lowers_the_weight_once_the_error_has_grown_by_the_factor_and_says_so(caplog):
    guard = ReconstructionGuard(1.5, 0.5)
    assert not guard.check(2.0, 100, started=False)
    assert not guard.check(1.0, 200, started=False)  # the reference is the last one before the start
    assert not guard.check(1.4, 300, started=True)
    assert guard.check(1.6, 400, started=True) and guard.scale == 0.5
    assert "more than 1.50 times" in caplog.text and "0.5 of what was asked" in caplog.text
    resumed = ReconstructionGuard(1.5, 0.5)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.check(1.6, 500, started=True) and resumed.scale == 0.25 and resumed.interventions == [400, 500]
    assert not ReconstructionGuard(0).check(1e9, 1, started=True)
    with pytest.raises(ValueError, match="factor"):
        ReconstructionGuard(0.9)


def test_adversary_learns_to_tell_constant_fakes_from_noise():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    bare = make_discriminator().train()
    optimizer = torch.optim.Adam(bare.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    adversary = Adversary(AdversarialTerm("hinge"), bare, bare, optimizer, scheduler, ReconstructionGuard(0))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        real = torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1
        losses.append(float(adversary.step(accelerator, real, torch.zeros_like(real))))
    assert losses[0] == pytest.approx(1, abs=0.1) and losses[-1] < 0.1


@for_each("size, layers", [(8, 1), (16, 2), (32, 3), (256, 3)])
def test_number_of_layers_follows_the_image_size(size, layers):
    assert PatchDiscriminatorConfig(image_size=size).num_layers == layers
    config = PatchDiscriminatorConfig(width=8, image_size=size)
    side = size // 2**layers
    assert PatchDiscriminator(config)(torch.zeros(1, 3, size, size)).logits.shape == (1, 1, side, side)


@for_each("options", [{}, {"norm": "batch"}, {"norm": "none", "spectral_norm": True}])
def test_discriminator_survives_save_and_load(options, tmp_path):
    model = make_discriminator(**options).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    found, expected = (one(images).logits for one in (PatchDiscriminator.from_pretrained(tmp_path).eval(), model))
    assert torch.equal(found, expected)


def test_discriminator_refuses_other_images_and_configs():
    with pytest.raises(ValueError, match="sides of at least 8"):
        make_discriminator()(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        make_discriminator()(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="norm"):
        PatchDiscriminatorConfig(norm="layer")
    for options in ({"width": 6}, {"num_layers": 0}, {"num_channels": 0}):
        with pytest.raises(ValueError, match="multiple of 4"):
            PatchDiscriminatorConfig(**options)


def test_hidden_features_are_those_of_which_the_last_layer_takes_the_logits():
    model, images = make_discriminator(), torch.rand(2, 3, 16, 16)
    logits, hidden = model(images, return_dict=False)
    assert hidden.shape == (2, 32, 4, 4) and torch.equal(logits, model(images).logits)
    torch.testing.assert_close(F.conv2d(hidden, model.layers[-1].weight, model.layers[-1].bias, padding=1), logits)


def test_images_of_the_penalty_must_require_a_gradient():
    with pytest.raises(ValueError, match="must require a gradient"):
        r1_penalty_of_logits(torch.zeros(2, 1), torch.zeros(2, 3))
