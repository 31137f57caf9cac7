"""Temperature by perplexity against loop-form oracles, its bounds and its state; learned degrees of freedom."""

import json
import math

import contrastive
import pytest
import torch
from cases import for_each
from scipy.optimize import brentq

from hf_dpssl import ContrastiveConfig, MoCoForPreTraining, SimCLRForPreTraining, moco, t_simclr
from hf_dpssl.contrastive.calibration import (
    COSINE_BOUNDS,
    DOF_RANGE,
    FREE_PERPLEXITY,
    PERPLEXITY,
    STUDENT_T_BOUNDS,
    KernelCalibration,
    dof_from_raw,
    mean_perplexity,
    raw_from_dof,
    temperature_of_perplexity,
)

SHARES = (0.45, 0.6, 0.9)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(dissimilarity: float, temperature: float, dof: float | None) -> float:
    if dof is None:
        return math.exp(-dissimilarity / temperature)
    return (1 + dissimilarity / (temperature * dof)) ** (-(dof + 1) / 2)


def loop_perplexity(rows: list[list[float]], temperature: float, dof: float | None) -> float:
    """exp of the mean entropy, from the definition, in Python's floats."""
    entropies = []
    for row in rows:
        values = [kernel(value, temperature, dof) for value in row]
        entropies.append(-sum(v / sum(values) * math.log(v / sum(values)) for v in values if v > 0))
    return math.exp(sum(entropies) / len(entropies))


def tiny(**options) -> ContrastiveConfig:
    model_args = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "ls_init_value": 1.0}
    return ContrastiveConfig("convnext_atto", model_args, **({"projection_dim": 4} | options))


def images(seed: int, count: int = 8) -> torch.Tensor:
    return random(count, 3, 16, 16, seed=seed).float()


def test_mean_perplexity_equals_loop_form_oracle():
    distances = random(5, 9).square()
    found = mean_perplexity(-distances / 0.7)
    assert float(found) == pytest.approx(loop_perplexity(distances.tolist(), 0.7, None), rel=1e-12)


def test_perplexity_of_equal_similarities_is_the_number_of_candidates_without_those_left_out():
    log_similarities = torch.full((4, 4), -3.0, dtype=torch.float64).fill_diagonal_(-math.inf)
    assert float(mean_perplexity(log_similarities)) == pytest.approx(3, rel=1e-12)


def test_counts_equal_repeated_candidates():
    log_similarities, counts = random(5, 3), torch.tensor([1.0, 4.0, 2.0])
    repeated = log_similarities.repeat_interleave(counts.long(), dim=1)
    assert float(mean_perplexity(log_similarities, counts)) == pytest.approx(
        float(mean_perplexity(repeated)), rel=1e-12
    )


def test_temperature_of_perplexity_equals_the_root_found_by_scipy():
    distances = torch.cdist(random(12, 2), random(30, 2, seed=1)).square()
    rows = distances.tolist()

    def excess(log_temperature: float, dof: float | None, share: float) -> float:
        return loop_perplexity(rows, math.exp(log_temperature), dof) - share * 30

    for dof in (None, 1.0, 5.0, 100.0):
        for share in SHARES:
            expected = math.exp(brentq(excess, -12, 12, args=(dof, share), xtol=1e-12))
            found = float(temperature_of_perplexity(distances, share=share, dof=dof))
            assert found == pytest.approx(expected, rel=1e-5)


def test_perplexity_below_what_a_student_t_kernel_can_have_gives_the_lowest_temperature():
    distances = torch.cdist(random(12, 2), random(30, 2, seed=1)).square()
    low = float(temperature_of_perplexity(distances, share=0.02, dof=1.0))
    assert low == pytest.approx(1e-6 * float(distances.mean()), rel=1e-3)
    assert loop_perplexity(distances.tolist(), low, 1.0) > 0.02 * 30


def test_temperature_follows_the_scale_of_the_distances_and_not_the_order_of_candidates():
    for dof in [None, 3.0]:
        distances = random(6, 20).square()
        expected = temperature_of_perplexity(distances, share=0.5, dof=dof)
        scaled = temperature_of_perplexity(1e6 * distances, share=0.5, dof=dof)
        shuffled = temperature_of_perplexity(distances.flip(1), share=0.5, dof=dof)
        torch.testing.assert_close(scaled, 1e6 * expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(shuffled, expected, rtol=1e-9, atol=0)


def test_candidates_left_out_do_not_count():
    distances = random(6, 20).square()
    padded = torch.cat([distances, torch.full((6, 5), math.inf, dtype=torch.float64)], dim=1)
    expected = temperature_of_perplexity(distances, share=0.4)
    torch.testing.assert_close(temperature_of_perplexity(padded, share=0.4), expected, rtol=1e-9, atol=0)


def test_calibrated_batch_has_the_perplexity_asked_for():
    for share in SHARES:
        views = random(20, 6), random(20, 6, seed=1)
        scale = KernelCalibration("student_t", "auto", share, 5.0).double()
        scale.calibrate(*views)
        distances = torch.cdist(torch.cat(views), torch.cat(views)).square().tolist()
        rows = [[value for j, value in enumerate(row) if j != i] for i, row in enumerate(distances)]
        assert loop_perplexity(rows, float(scale.temperature), 5.0) == pytest.approx(share * 39, rel=1e-4)


def test_calibrated_queue_has_the_perplexity_asked_for_although_only_some_of_it_is_read():
    queries, keys, queue = random(40, 3), random(40, 3, seed=1), random(9000, 3, seed=2)
    keys = queries + 0.1 * keys
    scale = KernelCalibration("student_t", "auto", 0.3, 5.0).double()
    scale.calibrate_queue(queries, keys, queue)
    distances = torch.cat([(queries - keys).square().sum(1)[:, None], torch.cdist(queries, queue).square()], dim=1)
    values = (1 + distances / (5 * scale.temperature)) ** -3
    q = values / values.sum(1, keepdim=True)
    found = float((-q * q.log()).sum(1).mean().exp())
    assert found == pytest.approx(0.3 * 9001, rel=0.03)  # 2,048 of 9,000 rows


def test_cosine_starts_at_a_fifth_and_follows_by_a_hundredth_of_the_logarithm():
    scale, expected = KernelCalibration("cosine", "auto", None, 5.0).double(), math.log(0.2)
    for seed in range(5):
        views = random(20, 3, seed=seed), random(20, 3, seed=100 + seed)
        scale.calibrate(*views)
        z = torch.nn.functional.normalize(torch.cat(views), dim=1)
        wanted = temperature_of_perplexity((1 - z @ z.T).fill_diagonal_(math.inf), share=PERPLEXITY)
        expected += 0.01 * (math.log(min(max(float(wanted), COSINE_BOUNDS[0]), COSINE_BOUNDS[1])) - expected)
    assert float(scale.temperature) == pytest.approx(math.exp(expected), rel=1e-6) != 0.2


def test_student_t_on_normalised_embeddings_starts_at_its_first_batch_and_goes_on():
    scale = KernelCalibration("student_t", "auto", None, 5.0).double()
    history = []
    for seed in range(3):
        scale.calibrate(random(20, 2, seed=seed), random(20, 2, seed=100 + seed))
        history.append(float(scale.temperature))
    assert len(set(history)) == 3 and history[2] == pytest.approx(history[0], rel=0.05)


def test_free_embeddings_set_the_temperature_once():
    scale = KernelCalibration("student_t", "auto", None, 5.0, free_scale=True).double()
    history = []
    for seed in range(3):
        scale.calibrate((1 + seed) * random(20, 2, seed=seed), random(20, 2, seed=100 + seed))
        history.append(float(scale.temperature))
    again = KernelCalibration("student_t", "auto", FREE_PERPLEXITY, 5.0).double()
    again.calibrate(random(20, 2), random(20, 2, seed=100))
    assert set(history) == {float(again.temperature)}


def test_evaluation_does_not_move_the_temperature():
    scale = KernelCalibration("student_t", "auto", None, 5.0)
    scale.calibrate(random(20, 6), random(20, 6, seed=1))
    before = float(scale.temperature)
    scale.eval().calibrate(9 * random(20, 6, seed=2), random(20, 6, seed=3))
    assert float(scale.temperature) == before


def test_coinciding_and_distant_points_give_temperatures_within_the_bounds():
    same = torch.ones(8, 3)
    cosine = KernelCalibration("cosine", "auto", 0.3, 5.0)
    cosine.calibrate(same, same)
    assert float(cosine.temperature) == pytest.approx(0.2**0.99 * COSINE_BOUNDS[0] ** 0.01)
    student_t = KernelCalibration("student_t", "auto", 0.01, 1.0)  # narrower than the kernel can be on one line
    points = 1e4 * torch.arange(200.0)[:, None]
    student_t.calibrate(points, points + 1)
    z = torch.cat([points, points + 1]).double()
    mean_distance = float(torch.cdist(z, z).square().sum() / (400 * 399))
    assert float(student_t.temperature) == pytest.approx(STUDENT_T_BOUNDS[0] * mean_distance, rel=0.1)
    collapsed = KernelCalibration("student_t", "auto", 0.3, 5.0)
    collapsed.calibrate(same, same)
    assert 0 < float(collapsed.temperature) < 1e-6


def test_dof_from_raw_inverts_raw_from_dof():
    for dof in [0.11, 1.0, 5.0, 999.0]:
        assert float(dof_from_raw(raw_from_dof(dof).double())) == pytest.approx(dof, rel=1e-4)


def test_learned_dof_stay_in_their_range_whatever_the_step():
    low, high = dof_from_raw(torch.tensor([-1e6, 1e6], dtype=torch.float64)).tolist()
    assert low == pytest.approx(DOF_RANGE[0]) and high == pytest.approx(DOF_RANGE[1])


@for_each("loss", ["joint", "anchor", "queue"])
def test_gradient_of_learned_dof_equals_finite_differences(loss):
    view_1, view_2, queue = random(6, 3), random(6, 3, seed=1), random(9, 3, seed=2)

    def value(raw: torch.Tensor) -> torch.Tensor:
        if loss == "queue":
            return moco(view_1, view_2, queue, kernel="student_t", temperature=2.0, dof=dof_from_raw(raw))
        return t_simclr(view_1, view_2, temperature=2.0, dof=dof_from_raw(raw), normalization=loss)

    raw = raw_from_dof(5.0).double().requires_grad_()
    assert torch.autograd.gradcheck(value, raw)
    (gradient,) = torch.autograd.grad(value(raw), raw)
    assert abs(gradient) > 1e-4


def test_learned_dof_end_at_the_same_value_from_both_sides():
    torch.manual_seed(0)
    anchors = 30 * random(100, 1, seed=3)
    paired = anchors + torch.distributions.StudentT(2.0).sample((100, 1)).double()  # heavy tails: few dof
    learned = []
    for start in (0.5, 50.0):
        scale = KernelCalibration("student_t", 1.0, 0.3, start, learnable_dof=True).double()
        optimizer = torch.optim.Adam(scale.parameters(), lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            t_simclr(anchors, paired, temperature=scale.temperature, dof=scale.dof).backward()
            optimizer.step()
        learned.append(scale.numbers()["dof"])
    assert learned[0] == pytest.approx(learned[1], rel=0.02) and 0.5 < learned[0] < 5


@pytest.mark.parametrize("queue", [False, True])
def test_temperature_and_dof_are_in_the_checkpoint_and_training_goes_on_from_it_exactly(queue, tmp_path):
    torch.manual_seed(0)
    options = {"temperature": "auto", "learnable_dof": True, "feature_norm": "batch", "normalization": "anchor"}
    model = (MoCoForPreTraining if queue else SimCLRForPreTraining)(tiny(**options, queue_size=20)).train()
    model(images(0), images(1)).loss.backward()
    with torch.no_grad():
        model.calibration.raw_dof -= 0.5
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    for trained in (model, again):
        for step in range(2, 5):
            loss = trained(images(step), images(step + 10)).loss
    numbers = model.calibration.numbers()
    assert numbers == again.calibration.numbers() and numbers["temperature"] != 1 and numbers["dof"] != 5
    assert int(again.calibration.steps) == 4 and bool(loss.isfinite())
    assert again.config.temperature == "auto" and again.config.learnable_dof


def test_learned_dof_get_a_gradient_and_fixed_ones_leave_no_trace_in_the_checkpoint():
    model = SimCLRForPreTraining(tiny(learnable_dof=True))
    model(images(0), images(1)).loss.backward()
    (raw,) = model.undecayed_parameters()
    assert raw.grad.abs() > 0 and not any(raw is parameter for parameter in model.trainable_parameters())
    fixed = SimCLRForPreTraining(tiny())
    assert not fixed.undecayed_parameters() and not any("calibration" in name for name in fixed.state_dict())


def test_config_refuses_bad_calibration_and_says_what_is_allowed():
    for options, message in [
        ({"temperature": "automatic"}, "temperature must be positive and finite, or \"auto\", got 'automatic'"),
        ({"perplexity": 0.0}, r"perplexity is a share of the candidates, in \(0, 1\), got 0.0"),
        ({"perplexity": 30}, r"in \(0, 1\), got 30"),
        ({"learnable_dof": True, "dof": 2000.0}, r"start inside \(0.1, 1000.0\), got 2000.0"),
        ({"learnable_dof": True, "kernel": "cosine", "normalization": "anchor"}, "needs kernel='student_t'"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny(**options)


def test_bad_dissimilarities_are_refused():
    for bad in (math.nan, -1.0):
        with pytest.raises(ValueError, match="non-negative"):
            temperature_of_perplexity(torch.tensor([[1.0, bad]]), share=0.5)


@pytest.mark.extended
def test_script_writes_the_calibrated_temperature_and_the_learned_dof(run_script, tmp_path):
    flags = ["--temperature", "auto", "--learnable_dof", "--max_train_steps", 3, "--batch_size", 32]
    run_script("contrastive", ["--output_dir", tmp_path, *flags])
    found = json.loads((tmp_path / "encoder" / "results.json").read_text())["kernel"]
    model = SimCLRForPreTraining.from_pretrained(tmp_path / "encoder" / "pretraining")
    assert found == model.calibration.numbers() and found["temperature"] != 1 and found["dof"] != 5


def test_script_refuses_a_temperature_that_is_no_number(capsys):
    with pytest.raises(SystemExit):
        contrastive.main(["--temperature", "cold"])
    assert "--temperature must be a number or auto, got 'cold'" in capsys.readouterr().err
