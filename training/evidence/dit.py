"""What does a latent cost the generator? DiTs of three sizes on three autoencoders' latents of mnist at 16 px.

    export DPSSL_DATA=folder                                 # with mnist-train.parquet and mnist-test.parquet
    python training/evidence/dit.py --stage autoencoders     # those of latents.py that are missing
    python training/evidence/dit.py --stage tune             # the learning rate of each size
    python training/evidence/dit.py --stage train            # three latents, three sizes, three seeds
    python training/evidence/dit.py --stage measure          # 2,000 images of each, beside test images
    python training/evidence/dit.py --stage report           # results/dit.json, dit.png and dit_samples.png

A killed study goes on where it stopped, and several processes share the work.

Protocol: autoencoders, images, splits and extractor are those of latents.py: joint training, an encoder trained and
frozen with its own decoder learning on (decoupled), and an encoder trained against a weak decoder (DAE), all with the
same number of steps. Seed s of the transformer goes with seed s of the autoencoder. The learning rate of a size is
chosen by the Frechet distance to training images on the JOINT latents, so in favour of the baseline. Images are
generated without guidance, to which class consistency would owe much. Test images are read by `measure` alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import latents
import torch
from dit_report import write_report
from runs import claimed

from hf_dpssl import VQAutoencoder, VQDiTPipeline, evaluation
from hf_dpssl.autoencoder.measures import encode_and_decode
from hf_dpssl.data import keyed_random
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.runs.atomic_files import write_json

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

AUTOENCODERS = {"joint": ("joint", "total"), "decoupled": ("decoupled", ""), "DAE": ("weak_dropout", "")}
SIZES = {
    "64x4": "--width 64 --num_layers 4 --num_heads 4",
    "96x4": "--width 96 --num_layers 4 --num_heads 4",
    "128x6": "--width 128 --num_layers 6 --num_heads 4",
}
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
STEPS, TUNING_STEPS, GENERATED = 1_500, 800, 2_000
FLAGS = (
    "--objective flow --patch_size 1 --batch_size 64 --sampling_steps 25 --ema_decay 0.998 --grid_images_per_class 5"
)
CURVE = "--validation_steps 300 --validation_images 1000"


@dataclass(frozen=True)
class Run:
    """One transformer."""

    latent: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        """Of the run's files."""
        return f"{self.latent}-{self.size}-s{self.seed}"

    @property
    def autoencoder(self) -> latents.Run:
        """The run of latents.py whose autoencoder it takes."""
        return latents.Run(*AUTOENCODERS[self.latent], self.seed)


def planned() -> Iterator[Run]:
    """All runs, seed by seed, so that the first complete table has one seed."""
    for seed in latents.SEEDS:
        for size in SIZES:
            yield from (Run(latent, size, seed) for latent in AUTOENCODERS)


def train_autoencoders(folder: Path) -> None:
    """The runs of latents.py that this study needs, where they are missing."""
    for seed in latents.SEEDS:
        for arm, budget in AUTOENCODERS.values():
            run = latents.Run(arm, budget, seed)
            path = folder / f"train-{run.name}.json"
            with claimed(path) as free:
                if free:
                    write_json(path, latents.train(run, folder))
                    print(path.name, flush=True)


def flags_of(run: Run, source: Path, folder: Path) -> list[str]:
    """Flags of training/dae_dit.py that all runs share; those of a latent and seed share a cache."""
    flags = ["--dataset", "mnist", "--autoencoder", str(source / run.autoencoder.name / "autoencoder")]
    flags += ["--seed", str(run.seed), "--validation_extractor", str(source / "extractor")]
    flags += ["--output_dir", str(folder / f"{run.latent}-s{run.seed}"), "--resume_from_checkpoint", "latest"]
    return [*flags, *FLAGS.split(), *SIZES[run.size].split()]


def tune(size: str, rate: float, source: Path, folder: Path) -> dict:
    """The Frechet distance of a short run on joint latents to training images."""
    import dae_dit

    flags = flags_of(Run("joint", size, 0), source, folder)
    short = f"--max_train_steps {TUNING_STEPS} --validation_steps {TUNING_STEPS} --validation_images 1000"
    target = dae_dit.main([*flags, *short.split(), "--learning_rate", str(rate), "--name", f"tune-{size}-{rate:g}"])
    found = json.loads((target / "results.json").read_text(encoding="utf-8"))
    return {"size": size, "learning_rate": rate, "fid_to_training_images": training_fid(found["metrics"])}


def training_fid(metrics: dict[str, float]) -> float:
    """The Frechet distance, whatever its extractor."""
    return next(value for name, value in metrics.items() if name.startswith("fid"))


def chosen_rate(size: str, folder: Path) -> float:
    """The learning rate of the smallest distance."""
    found = [json.loads((folder / f"tune-{size}-{rate:g}.json").read_text(encoding="utf-8")) for rate in RATES]
    return min(found, key=lambda entry: entry["fid_to_training_images"])["learning_rate"]


def train(run: Run, source: Path, folder: Path) -> dict:
    """The transformer of a run; returns the curve of its Frechet distance to training images."""
    import dae_dit

    more = ["--max_train_steps", str(STEPS), "--learning_rate", str(chosen_rate(run.size, folder))]
    target = dae_dit.main([*flags_of(run, source, folder), *CURVE.split(), *more, "--name", run.size])
    validations = json.loads((target / "results.json").read_text(encoding="utf-8"))["validations"]
    curve = {entry["step"]: training_fid(entry) for entry in validations}
    return {"curve": curve, "parameters": VQDiTPipeline.from_pretrained(target).transformer.num_parameters()}


@torch.no_grad()
def measure(run: Run, source: Path, folder: Path) -> dict:
    """Frechet distances of 2,000 images of a run to test images and to their reconstructions, and their classes."""
    extractor = load_extractor(str(source / "extractor"))
    train_images, test = latents.pictures(source)
    pipeline = VQDiTPipeline.from_pretrained(folder / f"{run.latent}-s{run.seed}" / run.size)
    pipeline.set_progress_bar_config(disable=True)
    classes = [number % 10 for number in range(GENERATED)]
    seeds = [keyed_random.derive_seed(run.seed, "measure", number) for number in range(GENERATED)]
    batches = []
    for first in range(0, GENERATED, 100):
        part = slice(first, first + 100)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        options = dict(guidance_scale=1.0, num_inference_steps=25, output_type="pt")
        batches.append(pipeline(classes[part], generator=generators, **options).images * 2 - 1)
    generated = torch.cat(batches)
    autoencoder = VQAutoencoder.from_pretrained(source / run.autoencoder.name / "autoencoder").eval()
    reconstructed = encode_and_decode(autoencoder, test.pixel_values).reconstructions
    metrics = {}
    for prefix, real, made in (
        ("g", test.pixel_values, generated),
        ("g_to_reconstructions_", reconstructed, generated),
        ("r", test.pixel_values, reconstructed),
    ):
        measures = ("fid", "manifold") if prefix == "g" else ("fid",)
        metrics |= evaluation.image_quality(real, made, extractor, prefix=prefix, measures=measures, seed=run.seed)
    metrics |= evaluation.copies(generated, train_images.pixel_values, test.pixel_values)
    return metrics | latents.judged_classes(extractor, train_images, test, generated, torch.tensor(classes))


def work(stage: str, source: Path, folder: Path) -> Iterator[tuple[Path, Callable[[], dict]]]:
    """(file, what makes its content) of each part of a stage."""
    if stage == "tune":
        for size in SIZES:
            for rate in RATES:
                yield folder / f"tune-{size}-{rate:g}.json", partial(tune, size, rate, source, folder)
        return
    for run in planned():
        if stage == "train" or (folder / f"train-{run.name}.json").exists():
            make = {"train": train, "measure": measure}[stage]
            yield folder / f"{stage}-{run.name}.json", partial(make, run, source, folder)


def main(argv: list[str] | None = None) -> None:
    """Run a stage of the study with command-line arguments `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ["autoencoders", "tune", "train", "measure", "report"]
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument(
        "--latents", type=Path, default=Path("outputs/latents"), help="folder of the runs of latents.py"
    )
    parser.add_argument("--runs", type=Path, default=Path("outputs/dit-study"), help="folder of the runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    source, folder = args.latents.absolute(), args.runs.absolute()
    latents.prepare(source)
    if args.stage == "report":
        settings = {"flags": f"{FLAGS} {CURVE} --max_train_steps {STEPS}", "sizes": SIZES, "rates": list(RATES)}
        rates = {size: chosen_rate(size, folder) for size in SIZES}
        write_report(folder, list(planned()), settings | {"learning_rates": rates}, GENERATED)
        return
    if args.stage == "autoencoders":
        latents.train_encoders(source)
        train_autoencoders(source)
        return
    for path, make in work(args.stage, source, folder):
        with claimed(path) as free:
            if free:
                write_json(path, make())
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
