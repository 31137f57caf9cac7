"""Accuracy of embeddings over their dimension on mnist: SimCLR, t-SimCLR per anchor and joint, Gaussian per anchor.

    export DPSSL_DATA=folder                                   # with mnist-train.parquet and mnist-test.parquet
    python training/evidence/dimensions.py --stage tune        # temperature and learning rate of each arm and dimension
    python training/evidence/dimensions.py --stage final       # paired seeds at the best of the grid
    python training/evidence/dimensions.py --stage auto        # temperature="auto" at d = 2, 8, 32, otherwise as tuned
    python training/evidence/dimensions.py --stage report      # results/dimensions.json and dimensions.png

About 1.4 hours of one core, the three arms at d = 2, 8, 128 0.6 of them. Every run is one file in --runs, so a killed
study goes on where it stopped, and all stages but the report may run in several processes at once.

Protocol: 10,000 images of the training split are trained on, 6,000 others (10 % of it) are the validation split, on
which temperature, learning rate and the metric of the neighbours (cosine or Euclidean) are chosen for each arm and
dimension; the grid has as many points for every arm. Test images are read once, at the end of the final runs. Seeds
are paired: the same initialisation, order and augmentation in all arms. AdamW makes the steps free of the loss's own
gradient scale, which differs between joint and per-anchor normalisation.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from dimensions_report import MARGIN, area, best_metric, plot, point_row, row
from runs import claimed
from torch import Tensor

from hf_dpssl.contrastive.calibration import mean_perplexity
from hf_dpssl.contrastive.kernels import log_similarities
from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data import keyed_random, load_images
from hf_dpssl.data.decoding import decode_image
from hf_dpssl.data.views import DIGITS, TwoViews, normalize
from hf_dpssl.evaluation import knn
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig
from hf_dpssl.runs.atomic_files import atomic_file, write_json
from hf_dpssl.runs.results import write_results

TRAIN_IMAGES, VALIDATION_IMAGES, BATCH_SIZE, WEIGHT_DECAY = 10_000, 6_000, 512, 1e-4
TUNING_EPOCHS, EPOCHS, SEEDS = 4, 15, (0, 1, 2)
MEAN, STD = [0.13], [0.31]
VIEWS = replace(DIGITS, crop_scale=(0.4, 1.0), crop_ratio=(3 / 4, 4 / 3), rotation=15.0, translation=0.0)
MODEL_ARGS = {"channels": [12, 24, 48, 96], "in_chans": 1, "stem_width": 8}  # a ResNet of width 12
ARMS = {
    "simclr": {"kernel": "cosine", "normalization": "anchor"},
    "t_anchor": {"kernel": "student_t", "normalization": "anchor", "dof": 5.0},
    "t_joint": {"kernel": "student_t", "normalization": "joint", "dof": 5.0},
    "gaussian_anchor": {"kernel": "student_t", "normalization": "anchor", "dof": 1e4},  # the limit dof -> infinity
}
TEMPERATURES = {"simclr": (0.05, 0.15, 0.5)}
TEMPERATURES |= dict.fromkeys(("t_anchor", "t_joint", "gaussian_anchor"), (0.002, 0.05, 1.0))
LEARNING_RATES = (3e-3, 1e-2)
# In the order in which they run: the claim itself, d = 32 for the calibrated temperature, then the controls.
MAIN = [(arm, dimension) for dimension in (2, 128, 8) for arm in ("simclr", "t_anchor", "t_joint")]
CELLS = MAIN + [("simclr", 32), ("t_anchor", 32), ("t_joint", 32)]
CELLS += [("simclr", 3), ("gaussian_anchor", 2), ("simclr", 9), ("gaussian_anchor", 8), ("gaussian_anchor", 128)]
AUTO = [(arm, dimension) for dimension in (2, 8, 32) for arm in ("simclr", "t_anchor", "t_joint")]


@dataclass(frozen=True)
class Run:
    """One training; `stage` is tune, final or auto (temperature by perplexity, learning rate as tuned)."""

    stage: str
    arm: str
    dimension: int
    temperature: float | str
    learning_rate: float
    epochs: int
    seed: int

    @property
    def file(self) -> str:
        """Name of its results; an auto run's does not depend on tuning."""
        return f"{self.stage}-{self.arm}-{self.dimension}d-t{self.temperature}-lr{self.learning_rate}-s{self.seed}.json"


def grid(arm: str, dimension: int) -> list[Run]:
    """The tuning runs of an arm at a dimension."""
    return [
        Run("tune", arm, dimension, temperature, rate, TUNING_EPOCHS, 0)
        for temperature in TEMPERATURES[arm]
        for rate in LEARNING_RATES
    ]


def best(arm: str, dimension: int, runs: Path) -> Run | None:
    """The grid point of the highest 20-NN validation accuracy under the better metric; None while any is missing."""
    points = grid(arm, dimension)
    if not all((runs / point.file).exists() for point in points):
        return None
    return max(points, key=lambda point: best_metric([read(runs, point)])[1])


def planned(stage: str, runs: Path, cells: list[tuple[str, int]]) -> Iterator[Run]:
    """The runs of a stage in their order; final and auto runs, seed by seed, only of cells that are tuned."""
    if stage == "tune":
        yield from (run for cell in cells for run in grid(*cell))
        return
    for seed in SEEDS:
        for arm, dimension in cells:
            tuned = best(arm, dimension, runs)
            if tuned is None:
                print(f"{arm} {dimension}d is not tuned yet and left out: run --stage tune first.")
                continue
            temperature = "auto" if stage == "auto" else tuned.temperature
            yield replace(tuned, stage=stage, temperature=temperature, epochs=EPOCHS, seed=seed)


def read(runs: Path, run: Run) -> dict:
    """What a finished run wrote."""
    return json.loads((runs / run.file).read_text(encoding="utf-8"))


def load_splits(runs: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """train, validation, test: images uint8 (N, 1, 28, 28) and labels (N,); decoded once, kept beside the runs."""
    path = runs / "mnist.pt"
    if not path.exists():
        data = load_images("mnist")
        order = keyed_random.permutation(len(data.train), seed=0, epoch=0).tolist()
        end = VALIDATION_IMAGES + TRAIN_IMAGES
        rows = {"validation": order[:VALIDATION_IMAGES], "train": order[VALIDATION_IMAGES:end]}
        splits = {name: decode(data.train.select(chosen)) for name, chosen in rows.items()}
        with atomic_file(path, "wb") as file:
            torch.save(splits | {"test": decode(data.evaluation)}, file)
    return torch.load(path, weights_only=True)


def decode(table) -> tuple[Tensor, Tensor]:
    """uint8 grey images (N, 1, H, W) and labels (N,)."""
    images = [np.array(decode_image(row["image"]).convert("L")) for row in table]
    return torch.from_numpy(np.stack(images))[:, None], torch.tensor(table["label"])


def train(run: Run, splits: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """Train and evaluate; {"history": one entry per epoch, "validation", "test" (not when tuning), "seconds"}."""
    torch.manual_seed(run.seed)
    config = ContrastiveConfig(
        "resnet10t", MODEL_ARGS, temperature=run.temperature, projection_dim=run.dimension, **ARMS[run.arm]
    )
    model = SimCLRForPreTraining(config).to(memory_format=torch.channels_last).train()
    parameters = model.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    images = splits["train"][0]
    steps = len(images) // BATCH_SIZE
    total = steps * run.epochs

    def rate(step: int) -> float:  # linear over the first epoch, then cosine to 0
        return (step + 1) / steps if step < steps else 0.5 + 0.5 * math.cos(math.pi * (step - steps) / (total - steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    views = TwoViews(VIEWS, MEAN, STD, run.seed)
    history, start = [], time.process_time()
    for epoch in range(run.epochs):
        losses = []
        order = keyed_random.permutation(len(images), seed=run.seed, epoch=epoch)
        for rows in order.split(BATCH_SIZE)[:steps]:
            pair = (view.contiguous(memory_format=torch.channels_last) for view in views(images[rows], rows, epoch))
            output = model(*pair)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(output.loss.detach())
        entry = {"loss": round(float(torch.stack(losses).mean()), 4)} | scale(model, output)
        if run.stage != "tune" and epoch + 1 == round(0.8 * run.epochs):
            entry |= evaluate(model, splits, ["validation"])["validation"]
        history.append(entry)
    accuracies = evaluate(model, splits, ["validation"] if run.stage == "tune" else ["validation", "test"])
    return asdict(run) | {"history": history} | accuracies | {"cpu_seconds": round(time.process_time() - start, 1)}


@torch.no_grad()
def scale(model: SimCLRForPreTraining, output) -> dict[str, float]:
    """temperature, perplexity of Q over the last batch, and its mean squared embedding (per point, centred)."""
    z = torch.cat([output.embeddings, output.paired_embeddings])
    config = model.config
    temperature = float(model.calibration.temperature)
    log_q = log_similarities(z, z, kernel=config.kernel, temperature=temperature, dof=config.dof)
    perplexity = float(mean_perplexity(log_q.fill_diagonal_(-torch.inf)))
    spread = float((z - z.mean(0)).pow(2).sum(1).mean())
    return {name: float(f"{v:.4g}") for name, v in dict(t=temperature, perplexity=perplexity, spread=spread).items()}


def evaluate(model: SimCLRForPreTraining, splits: dict, names: list[str]) -> dict[str, dict[str, float]]:
    """1-NN and 20-NN accuracy, cosine and Euclidean, of the embeddings of splits; neighbours are training images."""
    bank, bank_labels = embed(model, splits["train"][0]), splits["train"][1]
    accuracies: dict[str, dict[str, float]] = {}
    for name in names:
        query, labels = embed(model, splits[name][0]), splits[name][1]
        accuracies[name] = {
            f"{metric}_{k}nn": round(knn(bank, bank_labels, query, labels, k=k, metric=metric)["knn_top1"], 2)
            for metric in ("cosine", "euclidean")
            for k in (1, 20)
        }
    return accuracies


@torch.no_grad()
def embed(model: SimCLRForPreTraining, images: Tensor) -> Tensor:
    """Embeddings (N, D) of unaugmented images."""
    mean, std = torch.tensor(MEAN).view(1, 1, 1, 1), torch.tensor(STD).view(1, 1, 1, 1)
    model.eval()
    parts = [model(normalize(chunk.float() / 255, mean, std)).embeddings for chunk in images.split(1000)]
    model.train()
    return torch.cat(parts)


def write_report(runs: Path) -> None:
    """Write results/dimensions.json and dimensions.png beside this file from the runs that are there."""
    stages: dict[str, dict] = {"final": {}, "auto": {}}
    tuning, missing, seconds = {}, [], 0.0
    for stage, cells in (("final", CELLS), ("auto", AUTO)):
        for arm, dimension in cells:
            tuned = best(arm, dimension, runs)
            wanted = [] if tuned is None else [run for run in planned(stage, runs, [(arm, dimension)])]
            done = [read(runs, run) for run in wanted if (runs / run.file).exists()]
            if done:
                stages[stage][arm, dimension] = done
            if len(done) < len(SEEDS):
                missing.append(f"{stage} {arm} {dimension}-d: {len(done)} of {len(SEEDS)} seeds")
            seconds += sum(entry["cpu_seconds"] for entry in done)
    for arm, dimension in CELLS:
        points = [read(runs, run) for run in grid(arm, dimension) if (runs / run.file).exists()]
        seconds += sum(point["cpu_seconds"] for point in points)
        tuning[f"{arm}, {dimension}-d"] = [point_row(point) for point in points]
    pilots = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((runs / "pilot").glob("*.json"))]
    final, auto = stages["final"], stages["auto"]
    metrics = {
        "accuracy": {f"{arm}, {dimension}-d": row(done) for (arm, dimension), done in sorted(final.items())},
        "mean_over_log_d": {arm: area(final, arm) for arm in ARMS},
        "auto": {f"{arm}, {dimension}-d": row(done) for (arm, dimension), done in auto.items()},
        "tuning": {"columns": ["temperature", "learning_rate", "validation_20nn", "share_of_perplexity"]} | tuning,
        "pilot": [[p["arm"], p["dimension"], *point_row(p)] for p in pilots],
    }
    settings = {
        "complete": not missing, "missing": missing, "margin": MARGIN, "epochs": EPOCHS, "batch_size": BATCH_SIZE,
        "tuning_epochs": TUNING_EPOCHS, "tuning_seeds": 1, "learning_rates": LEARNING_RATES,
        "temperatures": TEMPERATURES, "weight_decay": WEIGHT_DECAY, "optimizer": "AdamW", "network": MODEL_ARGS,
        "dof": {arm: options.get("dof") for arm, options in ARMS.items()}, "cpu_hours": round(seconds / 3600, 2),
        "pilot": "runs of an earlier grid, by which this one was shifted: 3e-3 and 0.002 for 3e-2 and 20",
    }  # fmt: skip
    samples = {"train": TRAIN_IMAGES, "validation": VALIDATION_IMAGES, "test": 10_000}
    folder = Path(__file__).parent
    write_results(
        folder / "results" / "dimensions.json", metrics, dataset="mnist", seed=0, samples=samples, settings=settings
    )
    plot(final, folder / "dimensions.png")
    for name, entry in metrics["accuracy"].items():
        print(f"{name:24} {entry['mean_20nn']:6.2f} {entry['metric']:9} seeds {len(entry['seeds'])}")
    print("\n".join(missing or ["complete"]))


def main(argv: list[str] | None = None) -> None:
    """Run a stage of the study with command-line arguments `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["tune", "final", "auto", "report"], required=True)
    parser.add_argument("--runs", type=Path, default=Path("outputs/dimensions"), help="folder of the runs' files")
    parser.add_argument("--cells", choices=["main", "all"], default="all", help="main: the three arms at d = 2, 8, 128")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    if args.stage == "report":
        write_report(args.runs)
        return
    splits = load_splits(args.runs)
    cells = MAIN if args.cells == "main" else AUTO if args.stage == "auto" else CELLS
    for run in planned(args.stage, args.runs, cells):
        with claimed(args.runs / run.file) as free:
            if free:
                report = train(run, splits)
                write_json(args.runs / run.file, report)
                print(run.file, report["validation"], report.get("test"), f"{report['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
