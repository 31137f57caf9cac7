"""`hf-dpssl evaluate ID --suite transfer`: an encoder on nine data sets, in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runs.console import printable, say
from .domain_flags import precision_lines

FINETUNE = "finetune"  # protocol of the suite only
_PROTOCOLS = ("knn", "linear", FINETUNE)
_SHARED = ("checkpoint", "protocol", "batch_size", "seed", "json")  # flags of `evaluate` that the suite heeds
_OF_FINETUNE = ("steps", "learning_rates", "weight_decays")
_OWN = ("sets", "data", *_OF_FINETUNE, "output_dir")


def add_suite_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `--suite transfer` needs, which have no default but where they are given."""
    group = parser.add_argument_group("only with --suite transfer")

    def add(name: str, text: str, **how) -> None:
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **how)

    add("sets", "of the suite: aircraft, birdsnap, caltech101, cars, cifar10, cifar100, dtd, pets, sun397", nargs="+")
    add("data", "SET=FOLDER, parquet file, Hub id or name of the table, in place of the default Hub ids", nargs="+")
    add("steps", "of each run of fine-tuning (default: 5000); of dg: of each run (default: 1001)", type=int)
    add("learning_rates", "of the grid of fine-tuning (default: 1e-4 1e-3 1e-2 1e-1)", type=float, nargs="+")
    add("weight_decays", "divided by the learning rate (default: 0 1e-6 1e-5 1e-4 1e-3)", type=float, nargs="+")
    add(
        "output_dir",
        "results, and what a later call goes on with (default: outputs/transfer; of dg: outputs/dg)",
    )


def refuse_suite_flags(given: dict) -> None:
    """ValueError for flags of the suite where none is given."""
    if found := [name for name in _OWN if name in given]:
        raise ValueError(f"--{found[0]} is for --suite transfer: give both, or leave it out.")
    if FINETUNE in given.get("protocol", []):
        raise ValueError("--protocol finetune is for --suite transfer: give both, or leave it out.")


def main_of_suite(given: dict, defaults: dict) -> int:
    """Run the suite; `defaults` are the values of flags that were not given. Errors of `transfer`."""
    for name, value in given.items():
        if name not in (*_SHARED, *_OWN) and value != defaults[name]:
            raise ValueError(f"--{name} is not for --suite transfer: leave it out.")
    protocols = given.get("protocol", ["knn", "linear"])
    if unknown := [name for name in protocols if name not in _PROTOCOLS]:
        raise ValueError(f"--protocol {unknown[0]} is not for --suite transfer: {', '.join(_PROTOCOLS)} are.")
    how = {name: given[name] for name in _OF_FINETUNE if name in given}
    if how and FINETUNE not in protocols:
        raise ValueError(f"--{next(iter(how))} is of fine-tuning: add --protocol {FINETUNE}, or leave it out.")
    sources = {}
    for text in given.get("data", []):
        name, equals, source = text.partition("=")
        if not (name and equals and source) or name in sources:
            raise ValueError(f"--data takes SET=SOURCE, once for each set, got {text!r}.")
        sources[name] = source
    from ..domains.transfer import transfer
    from ..domains.transfer_sets import TRANSFER_SETS
    from ..runs.results import write_results

    folder = Path(given.get("output_dir", "outputs/transfer"))
    chosen = {"sets": given.get("sets", list(TRANSFER_SETS)), "protocols": protocols}
    options = chosen | how | {"batch_size": given["batch_size"], "seed": given["seed"]}
    found = transfer(given["checkpoint"], sources=sources, folder=folder, **options)
    samples = {row["set"]: row["test"] for row in found["rows"] if "error" not in row}
    names = ", ".join(row["title"] for row in found["rows"] if "error" not in row)
    write_results(folder / "transfer.json", found, dataset=names, seed=given["seed"], samples=samples, options=options)
    if given["json"]:
        print(json.dumps(found, indent=2))
        return 0
    print(printable("\n".join([*_lines(found["rows"]), *precision_lines([found])])))
    say(f"written to {folder / 'transfer.json'}")
    return 0


def _lines(rows: list[dict]) -> list[str]:
    lines = [f"{'protocol':<10}{'percent':>9}{'95 % of test images':>22}  {'metric':<11}set"]
    published = False
    for row in rows:
        if "error" in row:
            lines.append(f"{row['set']}: failed: {row['error']}")
            continue
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"{row['protocol']:<10}{row['mean']:>9.2f}{interval:>22}  {row['metric']:<11}{row['title']}")
        for name, value in row.get("published", {}).items():
            lines.append(f"{'':<10}{value:>9.2f}{'':>22}  {'published':<11}{name}, of ImageNet")
            published = True
    if not published:
        lines.append("published figures stand beside whole sets that were fine-tuned only")
    return lines
