"""What decoupled training (DAE) buys and costs beside joint training, in the studies of a scale: two tables.

Looked at after the runs: of these comparisons claims 5 to 8 and 21 state some, and only their verdicts are corrected.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from claim_decision import Cells, paired
from claim_page import cells_of

from hf_dpssl.evaluation.student_interval import student_interval

_BOTH = [("weak_dropout", "joint_total"), ("weak_dropout", "joint_encoder")]
_WEAKNESSES = [
    (arm, "joint_encoder") for arm in ("dropout_05", "dropout_10", "dropout_20", "dropout_40", "noise_30", "mask_30")
]
_DIT = [("dit_25", "joint_dit_25")]
_ONE_STEP = [("one_step", "joint_one_step")]


class Measured(NamedTuple):
    """Rows of a table: what is measured, the study, its metric, and pairs of DAE's arm and the joint one."""

    says: str
    study: str
    metric: str
    pairs: list[tuple[str, str]]


MEASURED = (  # the lower, the better
    Measured("rFID", "autoencoders", "rfid", _BOTH),
    Measured("rFID", "weakness", "rfid", _WEAKNESSES),
    Measured("nats per image, small prior", "autoencoders", "prior_nats", _BOTH),
    Measured("nats per image, small prior", "weakness", "prior_nats", _WEAKNESSES),
    Measured("nats per image, token model", "tokens", "nats", _BOTH),
    Measured("Frechet distance, token model", "tokens", "token_fd", _BOTH),
    Measured("Frechet distance, small DiT", "weakness", "dit_small_fd", _WEAKNESSES),
    Measured("Frechet distance, large DiT", "weakness", "dit_large_fd", _WEAKNESSES),
    Measured("Frechet distance, DiT *", "one_step", "frechet_distance", _DIT),
    Measured("Frechet distance, DiT *", "one_step_photographs", "frechet_distance", _DIT),
    Measured("Frechet distance, one step", "weakness", "one_step_fd", _WEAKNESSES),
    Measured("Frechet distance, one step *", "one_step", "frechet_distance", _ONE_STEP),
    Measured("Frechet distance, one step *", "one_step_photographs", "frechet_distance", _ONE_STEP),
    Measured("Frechet distance, GAN", "gan", "fid", [("dae", "joint"), ("dae", "joint_encoder")]),
)
RECONSTRUCTED = {"autoencoders": _BOTH, "weakness": _WEAKNESSES}  # study: pairs; their metric is psnr
_ABOUT = (
    "Above 0 DAE's figure is the higher one: its images lie farther from real ones, its codes cost more. DAE's decoder "
    "of stage 1 is as wide as the real one here, and weakened by dropout, noise or masks alone. The encoder of "
    "`joint_encoder` learns for as many steps as DAE's, that of `joint_total`, and of `joint` in GANs, for as many "
    "as DAE takes in all; the GAN `joint_encoder` ends with its encoder. \\* One autoencoder for each arm: seeds are "
    "the generator's, so that the interval leaves out how much autoencoders differ."
)


def rise(cells: Cells, pair: tuple[str, str], metric: str, about: dict) -> list[float]:
    """By how much the metric of the pair's first arm is higher, of each seed that both arms have.

    In its unit; of a `relative` one the logarithm of the ratio. ValueError where a value is no number.
    """
    sign = {"higher": 1, "lower": -1}[about["better"]]
    better = paired(cells, {"first": pair[0], "second": pair[1], "metric": metric}, about)
    return [sign * value for value in better.values()]


def percent(differences: list[float]) -> str:
    """Mean and 95 % interval of logarithms of ratios, as `+22 % (+6 to +40)`; empty with fewer than two."""
    if len(differences) < 2:
        return ""
    found = student_interval(differences)
    centre, low, high = (round(100 * math.expm1(found[name])) for name in ("mean", "low", "high"))
    return f"{centre:+d} % ({low:+d} to {high:+d})"


def decibels(differences: list[float]) -> str:
    """Mean and 95 % interval, as `-0.21 (-0.45 to +0.02)`; empty with fewer than two."""
    if len(differences) < 2:
        return ""
    found = student_interval(differences)
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})"


def dae_tables(folder: Path) -> str:
    """Both tables, in Markdown, of the studies that have results in the folder of a scale.

    Raises:
        KeyError: a study without an arm that is compared.
    """
    studies = {rows.study for rows in MEASURED} | RECONSTRUCTED.keys()
    files = {study: folder / f"{study}.json" for study in studies}
    results = {study: json.loads(path.read_text("utf-8")) for study, path in files.items() if path.exists()}
    cells = {study: cells_of(result) for study, result in results.items()}
    lines = ["| measured, the lower the better | data | of claims | DAE's arm | joint arm | DAE's higher by | seeds |"]
    lines.append("|---" * 7 + "|")
    for rows in MEASURED:
        for pair in rows.pairs if rows.study in results else ():
            differences = rise(cells[rows.study], pair, rows.metric, _metric(results[rows.study], pair, rows.metric))
            where = " | ".join(_where(results[rows.study], pair))
            lines.append(f"| {rows.says} | {where} | {percent(differences)} | {len(differences)} |")
    heads = ["reconstruction of", "of claims", "autoencoder", "DAE's arm", "joint arm", "DAE's PSNR, dB", "joint"]
    heads += ["DAE's higher by", "seeds"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for study, pairs in RECONSTRUCTED.items():
        for pair in pairs if study in results else ():
            differences = rise(cells[study], pair, "psnr", _metric(results[study], pair, "psnr"))
            data, claims, *arms = _where(results[study], pair)
            means = [_mean(cells[study].get(arm, {}), "psnr") for arm in pair]
            values = [
                data,
                claims,
                _autoencoder(results[study]["stated"]["study"]),
                *arms,
                *means,
                decibels(differences),
                str(len(differences)),
            ]
            lines.append(f"| {' | '.join(values)} |")
    counted = (
        "Intervals: Student's t over paired seeds, 95 %, not corrected for their number; rows of a study share the "
    )
    counted += "joint arm."
    return "\n".join([*lines, "", f"{_ABOUT} {counted}"])


def _autoencoder(study: dict) -> str:
    """Side and number of its codes, terms of its loss beside the reconstruction's, steps of both stages."""
    numbers = study["numbers"]
    side = study["data"]["image_size"] // 2 ** (len(numbers["encoder_channels"].split()) - 1)
    flags = study["steps"][0]["flags"]
    terms = [term for term in ("adversarial", "perceptual") if f"--{term} " in flags]
    steps = f"{numbers['stage_1_steps']} + {numbers['stage_2_steps']} steps"
    return ", ".join([f"{side} x {side} of {numbers['num_codes']} codes", *terms, steps])


def _metric(result: dict, pair: tuple[str, str], metric: str) -> dict:
    """What is stated of the metric; KeyError when the study has not both arms."""
    study = result["stated"]["study"]
    if lacking := [arm for arm in pair if arm not in study["arms"]]:
        raise KeyError(f"{result['command']} has no arm {lacking[0]} to compare, of {', '.join(study['arms'])}.")
    return study["metrics"][metric]


def _where(result: dict, pair: tuple[str, str]) -> list[str]:
    """Data set, numbers of the claims, and names of the arms."""
    stated = result["stated"]
    numbers = sorted(claim["number"] for claim in stated["claims"].values())
    return [stated["study"]["data"]["name"], ", ".join(map(str, numbers)), *(f"`{arm}`" for arm in pair)]


def _mean(seeds: dict[int, dict], metric: str) -> str:
    values = [cell["metrics"][metric] for cell in seeds.values() if metric in cell["metrics"]]
    return f"{mean(values):.1f}" if values else ""
