"""The subcommand `hf-dpssl search`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..evaluation.choices import METRICS
from ..runs.console import printable
from .parsing import command_parser, parse_command

if TYPE_CHECKING:
    from ..embedding.embeddings_table import EmbeddingsTable

_GRID_SIDE = 64


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser("search", "The pictures of an embedded data set that are nearest to given ones.")
    parser.add_argument("embeddings", help="folder that hf-dpssl embed has written")
    parser.add_argument("pictures", nargs="+", help="picture files to search for")
    parser.add_argument("--k", type=int, default=5, help="neighbours of each picture")
    parser.add_argument("--metric", default="cosine", choices=METRICS, help="similarity: cosine, or minus the distance")
    parser.add_argument("--encoder", help="where the encoder is now, if it has moved")
    parser.add_argument("--output", help="JSON file for the result")
    parser.add_argument("--grid", help="PNG file: a row for each picture, itself and its neighbours")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl search`: returns the exit status; raises as `search_images`."""
    args = parse_command(parser(), argv)
    from ..embedding.embeddings_table import EmbeddingsTable, search_images
    from ..runs.atomic_files import write_json
    from ..runs.results import command_line

    table = EmbeddingsTable(args.embeddings)
    found = search_images(table, args.pictures, k=args.k, metric=args.metric, encoder=args.encoder)
    queries = [{"query": q, "neighbours": rows} for q, rows in zip(args.pictures, found, strict=True)]
    settings = {"embeddings": args.embeddings, "metric": args.metric, "k": args.k}
    result = settings | {"queries": queries, "command": command_line()}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print_neighbours(queries)
    if args.output:
        write_json(args.output, result)
    if args.grid:
        _save_neighbours(table, args.pictures, found, args.grid)
    return 0


def _print_neighbours(queries: list[dict]) -> None:
    for entry in queries:
        print(printable(entry["query"]))
        for row in entry["neighbours"]:
            where = f"{row['split']} row {row['row']}"
            found = f"{row['label'] or '':<16}{row['file'] or ''}"
            print(printable(f"  {row['similarity']:>9.4f}  {where:<22}{found}"))


def _save_neighbours(table: EmbeddingsTable, queries: list[str], found: list[list[dict]], path: str) -> None:
    import torch

    from ..data.decoding import to_square_tensor
    from ..embedding.embeddings_table import read_picture
    from ..runs.plots import save_grid

    pictures = []
    for query, neighbours in zip(queries, found, strict=True):
        pictures += [read_picture(query), *table.pictures([row["index"] for row in neighbours])]
    pixels = torch.stack([to_square_tensor(picture, _GRID_SIDE) for picture in pictures])
    save_grid(pixels.float() / 127.5 - 1, path, columns=1 + len(found[0]))
