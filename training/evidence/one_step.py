"""Measure a generator: how good its images are, by a judge that it has not seen, and what they cost.

    python training/evidence/one_step.py PIPELINE --judge FOLDER --dataset FOLDER --output measured.json
    hf-dpssl reproduce one_step --scale quick             # the whole study: autoencoders, judge, generators, seeds

Image i is of class i modulo their number and has its own noise, the same for every generator of a latent space and a
seed. Compared with all held-out images; copies at three percentiles of the distance of held-out images to training
images. Images a second are of one thread's CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from judge_network import features_of, load_judge
from torch import Tensor, nn

from hf_dpssl import VQAutoencoder, VQDiTPipeline, VQDriftPipeline, VQTokenPipeline
from hf_dpssl.autoencoder.measures import load_pictures
from hf_dpssl.cli.errors import reported
from hf_dpssl.data import keyed_random
from hf_dpssl.evaluation import (
    class_consistency,
    copies,
    diversity,
    frechet_distance_of_features,
    manifold_overlap,
)
from hf_dpssl.runs.atomic_files import write_json

Pipeline = VQDiTPipeline | VQDriftPipeline | VQTokenPipeline
PERCENTILES = (1, 5, 25)
BATCH = 100


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder of a VQDiTPipeline, VQDriftPipeline or VQTokenPipeline")
    parser.add_argument("--judge", type=Path, required=True, help="folder that judge_network.py wrote")
    parser.add_argument("--dataset", required=True, help="with a split to train on and one that is held out")
    parser.add_argument("--num_images", type=int, default=1000, help="drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the noises")
    parser.add_argument("--num_inference_steps", type=int, help="of a VQDiTPipeline")
    parser.add_argument("--dpm_solver", action="store_true", help="DPM-Solver++ in place of Euler steps of the flow")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status."""
    args = parser().parse_args(argv)
    pipeline = load_pipeline(args.pipeline, args)
    torch.set_num_threads(1)
    ids = torch.arange(args.num_images) % len(pipeline.class_names)
    images, seconds = draw(pipeline, ids, args)
    pictures = load_pictures(args.dataset, pipeline.vae.config.image_size, None)
    train, held_out = pictures["train"].pixel_values / 2 + 0.5, pictures["evaluation"].pixel_values / 2 + 0.5
    judge = load_judge(args.judge)
    found = judged(judge, images, ids, held_out, pictures["evaluation"].labels)
    found |= {f"copies_{level}": copies(images, train, held_out, percentile=level)["copies"] for level in PERCENTILES}
    found |= beside_reconstructions(judge, pipeline.vae, images, held_out)
    results = json.loads((args.pipeline / "results.json").read_text(encoding="utf-8"))
    found |= {
        "images_per_second": args.num_images / seconds,
        "parameters": sum(parameter.numel() for parameter in network_of(pipeline).parameters()),
        "training_seconds": results["training"]["seconds"],
        "frechet_distance_of_real": float(frechet(judge, train[: args.num_images], held_out)),
        "samples": {"generated": args.num_images, "held_out": len(held_out), "train": len(train)},
    }
    write_json(args.output, found)
    return 0


def load_pipeline(folder: Path, args: argparse.Namespace) -> Pipeline:
    """The pipeline of a folder, with the solver that was asked for; ValueError for flags of the other kind."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kinds = {kind.__name__: kind for kind in (VQDiTPipeline, VQDriftPipeline, VQTokenPipeline)}
    (kind,) = (kinds[name] for name in kinds if name in index["_class_name"])
    if kind is not VQDiTPipeline and (args.num_inference_steps or args.dpm_solver):
        raise ValueError("--num_inference_steps and --dpm_solver are of a VQDiTPipeline: leave them out.")
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if args.dpm_solver:
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
        pipeline.scheduler = DPMSolverMultistepScheduler(**options)
    return pipeline


def network_of(pipeline: Pipeline) -> nn.Module:
    """What was trained to generate."""
    return pipeline.language_model if isinstance(pipeline, VQTokenPipeline) else pipeline.transformer


def draw(pipeline: Pipeline, ids: Tensor, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Images (N, 3, S, S) in [0, 1] of class ids (N,), and the CPU seconds that they took after a first batch."""
    options: dict = {"output_type": "pt"}
    if isinstance(pipeline, VQDiTPipeline):
        options |= {"num_inference_steps": args.num_inference_steps or 25, "guidance_scale": 1.0}
    seeds = [keyed_random.derive_seed(args.seed, "one step", number) for number in range(len(ids))]
    pipeline(ids[:BATCH].tolist(), generator=seeds[:BATCH], **options)  # what only the first call does
    start = time.process_time()
    parts = [slice(first, first + BATCH) for first in range(0, len(ids), BATCH)]
    images = torch.cat([pipeline(ids[part].tolist(), generator=seeds[part], **options).images for part in parts])
    return images, time.process_time() - start


@torch.no_grad()
def judged(judge: nn.Sequential, images: Tensor, ids: Tensor, real: Tensor, real_ids: Tensor) -> dict[str, float]:
    """Frechet distance, precision, recall, class consistency and diversity of images beside real ones."""
    seen = [features_of(judge, part) for part in (real, images)]
    overlap = manifold_overlap(*seen)
    return {
        "frechet_distance": float(frechet_distance_of_features(*seen)),
        "precision": overlap["precision"],
        "recall": overlap["recall"],
        **class_consistency(judge(images), ids),
        **diversity(images, ids, real, real_ids),
    }


@torch.no_grad()
def beside_reconstructions(judge: nn.Sequential, vae: VQAutoencoder, images: Tensor, real: Tensor) -> dict[str, float]:
    """Frechet distances in the judge's features: of reconstructed to real ones, of images to reconstructed ones."""
    parts = [vae(part * 2 - 1).pixel_values for part in real.split(BATCH)]
    reconstructed = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
    return {
        "frechet_distance_of_reconstructions": float(frechet(judge, reconstructed, real)),
        "frechet_distance_to_reconstructions": float(frechet(judge, images, reconstructed)),
    }


@torch.no_grad()
def frechet(judge: nn.Sequential, images: Tensor, real: Tensor) -> float:
    """Frechet distance in the judge's features."""
    return frechet_distance_of_features(*(features_of(judge, part) for part in (images, real)))


if __name__ == "__main__":
    sys.exit(reported("one_step.py", main))
