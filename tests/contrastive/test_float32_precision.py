"""Losses, nearest codes and neighbours where float32 products may be rounded: TF32, or bfloat16 on a CPU."""

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpssl.cli import evaluate
from hf_dpssl.contrastive import losses, matching
from hf_dpssl.contrastive.isotropy import lejepa, random_directions
from hf_dpssl.domains.algorithms import _discrepancy
from hf_dpssl.embedding import embedding_job
from hf_dpssl.embedding.embedding_job import EmbedJob
from hf_dpssl.evaluation.neighbours import nearest_neighbours
from hf_dpssl.generation import bulk_sampling
from hf_dpssl.models import matrix_products
from hf_dpssl.models.codebook_search import nearest_codes
from hf_dpssl.models.matrix_products import allow_tf32, full_float32
from hf_dpssl.runs import training_loop
from hf_dpssl.runs.recipe import RunArguments

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "mkldnn._linear_pointwise")


def products_are_rounded() -> bool:
    setting = getattr(torch.backends.mkldnn.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() == "medium" if setting is None else setting == "bf16"


class RoundedProducts(TorchDispatchMode):
    """What a processor with bfloat16 units does to float32 products, on any machine, while torch is told it may."""

    rounded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(PRODUCTS) and products_are_rounded():
            self.rounded += 1
            args = [
                a.bfloat16().float() if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args
            ]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def medium():
    torch.set_float32_matmul_precision("medium")
    with RoundedProducts() as mode:
        yield mode
    torch.set_float32_matmul_precision("highest")


generator = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(12, 16, generator=generator, dtype=torch.float64)
CENTRES = torch.cat([CENTRES, CENTRES + 0.1])  # near neighbours far from the origin: what rounding loses
VIEW = CENTRES + 0.1 * torch.randn(24, 16, generator=generator, dtype=torch.float64)
QUEUE = torch.cat([CENTRES + 0.2, CENTRES - 0.1])
LABELS = torch.arange(24) % 6
P = matching.gaussian_similarities(CENTRES, 5.0, normalization="anchor")
JOINT = matching.gaussian_similarities(CENTRES, 5.0, normalization="joint")
LOSSES = {
    "info_nce": partial(losses.info_nce, view_2=VIEW, temperature=0.1),
    "t_simclr, joint": partial(losses.t_simclr, view_2=VIEW, temperature=0.1, dof=5.0),
    "t_simclr, anchor, in logarithms": partial(
        losses.t_simclr, view_2=VIEW, temperature=1.0, dof=150.0, normalization="anchor"
    ),
    "moco": partial(losses.moco, key=VIEW, queue=QUEUE, temperature=0.1),
    "t-moco": partial(losses.moco, key=VIEW, queue=QUEUE, kernel="student_t", temperature=0.1, dof=5.0),
    "clip": partial(losses.clip, text=VIEW, temperature=0.1),
    "sup_con": partial(losses.sup_con, labels=LABELS, temperature=0.1, kernel="student_t"),
    "sne": lambda x: losses.sne(P, x, temperature=0.5),
    "t_sne": lambda x: losses.t_sne(JOINT, x),
    "uniformity": losses.uniformity,
    "lejepa": partial(lejepa, view_2=VIEW, directions=random_directions(32, 16, step=0), weight=0.5),
    "match": lambda x: matching.match(
        P, matching.q_similarities(x, kernel="student_t", normalization="anchor", temperature=0.1)
    ),
}


def gradient(loss, dtype: torch.dtype) -> torch.Tensor:
    x = CENTRES.to(dtype, copy=True).requires_grad_()
    if isinstance(loss, partial):
        given = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in loss.keywords.items()
        }
        loss = partial(loss.func, **given)
    return torch.autograd.grad(loss(x), x)[0].double()


def test_gradients_of_losses_are_those_of_full_precision_where_products_may_be_rounded(medium):
    for name, loss in LOSSES.items():
        exact = gradient(loss, torch.float64)
        error = (gradient(loss, torch.float32) - exact).norm() / exact.norm()
        assert error < 1e-3, f"{name}: the gradient is {100 * error:.2g} % off"
    assert medium.rounded == 0
    x = CENTRES.float()
    assert (x @ x.T - (CENTRES @ CENTRES.T)).abs().max() > 0.05 and medium.rounded, "the emulation acts"


def test_nearest_codes_and_neighbours_are_those_of_full_precision_where_products_may_be_rounded(medium):
    codes = torch.cat([CENTRES, CENTRES + 0.03])
    distances = torch.cdist(VIEW, codes, compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(nearest_codes(VIEW.float(), codes.float()), distances.argmin(1))
    found, _ = nearest_neighbours(codes.float(), VIEW.float(), k=3, metric="euclidean")
    torch.testing.assert_close(-found.double(), distances.topk(3, largest=False).values, rtol=1e-5, atol=1e-5)


def test_discrepancy_of_domains_is_that_of_full_precision_where_products_may_be_rounded(medium):
    near = CENTRES[:12], CENTRES[12:]
    found = _discrepancy(*(points.float() for points in near))
    torch.testing.assert_close(found.double(), _discrepancy(*near), rtol=1e-3, atol=1e-6)


def test_full_precision_is_restored_once_after_nested_and_failed_contexts(medium):
    with full_float32():
        with pytest.raises(ZeroDivisionError), full_float32():
            math.floor(1 / 0)
        assert not products_are_rounded()
    assert products_are_rounded() and torch.get_float32_matmul_precision() == "medium"


@pytest.fixture
def settings():
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv)
    yield lambda: [place.fp32_precision for place in places]
    torch.backends.cuda.matmul.allow_tf32 = False


def test_tf32_is_for_products_of_gpus_alone_and_full_precision_ends_and_restores_it(settings):
    _, cpu, convolutions = before = settings()
    allow_tf32(torch.device("cpu"))
    assert settings() == before
    allow_tf32(torch.device("cuda", 0))
    assert settings() == ["tf32", cpu, convolutions]
    with full_float32():
        assert settings()[0] == "ieee"
    assert settings() == ["tf32", cpu, convolutions]
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32  # nor do they raise


class _Asked(Exception):
    pass


def test_trainers_and_commands_allow_tf32_on_their_device_before_they_use_weights(monkeypatch, tmp_path):
    def asked(device):
        raise _Asked(device.type)

    jobs = {
        training_loop: lambda: training_loop.start_accelerator(RunArguments(output_dir=str(tmp_path))),
        bulk_sampling: lambda: bulk_sampling.sample_images(bulk_sampling.SampleJob("missing", str(tmp_path))),
        embedding_job: lambda: embedding_job.embed_images(EmbedJob("missing", "digits", str(tmp_path))),
        matrix_products: lambda: evaluate._measured(None, tmp_path, None),
    }
    here = "cuda" if torch.cuda.is_available() else "cpu"
    for module, job in jobs.items():
        monkeypatch.setattr(module, "allow_tf32", asked)
        with pytest.raises(_Asked, match=here):
            job()
