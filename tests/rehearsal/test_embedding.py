"""An encoder on a GPU that is not there: as exact as on a CPU, or in bfloat16 where accuracies are measured."""

from functools import partial
from unittest import mock

import torch
from tiny_encoders import save_ours

from hf_dpssl.embedding import embedder
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.runs.rehearsal import rehearsal


def _on_a_gpu(folder):
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    on_cpu = ImageEmbedder(folder, device="cpu")
    expected = on_cpu(images)
    for mixed_precision, has_bfloat16 in ((True, True), (True, False), (False, True)):
        with mock.patch.object(embedder, "gpu_computes_in_bfloat16", lambda has=has_bfloat16: has):
            assert not ImageEmbedder(folder, device="cpu", mixed_precision=mixed_precision).rounded
            moved = mock.patch.object(torch.nn.Module, "to", lambda module, device: module)
            with moved, mock.patch.object(ImageEmbedder, "_check", lambda self: 8):
                on_gpu = ImageEmbedder(folder, device="cuda", mixed_precision=mixed_precision)
        with rehearsal() as rehearsed:
            rehearsed.fake_module_(on_gpu.model)
            found = on_gpu(rehearsed.fake_of(images)).rehearsed
        error = float((found - expected).norm() / expected.norm())
        assert found.dtype == torch.float32
        same_cache = on_gpu.fingerprint == on_cpu.fingerprint
        assert same_cache == (not on_gpu.rounded)
        assert (1e-4 < error < 2e-2) if mixed_precision and has_bfloat16 else error < 1e-6, error


def test_an_encoder_that_is_evaluated_computes_in_bfloat16_where_a_gpu_does(rehearse, tmp_path):
    save_ours(tmp_path)
    rehearse(partial(_on_a_gpu, tmp_path))
