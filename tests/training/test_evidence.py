"""The studies' pages: differences pair seeds, intervals are scipy's of the stored seeds, verdicts need five seeds."""

import json
import re
import sys

import numpy as np
import pytest
from launches import REPOSITORY
from scipy.stats import ttest_1samp

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import claim_statements
import dae_gains
import mnist_domains
import paired_seeds
import readme
import reproduce
import size_costs

EVIDENCE = REPOSITORY / "training" / "evidence"


def results(name: str) -> dict:
    return json.loads((EVIDENCE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_differences_pair_equal_seeds_whatever_their_order():
    first, second = {"seeds": [2, 0, 7], "x": [5.0, 1.0, 99.0]}, {"seeds": [0, 1, 2], "x": [4.0, 50.0, 2.0]}
    found = paired_seeds.difference(first, second, "x")
    low, high = ttest_1samp([-3.0, 3.0], 0).confidence_interval(0.95)
    assert found["seeds"] == 2 and found["mean"] == 0 and found["interval"] == pytest.approx((low, high))
    one = paired_seeds.difference(first, {"seeds": [7], "x": [9.0]}, "x")
    assert one == {"seeds": 1, "mean": 90, "interval": None} and paired_seeds.contains_zero(one)
    with pytest.raises(ValueError, match="no seed has x in both rows"):
        paired_seeds.difference(first, {"seeds": [8], "x": [9.0]}, "x")


def test_a_verdict_needs_five_seeds_and_the_whole_interval_on_one_side_of_the_margin():
    cases = {
        "supported": [9.0, 10.0, 11.0, 10.0, 10.0],
        "contradicted": [1.0, 1.1, 0.9, 1.0, 1.2],
        "undecided": [0.0, 9.0, 1.0, 6.0, 2.0],
        "undecided (4 seeds)": [9.0, 10.0, 11.0, 10.0],
        "undecided (1 seed)": [10.0],
    }
    for wanted, values in cases.items():
        rows = [{"seeds": list(range(len(values))), "x": x} for x in (values, [0.0] * len(values))]
        assert paired_seeds.verdict(paired_seeds.difference(*rows, "x"), margin=2.0) == wanted


def test_intervals_of_the_page_are_those_of_scipys_t_test_on_the_stored_seeds():
    page = (EVIDENCE / "README.md").read_text(encoding="utf-8")
    accuracy, latents = results("dimensions")["metrics"]["accuracy"], results("latents")["metrics"]["cells"]
    modes, dits = results("augmentation_modes")["metrics"], results("dit")["metrics"]["cells"]
    cases = [
        ("| t per anchor - SimCLR, 2-d | ", accuracy["t_anchor, 2-d"], accuracy["simclr, 2-d"], "test_20nn"),
        ("| weak_dropout - joint, total | ", latents["weak_dropout"], latents["joint, total"], "psnr"),
        ("| DAE - decoupled, 96x4 | ", dits["DAE, 96x4"], dits["decoupled, 96x4"], "gfid"),
        ("paired difference ", {"x": modes["knn_top1_fused"]}, {"x": modes["knn_top1_exact"]}, "x"),
    ]
    for label, first, second, name in cases:
        assert first.get("seeds") == second.get("seeds")
        values = np.subtract(first[name], second[name])
        wanted = [values.mean(), *ttest_1samp(values, 0).confidence_interval(0.95)]
        found = re.search(re.escape(label) + r"(\S+) \((\S+) to (\S+)\)", page).groups()
        assert [float(number) for number in found] == pytest.approx(wanted, rel=0.01, abs=0.05 * abs(wanted[0])), label


def test_no_interval_or_verdict_is_stored_where_the_values_of_the_seeds_could_change():
    for path in (EVIDENCE / "results").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(interval|verdict|differences|minus_\w+|standard_\w+)":', text), path.name


def test_results_of_claims_are_of_the_statements_that_are_there():
    found = {path: json.loads(path.read_text())["stated"] for path in (EVIDENCE / "results").glob("claims/*/*.json")}
    if not found:
        pytest.skip("the results are not in this tree")
    for path, stored in found.items():
        now = reproduce.statement(path.stem, path.parent.name, None, claim_statements.CLAIMS)
        assert claim_statements.differences(stored, now) == [], path


def test_the_pages_words_on_a_difference_follow_its_seeds():
    nats = {"joint, total": 68.0, "joint, encoder": 63.0, "weak_dropout": 62.0, "weak_width": 62.0}
    cells = {name: {"prior_nats": [value]} for name, value in nats.items()}
    assert "explains most of the gain" in readme._encoder_share(cells) and "83%" in readme._encoder_share(cells)
    cells["joint, encoder"]["prior_nats"] = [67.0]
    assert "explains part of the gain" in readme._encoder_share(cells)
    cells["weak_width"]["prior_nats"] = [69.0]
    assert "no gain to explain" in readme._encoder_share(cells)
    entry = {"seeds": 3, "mean": 1.0, "interval": (0.5, 1.5)}
    assert readme._interval(entry, ".1f") == "+1.0 (+0.5 to +1.5) *"
    text = readme._intervals([entry, entry | {"interval": (-1.0, 3.0)}])
    assert "1 of 2 contain 0" in text and "Fewer than 5 seeds: no verdict" in text
    assert "no verdict" not in readme._intervals([entry | {"seeds": 5}])


def test_rows_of_runs_that_are_not_there_stay_and_those_of_new_runs_take_their_place():
    known = results("colored_mnist")["rows"]
    assert mnist_domains.rows_of([], known, mnist_domains.COLORED) == known
    records = [
        {"step": step, "loss": 0.0, "held_out": {"+90%": 60.0 + step, "+80%": 60.0 + step},
         "targets": {"-90%": {"accuracy": 70.0 + step, "fifth": 70.0 + step}}}
        for step in (0, 1)
    ]  # fmt: skip
    run = {"algorithm": "irm", "targets": ["-90%"], "draw": 0, "seed": 0, "adapts": False, "hyperparameters": {}}
    rows = mnist_domains.rows_of(
        [run | {"diverged": False, "seconds": 1.0, "records": records}], known, mnist_domains.COLORED
    )

    def split(given: list[dict]) -> tuple[list[float], list[dict]]:
        new = [(row["algorithm"], row["target"], row["draws"]) == ("irm", "-90%", [0]) for row in given]
        others = [row for row, is_new in zip(given, new, strict=True) if not is_new]
        return [row["accuracy"] for row, is_new in zip(given, new, strict=True) if is_new], others

    assert split(rows) == ([71.0, 71.0], split(known)[1])


@pytest.mark.extended
@pytest.mark.parametrize("number", range(2))
def test_flags_of_the_table_of_sizes_run_and_cost_what_it_states(number):
    stored = results("size_costs")["rows"]
    size = size_costs.SIZES[number]
    costs = {script: size_costs.costs_of(size, script) for script in size_costs.SCRIPTS}
    assert json.loads(json.dumps(size | {"costs": costs})) == stored[number]
    assert [row["images"] for row in stored] == [size["images"] for size in size_costs.SIZES]


def test_a_network_that_gives_one_class_for_all_answers_no_question():
    def rows(accuracy: float) -> list[dict]:
        found = {"erm": 25.0, "irm": accuracy}
        return [
            {"target": "-90%", "selection": "oracle", "algorithm": name, "draws": [0], "accuracy": value}
            for name, value in found.items()
        ]

    for accuracy, met in ((49.6, False), (50.4, False), (51.0, True), (39.0, False)):
        (found,) = mnist_domains.differences(rows(accuracy), {"-90%": 50.4})
        assert found["met"] == met and found["difference"] == accuracy - 25
    stored = [question for question in results("colored_mnist")["questions"] if question["draws"] == [0]]
    assert {question["algorithm"]: question["met"] for question in stored} == {"irm": False, "vrex": False, "arm": True}


def test_of_several_draws_the_oracle_takes_the_one_whose_fifth_is_best_and_none_lacks():
    def run(draw: int, fifth: float, accuracy: float) -> dict:
        records = [
            {"step": 0, "loss": 0.0, "held_out": {"+90%": 60.0, "+80%": 60.0},
             "targets": {"-90%": {"accuracy": accuracy, "fifth": fifth}}}
        ]  # fmt: skip
        about = {"algorithm": "irm", "targets": ["-90%"], "draw": draw, "seed": 0, "adapts": False}
        return about | {"hyperparameters": {}, "diverged": False, "seconds": 1.0, "records": records}

    first, second = run(2, 50.0, 40.0), run(3, 49.0, 60.0)
    (found,) = (
        row for row in mnist_domains.rows_of([first, second], [], mnist_domains.COLORED) if row["selection"] == "oracle"
    )
    assert (found["draws"], found["chosen_draw"], found["accuracy"]) == ([2, 3], 2, 40.0)
    assert mnist_domains.rows_of([first], [], mnist_domains.COLORED) == []


def test_only_a_row_within_a_point_of_the_published_one_agrees_with_it():
    def row(accuracy: float, published: float | None = 95.9, selection: str = "training_domains") -> dict:
        about = {"algorithm": "erm", "target": "0", "selection": selection, "draws": [3]}
        return about | {"accuracy": accuracy, "published": published}

    for accuracy, met in ((94.8, False), (95.0, True), (96.8, True), (97.0, False)):
        (found,) = mnist_domains.agreements([row(accuracy)])
        assert found["met"] == met and found["difference"] == pytest.approx(accuracy - 95.9)
    assert mnist_domains.agreements([row(95.9, published=None), row(95.9, selection="oracle")]) == []


def test_encoders_agree_with_their_images_by_kendalls_tau_of_each_seed():
    def row(knn: list[float], distance: list[float]) -> dict:
        return {"seeds": [0, 1], "encoder_knn": knn, "encoder_rank": knn, "frechet_distance": distance} | {
            "encoder_uniformity": [-value for value in distance]
        }

    cells = {
        "latent": {"seeds": [0, 1], "frechet_distance": [0.1, 0.1]},  # has no encoder
        "worst": row([50.0, 50.0], [3.0, 1.0]),
        "middle": row([60.0, 60.0], [2.0, 3.0]),
        "best": row([70.0, 70.0], [1.0, 2.0]),
    }
    text = readme.encoder_agreement(cells)
    assert text.startswith("Kendall's tau of the 3 encoders' measure")
    assert "20-NN of the encoder, % 0.33 (" in text  # 1 in the first seed, (1 - 2) / 3 in the second
    assert "uniformity -1.00 (-1.00 to -1.00)" in text


def test_what_dae_costs_is_its_ratio_to_the_joint_arm_over_seeds_of_both_with_scipys_interval(tmp_path):
    study = {
        "data": {"name": "mnist"},
        "arms": dict.fromkeys(["joint", "joint_encoder", "dae"]),
        "metrics": {"fid": {"better": "lower", "relative": True}},
    }
    rows = {
        "dae": {"seeds": [2, 0, 1, 7], "fid": [3.0, 1.0, 2.5, 99.0]},
        "joint": {"seeds": [0, 1, 2], "fid": [2.0, 2.0, 2.0]},
        "joint_encoder": {"seeds": [2], "fid": [2.0]},
    }
    gan = {"command": "reproduce.py", "metrics": {"cells": rows}}
    gan["stated"] = {"study": study, "claims": {"gan_latents": {"number": 5}}}
    (tmp_path / "gan.json").write_text(json.dumps(gan), encoding="utf-8")
    lines = dae_gains.dae_tables(tmp_path).splitlines()
    low, high = ttest_1samp(np.log([0.5, 1.25, 1.5]), 0).confidence_interval(0.95)
    figures = [f"{100 * (ratio - 1):+.0f}" for ratio in (0.9375 ** (1 / 3), np.exp(low), np.exp(high))]
    start = "| Frechet distance, GAN | mnist | 5 | `dae` |"
    assert lines[2:4] == [
        f"{start} `joint` | {figures[0]} % ({figures[1]} to {figures[2]}) | 3 |",
        f"{start} `joint_encoder` |  | 1 |",  # one seed has no interval
    ]
    del study["arms"]["joint"]
    (tmp_path / "gan.json").write_text(json.dumps(gan), encoding="utf-8")
    with pytest.raises(KeyError, match="reproduce.py has no arm joint to compare, of joint_encoder, dae"):
        dae_gains.dae_tables(tmp_path)


def test_what_dae_costs_in_decibels_is_dae_minus_joint_training():
    psnr = {arm: np.array(row["psnr"]) for arm, row in results("claims/quick/weakness")["metrics"]["cells"].items()}
    found = ttest_1samp(psnr["mask_30"] - psnr["joint_encoder"], 0).confidence_interval(0.95)
    table = dae_gains.dae_tables(EVIDENCE / "results" / "claims" / "quick")
    (row,) = [line for line in table.splitlines() if "| 8 x 8 of 256 codes, 150 + 150 steps | `mask_30` |" in line]
    means = [psnr[arm].mean() for arm in ("mask_30", "joint_encoder")]
    difference = f"{means[0] - means[1]:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
    assert row.endswith(f"| `joint_encoder` | {means[0]:.1f} | {means[1]:.1f} | {difference} | 5 |")
