"""The subcommand `hf-dpssl zood`: what choosing, combining and selecting encoders is worth on a domain not seen."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runs.console import printable, say
from .domain_flags import READING, add_domain_flags, counts_of, load_given, notes_of, options_of, precision_lines
from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "zood",
        "Leave each of three or more domains out, rank a zoo of encoders on the others, take the best, put the best "
        "ones together, select their features, and count what a linear classifier gets right in the domain left out.",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="folder DOMAIN/CLASS/image or CLASS/image, NAME=FOLDER of pacs, vlcs ..., or a data set with a "
        "domain column",
    )
    parser.add_argument(
        "--zoo", nargs="+", required=True, help="YAML file; or folders, Hub ids, untrained:NAME of timm, or default"
    )
    parser.add_argument("--top", type=int, default=3, help="encoders that are put together")
    parser.add_argument("--draws", type=int, default=2, help="of half of the classes, for agreement over set-ups")
    add_domain_flags(parser, "outputs/zood")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl zood`: returns the exit status; raises as `read_zoo`, `load_domains` and `zood`."""
    args = parse_command(parser(), argv)
    from ..runs.atomic_files import atomic_file
    from ..runs.redaction import redacted
    from ..runs.results import write_results
    from ..zoo.ranking_plot import draw_zood
    from ..zoo.zoo_list import read_zoo
    from ..zoo.zood import zood

    zoo = read_zoo(args.zoo)
    given = load_given(args, labelled=True)
    counts = counts_of(given)
    notes = notes_of(args, given)
    if not args.json:
        of = ", ".join(f"{name} {count}" for name, count in counts.items())
        say("\n".join([f"{args.dataset}: {of} images; domains are {given.origin}", *notes]))
    folder = Path(args.output_dir)
    reading = {name: getattr(args, name) for name in READING}
    found = zood(zoo, given, top=args.top, draws=args.draws, cache=folder / "features", **reading)
    about = {"dataset": args.dataset, "seed": args.seed, "samples": counts, "notes": notes, "domains": given.origin}
    write_results(folder / "zood.json", redacted(found), **about, options=options_of(args, "top", "draws"))
    with atomic_file(folder / "zood.png", "wb") as file:
        draw_zood(found, file, title=f"{len(zoo)} encoders on {args.dataset}")
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    print(printable("\n".join(_lines(found, args.draws))))
    say(f"written to {folder / 'zood.json'} and {folder / 'zood.png'}")
    return 0


def _lines(found: dict, draws: int) -> list[str]:
    targets = found["targets"]
    names = [entry["name"] for entry in found["encoders"]]
    width = max(map(len, [*names, *found["methods"], *found["not_stated"]])) + 2
    lines = ["percent right in the domain that was left out, by a linear probe of the others"]
    lines.append(f"{'':<{width}}" + "".join(f"{name[:14]:>15}" for name in targets) + f"{'seen before':>15}  because")
    for entry in found["encoders"]:
        name = entry["name"]
        if "error" in entry:
            lines.append(f"{name:<{width}}failed: {entry['error']}")
            continue
        values = "".join(f"{target['encoders'][name]['accuracy']:>15.2f}" for target in targets.values())
        lines.append(f"{name:<{width}}{values}{entry['contaminated']:>15}  {entry['contaminated_because']}")
    for method, mean in found["methods"].items():
        values = "".join(f"{target[method]['accuracy']:>15.2f}" for target in targets.values())
        lines.append(f"{method:<{width}}{values}   mean {_interval(mean)}")
    for method, lacking in found["not_stated"].items():
        lines.append(f"{method:<{width}}not stated: no feature was selected for the target {', '.join(lacking)}")
    for name, target in targets.items():
        selection = target["selection"]
        ranked = sorted(target["encoders"].items(), key=lambda item: -item[1]["score"])
        order = " > ".join(f"{encoder} {value['score']:.3f}" for encoder, value in ranked)
        kept = ", ".join(f"{encoder} {count}" for encoder, count in selection["features"].items())
        lines.append(f"{name}: ranked by the others {order}; selected of {selection['of']} features: {kept}")
    for group, measures in found["agreement"].items():
        lines.append(f"agreement with accuracy, weighted Kendall's tau and regret in percent right, {group} encoders:")
        for measure, value in measures.items():
            lines.append(f"  {measure:<{width}}{_interval(value['tau']):<28}{value['regret']:>8.2f}")
    if not found["agreement"]:
        lines.append("agreement is not stated: three encoders are needed.")
    elif found["draws"] < draws:
        lines.append("agreement is of all classes alone: halves are drawn of four or more that every domain has")
    lines.append("intervals are of 95 %, over the domains that were left out")
    return lines + precision_lines(found["encoders"])


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
