"""Options of the vector quantiser: gradient codebook, cosine codes, rotation trick, entropy term, precision."""

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer

from hf_dpssl import VectorQuantizer
from hf_dpssl.models.codebook_search import nearest_codes
from hf_dpssl.models.quantizer import rotate_onto

CASES = [
    {},
    {"update": "gradient"},
    {"distance": "cosine"},
    {"gradient": "rotation"},
    {"update": "gradient", "distance": "cosine", "gradient": "rotation", "entropy_temperature": 0.5},
]


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(num_codes: int = 16, code_dim: int = 4, **options) -> VectorQuantizer:
    torch.manual_seed(0)
    made = VectorQuantizer(num_codes, code_dim, **options).train()
    made.is_initialized.fill_(1)
    return made


def test_lookup_of_the_codes_is_bit_equal_to_the_quantized_value_and_quantises_to_itself():
    for options in CASES:
        vq = quantizer(**options).eval()
        output = vq(latents(3, 4, 5, 5))
        found = vq.lookup(output.codes)
        assert torch.equal(found, output.quantized)
        assert torch.equal(vq(found).codes, output.codes)


def test_gradient_codebook_loss_equals_that_of_diffusers_with_the_paper_s_terms():
    ours = quantizer(update="gradient", revival_threshold=0)
    theirs = DiffusersQuantizer(16, 4, beta=0.25, legacy=False)
    theirs.embedding.weight.data.copy_(ours.codebook.data)
    z = latents(2, 4, 3, 3).requires_grad_()
    output = ours(z)
    loss = output.codebook_loss + 0.25 * output.commitment
    gradients = torch.autograd.grad(loss + output.quantized.sum(), [z, ours.codebook])
    z_2 = latents(2, 4, 3, 3).requires_grad_()
    quantized, theirs_loss, (_, _, indices) = theirs(z_2)
    expected = torch.autograd.grad(theirs_loss + quantized.sum(), [z_2, theirs.embedding.weight])
    assert torch.equal(output.codes.flatten(), indices.flatten())
    torch.testing.assert_close(loss, theirs_loss)
    torch.testing.assert_close(output.quantized, quantized)
    torch.testing.assert_close(list(gradients), list(expected))


def test_ema_codebook_follows_that_of_a_peer_over_several_steps():
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours = quantizer(revival_threshold=0, decay=0.9)
    theirs = peers.VectorQuantize(dim=4, codebook_size=16, decay=0.9, eps=1e-12, threshold_ema_dead_code=0).train()
    inner = theirs._codebook
    inner.embed.data.copy_(ours.codebook[None])
    inner.embed_avg.data.copy_(ours.sums[None])
    inner.cluster_size.data.copy_(ours.counts[None])
    for step in range(5):
        z = latents(8, 4, 4, 4, seed=step)
        codes = ours(z).codes
        _, indices, _ = theirs(z.permute(0, 2, 3, 1).reshape(8, 16, 4))
        assert torch.equal(codes.flatten(1), indices)
    torch.testing.assert_close(ours.codebook, inner.embed[0], rtol=1e-4, atol=1e-4)


def test_cosine_codes_have_unit_length_and_are_nearest_by_angle():
    vq = quantizer(distance="cosine")
    z = 7 * latents(4, 4, 4, 4)
    before = vq.codebook.clone()
    output = vq(z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 4)
    angles = F.cosine_similarity(vectors.double()[:, None], before.double()[None], dim=2)
    assert torch.equal(output.codes.flatten(), angles.argmax(1))
    for rows in (vq.codebook, output.quantized.permute(0, 2, 3, 1).reshape(-1, 4)):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def rotation_matrix(v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The turn of the plane of unit vectors v and t that takes v to t, by its angle."""
    cosine, identity = v @ t, torch.eye(len(v), dtype=v.dtype)
    skew = torch.outer(t, v) - torch.outer(v, t)
    return identity + skew + skew @ skew / (1 + cosine)


def test_rotation_gradient_equals_the_transposed_rotation_matrix_times_the_scale():
    v, t = latents(6, 5).double().requires_grad_(), latents(6, 5, seed=1).double()
    weights = latents(6, 5, seed=2).double()
    moved = rotate_onto(v, t)
    assert torch.equal(moved, t)
    (gradient,) = torch.autograd.grad((moved * weights).sum(), v)
    for row, vector, target, weight in zip(gradient, v.detach(), t, weights, strict=True):
        scale = target.norm() / vector.norm()
        matrix = scale * rotation_matrix(vector / vector.norm(), target / target.norm())
        torch.testing.assert_close(row, matrix.T @ weight, rtol=1e-9, atol=1e-9)


def test_rotation_gradient_equals_a_peer_s():
    pytest.importorskip("vector_quantize_pytorch")
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    v, t, weights = latents(6, 5), latents(6, 5, seed=1), latents(6, 5, seed=2)
    gradients = []
    for function in (rotate_onto, rotate_to):
        leaf = v.clone().requires_grad_()
        gradients.append(torch.autograd.grad((function(leaf, t) * weights).sum(), leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_rotation_of_opposite_and_zero_vectors_passes_the_gradient_straight_through():
    v = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(rotate_onto(v, torch.tensor([[-2.0, 0.0], [1.0, 1.0]])).sum(), v)
    assert torch.equal(gradient, torch.ones(2, 2))


def loop_entropy(vectors: torch.Tensor, codebook: torch.Tensor, temperature: float) -> torch.Tensor:
    shares = torch.stack([(-(v - codebook).pow(2).sum(1) / temperature).softmax(0) for v in vectors])
    mean = shares.mean(0)
    return -(shares * shares.log()).sum() / len(vectors) + (mean * mean.log()).sum()


@for_each("elements", [16, 48, 2**24])
@for_each("offset", [0.0, 100.0])
def test_entropy_term_and_its_gradients_equal_the_loop(elements, offset, monkeypatch):
    monkeypatch.setattr("hf_dpssl.models.quantizer._ENTROPY_ELEMENTS", elements)
    vq = quantizer(update="gradient", entropy_temperature=0.7)
    vq.codebook.data += offset
    z = (latents(2, 4, 3, 3) + offset).requires_grad_()
    gradients = torch.autograd.grad(found := vq(z).entropy, [z, vq.codebook])
    z_2, codebook = z.detach().double().requires_grad_(), vq.codebook.detach().double().requires_grad_()
    expected = loop_entropy(z_2.permute(0, 2, 3, 1).reshape(-1, 4), codebook, 0.7)
    tolerance = 1e-5 if offset == 0 else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [z_2, codebook]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_entropy_term_keeps_no_more_for_the_backward_pass_than_one_part(monkeypatch):
    monkeypatch.setattr("hf_dpssl.models.quantizer._ENTROPY_ELEMENTS", 16 * 10)
    vq, kept = quantizer(entropy_temperature=0.7), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        vq._entropy(latents(500, 4).requires_grad_(), vq.codebook)
    assert max(kept) <= 500 * 4, "assignments of 500 vectors to 16 codes would be 8,000"


def test_codes_too_far_for_any_share_leave_the_gradient_of_the_entropy_finite():
    vq = quantizer(update="gradient", entropy_temperature=1.0, revival_threshold=0)
    vq.codebook.data[3] = 1000.0
    z = latents(2, 4, 3, 3).requires_grad_()
    gradients = torch.autograd.grad(vq(z).entropy, [z, vq.codebook])
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[1][3].any()


def test_revival_between_forward_and_backward_does_not_change_the_gradients():
    for options in CASES:
        found = []
        for threshold in (0, 0.9):
            vq = quantizer(**options, revival_threshold=threshold, decay=0.5)
            before, z = vq.codebook.detach().clone(), latents(1, 4, 2, 2).requires_grad_()
            output = vq(z)
            loss = output.commitment + output.codebook_loss + output.entropy + (output.quantized**2).sum()
            loss.backward()
            found.append([z.grad, vq.codebook.grad] if isinstance(vq.codebook, torch.nn.Parameter) else [z.grad])
        assert not torch.equal(vq.codebook.detach(), before), "no code was revived"
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_codebook_and_statistics_stay_float32_in_a_half_precision_model():
    for dtype in [torch.bfloat16, torch.float16]:
        for update in ["ema", "gradient"]:
            vq = quantizer(update=update).to(dtype)
            output = vq(latents(2, 4, 3, 3).to(dtype))
            assert output.quantized.dtype == dtype
            assert {t.dtype for t in vq.state_dict().values() if t.is_floating_point()} == {torch.float32}
            assert {loss.dtype for loss in (output.commitment, output.codebook_loss, output.perplexity)} == {
                torch.float32
            }


def test_revival_moves_only_dead_rows_of_a_gradient_codebook():
    vq = quantizer(update="gradient", revival_threshold=0.5, decay=0.0)
    before = vq.codebook.detach().clone()
    output = vq(latents(1, 4, 2, 2))
    used = torch.bincount(output.codes.flatten(), minlength=16) > 0
    moved = (vq.codebook.detach() != before).any(1)
    assert not moved[used].any() and moved[~used].all()


def test_offsets_do_not_swallow_small_differences():
    codebook = 1000 + 1e-2 * latents(64, 8)
    vectors = codebook[torch.arange(63, -1, -1)] + 1e-3 * latents(64, 8, seed=1)
    squared = (vectors.double()[:, None] - codebook.double()[None]).pow(2).sum(2)
    assert torch.equal(nearest_codes(vectors, codebook), squared.argmin(1))


def test_usage_counts_the_codes_below_the_revival_threshold():
    vq = quantizer(revival_threshold=0.03)
    assert vq.usage() == {"code_usage": 100.0, "dead_codes": 0.0}
    vq.counts[:4] = 0.01
    assert vq.usage() == {"code_usage": 75.0, "dead_codes": 4.0}


def test_order_of_the_codes_does_not_matter():
    ours, other, order = quantizer(), quantizer(), torch.randperm(16, generator=torch.Generator().manual_seed(3))
    other.codebook.copy_(ours.codebook[order])
    other.sums.copy_(ours.sums[order])
    for step in range(3):
        z = latents(4, 4, 4, 4, seed=step)
        assert torch.equal(order[other(z).codes], ours(z).codes)
    torch.testing.assert_close(other.codebook, ours.codebook[order])


def test_more_codes_than_vectors_at_the_start_give_a_warning_that_says_both():
    vq = VectorQuantizer(32, 4).train()
    with pytest.warns(UserWarning, match="32 codes starts from 9 latent vectors"):
        vq(latents(1, 4, 3, 3))


def revived(seed: int) -> dict[str, torch.Tensor]:
    """In each of two processes: steps with half the data each, every code dead at first."""
    import torch.distributed as dist

    vq = quantizer(revival_threshold=0.9, decay=0.5)
    for step in range(3):
        z = latents(4, 4, 4, 4, seed=10 * seed + step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vq(z.chunk(2)[dist.get_rank()])
    return {"codebook": vq.codebook, "counts": vq.counts, "sums": vq.sums}


def test_revival_gives_every_process_the_same_codebook_under_autocast(run_in_two):
    first, second = run_in_two(revived, 1)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_unknown_options_are_refused_by_name():
    for options in [{"update": "adam"}, {"distance": "l1"}, {"gradient": "none"}, {"entropy_temperature": 0.0}]:
        with pytest.raises(ValueError, match=next(iter(options))):
            VectorQuantizer(8, 4, **options)
