"""What is claimed, and how it is decided, stated before a run: the YAML files of claims/ and claims/studies/.

A study says what is run: data, arms (the steps of a cell), metrics and how they are read, and the numbers of each
scale. A claim says what is compared in a study, by which margin, and with how many seeds. Both are stored beside the
first cell; files that say something else later are refused. What either has at some scales only stands under `added`,
so that it may come later without changing what was stated of the others.

Of a study, beside data, arms, steps, metrics and scales:

- a step may name its `arms`; `final`: it reads test images, in no cell of a grid; `grid`: it is run in these alone;
- an arm may have a `grid` of flags, of which `tuning` chooses; `without`, scripts whose steps of all arms it has not;
  `needs`, arms whose cells it reads; `trained_as`, the arm whose run it draws from;
- `curve` tells whether an arm had converged, `curves` the same of its generators, for claims that read their `metrics`;
  of a `relative` one the logarithm does;
- `dial` and `gains` are drawn: metrics along a setting, and how much better the first arm of a pair is along one;
- `equal_quality` (claim_sizes.py) and `forecast` (claim_forecast.py) are further metrics.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path

import yaml

CLAIMS = Path(__file__).parent / "claims"
FEWEST_SEEDS = 5  # of a verdict, as in paired_seeds.py
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times faster, where libyaml was there
_CLAIM = {
    "number",
    "hypothesis",
    "source",
    "study",
    "family",
    "no_op",
    "seeds",
    "comparisons",
    "differs_from_paper",
    "change_of_mind",
}
_STUDY = {"data", "measuring", "arms", "steps", "metrics", "curve", "scales"}
_COMPARISON = {"first", "second", "metric", "margin"}


def claim_names(folder: Path = CLAIMS) -> list[str]:
    """All claims, in the order of their numbers; FileNotFoundError for a folder without any."""
    if not any(folder.glob("*.yaml")):
        raise FileNotFoundError(f"{folder} has no claims (*.yaml): name a folder that has.")
    return sorted((path.stem for path in folder.glob("*.yaml")), key=lambda name: _yaml(folder, name)["number"])


def find_claim(given: str, folder: Path = CLAIMS) -> str:
    """The name of a claim that is given by its name or number; ValueError names the closest ones."""
    numbers = {str(_yaml(folder, name)["number"]): name for name in claim_names(folder)}
    if given in numbers.values():
        return given
    if given in numbers:
        return numbers[given]
    close = difflib.get_close_matches(given, numbers.values(), 3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    known = ", ".join(f"{number} ({name})" for number, name in numbers.items())
    raise ValueError(f"no claim {given!r}: there are {known}.{hint}")


def read_claim(name: str, scale: str, folder: Path = CLAIMS) -> dict:
    """A claim at a scale; ValueError where it lacks a key, its margin decides nothing or its seeds are too few."""
    claim = with_added(_yaml(folder, name), scale)
    _require(name, claim, _CLAIM)
    if claim["seeds"] < FEWEST_SEEDS:
        raise ValueError(f"claim {name!r} states {claim['seeds']} seeds: a verdict needs at least {FEWEST_SEEDS}.")
    for comparison in claim["comparisons"]:
        _require(f"{name}, comparison", comparison, _COMPARISON)
        if comparison["margin"] <= 0:
            raise ValueError(
                f"claim {name!r} has the margin {comparison['margin']}: it must be positive, or a method that does "
                "nothing would be supported by chance."
            )
    return claim


def read_study(name: str, scale: str, folder: Path = CLAIMS) -> dict:
    """A study at a scale: its file, with the `numbers` and the data of that scale in place of `scales`.

    Raises:
        ValueError: a key is missing, it has not the scale, or an arm is without a script that no step runs.
    """
    study = with_added(_yaml(folder / "studies", name), scale)
    _require(name, study, _STUDY)
    if scale not in study["scales"]:
        raise ValueError(f"study {name!r} has no scale {scale!r}: it has {', '.join(study['scales'])}.")
    for arm, about in study["arms"].items():
        if unknown := set(about.get("without", [])) - {step["run"] for step in study["steps"]}:
            raise ValueError(f"study {name!r}: {arm} is without {sorted(unknown)}, which no step runs.")
    numbers = dict(study.pop("scales")[scale])
    study["data"] = study["data"] | numbers.pop("data", {})
    study["numbers"] = numbers
    study["scale"] = scale
    return study


def with_added(content: dict, scale: str) -> dict:
    """A file's content with what it adds at a scale: keys of mappings, entries of lists, and texts in place of others.

    `added` is {"scales": [...], what is added}.
    """
    content = dict(content)
    added = dict(content.pop("added", {"scales": []}))
    if scale in added.pop("scales"):
        for key, more in added.items():
            here = content.get(key)
            content[key] = here | more if isinstance(here, dict) else here + more if isinstance(here, list) else more
    return content


def claims_of(study: str, scale: str, folder: Path = CLAIMS) -> dict[str, dict]:
    """{name: claim} of a study.

    Raises:
        ValueError: one compares arms or metrics that the study has not, or arms with grids of different lengths.
    """
    claims = {name: read_claim(name, scale, folder) for name in claim_names(folder)}
    found = {name: claim for name, claim in claims.items() if claim["study"] == study}
    content = with_added(_yaml(folder / "studies", study), scale)
    arms = [*content["arms"], *forecasts(content)]
    metrics = list(metrics_of(content))
    for name, claim in found.items():
        for comparison in claim["comparisons"]:
            for key, known in (("first", arms), ("second", arms), ("metric", metrics)):
                if comparison[key] not in known:
                    raise ValueError(f"claim {name!r} compares {comparison[key]!r}: {study} has {known}.")
            grids = [len(content["arms"].get(comparison[side], {}).get("grid", [])) for side in ("first", "second")]
            if grids[0] != grids[1]:
                raise ValueError(
                    f"claim {name!r} compares {comparison}: their grids have {grids} points, and need as many."
                )
            measured = content["metrics"].get(comparison["metric"], {}).get("arms", arms)
            if not {comparison["first"], comparison["second"]} <= set(measured):
                raise ValueError(
                    f"claim {name!r} compares {comparison}: {comparison['metric']} is of {measured} alone."
                )
    return found


def forecasts(study: dict) -> list[str]:
    """The pseudo-arms of a study: what forecasts its generators' results, see claim_forecast.py."""
    return ["forecast", *study["forecast"]["measures"]] if "forecast" in study else []


def metrics_of(study: dict) -> dict[str, dict]:
    """The metrics of a study's arms, of equal quality and of its forecasts."""
    found = dict(study["metrics"])
    for name, about in study.get("equal_quality", {}).items():
        found[name] = {"says": about["says"], "better": "lower", "relative": True, "equal_quality": about}
    for target, metric in study.get("forecast", {}).get("targets", {}).items():
        for key, which in (("all", "all autoencoders"), ("worse_half", "the worse half")):
            says = f"rank correlation with {study['metrics'][metric]['says']}, {which}"
            found[f"{key}_{target}"] = {"says": says, "better": "higher"}
    return found


def counts(scale: str, folder: Path = CLAIMS) -> dict[str, int]:
    """{claim: its comparisons} of all claims at a scale, run or not: what p values are corrected for."""
    return {name: len(read_claim(name, scale, folder)["comparisons"]) for name in claim_names(folder)}


def families(claims: dict[str, dict], scale: str, folder: Path = CLAIMS) -> dict[str, dict[str, int]]:
    """{family: {claim: its comparisons}} of the families of some claims: all their claims, run or not.

    Part of what is stated, so it stays; which claims ask about the same thing, and no more: p values are corrected over
    the claims of all families (`counts`), as one table shows them all.
    """
    found: dict[str, dict[str, int]] = {claim["family"]: {} for claim in claims.values()}
    for name in claim_names(folder):
        claim = read_claim(name, scale, folder)
        if claim["family"] in found:
            found[claim["family"]][name] = len(claim["comparisons"])
    return found


def fingerprint(content: dict) -> str:
    """Digest of a statement, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(stored: object, now: object, place: str = "") -> list[str]:
    """Lines "place: stored X, now Y" where two statements differ."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = sorted(stored.keys() | now.keys())
        parts = [(stored.get(key), now.get(key), f"{place}.{key}" if place else key) for key in keys]
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        parts = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(stored, now, strict=True))]
    else:
        return [] if stored == now else [f"{place}: stored {stored!r}, now {now!r}"]
    return [line for part in parts for line in differences(*part)]


def _yaml(folder: Path, name: str) -> dict:
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: there are {sorted(p.stem for p in folder.glob('*.yaml'))}.")
    content = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping, not a {type(content).__name__}.")
    return content


def _require(name: str, content: dict, keys: set[str]) -> None:
    if missing := sorted(keys - content.keys()):
        raise ValueError(f"{name!r} lacks {', '.join(missing)}: a claim states all before it is run.")
