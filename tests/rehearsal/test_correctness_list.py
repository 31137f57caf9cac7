"""What tests/benchmarks/gpu_correctness.py compares on a GPU, on one that is not there: devices agree, and values."""

import sys
from pathlib import Path

import pytest
import torch

from hf_dpssl.runs.rehearsal import rehearsal

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _listed():
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import gpu_correctness

    return gpu_correctness


def _compare(case, rounded: bool) -> None:
    """As `row_of` does, but that an error is raised."""
    listed = _listed()
    name = "bf16" if rounded else "fp32"
    expected = case.check(CPU, False)
    with rehearsal():
        found = case.check(CUDA, rounded)
        assert {result.device.type for result in found} == {"cuda"}, case.what
    found = [result.rehearsed for result in found]
    error = listed.error_of(found, expected)
    assert error <= listed.TOLERANCES[name][case.kind], (case.what, name, error)
    if rounded:  # and it has been rounded
        assert error > 1e-4, (case.what, error)


def _losses_models_and_pipelines():
    listed = _listed()
    for case in [*listed.loss_cases(), *listed.model_cases(), *listed.pipeline_cases()]:
        _compare(case, False)
        if case.rounded:
            _compare(case, True)


def _views():
    for case in _listed().view_cases():
        _compare(case, False)


def _steps():
    for case in _listed().step_cases():
        _compare(case, False)
        # A CPU's bfloat16 gradients of some small convolutions are not always finite: those of encoders are left out.
        if case.rounded and "contrastive" not in case.what:
            _compare(case, True)


def test_losses_models_and_pipelines_on_a_gpu_have_the_values_of_a_cpu_and_in_bfloat16_nearly(rehearse):
    rehearse(_losses_models_and_pipelines)


@pytest.mark.extended
def test_views_on_a_gpu_have_the_pixels_of_a_cpu_in_both_modes_of_all_presets(rehearse):
    rehearse(_views)


@pytest.mark.slow
def test_gradients_of_training_steps_on_a_gpu_are_those_of_a_cpu(rehearse):
    rehearse(_steps)
