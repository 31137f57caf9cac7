"""The subcommand `hf-dpssl sample`."""

from __future__ import annotations

import argparse
import json
import sys

from ..generation.choices import DTYPES, FORMATS, LAYOUTS, OPTIONS
from ..runs.console import say
from .errors import INTERRUPTED
from .parsing import command_parser, json_object, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "sample",
        "Draw many images from a pipeline, for example to measure its Frechet distance. Each image has its "
        "own random seed, so the set does not depend on batches or processes. The same command goes on after a kill. "
        "Several machines or GPUs: accelerate launch -m hf_dpssl.cli sample ... An argument @FILE stands for the "
        "file's lines, e.g. --class_labels @labels.txt.",
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("pipeline", help="folder or Hub id (id@revision) of a VQDiTPipeline, VQDriftPipeline or VQTokenPipeline")
    add("--output_dir", required=True, help="folder of the result")
    add("--num_images", type=int, default=50_000, help="images in all")
    add("--format", default="png", choices=FORMATS, help="pictures, or one samples.npz (arr_0, arr_1) as ADM reads it")
    add("--layout", default="numbered", choices=LAYOUTS, help="of pictures: numbered, or a folder to each class")
    add("--images_per_folder", type=int, default=1000, help="of numbered pictures; 0: all in one folder")
    add("--class_labels", nargs="+", metavar="CLASS", help="ids or names, taken in turn; default: all classes in turn")
    add("--unconditional", action="store_true", help="draw without class from a model that has classes")
    add("--seed", type=int, default=0, help="random seed; image i's own follows from it and from i")
    add("--batch_size", type=int, default=64, help="images drawn at once")
    add("--dtype", choices=DTYPES, help="of weights and noise; default: bfloat16 on a GPU that has it, else float32")
    add("--scheduler", help="diffusers scheduler in place of the pipeline's, with its config")
    add("--scheduler_config", type=json_object, default={}, help="what to change in the scheduler's config, as JSON")
    add("--guidance_scale", type=float, help="1: no guidance; default: the pipeline's, as of what follows")
    add("--num_inference_steps", type=int, help="denoising steps")
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of the noise range, 0 to 1")
    add("--guidance_rescale", type=float, help="0: none")
    add("--no_quantize", dest="quantize", action="store_const", const=False, help="decode latents, not their codes")
    add("--temperature", type=float, help="of a token model")
    add("--top_k", type=int, help="of a token model")
    add("--top_p", type=float, help="of a token model")
    add("--num_processes", type=int, default=1, help="processes on this machine")
    add("--overwrite", action="store_true", help="remove images that are in the folder already")
    add("--json", action="store_true", help="print the manifest as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl sample`: returns the exit status; raises as `sample_images`."""
    options = vars(parse_command(parser(), argv))
    from ..generation.bulk_sampling import SampleJob, sample_images
    from ..runs.training_loop import check_launch

    how, as_json = {name: options.pop(name) for name in ("num_processes", "overwrite")}, options.pop("json")
    call = {name: value for name in OPTIONS if (value := options.pop(name)) is not None}
    if "guidance_interval" in call:
        call["guidance_interval"] = tuple(call["guidance_interval"])
    if options["dtype"] is None:
        del options["dtype"]
    check_launch()
    job = SampleJob(folder=options.pop("output_dir"), options=call, **options)
    try:
        manifest = sample_images(job, **how)
    except KeyboardInterrupt:
        print("hf-dpssl sample: interrupted; the same command goes on.", file=sys.stderr)
        return INTERRUPTED
    if manifest is not None and as_json:
        print(json.dumps(manifest, indent=2))
    elif manifest is not None:
        where = "samples.npz" if job.format == "npz" else "images"
        say(f"{job.folder}/{where}: {manifest['images']} images, fingerprint {manifest['fingerprint'][:12]}")
    return 0
