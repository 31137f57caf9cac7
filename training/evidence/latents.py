"""What is a latent worth? Five ways to train an autoencoder of mnist at 16 px, three budgets, three paired seeds.

    export DPSSL_DATA=folder                               # with mnist-train.parquet and mnist-test.parquet
    python training/evidence/latents.py --stage train      # the autoencoders, seed by seed
    python training/evidence/latents.py --stage tokens     # a token transformer on the codes of each
    python training/evidence/latents.py --stage measure    # every measure of each, on test images
    python training/evidence/latents.py --stage report     # results/latents.json and latents.png

A killed study goes on where it stopped, and several processes share the work. Each run leaves
RUNS/ARM-BUDGET-sSEED/ with autoencoder/ and tokens/, complete checkpoint folders; the DiT study takes its autoencoders
from there.

Protocol: 10,000 images of the training split are trained on, 2,000 others are the validation images of the curves, and
5,000 test images are read once, by the measures. The perceptual term is a SimCLR encoder of the same images, the
extractor of the Frechet distances a t-SimCLR encoder of another seed and width. Seeds are paired: the same encoder at
the start, the same order of images. Every arm has the adversarial term in the last 40 % of its last stage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from latents_report import write_report
from runs import alone, claimed
from sklearn.linear_model import LogisticRegression

from hf_dpssl import VQAutoencoder, VQTokenPipeline, evaluation
from hf_dpssl.autoencoder.measures import Pictures, encode_and_decode, load_pictures, measure_autoencoder
from hf_dpssl.data import keyed_random, load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.embedding.feature_extractors import load_extractor
from hf_dpssl.runs.atomic_files import write_json

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

TRAIN_IMAGES, VALIDATION_IMAGES, TEST_IMAGES, IMAGE_SIZE = 10_000, 2_000, 5_000, 16
SEEDS = (0, 1, 2)
ENCODERS = {
    "perceptual": "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.15 --seed 100",
    "extractor": "--kernel student_t --normalization joint --feature_norm none --temperature 2 --seed 101",
}
WIDTHS = {"perceptual": [12, 24, 48, 96], "extractor": [16, 32, 64, 128]}
STEPS = 1_500  # of each stage
MODEL = (
    "--encoder_channels 8 16 32 --decoder_channels 16 32 64 --auxiliary_channels 8 16 32 --auxiliary_dropout 0.05 "
    f"--num_codes 256 --latent_channels 4 --batch_size 32 --stage_1_steps {STEPS} --stage_2_steps {STEPS}"
)
LOSSES = (
    "--reconstruction_loss l1 --perceptual_weight 0.1 --adversarial hinge --adversarial_weight 0.1 "
    "--adversarial_start 0.6 --discriminator_warmup 50 --discriminator_width 16 --discriminator_learning_rate 5e-4"
)
TOKENS = "--max_train_steps 800 --num_layers 2 --width 64 --num_heads 4 --batch_size 64"
GENERATED = 2_000
# The joint arms come with every budget; the decoupled ones are what they are matched with.
BUDGETS = {"joint": ("total", "encoder", "flops"), "joint_dropout": ("total", "encoder", "flops")}
ARMS = ("joint", "weak_dropout", "weak_width", "decoupled", "joint_dropout")


@dataclass(frozen=True)
class Run:
    """One autoencoder; `budget` is "" where the arm has one only."""

    arm: str
    budget: str
    seed: int

    @property
    def cell(self) -> str:
        """Arm and budget."""
        return ", ".join(part for part in (self.arm, self.budget) if part)

    @property
    def name(self) -> str:
        """Of the run's folder and files."""
        return "-".join(part for part in (self.arm, self.budget, f"s{self.seed}") if part)


def planned() -> Iterator[Run]:
    """All runs, seed by seed, so that the first complete table has one seed."""
    for seed in SEEDS:
        for arm in ARMS:
            yield from (Run(arm, budget, seed) for budget in BUDGETS.get(arm, ("",)))


def prepare(folder: Path) -> None:
    """Parquet files of the training and validation images, which then are the data set "mnist" of this process."""
    rows = keyed_random.permutation(60_000, seed=0, epoch=0)[: TRAIN_IMAGES + VALIDATION_IMAGES].tolist()
    parts = {"train": rows[:TRAIN_IMAGES], "test": rows[TRAIN_IMAGES:]}
    files = {name: folder / "data" / f"mnist-{name}.parquet" for name in parts}
    with alone(folder / "data" / "mnist"):
        if not all(file.exists() for file in files.values()):
            split = load_images("mnist").train
            for name, file in files.items():
                split.select(parts[name]).to_parquet(file.with_suffix(".unfinished"))
                file.with_suffix(".unfinished").rename(file)
    os.environ["DPSSL_DATA"] = str(folder / "data")


def train_encoders(folder: Path) -> None:
    """The frozen encoders that the losses and the measures need, trained once."""
    import contrastive

    for name, flags in ENCODERS.items():
        with alone(folder / name):
            if not (folder / name / "config.json").exists():
                model_args = json.dumps({"channels": WIDTHS[name], "stem_width": 8, "output_stride": 8})
                sizes = ["--dataset", "mnist", "--image_size", str(IMAGE_SIZE), "--model_args", model_args]
                run = ["--name", name, "--num_train_epochs", "25", "--batch_size", "256", "--overwrite", "True"]
                contrastive.main([*sizes, *run, *flags.split(), "--output_dir", str(folder)])


def train(run: Run, folder: Path) -> dict:
    """The autoencoder of a run; returns what its results.json says."""
    import dae_vq

    arm = ["--arm", run.arm] + (["--budget", run.budget] if run.budget else [])
    data = ["--dataset", "mnist", "--image_size", str(IMAGE_SIZE), "--seed", str(run.seed)]
    more = ["--perceptual", str(folder / "perceptual"), "--output_dir", str(folder / run.name)]
    more += ["--resume_from_checkpoint", "latest", "--evaluation_images", "2000"]
    target = dae_vq.main([*arm, *data, *MODEL.split(), *LOSSES.split(), *more])
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


def train_tokens(run: Run, folder: Path) -> dict:
    """The token model of a run; returns what its results.json says."""
    import dae_ar

    source = ["--autoencoder", str(folder / run.name / "autoencoder"), "--dataset", "mnist", "--seed", str(run.seed)]
    more = ["--image_size", str(IMAGE_SIZE), "--name", "tokens", "--output_dir", str(folder / run.name)]
    target = dae_ar.main([*source, *TOKENS.split(), *more, "--resume_from_checkpoint", "latest"])
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


def measure(run: Run, folder: Path) -> dict:
    """Every measure of a run's autoencoder on test images, and of 2,000 images of its token model."""
    autoencoder = VQAutoencoder.from_pretrained(folder / run.name / "autoencoder").eval()
    extractor = load_extractor(str(folder / "extractor"))
    train_images, test = pictures(folder)
    metrics, curves = measure_autoencoder(
        autoencoder, train_images, test, extractor=extractor, seed=run.seed, lipschitz_images=64, distance_images=150
    )
    pipeline = VQTokenPipeline.from_pretrained(folder / run.name / "tokens")
    classes = [number % 10 for number in range(GENERATED)]
    generator = torch.Generator().manual_seed(run.seed)
    batches = [pipeline(classes[i : i + 250], generator=generator, output_type="pt") for i in range(0, GENERATED, 250)]
    generated = torch.cat([batch.images for batch in batches]) * 2 - 1
    reconstructed = encode_and_decode(autoencoder, test.pixel_values).reconstructions
    for prefix, reference in (("g", test.pixel_values), ("g_to_reconstructions_", reconstructed)):
        metrics |= evaluation.image_quality(reference, generated, extractor, prefix=prefix, seed=run.seed)
    metrics |= evaluation.copies(generated, train_images.pixel_values, test.pixel_values)
    metrics |= judged_classes(extractor, train_images, test, generated, torch.tensor(classes))
    curves = {
        name: [round(value, 5) for value in values[:: max(1, len(values) // 64)]] for name, values in curves.items()
    }
    return {"metrics": metrics, "curves": curves, "fingerprint": autoencoder.fingerprint()}


def pictures(folder: Path) -> tuple[Pictures, Pictures]:
    """The training images, and test images from the folder that DPSSL_DATA named at first."""
    train_images = load_pictures("mnist", IMAGE_SIZE, TRAIN_IMAGES)["train"]
    os.environ["DPSSL_DATA"], prepared = SOURCE or "", os.environ["DPSSL_DATA"]
    try:
        source = load_images("mnist")
    finally:
        os.environ["DPSSL_DATA"] = prepared
    test = source.evaluation.select(source.random_rows(source.evaluation, TEST_IMAGES))
    table = ImageTable(load_images("mnist"), test, IMAGE_SIZE)
    table.preload(2**30, show_progress=False)
    return train_images, Pictures(table.images.float() / 127.5 - 1, table.labels)


def judged_classes(extractor, train_images: Pictures, test: Pictures, generated, classes) -> dict[str, float]:
    """Class consistency of generated images by a linear classifier on the extractor's features, and its accuracy."""
    features = [extractor.features(images) for images in (train_images.pixel_values, test.pixel_values, generated)]
    classifier = LogisticRegression(max_iter=500).fit(features[0], train_images.labels)
    accuracy = 100 * classifier.score(features[1], test.labels)
    logits = torch.from_numpy(classifier.decision_function(features[2]))
    return evaluation.class_consistency(logits, classes) | {"classifier_top1": accuracy}


STAGES = {"train": train, "tokens": train_tokens, "measure": measure}
NEEDS = {"tokens": "train", "measure": "tokens"}
SOURCE = os.environ.get("DPSSL_DATA")


def main(argv: list[str] | None = None) -> None:
    """Run a stage of the study with command-line arguments `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["train", "tokens", "measure", "report"], required=True)
    parser.add_argument("--runs", type=Path, default=Path("outputs/latents"), help="folder of the runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = args.runs.absolute()
    prepare(folder)
    train_encoders(folder)
    if args.stage == "report":
        flags = {"dae_vq": f"{MODEL} {LOSSES}", "dae_ar": TOKENS, "encoders": ENCODERS}
        write_report(folder, list(planned()), flags)
        return
    for run in planned():
        path = folder / f"{args.stage}-{run.name}.json"
        if args.stage in NEEDS and not (folder / f"{NEEDS[args.stage]}-{run.name}.json").exists():
            print(f"{run.name} is left out: --stage {NEEDS[args.stage]} has not finished it.", flush=True)
            continue
        with claimed(path) as free:
            if free:
                write_json(path, STAGES[args.stage](run, folder))
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
