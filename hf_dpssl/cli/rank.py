"""The subcommand `hf-dpssl rank`: which encoder to take for one's own pictures."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from ..runs.console import printable, say
from .domain_flags import READING, add_domain_flags, counts_of, load_given, notes_of, options_of, precision_lines
from .parsing import command_parser, parse_command

# Flags that decide what is read and embedded; `hf-dpssl embed` has the same ones.
_ALSO_OF_EMBED = ("features", "image_column", "label_column", "dataset_revision", "on_bad_image")
_PARTS = [  # columns, where they were measured
    "labels",
    "stability",
    "knn_top1",
    "in_domain_top1",
    "log_me",
    "h_score",
    "nce",
    "trans_rate",
    "effective_rank",
    "views",
]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "rank",
        "Say which encoder to take for pictures of several domains (photo, sketch, ...), in minutes and without "
        "training: each domain is left out once, and a Bayesian linear model of the others tells its labels.",
    )
    parser.add_argument(
        "dataset",
        help="folder DOMAIN/CLASS/image or CLASS/image, NAME=FOLDER of pacs, vlcs ..., or any data set with "
        "--domain_column",
    )
    parser.add_argument(
        "--zoo",
        nargs="+",
        default=["default"],
        help="folders or Hub ids (id@revision) of image encoders, untrained:NAME of timm, a YAML file with a list of "
        "them, or default: six of the Hub",
    )
    parser.add_argument(
        "--no_labels", action="store_true", help="rank by how well two views of a picture find each other"
    )
    add_domain_flags(parser, "outputs/rank")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl rank`: returns the exit status; raises as `load_domains` and `rank_zoo`."""
    args = parse_command(parser(), argv)
    from ..runs.atomic_files import atomic_file
    from ..runs.redaction import redacted
    from ..runs.results import write_results
    from ..zoo.ranking_plot import draw_ranking
    from ..zoo.zoo_list import UNTRAINED, read_zoo
    from ..zoo.zoo_ranking import rank_zoo

    zoo = read_zoo(args.zoo)
    if random := [entry.encoder for entry in zoo if entry.encoder.startswith(UNTRAINED)]:
        print(f"warning: weights are random, for comparison only: {', '.join(random)}", file=sys.stderr)
    given = load_given(args, labelled=not args.no_labels)
    counts = counts_of(given)
    notes = notes_of(args, given)
    if not args.json:
        of = ", ".join(f"{name} {count}" for name, count in counts.items())
        say("\n".join([f"{args.dataset}: {of} images; domains are {given.origin}", *notes]))
    folder = Path(args.output_dir)
    reading = {name: getattr(args, name) for name in READING}
    entries = rank_zoo(zoo, given, cache=folder / "features", **reading)
    unit = "percent of views that find each other" if args.no_labels else "score: nats per label and per dimension"
    options = options_of(args, "no_labels")
    metrics = {entry["name"]: {key: entry[key] for key in entry if key != "name"} for entry in entries}
    about = {"dataset": args.dataset, "seed": args.seed, "samples": counts, "notes": notes}
    write_results(folder / "rank.json", redacted(metrics), **about, options=options, unit=unit, domains=given.origin)
    with atomic_file(folder / "rank.png", "wb") as file:
        draw_ranking(entries, file, title=f"{len(entries)} encoders on {args.dataset}", unit=unit)
    if args.json:
        print(json.dumps(entries, indent=2))
        return 0
    _print_table(entries, unit)
    say(f"written to {folder / 'rank.json'} and {folder / 'rank.png'}; next, with the first one:")
    best = entries[0]["encoder"]
    if best.startswith(UNTRAINED):
        say("  nothing: its weights are random, and no trained encoder is better")
        return 0
    command = ["hf-dpssl", "embed", best, given.data.name, "--output_dir", "outputs/embeddings"]
    for name in _ALSO_OF_EMBED:
        if (value := getattr(args, name)) != parser().get_default(name):
            command += [f"--{name}", value]
    say("  " + shlex.join(command))
    return 0


def _print_table(entries: list[dict], unit: str) -> None:
    parts = [name for name in _PARTS if name in entries[0]]
    width = max(len(entry["name"]) for entry in entries) + 2
    print(f"{unit}, mean and 95 % interval over the domains that were left out")
    numbers = {"width": "", "megabytes": ",.1f"}
    head = f"{'score':>9}{'interval':>20}{'behind the first':>22}"
    head += "".join(f"{name:>15}" for name in (*parts, *numbers)) + f"{'seconds':>18}"
    print(f"{'encoder':<{width}}{head}{'seen before':>15}  licence")
    for entry in entries:
        if "error" in entry:
            print(printable(f"{entry['name']:<{width}}failed: {entry['error']}"))
            continue
        behind = "" if entry is entries[0] else _interval(entry["behind"])
        text = f"{entry['score']['mean']:>9.3f}{_interval(entry['score']):>20}{behind:>22}"
        text += "".join(f"{entry[name]:>15.3f}" for name in parts)
        text += "".join(f"{format(entry[name], how):>15}" for name, how in numbers.items())
        seconds = f"{entry['seconds']:.1f}{' (cached)' if entry['cached'] else ''}"
        text += f"{seconds:>18}"
        print(printable(f"{entry['name']:<{width}}{text}{entry['contaminated']:>15}  {entry['licence']}"))
    for entry in entries:
        if entry.get("contaminated") == "yes":
            print(printable(f"{entry['name']} has seen pictures like these: {entry['contaminated_because']}"))
    for line in precision_lines(entries):
        print(line)


def _interval(value: dict[str, float]) -> str:
    return f"[{value['low']:.3f}, {value['high']:.3f}]"
