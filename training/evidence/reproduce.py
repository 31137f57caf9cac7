"""Decide claims of the papers: each is stated in a file of claims/ before it is run, and gets one of three verdicts.

    python training/evidence/reproduce.py --list
    python training/evidence/reproduce.py reconstruction --scale quick     # with its study's other claims
    python training/evidence/reproduce.py all --scale cpu                  # hours
    python training/evidence/reproduce.py 1 --scale paper --dry_run        # what would be run
    python training/evidence/reproduce.py 1 --scale paper --rehearse       # whether it would start, on any machine

Writes OUTPUT_DIR/SCALE/: STUDY.json with the values of every seed, claims.md, a plot per claim, and a folder for each
study. A killed run goes on cell by cell; several processes may share one. Of STUDY.json alone, as of another
checkout, a study goes on from its whole seeds. The page is valid after every cell.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

from claim_statements import CLAIMS, claim_names, claims_of, families, find_claim, read_claim, read_study

from hf_dpssl.cli.errors import reported
from hf_dpssl.cli.reproduce import parser
from hf_dpssl.runs.console import say

if __name__ == "__main__":
    parser().parse_args()  # help and wrong flags end here, before the libraries are imported


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status."""
    asked = parser()
    args = asked.parse_args(argv)
    source = Path(args.claims_dir) if args.claims_dir else CLAIMS
    if args.list:
        print_list(args.scale, source)
        return 0
    if not args.claims:
        asked.error("give the claims to decide, by name or number, or all; --list shows them.")
    names = claim_names(source) if args.claims == ["all"] else [find_claim(given, source) for given in args.claims]
    folder = Path(args.output_dir) / args.scale
    studies = dict.fromkeys(read_claim(name, args.scale, source)["study"] for name in names)
    stated = {name: statement(name, args.scale, args.seeds, source) for name in studies}
    if args.dry_run:
        for name, content in stated.items():
            print_plan(name, content, folder / name)
        return 0
    if args.rehearse:
        for name, content in stated.items():
            print_rehearsal(name, content["study"])
        return 0
    import torch
    from claim_cells import check_data, state
    from claim_page import summary

    torch.set_num_threads(1)
    for content in stated.values():  # whatever would be refused is refused before the first cell
        check_data(content["study"])
    for name, content in stated.items():
        state(content, folder / name)
    for name, content in stated.items():
        run(name, content, folder, source=source)
    entries = refresh_page(folder, source)
    for name in names:
        print(f"{name}: {entries[name]['verdict']} ({summary(entries[name])})")
    say(f"written to {folder / 'claims.md'}")
    return 0


def statement(study: str, scale: str, seeds: int | None, source: Path) -> dict:
    """What is stated of a study before its first cell; ValueError for fewer seeds than its verdicts need."""
    claims = claims_of(study, scale, source)
    needed = max(claim["seeds"] for claim in claims.values())
    if seeds is not None and seeds < needed:
        raise ValueError(
            f"--seeds {seeds} decides nothing: the verdicts on {', '.join(claims)} need {needed}. Leave it out; a run "
            "that is stopped early leaves a table of what is done, and goes on later."
        )
    content = {"study": read_study(study, scale, source), "claims": claims}
    return content | {"families": families(claims, scale, source), "seeds": seeds or needed}


def run(name: str, stated: dict, folder: Path, end: float = math.inf, source: Path = CLAIMS) -> None:
    """Run the cells of a study that are missing, writing its values and the page after each.

    No cell begins after `end`, a time of time.monotonic().
    """
    from claim_cells import plan, ready, run_study, write_study
    from claim_restore import restore

    total = len(plan(stated["study"], stated["seeds"]))
    if time.monotonic() >= end:
        say(f"{name} is not begun: the time is over.")
        return
    places = ready(stated["study"], folder / name)
    restore(stated["study"], folder / name, folder / f"{name}.json")
    for cell in run_study(stated, folder / name, places):
        write_study(stated, folder / name, folder / f"{name}.json")
        refresh_page(folder, source)
        done = len(list((folder / name / "cells").glob("*.json")))
        say(f"{name}: {cell.name} is finished, {done} of {total} cells")
        if time.monotonic() >= end:
            say(f"{name} stops here, as the time is over; the same command goes on.")
            break
    write_study(stated, folder / name, folder / f"{name}.json")


def refresh_page(folder: Path, source: Path = CLAIMS) -> dict[str, dict]:
    """The page from all studies of a scale that have values; returns the verdicts."""
    from claim_page import write_page

    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return write_page(results, folder, source)


def print_list(scale: str, source: Path) -> None:
    """A line for each claim."""
    for name in claim_names(source):
        claim = read_claim(name, scale, source)
        numbers = read_study(claim["study"], scale, source)["numbers"]
        shared = len(claims_of(claim["study"], scale, source))
        about = f"{claim['seeds']} seeds; study {claim['study']}, {numbers['minutes']} minutes at scale {scale}"
        about += f" for its {shared} claims" if shared > 1 else ""
        print(f"{claim['number']:>3} {name} ({about})\n    {' '.join(claim['hypothesis'].split())}")


def print_plan(name: str, stated: dict, folder: Path) -> None:
    """What would be run, in its order, and what is there already; nothing is written."""
    from claim_cells import plan, steps_of_arm

    study = stated["study"]
    cells = plan(study, stated["seeds"])
    taken = [step for arm in study["arms"] for step in steps_of_arm(study, arm)]
    done = [(folder / "cells" / f"{cell.name}.json").exists() for cell in cells]
    data = study["data"]
    print(
        f"{name}, scale {study['scale']}: {len(cells)} cells, {sum(done)} done; about {study['numbers']['minutes']} min"
    )
    print(f"  data: {data['name']} at {data['image_size']} px, from {data['from']}")
    for step in filter(taken.__contains__, study["steps"]):
        print(f"  step: {step['run']} {' '.join(step['flags'].split())}")
    for arm, content in study["arms"].items():
        budget = ", ".join(f"{what} {study['numbers'][key]}" for what, key in content.get("budget", {}).items())
        print(f"  arm {arm} ({budget}): {content['flags']}")
    for cell, finished in zip(cells, done, strict=True):
        print(f"  {'done' if finished else 'open'} {cell.name}")


def print_rehearsal(name: str, study: dict) -> None:
    """A line for each different training run of a study, once two of its steps were taken; nothing is written."""
    from claim_rehearsal import rehearsed, runs_of

    runs, left = runs_of(study)
    arms = sum(len(run.arms) for run in runs)
    print(
        f"{name}, scale {study['scale']}: {len(runs)} different runs of {arms} in one seed, two steps of each",
        flush=True,
    )
    for run, stages in rehearsed(study):
        parts = [
            f"{stage + ' ' if stage else ''}{found['parameters'] / 1e6:.1f} M parameters, "
            f"{found['bytes']['total'] / 1e9:.1f} GB"
            for stage, found in stages.items()
        ]
        without = f" (without {', '.join(run.without)})" if run.without else ""
        print(f"  {run.script} of {', '.join(dict.fromkeys(run.arms))}{without}: {'; '.join(parts)}", flush=True)
    if left:
        print(f"  not rehearsed: {', '.join(left)}")


if __name__ == "__main__":
    sys.exit(reported("reproduce.py", main))
