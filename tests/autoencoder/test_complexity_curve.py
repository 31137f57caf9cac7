"""D^G: gaps against integrals, the sanity order of latents, and what a value may depend on."""

import math

import pytest
import torch
from cases import for_each

from hf_dpssl.autoencoder import generator_complexity
from hf_dpssl.autoencoder.complexity_curve import Budget, critic_gap, generator_gaps, rows_of, train_generator

SHORT = Budget(generator_steps=400, critic_steps=150)


def normal(mean: float, sd: float = 1.0):
    return lambda count, random: mean + sd * torch.randn(count, 1, generator=random)


def rings(count: int, random: torch.Generator) -> torch.Tensor:
    """(count, 4): five modes in a plane, and smaller ones, independent of them, in another."""
    angles = torch.randint(5, (2, count), generator=random) * 2 * math.pi / 5
    points = torch.cat([2 * angles[:1].cos(), 2 * angles[:1].sin(), angles[1:].cos(), angles[1:].sin()]).T
    return points + 0.15 * torch.randn(count, 4, generator=random)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    return rings(4000, random), rings(4000, random)


def noise(count: int, random: torch.Generator) -> torch.Tensor:
    return torch.randn(count, 4, generator=random)


@pytest.mark.extended
@for_each("mean, sd", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (0.0, 3.0), (9.0, 1.0)])
def test_gap_is_the_jensen_shannon_divergence_from_below(mean, sd):
    random, draw = torch.Generator().manual_seed(0), normal(0.0)
    x = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    p, q = ((-0.5 * ((x - m) / s) ** 2).exp() / s / (2 * math.pi) ** 0.5 for m, s in ((0.0, 1.0), (mean, sd)))
    middle = (p + q) / 2
    divergence = sum(torch.trapezoid(torch.special.xlogy(f, f / middle.clamp_min(1e-300)), x) / 2 for f in (p, q))
    found = critic_gap(normal(mean, sd), draw(8000, random), draw(8000, random))
    assert found == pytest.approx(float(divergence), abs=0.02)
    assert found < float(divergence) + 0.01


def test_gap_is_read_on_held_out_samples_not_on_those_learned():
    random = torch.Generator().manual_seed(0)
    train, test = normal(0.0)(4000, random), normal(0.0)(4000, random)
    seen = critic_gap(normal(3.0), train, test, budget=SHORT)
    unseen = critic_gap(normal(3.0), train, test, held_out=normal(0.0), budget=SHORT)
    assert seen > 0.3 and unseen < 0  # the critic takes what it has not learned for real


@pytest.mark.extended
def test_whitened_data_need_a_smaller_generator_than_noise(data):
    train, test = (part[:, :2] for part in data)
    axes = torch.linalg.svd(train - train.mean(0), full_matrices=False).Vh
    projected = [(part - train.mean(0)) @ axes.T for part in (train, test)]
    white = [part / projected[0].std(0) for part in projected]
    options = dict(widths=(8,), critics=1, budget=SHORT)
    encoded = generator_complexity(white[0], train, test, held_out_latents=white[1], **options)["complexity"]
    assert (
        encoded
        < 0.04
        < 0.08
        < generator_complexity(lambda n, g: noise(n, g)[:, :2], train, test, **options)["complexity"]
    )


@pytest.mark.slow
def test_order_of_latents_and_monotone_curves(data):
    train, test = data
    axes = torch.linalg.svd(train - train.mean(0), full_matrices=False).Vh
    projected = [(part - train.mean(0)) @ axes.T for part in data]
    white = [part / projected[0].std(0) for part in projected]
    # Two principal components of four, and noise for the rest: a generator of fewer dimensions than the data is
    # told apart however large it is.

    def components(latents: torch.Tensor):
        draw = rows_of(latents[:, :2])
        return lambda count, random: torch.cat([draw(count, random), noise(count, random)[:, 2:]], 1)

    pairs = {"white": white, "pca": [components(part) for part in white], "noise": (noise, noise)}
    widths, found = (4, 12, 36), {}
    for name, (latents, fresh) in pairs.items():
        found[name] = generator_complexity(latents, train, test, held_out_latents=fresh, widths=widths)
        curve = [found[name][f"complexity_w{width}"] for width in widths]
        assert all(later < earlier + 0.03 for earlier, later in zip(curve, curve[1:], strict=False)), (name, curve)
    assert found["white"]["complexity"] < found["pca"]["complexity"] - 0.02
    assert found["pca"]["complexity"] < found["noise"]["complexity"] - 0.02


@pytest.mark.extended
def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(data):
    options = dict(widths=(3, 5), critics=2, budget=Budget(generator_steps=20, critic_steps=20))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generator_complexity(noise, *data, seed=1, **options)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert generator_complexity(noise, *data, seed=1, **options) == first
    assert generator_complexity(noise, *data, seed=2, **options) != first
    # A point of the curve does not depend on the other widths.
    alone = generator_complexity(noise, *data, seed=1, **options | {"widths": (5,)})
    assert alone["complexity_w5"] == first["complexity_w5"] == alone["complexity"]
    assert first["complexity"] == pytest.approx((first["complexity_w3"] + first["complexity_w5"]) / 2)


def test_figures_do_not_depend_on_the_units_of_the_data(data):
    options = dict(widths=(4,), critics=1, budget=Budget(generator_steps=30, critic_steps=30))
    plain = generator_complexity(noise, *data, **options)
    scaled = generator_complexity(noise, *(64 * part + 8 for part in data), **options)
    assert scaled["complexity"] == pytest.approx(plain["complexity"], abs=1e-3)


def test_parts_give_the_whole_and_the_generator_is_frozen(data):
    budget = Budget(generator_steps=20, critic_steps=20)
    latents = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    generator = train_generator(rows_of(latents), data[0], 4, budget=budget)
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())
    gaps = generator_gaps(generator, rows_of(latents), rows_of(latents), *data, critics=2, budget=budget)
    found = generator_complexity(latents, *data, widths=(4,), critics=2, budget=budget)
    assert found["complexity_w4"] == pytest.approx(float(gaps.mean()))
    assert found["complexity_sd_w4"] == pytest.approx(float(gaps.std(correction=0)))


def test_images_have_convolutional_generators_of_the_asked_width():
    images = torch.rand(64, 1, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    budget = Budget(generator_steps=3, critic_steps=3, batch_size=16, samples=32, critic_width=4)
    found = generator_complexity(torch.randn(64, 2, 2, 2), images, images, widths=(2, 4), critics=1, budget=budget)
    assert all(math.isfinite(value) for value in found.values())
    sizes = []
    for width in (2, 4):
        generator = train_generator(noise, images, width, budget=budget)
        assert generator(torch.zeros(5, 4)).shape == (5, 1, 8, 12)
        sizes.append(sum(p.numel() for p in generator.parameters()))
    assert sizes[0] < sizes[1]


def test_bad_input_is_refused(data):
    train, test = data
    with pytest.raises(ValueError, match="both be"):
        generator_complexity(noise, train, test[:, :3])
    with pytest.raises(ValueError, match="divisible by 4"):
        generator_complexity(noise, torch.zeros(4, 1, 6, 8), torch.zeros(4, 1, 6, 8))
    with pytest.raises(ValueError, match="must be positive"):
        generator_complexity(noise, train, test, widths=())
    with pytest.raises(ValueError, match="NaN or infinite"):
        generator_complexity(noise, train / 0, test)
    with pytest.raises(ValueError, match=r"\(count, d\) latents"):
        generator_complexity(lambda count, random: torch.zeros(count, 2, 2), train, test)
    with pytest.raises(ValueError, match="no latents"):
        rows_of(torch.zeros(0, 2))
