"""Latent DiTs of photographs, and what fewer steps, guidance in an interval, and bfloat16 do to generated images.

    export DPSSL_DATA=folder                              # with mnist, tiny-imagenet-20c and orl-faces
    python training/evidence/dit.py --stage autoencoders  # the mnist latents
    python training/evidence/solvers.py --stage train     # one transformer of each data set
    python training/evidence/solvers.py --stage sample    # every setting, three sampling seeds
    python training/evidence/solvers.py --stage report    # results/solvers.json, tiny_imagenet.png and faces.png

A killed study goes on where it stopped, and several processes share the work.

Protocol: the models of mnist (16 px, joint autoencoder of seed 0) and tiny-imagenet-20c (64 px) predict epsilon and its
variance, as the DiT paper's; that of orl-faces is a rectified flow. Settings were written down before the first image
was made: 250 ancestral steps as in the paper beside three solvers of 20 steps, without guidance; guidance of 1.5 at all
of 20 steps beside the half of them from 25 to 75 % of the noise; bfloat16 beside float32. Image i of a sampling seed
has the same noise in all settings. Distances are to 10,000 training images. The grids show the first images of seed 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import latents
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image
from runs import claimed

from hf_dpssl import VQDiTPipeline, evaluation
from hf_dpssl.autoencoder.measures import load_pictures
from hf_dpssl.data import keyed_random
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.plots import save_grid
from hf_dpssl.runs.results import write_results

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

PHOTOGRAPHS = "--arm dae --image_size 64 --num_codes 1024 --batch_size 16 --reconstruction_loss l1"
AUTOENCODERS = {  # f4 with 4 x 16 x 16 latents, and f8 with 8 x 8 x 8
    "tiny-imagenet-20c": f"{PHOTOGRAPHS} --encoder_channels 16 32 64 --decoder_channels 24 48 64 "
    "--auxiliary_channels 16 32 64 --latent_channels 4 --stage_1_steps 1500 --stage_2_steps 1500",
    "orl-faces": f"{PHOTOGRAPHS} --encoder_channels 16 32 64 64 --decoder_channels 24 32 64 64 "
    "--auxiliary_channels 16 32 64 64 --latent_channels 8 --stage_1_steps 700 --stage_2_steps 700 --num_channels 1",
}
EPSILON = "--objective epsilon --learned_variance True"
TRANSFORMERS = {
    "mnist": f"{EPSILON} --width 96 --num_layers 4 --patch_size 1 --batch_size 64 --max_train_steps 2000",
    "tiny-imagenet-20c": f"{EPSILON} --width 128 --num_layers 6 --patch_size 2 --batch_size 32 --max_train_steps 6000",
    "orl-faces": "--objective flow --width 128 --num_layers 4 --patch_size 1 --batch_size 32 --max_train_steps 1200",
}
SETTINGS = {  # scheduler, steps, other arguments of the pipeline
    "ancestral, 250 steps": (DDPMScheduler, 250, {}),
    "DPM-Solver++, 20 steps": (DPMSolverMultistepScheduler, 20, {}),
    "UniPC, 20 steps": (UniPCMultistepScheduler, 20, {}),
    "DDIM, 20 steps": (DDIMScheduler, 20, {}),
    "DPM-Solver++, guidance 1.5": (DPMSolverMultistepScheduler, 20, {"guidance_scale": 1.5}),
    "DPM-Solver++, guidance 1.5 in half": (
        DPMSolverMultistepScheduler,
        20,
        {"guidance_scale": 1.5, "guidance_interval": (0.25, 0.75)},
    ),
    "DPM-Solver++, bfloat16": (DPMSolverMultistepScheduler, 20, {}),
}
PAIRS = [  # a setting and what it is judged beside
    *((name, "ancestral, 250 steps") for name in list(SETTINGS)[1:4]),
    ("DPM-Solver++, guidance 1.5 in half", "DPM-Solver++, guidance 1.5"),
    ("DPM-Solver++, bfloat16", "DPM-Solver++, 20 steps"),
]
IMAGES = {"mnist": 1_000, "tiny-imagenet-20c": 200}
SAMPLING_SEEDS = (0, 1, 2)
PICTURES = {"tiny-imagenet-20c": "tiny_imagenet.png", "orl-faces": "faces.png"}


def train(dataset: str, source: Path, folder: Path) -> dict:
    """Autoencoder and transformer of a data set; returns what the latter's results.json says."""
    import dae_dit
    import dae_vq

    shared = ["--dataset", dataset, "--output_dir", str(folder / dataset), "--resume_from_checkpoint", "latest"]
    if dataset == "mnist":
        autoencoder = source / "joint-total-s0" / "autoencoder"
        latents.prepare(source)
    else:
        autoencoder = dae_vq.main([*shared, *AUTOENCODERS[dataset].split()])
    flags = ["--autoencoder", str(autoencoder), *TRANSFORMERS[dataset].split(), "--grid_images_per_class", "4"]
    target = dae_dit.main([*shared, *flags])
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


@torch.no_grad()
def sample(dataset: str, setting: str, seed: int, source: Path, folder: Path) -> dict:
    """Frechet distance of a setting's images to training images."""
    scheduler, steps, options = SETTINGS[setting]
    pipeline = VQDiTPipeline.from_pretrained(folder / dataset / "dit")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.to(torch.bfloat16 if "bfloat16" in setting else torch.float32)
    classes = [number % len(pipeline.class_names) for number in range(IMAGES[dataset])]
    seeds = [keyed_random.derive_seed(seed, "solvers", number) for number in range(len(classes))]
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    arguments = {"guidance_scale": 1.0, "output_type": "pt", "batch_size": 50, "num_inference_steps": steps}
    images = pipeline(classes, generator=generators, **(arguments | options)).images.float() * 2 - 1
    extractor = load_extractor(str(source / "extractor") if dataset == "mnist" else "resnet56-cifar10")
    real = load_pictures(dataset, pipeline.vae.config.image_size, 10_000)["train"].pixel_values
    return evaluation.image_quality(real, images, extractor, measures=("fid",), seed=seed)


def write_report(folder: Path) -> None:
    """results/solvers.json and the two grids beside this file."""
    table, differences = {}, {}
    for dataset in IMAGES:
        cells = {}
        for setting, seed in ((name, seed) for name in SETTINGS for seed in SAMPLING_SEEDS):
            path = file_of(folder, dataset, setting, seed)
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                cells.setdefault(setting, []).append(float(f"{next(iter(found.values())):.5g}"))
        if not cells:
            continue
        table[dataset] = cells
        differences[dataset] = {
            f"{first} / {second}": float(f"{np.mean(cells[first]) / np.mean(cells[second]):.4g}")
            for first, second in PAIRS if first in cells and second in cells
        }  # fmt: skip
    here = Path(__file__).parent
    settings = {"transformers": TRANSFORMERS, "autoencoders": AUTOENCODERS, "sampling_seeds": list(SAMPLING_SEEDS)}
    metrics = {"fid": table, "ratios": differences}
    samples = {"generated": {dataset: IMAGES[dataset] for dataset in table}, "reference": 10_000}
    write_results(
        here / "results" / "solvers.json", metrics, dataset=" and ".join(table), seed=0, samples=samples,
        settings=settings,
    )  # fmt: skip
    for dataset, name in PICTURES.items():
        if (folder / f"train-{dataset}.json").exists():
            first_images(folder / dataset / "dit", here / name, classes=10, guidance=1.5)


def first_images(source: Path, path: Path, *, classes: int, guidance: float, each: int = 5) -> None:
    """The first images of seed 0 of the first classes, a column each; 128 colours keep the file small."""
    pipeline = VQDiTPipeline.from_pretrained(source)
    labels = list(range(classes)) * each
    images = pipeline(labels, guidance_scale=guidance, num_inference_steps=50, output_type="pt",
                      generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    save_grid(images * 2 - 1, path, columns=classes)
    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def file_of(folder: Path, dataset: str, setting: str, seed: int) -> Path:
    """Result of one setting."""
    name = "-".join(setting.replace(",", "").split())
    return folder / f"sample-{dataset}-{name}-s{seed}.json"


def main(argv: list[str] | None = None) -> None:
    """Run a stage of the study with command-line arguments `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["train", "sample", "report"], required=True)
    parser.add_argument("--datasets", nargs="+", default=list(TRANSFORMERS), choices=list(TRANSFORMERS))
    parser.add_argument("--latents", type=Path, default=Path("outputs/latents"), help="runs of latents.py")
    parser.add_argument("--runs", type=Path, default=Path("outputs/solvers"), help="folder of the runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source, folder = args.latents.absolute(), args.runs.absolute()
    if args.stage == "report":
        write_report(folder)
        return
    work = {}
    if args.stage == "train":
        work = {folder / f"train-{dataset}.json": partial(train, dataset, source, folder) for dataset in args.datasets}
    else:
        for seed in SAMPLING_SEEDS:
            for dataset in IMAGES.keys() & set(args.datasets):
                for setting in SETTINGS:
                    path = file_of(folder, dataset, setting, seed)
                    work[path] = partial(sample, dataset, setting, seed, source, folder)
    for path, make in work.items():
        with claimed(path) as free:
            if free:
                write_json(path, make())
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
