"""tests/benchmarks/gpu.py without a GPU: it runs whole at a thousandth of its size, and would find a wrong device."""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import operator
import os
import signal
import time
import tomllib
from pathlib import Path

import pytest
import torch
from dit_operations import multiplications
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpssl.latent_training.dit_sizes import DiTSize
from hf_dpssl.models import matrix_products

PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution", "mkldnn._linear_pointwise")


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gpu

    return gpu


@pytest.fixture
def output(tmp_path):
    return tmp_path / "results" / "gpu.json"


def written(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def whole(figures) -> dict:
    """All that a part has measured."""
    return functools.reduce(operator.or_, figures)


class RoundedProducts(TorchDispatchMode):
    """A device that rounds the operands of float32 products to 10 bits, as TF32 does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith(PRODUCTS):
            args = [self._rounded(a) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(values):
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@pytest.mark.slow
def test_every_part_runs_at_a_thousandth_of_its_size_and_leaves_its_figures(gpu, output):
    found = gpu.main(["--scale", "0.001", "--output", str(output)])
    content = written(output)
    assert content["metrics"]["parts"] == json.loads(json.dumps(found))
    assert {name: part.get("error", part["passed"]) for name, part in found.items()} == dict.fromkeys(gpu.PARTS, True)
    assert {"command", "environment", "about", "seconds"} <= content.keys() and content["samples"]["scale"] == 0.001
    figures = {name: part["figures"] for name, part in found.items()}
    assert figures["correctness"]["checks"] > 90 and not figures["correctness"]["failed"]
    loops = {"contrastive": ["encoder"], "dae_vq": ["autoencoder/stage-1", "autoencoder/stage-2"], "dae_dit": ["dit"]}
    for script, names in loops.items():
        for name in names:
            loop = figures["training"][script][name]
            assert loop["steps_per_second"] > 0 and loop["synchronisations_per_step"]["aten::_local_scalar_dense"] > 0
    assert figures["loss"]["dense"]["ms"] > 0 and figures["loss"]["lejepa"]["ms"] > 0
    assert "clip, open_clip" in figures["loss"]
    assert {"lejepa", "sigreg"} <= {row["what"] for row in figures["correctness"]["rows"]}
    assert figures["simclr"]["views_per_second"] > 0 and figures["drift"]["images_per_second"] > 0
    for size in ("dit-b-2", "dit-xl-2"):
        assert figures["dit"][size]["images_per_second"] > 0 and figures["dit"][size]["share_of_matrix_rate"] > 0


@pytest.mark.extended
def test_correctness_fails_where_a_device_rounds_its_products(gpu, monkeypatch):
    @contextlib.contextmanager
    def as_tf32(device):
        with RoundedProducts():
            yield

    monkeypatch.setattr(gpu.gpu_correctness, "exact_float32", as_tf32)
    found = whole(gpu.gpu_correctness.measure(torch.device("cpu"), 0.001))
    failed = {row["what"] for row in found["rows"] if row["precision"] == "fp32" and not row["passed"]}
    expected = {"info_nce", "t_simclr joint", "t-moco", "clip", "sup_con", "sne", "t_sne", "drift_loss"}
    expected |= {f"encoder {name}" for name in ("convnext", "resnet", "vit", "swin", "rope")}
    expected |= {"autoencoder kl", "VAEGAN", "PatchDiscriminator", "DiT", "LatentMLP", "language model gpt2"}
    expected |= {"step of contrastive t-MoCo", "step of dae_vq", "step of dae_dit flow"}
    expected |= {"VQDiTPipeline", "VQDriftPipeline"}
    assert not found["passed"] and not expected - failed
    assert not any("error" in row and isinstance(row["error"], str) for row in found["rows"])


def test_without_a_gpu_only_a_trial_is_run(gpu, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, message in (([], "no CUDA device here; --scale 0.001"), (["--scale", "2"], "--scale lies in (0, 1]")):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(argv)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def _fails(device, scale):
    yield {"before": 1}
    raise RuntimeError("no memory")


def _sleeps(device, scale):
    yield {"before": 2}
    time.sleep(60)


def _hangs(device, scale):
    """As a call of a driver that never comes back: no signal reaches Python."""
    yield {"before": 3}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


def _ends(device, scale):
    yield {"before": 4}
    os._exit(7)


def _passes(device, scale):
    yield {"first": 5}
    yield {"second": 6, "passed": True}


@pytest.fixture
def quick(gpu, monkeypatch):
    """Parts of all fates, in forks, which need not import all again; a process of the real script is a fresh one."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda method: fork)
    parts = {"fails": _fails, "sleeps": _sleeps, "hangs": _hangs, "ends": _ends, "passes": _passes, "again": _passes}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    return gpu


def test_a_part_that_fails_hangs_or_dies_leaves_figures_and_error_and_the_next_goes_on(quick, output):
    quick.main(["--scale", "0.001", "--output", str(output), "--part_seconds", "0.5"])
    found = written(output)["metrics"]["parts"]
    assert found["fails"]["error"] == "RuntimeError: no memory" and "_fails" in str(found["fails"]["traceback"])
    assert found["sleeps"]["error"] == "TimeoutError: not finished after 0 s"
    assert found["hangs"]["error"].startswith("TimeoutError: killed")
    assert found["ends"]["error"] == "the process ended with 7"
    for number, name in enumerate(("fails", "sleeps", "hangs", "ends"), 1):
        assert not found[name]["passed"] and found[name]["figures"] == {"before": number}
        assert found[name]["seconds"] < 10
    for name in ("passes", "again"):
        assert found[name].pop("seconds") < 1
        assert found[name] == {"passed": True, "figures": {"first": 5, "second": 6}}


def test_all_ends_when_its_seconds_are_over_with_what_was_measured_in_the_file(quick, output, monkeypatch):
    before = []
    write_results = quick.write_results

    def noted(path, metrics, **more):
        write_results(path, metrics, **more)
        before.append({name: part["figures"] for name, part in metrics["parts"].items() if "figures" in part})

    monkeypatch.setattr(quick, "write_results", noted)
    start = time.monotonic()
    flags = ["--scale", "0.001", "--output", str(output), "--parts", "again", "hangs", "passes"]
    quick.main([*flags, "--seconds", "2"])
    assert 2 < time.monotonic() - start < 6
    found = written(output)["metrics"]["parts"]
    assert found["hangs"]["error"].startswith("TimeoutError") and found["hangs"]["figures"] == {"before": 3}
    assert found["passes"]["error"] == found["again"]["error"] == "not begun within 2 s"
    assert {"hangs": {"before": 3}} in before[:-1]  # as a run that is killed would leave it
    quick.main([*flags, "--seconds", "-1"])
    assert {part["error"] for part in written(output)["metrics"]["parts"].values()} == {"not begun within -1 s"}


def test_counted_operations_are_those_of_the_formula(gpu):
    size = DiTSize(2, 64, 4, 2)
    model = gpu.gpu_speed.transformer_of(size, 16, torch.device("cpu"), learned_variance=True)
    counted = gpu.gpu_speed.operations_of_step(model, 16, torch.device("cpu"))
    shape = dict(latent_size=16, in_channels=4, out_channels=8)
    formula = 6 * multiplications(size, **shape, embedders=size.num_layers + 1)
    assert counted == pytest.approx(formula, rel=0.2)


def test_losses_are_compared_in_full_float32_whatever_ran_before(gpu, monkeypatch):
    def precision(device, scale):
        yield {"settings": matrix_products._precision()}

    monkeypatch.setattr(gpu.gpu_speed, "losses_of", precision)
    torch.set_float32_matmul_precision("medium")  # as a training script may have left it
    try:
        found = whole(gpu.gpu_speed.loss(torch.device("cpu"), 1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(found["settings"]) <= set(matrix_products._FULL)


def test_losses_that_ours_are_timed_beside_are_the_same_ones(gpu):
    found = whole(gpu.gpu_speed.loss(torch.device("cpu"), 0.004))
    assert found["pairs"] == 66 and found["difference_to_dense"] < 1e-6
    extras = tomllib.loads((gpu.TESTS.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(name.startswith("open_clip_torch") for name in extras["bench"])
    if importlib.util.find_spec("open_clip"):
        assert found["difference_to_open_clip"] < 1e-5 and found["passed"]
    else:
        assert "hf_dpssl[bench]" in found["clip, open_clip"]
