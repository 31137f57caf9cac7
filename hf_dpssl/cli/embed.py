"""The subcommand `hf-dpssl embed`."""

from __future__ import annotations

import argparse
import json

from ..embedding.choices import BAD_IMAGES, KINDS, SPLITS
from ..runs.console import say
from .parsing import command_parser, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "embed",
        "Write the vector of every picture of a folder or data set as parquet shards. The same command "
        "goes on after a kill. Several machines or GPUs: accelerate launch -m hf_dpssl.cli embed ...",
    )
    parser.add_argument("encoder", help="folder or Hub id (id@revision) of an image encoder")
    parser.add_argument("dataset", help="folder of pictures, digits, cifar10 ..., Hub id, parquet or tar file")
    parser.add_argument("--output_dir", required=True, help="folder of the result")
    parser.add_argument("--features", default="features", choices=KINDS, help="of the backbone, or after the head")
    parser.add_argument(
        "--split", choices=SPLITS, help="one of them only; evaluation: validation and test; default: all"
    )
    parser.add_argument("--image_column", help="column of pictures; found by its type when not given")
    parser.add_argument("--label_column", help="column of classes; found by its type when not given")
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--on_bad_image", default="error", choices=BAD_IMAGES, help="unreadable pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures embedded at once")
    parser.add_argument("--rows_per_shard", type=int, default=1024, help="pictures of a parquet file")
    parser.add_argument("--num_workers", type=int, default=0, help="loader processes of each process")
    parser.add_argument("--num_processes", type=int, default=1, help="processes on this machine")
    parser.add_argument("--overwrite", action="store_true", help="remove embeddings that are in the folder already")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl embed`: returns the exit status; raises as `embed_images`."""
    options = vars(parse_command(parser(), argv))
    from ..embedding.embedding_job import EmbedJob, embed_images
    from ..runs.training_loop import check_launch

    as_json = options.pop("json")
    how = {name: options.pop(name) for name in ("num_processes", "overwrite")}
    options |= {"folder": options.pop("output_dir"), "revision": options.pop("dataset_revision")}
    check_launch()
    table = embed_images(EmbedJob(**options), **how)
    if table is None:  # other processes are not done
        return 0
    skipped, dimension = table.manifest["skipped"]["count"], table.manifest["dimension"]
    if as_json:
        about = {"features": options["features"], "dimension": dimension, "skipped": skipped}
        print(json.dumps({"folder": str(table.folder), "pictures": len(table)} | about, indent=2))
        return 0
    note = f", {skipped} unreadable pictures skipped (see manifest.json)" if skipped else ""
    say(f"{table.folder}: {len(table)} {options['features']} of {dimension} numbers{note}")
    return 0
