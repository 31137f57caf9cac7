"""The subcommand `hf-dpssl rank`: which encoder to take for one's own pictures."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from ..embedding.choices import BAD_IMAGES, KINDS
from ..runs.console import printable, say
from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "rank",
        "Say which encoder to take for pictures of several domains (photo, sketch, ...), in minutes and without "
        "training: each domain is left out once, and a Bayesian linear model of the others tells its labels.",
    )
    parser.add_argument("dataset", help="folder DOMAIN/CLASS/image, or any data set with --domain_column")
    parser.add_argument("--zoo", nargs="+", required=True, help="folders or Hub ids (id@revision) of image encoders")
    parser.add_argument("--domain_column", help="column of domains; without it the folders of the first level are")
    parser.add_argument("--label_column", help="column of classes; found by its type when not given")
    parser.add_argument("--image_column", help="column of pictures; found by its type when not given")
    parser.add_argument(
        "--no_labels", action="store_true", help="rank by how well two views of a picture find each other"
    )
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--features", default="features", choices=KINDS, help="of the backbone, or after the head")
    parser.add_argument("--images", type=int, help="at most so many pictures, drawn at random; default: all")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures embedded at once")
    parser.add_argument("--on_bad_image", default="error", choices=BAD_IMAGES, help="unreadable pictures")
    parser.add_argument("--seed", type=int, default=0, help="of subset and views")
    parser.add_argument(
        "--output_dir", default="outputs/rank", help="folder of rank.json, rank.png and the features, which are kept"
    )
    parser.add_argument("--json", action="store_true", help="print the ranking as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl rank`: returns the exit status; raises as `load_domains` and `rank_zoo`."""
    args = parse_command(parser(), argv)
    from ..domains.domain_data import load_domains
    from ..domains.ranking_plot import draw_ranking
    from ..domains.zoo import rank_zoo
    from ..runs.atomic_files import atomic_file
    from ..runs.results import write_results

    columns = {name: getattr(args, name) for name in ("domain_column", "label_column", "image_column")}
    how = {"labelled": not args.no_labels, "limit": args.images, "seed": args.seed}
    given = load_domains(args.dataset, **columns, revision=args.dataset_revision, **how)
    counts = {name: int((given.domains[list(given.rows)] == i).sum()) for i, name in enumerate(given.domain_names)}
    if not args.json:
        say(f"{args.dataset}: {', '.join(f'{name} {count}' for name, count in counts.items())} images")
    folder = Path(args.output_dir)
    reading = {name: getattr(args, name) for name in ("features", "batch_size", "on_bad_image", "seed")}
    entries = rank_zoo(args.zoo, given, cache=folder / "features", **reading)
    unit = "percent of views that find each other" if args.no_labels else "score: nats per label and per dimension"
    options = columns | {name: getattr(args, name) for name in ("no_labels", "features", "images", "on_bad_image")}
    metrics = {entry["encoder"]: {key: entry[key] for key in entry if key != "encoder"} for entry in entries}
    about = {"dataset": args.dataset, "seed": args.seed, "samples": counts}
    write_results(folder / "rank.json", metrics, **about, options=options, unit=unit)
    with atomic_file(folder / "rank.png", "wb") as file:
        draw_ranking(entries, file, title=f"{len(entries)} encoders on {args.dataset}", unit=unit)
    if args.json:
        print(json.dumps(entries, indent=2))
        return 0
    _print_table(entries, unit)
    following = shlex.join(
        ["hf-dpssl", "embed", entries[0]["encoder"], args.dataset, "--output_dir", "outputs/embeddings"]
    )
    say(f"written to {folder / 'rank.json'} and {folder / 'rank.png'}; next, with the first one:\n  {following}")
    return 0


def _print_table(entries: list[dict], unit: str) -> None:
    parts = [name for name in ("labels", "stability", "knn_top1", "log_me", "effective_rank") if name in entries[0]]
    width = max(len(entry["encoder"]) for entry in entries) + 2
    print(f"{unit}, mean and 95 % interval over the domains that were left out")
    names = [*parts, "width", "parameters", "seconds"]
    head = f"{'score':>9}{'interval':>20}{'behind the first':>22}"
    print(f"{'encoder':<{width}}{head}" + "".join(f"{name:>15}" for name in names))
    for entry in entries:
        if "error" in entry:
            print(printable(f"{entry['encoder']:<{width}}failed: {entry['error']}"))
            continue
        behind = "" if entry is entries[0] else _interval(entry["behind"])
        text = f"{entry['score']['mean']:>9.3f}{_interval(entry['score']):>20}{behind:>22}"
        text += "".join(f"{entry[name]:>15.3f}" for name in parts)
        text += f"{entry['width']:>15}{entry['parameters']:>15,}{entry['seconds']:>15.1f}"
        print(printable(f"{entry['encoder']:<{width}}{text}"))


def _interval(value: dict[str, float]) -> str:
    return f"[{value['low']:.3f}, {value['high']:.3f}]"
