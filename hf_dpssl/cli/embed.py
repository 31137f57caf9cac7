"""The subcommands `hf-dpssl embed` and `hf-dpssl search`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

import torch

from ..data.decoding import to_square_tensor
from ..embedding.embedder import KINDS
from ..embedding.embedding_job import SPLITS, EmbedJob, embed_images
from ..embedding.embeddings_table import EmbeddingsTable, read_picture, search_images
from ..evaluation.neighbours import METRICS
from ..runs.atomic_files import write_json
from ..runs.plots import save_grid
from ..runs.results import command_line
from ..runs.training_loop import check_launch

_GRID_SIDE = 64


def embed(argv: list[str]) -> int:
    """`hf-dpssl embed`: returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hf-dpssl embed",
        description="Write the vector of every picture of a folder or data set as parquet shards. The same command "
        "goes on after a kill. Several machines or GPUs: accelerate launch -m hf_dpssl.cli embed ...",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("encoder", help="folder or Hub id (id@revision) of an image encoder")
    parser.add_argument("dataset", help="folder of pictures, name of the table in data.py, Hub id or parquet file")
    parser.add_argument("--output", required=True, help="folder of the result")
    parser.add_argument("--features", default="features", choices=KINDS, help="of the backbone, or after the head")
    parser.add_argument("--split", choices=SPLITS, help="one split only; default: all")
    parser.add_argument("--image_column", help="column of pictures; found by its type when not given")
    parser.add_argument("--label_column", help="column of classes; found by its type when not given")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--on_bad_image", default="error", choices=["error", "skip"], help="unreadable pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures embedded at once")
    parser.add_argument("--rows_per_shard", type=int, default=1024, help="pictures of a parquet file")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes of each process")
    parser.add_argument("--num_processes", type=int, default=1, help="processes on this machine")
    parser.add_argument("--overwrite", action="store_true", help="remove embeddings that are in the folder already")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")
    how = {name: options.pop(name) for name in ("num_processes", "overwrite")}
    options |= {"folder": options.pop("output"), "revision": options.pop("dataset_revision")}

    def run() -> None:
        check_launch()
        table = embed_images(EmbedJob(**options), **how)
        if table is not None:
            skipped = table.manifest["skipped"]["count"]
            if as_json:
                about = {"features": options["features"], "dimension": table.manifest["dimension"], "skipped": skipped}
                print(json.dumps({"folder": str(table.folder), "pictures": len(table)} | about, indent=2))
                return
            note = f", {skipped} unreadable pictures skipped (see manifest.json)" if skipped else ""
            print(f"{table.folder}: {len(table)} {options['features']} of {table.manifest['dimension']} numbers{note}")

    return _with_short_errors("embed", run)


def search(argv: list[str]) -> int:
    """`hf-dpssl search`: returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="hf-dpssl search",
        description="The pictures of an embedded data set that are nearest to given ones.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("embeddings", help="folder that hf-dpssl embed has written")
    parser.add_argument("pictures", nargs="+", help="picture files to search for")
    parser.add_argument("--k", type=int, default=5, help="neighbours of each picture")
    parser.add_argument("--metric", default="cosine", choices=METRICS, help="similarity: cosine, or minus the distance")
    parser.add_argument("--encoder", help="where the encoder is now, if it has moved")
    parser.add_argument("--output", help="JSON file for the result")
    parser.add_argument("--grid", help="PNG file: a row for each picture, itself and its neighbours")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)

    def run() -> None:
        table = EmbeddingsTable(args.embeddings)
        options = {"k": args.k, "metric": args.metric, "encoder": args.encoder}
        found = search_images(table, args.pictures, **options)
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

    return _with_short_errors("search", run)


def _print_neighbours(queries: list[dict]) -> None:
    for entry in queries:
        print(entry["query"])
        for row in entry["neighbours"]:
            where = f"{row['split']} row {row['row']}"
            print(f"  {row['similarity']:>9.4f}  {where:<22}{row['label'] or '':<16}{row['file'] or ''}")


def _save_neighbours(table: EmbeddingsTable, queries: list[str], found: list[list[dict]], path: str) -> None:
    pictures = []
    for query, neighbours in zip(queries, found, strict=True):
        pictures += [read_picture(query), *table.pictures([row["index"] for row in neighbours])]
    pixels = torch.stack([to_square_tensor(picture, _GRID_SIDE) for picture in pictures])
    save_grid(pixels.float() / 127.5 - 1, path, columns=1 + len(found[0]))


def _with_short_errors(command: str, run: Callable[[], None]) -> int:
    try:
        run()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"hf-dpssl {command}: {error}", file=sys.stderr)
        return 2
    return 0
