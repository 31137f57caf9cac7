"""Which loss `hf-dpssl train contrastive` should have where nobody tunes: untuned arms on four data sets, by dimension.

    export DPSSL_DATA=folder                       # with the four data sets
    python training/evidence/defaults.py screen    # every candidate, one seed, validation images: half an hour
    python training/evidence/defaults.py final     # SimCLR and the one chosen, five other seeds, test images: an hour
    python training/evidence/defaults.py report    # results/defaults.json

All flags that no arm names are the script's defaults (AdamW 2e-3, batches of 256), but for size: 3,000 images at 24
pixels, 12 epochs, a ResNet of width 12. Written down before the first run: a candidate is chosen by the mean, over data
sets and dimensions, of 20-NN accuracies of features (cosine) and of embeddings (by the kernel's own distance) on
validation images; it becomes the default unless the final runs show its features a point below SimCLR's at a dimension.
A killed stage goes on with the runs that lack; several processes may share one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from claim_cells import prepare
from runs import claimed

from hf_dpssl.cli.errors import reported
from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data import load_images
from hf_dpssl.data.image_data import TABLE
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.evaluation import knn
from hf_dpssl.evaluation.student_interval import student_interval
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.results import write_results

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

SETS = ["mnist", "cifar10-jpeg-small", "tiny-imagenet-20c", "pacs-64px"]
DIMENSIONS = [2, 8, 32]
NUMBERS = {"train": 3000, "validation": 1000, "test": 900}
IMAGE_SIZE, EPOCHS, NEIGHBOURS = 24, 12, 20
BACKBONE = {"channels": [12, 24, 48, 96], "stem_width": 8}  # a ResNet of width 12
SIMCLR = "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.2"
CANDIDATES = {  # flags, and the distance of the kernel
    "simclr": (SIMCLR, "cosine"),
    "t_joint_2": ("--kernel student_t --normalization joint --temperature 2", "euclidean"),
    "t_joint_low": ("--kernel student_t --normalization joint --temperature 0.05", "euclidean"),
    "t_joint_auto": ("--kernel student_t --normalization joint --temperature auto", "euclidean"),
    "t_anchor_auto": ("--kernel student_t --normalization anchor --temperature auto", "euclidean"),
    "t_batch_auto": ("--kernel student_t --normalization joint --feature_norm batch --temperature auto", "euclidean"),
    "t_sphere_auto": ("--kernel student_t --normalization joint --feature_norm l2 --temperature auto", "euclidean"),
}
SCREENING_SEED, SEEDS = 1000, range(5)
RESULTS = Path(__file__).parent / "results" / "defaults.json"


def run(folder: Path, dataset: str, arm: str, dimension: int, seed: int, final: bool) -> dict:
    """Train one encoder, and 20-NN accuracies in percent of its features and embeddings on held-out images."""
    import contrastive

    flags, distance = CANDIDATES[arm]
    start = time.process_time()
    places = prepare({"data": {"name": dataset}, "numbers": NUMBERS, "scale": "defaults"}, folder / dataset)
    target = folder / "run" / f"{dataset}-{arm}-{dimension}-{seed}"
    fixed = ["--architecture", "resnet10t", "--model_args", json.dumps(BACKBONE), "--image_size", str(IMAGE_SIZE)]
    fixed += ["--augmentation", TABLE[dataset].augmentation, "--num_train_epochs", str(EPOCHS), "--seed", str(seed)]
    fixed += ["--projection_dim", str(dimension), "--output_dir", str(target), "--evaluation_images", "100"]
    contrastive.main([*fixed, "--dataset", str(places["fit"]), "--overwrite", *flags.split()])
    model = SimCLRForPreTraining.from_pretrained(target / "encoder" / "pretraining").eval()
    data = load_images(str(places["measured" if final else "fit"]))
    tables = [ImageTable(data, split, IMAGE_SIZE) for split in (data.train, data.evaluation)]
    bank, query = (contrastive.embed(model, table, range(len(table)), *data.entry.statistics) for table in tables)
    found = {}
    for kind, metric in (("features", "cosine"), ("embeddings", distance)):
        labelled = (bank[kind], bank["labels"], query[kind], query["labels"])
        found[kind] = knn(*labelled, k=NEIGHBOURS, metric=metric)["knn_top1"]
    shutil.rmtree(target)
    about = {"dataset": dataset, "arm": arm, "dimension": dimension, "seed": seed}
    return about | found | {"cpu_seconds": round(time.process_time() - start, 1)}


def planned(stage: str, arms: list[str]) -> list[tuple[str, str, int, int]]:
    """Data set, arm, dimension and seed of all runs of a stage."""
    seeds = [SCREENING_SEED] if stage == "screen" else SEEDS
    return [(name, arm, d, seed) for seed, d, name, arm in itertools.product(seeds, DIMENSIONS, SETS, arms)]


def read(folder: Path, stage: str) -> list[dict]:
    """The finished runs of a stage."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / stage).glob("*.json"))]


def score(runs: list[dict], arm: str) -> float:
    """Mean of both accuracies over data sets and dimensions."""
    return mean(found["features"] + found["embeddings"] for found in runs if found["arm"] == arm) / 2


def chosen(screened: list[dict]) -> str:
    """The Student-t candidate of the highest score; ValueError while a run of the screening lacks."""
    if (lacking := len(planned("screen", list(CANDIDATES))) - len(screened)) > 0:
        raise ValueError(f"{lacking} runs of the screening lack: run the stage screen first.")
    return max((arm for arm in CANDIDATES if arm != "simclr"), key=lambda arm: score(screened, arm))


def report(folder: Path) -> None:
    """results/defaults.json: accuracies of the screening, and of the final runs the values of every seed."""
    screened, finished = read(folder, "screen"), read(folder, "final")
    winner = chosen(screened)
    values: dict = {}
    for found in sorted(finished, key=lambda found: found["seed"]):
        of = values.setdefault(found["dataset"], {}).setdefault(str(found["dimension"]), {})
        of.setdefault(found["arm"], []).append([round(found[kind], 2) for kind in ("features", "embeddings")])
    metrics = {f"screening_{arm}": score(screened, arm) for arm in CANDIDATES}
    rows = [
        [f["dataset"], f["dimension"], f["arm"], round(f["features"], 2), round(f["embeddings"], 2)] for f in screened
    ]
    seconds = sum(found["cpu_seconds"] for found in screened + finished)
    protocol = {"image_size": IMAGE_SIZE, "epochs": EPOCHS, "neighbours": NEIGHBOURS, "backbone": BACKBONE}
    protocol |= {"arms": {arm: flags for arm, (flags, _) in CANDIDATES.items()}, "cpu_hours": round(seconds / 3600, 2)}
    about = {"dataset": "+".join(SETS), "seed": SCREENING_SEED, "samples": NUMBERS, "protocol": protocol}
    write_results(RESULTS, metrics, **about, chosen=winner, screening=rows, final=values)
    for arm in CANDIDATES:
        print(f"{arm:16} {score(screened, arm):.2f}")
    for dimension, kind in itertools.product(DIMENSIONS, (0, 1)):
        differences = []
        for seed in range(min((len(of[str(dimension)][winner]) for of in values.values()), default=0)):
            pairs = [(of[str(dimension)][winner][seed], of[str(dimension)]["simclr"][seed]) for of in values.values()]
            differences.append(mean(first[kind] - second[kind] for first, second in pairs))
        if len(differences) > 1:
            print(dimension, ("features", "embeddings")[kind], student_interval(differences))


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["screen", "final", "report"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evidence-defaults"))
    args = parser.parse_args(argv)
    folder = args.output_dir
    if args.stage == "report":
        report(folder)
        return 0
    torch.set_num_threads(1)
    arms = list(CANDIDATES) if args.stage == "screen" else ["simclr", chosen(read(folder, "screen"))]
    for dataset, arm, dimension, seed in planned(args.stage, arms):
        path = folder / args.stage / f"{dataset}-{arm}-{dimension}-{seed}.json"
        with claimed(path) as free:
            if free:
                write_json(path, found := run(folder, dataset, arm, dimension, seed, args.stage == "final"))
                print({name: value for name, value in found.items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(reported("defaults.py", main))
