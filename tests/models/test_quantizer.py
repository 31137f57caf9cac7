"""The vector quantiser against brute force and formulas by hand; what happens over processes is in test_gather.py."""

import copy
import math

import pytest
import torch

from hf_dpssl import VectorQuantizer

FLOAT_BUFFERS = ("codebook", "counts", "sums")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_vectors(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def as_latents(vectors: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N, D, 1, 1)."""
    return vectors[:, :, None, None]


def started(num_codes: int = 6, code_dim: int = 3, **options) -> VectorQuantizer:
    """A quantiser with a codebook by hand, so that no k-means start follows."""
    vq = VectorQuantizer(num_codes, code_dim, **options)
    vq.codebook.copy_(random(num_codes, code_dim, seed=7))
    vq.sums.copy_(vq.codebook)
    vq.is_initialized.fill_(1)
    return vq


def state(vq: VectorQuantizer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in vq.state_dict().items()}


def four_clusters() -> tuple[torch.Tensor, torch.Tensor]:
    """100 vectors in 4 clusters of 25, far apart, and the clusters' means."""
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = corners.repeat_interleave(25, 0) + 0.1 * random(100, 2)
    return vectors, vectors.view(4, 25, 2).mean(1)


def test_first_training_batch_starts_the_codebook_at_its_clusters():
    torch.manual_seed(0)
    vectors, means = four_clusters()
    vq = VectorQuantizer(16, 2, decay=0.9, revival_threshold=0)
    output = vq(as_latents(vectors))
    assert int(vq.is_initialized) == 1
    assert torch.cdist(means, vq.codebook).amin(1).max() < 0.3
    used = torch.bincount(output.codes.flatten(), minlength=16)
    torch.testing.assert_close(vq.counts, 0.9 * 100 / 16 + 0.1 * used)


def test_quantized_value_is_bit_equal_to_the_codebook_row():
    for training in [False, True]:
        vq = started().train(training)
        before = vq.codebook.clone()
        output = vq(random(2, 3, 4, 5, scale=100))
        assert output.codes.shape == (2, 4, 5) and output.codes.dtype == torch.int64
        assert torch.equal(as_vectors(output.quantized), before[output.codes.flatten()])
        if not training:
            assert torch.equal(output.quantized, vq.lookup(output.codes))


def test_gradient_passes_straight_through():
    latents = random(2, 3, 4, 4).requires_grad_()
    output, weight = started().eval()(latents), random(2, 3, 4, 4, seed=5)
    (output.quantized * weight).sum().backward()
    assert torch.equal(latents.grad, weight)


def test_commitment_is_the_mean_squared_error_and_pulls_latents_to_their_codes():
    latents = random(2, 3, 4, 4).requires_grad_()
    output = started().eval()(latents)
    error = latents.detach() - output.quantized.detach()
    torch.testing.assert_close(output.commitment.detach(), error.pow(2).mean())
    output.commitment.backward()
    torch.testing.assert_close(latents.grad, 2 * error / error.numel())


def test_codebook_update_equals_the_running_means_by_hand():
    for decay in [0.0, 0.7, 0.99]:
        vq = started(decay=decay, revival_threshold=0)
        counts, sums, codebook = [1.0] * 6, vq.codebook.double().tolist(), vq.codebook.double().tolist()
        for step in range(3):
            latents = random(2, 3, 4, 4, seed=step)
            codes = vq(latents).codes.flatten().tolist()
            vectors = as_vectors(latents).double().tolist()
            for k in range(6):
                mine = [v for v, code in zip(vectors, codes, strict=True) if code == k]
                counts[k] = decay * counts[k] + (1 - decay) * len(mine)
                sums[k] = [decay * sums[k][d] + (1 - decay) * sum(v[d] for v in mine) for d in range(3)]
                if counts[k] > 0:
                    codebook[k] = [s / counts[k] for s in sums[k]]
            torch.testing.assert_close(
                vq.counts.double(), torch.tensor(counts, dtype=torch.float64), rtol=1e-5, atol=1e-6
            )
            expected = torch.tensor(codebook, dtype=torch.float64)
            torch.testing.assert_close(vq.codebook.double(), expected, rtol=1e-4, atol=1e-5)


def far_code(**options) -> tuple[VectorQuantizer, torch.Tensor]:
    """A quantiser whose code 2 is never nearest, and latents."""
    vq = started(**options)
    vq.codebook[2] = vq.sums[2] = 1000.0
    return vq, random(2, 3, 4, 4)


def test_dead_code_is_revived_at_a_vector_of_the_batch():
    vq, latents = far_code(decay=0.5, revival_threshold=0.2)
    torch.manual_seed(0)
    assert 2 not in vq(latents).codes
    assert (vq.codebook[2] - as_vectors(latents)).norm(dim=1).min() < 1e-5
    assert 2 in vq.eval()(latents).codes


def test_revived_code_starts_with_the_mean_usage_and_living_codes_are_not_touched():
    (vq, latents), (reference, _) = far_code(decay=0.5, revival_threshold=0.1), far_code(decay=0.5, revival_threshold=0)
    vq.counts[2] = 0
    vq(latents), reference(latents)
    living = [0, 1, 3, 4, 5]
    torch.testing.assert_close(vq.codebook[living], reference.codebook[living])
    torch.testing.assert_close(vq.counts[2], vq.counts[living].sum() / 6)


def test_threshold_zero_never_revives_and_an_unused_code_stays_where_it_is():
    vq, latents = far_code(decay=0.5, revival_threshold=0)
    for _ in range(60):
        vq(latents)
    assert vq.counts[2] < 1e-15
    torch.testing.assert_close(vq.codebook[2], torch.full((3,), 1000.0))
    vq(as_latents(torch.full((8, 3), 900.0)))
    torch.testing.assert_close(vq.codebook[2], torch.full((3,), 900.0))


def test_four_deferred_forwards_and_one_update_equal_one_forward_of_all():
    parts = [random(2, 3, 4, 4, seed=seed) for seed in range(4)]
    whole, deferred = started(decay=0.8), started(decay=0.8)
    codes = whole(torch.cat(parts)).codes
    deferred.defer_update = True
    before = state(deferred)
    deferred_codes = torch.cat([deferred(part).codes for part in parts])
    assert all(torch.equal(value, before[name]) for name, value in state(deferred).items()), "updated too early"
    deferred.update_codebook_()
    assert torch.equal(deferred_codes, codes)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(deferred)[name], value)


def test_statistics_of_a_forward_are_used_once():
    vq = started()
    vq.defer_update = True
    vq(random(2, 3, 4, 4))
    vq.update_codebook_()
    after = state(vq)
    vq.update_codebook_()
    assert all(torch.equal(value, after[name]) for name, value in state(vq).items())


def test_eval_mode_changes_nothing_not_even_the_start():
    vq = VectorQuantizer(6, 3).eval()
    before = state(vq)
    for _ in range(3):
        vq(random(2, 3, 4, 4))
    vq.update_codebook_()
    assert all(torch.equal(value, before[name]) for name, value in state(vq).items())
    assert int(vq.is_initialized) == 0


def test_a_loaded_state_that_has_not_started_starts_anew():
    vq, new = VectorQuantizer(6, 3), VectorQuantizer(6, 3)
    vq(random(2, 3, 4, 4))
    vq.load_state_dict(new.state_dict())
    assert int(vq.is_initialized) == 0
    vq(random(2, 3, 4, 4))
    assert int(vq.is_initialized) == 1


def test_statistics_stay_float32_and_bit_equal_under_a_change_of_precision():
    for cast in [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()]:
        vq = started()
        before = state(vq)
        cast(torch.nn.ModuleDict({"inner": vq}))
        for name in FLOAT_BUFFERS:
            assert getattr(vq, name).dtype == torch.float32
            assert torch.equal(getattr(vq, name), before[name])


def test_half_precision_latents_are_assigned_and_averaged_in_float32():
    for dtype in [torch.bfloat16, torch.float16]:
        latents = random(2, 3, 4, 4).to(dtype)
        vq, reference = started(), started()
        output, expected = vq(latents), reference(latents.float())
        assert output.quantized.dtype == dtype and output.commitment.dtype == torch.float32
        assert torch.equal(output.codes, expected.codes)
        assert all(torch.equal(value, state(reference)[name]) for name, value in state(vq).items())


def test_autocast_does_not_change_codes_or_statistics():
    latents, vq, reference = random(8, 3, 16, 16), started(), started()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = vq(latents)
    expected = reference(latents)
    assert torch.equal(output.quantized, expected.quantized)
    assert all(torch.equal(value, state(reference)[name]) for name, value in state(vq).items())


def test_statistics_follow_to_another_device_without_changing_precision():
    vq = started().to("meta", torch.bfloat16)
    for name in FLOAT_BUFFERS:
        assert getattr(vq, name).device.type == "meta" and getattr(vq, name).dtype == torch.float32
    assert vq.is_initialized.device.type == "meta" and vq.is_initialized.dtype == torch.int64


def test_loaded_state_continues_as_the_original(tmp_path):
    vq = started()
    vq(random(2, 3, 4, 4))
    torch.save(vq.state_dict(), tmp_path / "state.pt")
    loaded = VectorQuantizer(6, 3)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for module in (vq, loaded, copy.deepcopy(loaded)):
        torch.manual_seed(0)
        module(random(2, 3, 4, 4, seed=3))
    assert all(torch.equal(value, state(loaded)[name]) for name, value in state(vq).items())


def test_lookup_gives_rows_of_the_codebook_and_refuses_ids_outside():
    vq = started()
    assert torch.equal(vq.lookup(torch.tensor([[[0, 5]]]))[0, :, 0, 1], vq.codebook[5])
    for codes in ([[[6]]], [[[-1]]]):
        with pytest.raises(IndexError, match=r"\[0, 5\]"):
            vq.lookup(torch.tensor(codes))


def test_perplexity_is_one_for_one_code_and_their_number_for_evenly_used_codes():
    vq = started().eval()
    assert float(vq(as_latents(vq.codebook[:1].repeat(9, 1))).perplexity) == pytest.approx(1)
    assert float(vq(as_latents(vq.codebook.repeat(3, 1))).perplexity) == pytest.approx(6)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(vq(as_latents(vq.codebook[[0, 0, 0, 1]])).perplexity) == pytest.approx(math.exp(entropy))


def test_latents_of_wrong_shape_are_refused():
    for shape in [(2, 4, 4, 4), (2, 3, 4), (3,)]:
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
            started()(torch.zeros(shape))


def test_quantizer_options_out_of_range_are_refused_by_name():
    for options in [{"num_codes": 0}, {"code_dim": 0}, {"decay": 1.0}, {"decay": -0.1}, {"revival_threshold": 1.0}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            VectorQuantizer(**({"num_codes": 4, "code_dim": 2} | options))
