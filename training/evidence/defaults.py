"""Which loss `hf-dpssl train contrastive` should have where nobody tunes: untuned arms on four data sets, by dimension.

    export DPSSL_DATA=folder                       # with the four data sets
    python training/evidence/defaults.py screen    # every candidate, one seed, validation images: half an hour
    python training/evidence/defaults.py final     # SimCLR and the one chosen, five other seeds, test images: an hour
    python training/evidence/defaults.py report    # results/defaults.json

All flags that no arm names are the script's defaults (AdamW 2e-3, batches of 256), but for size: 3,000 images at 24
pixels, 12 epochs, a ResNet of width 12. For few dimensions (2, 8) and for many (32) the Student-t candidate is chosen
that has the highest mean, over data sets, of 20-NN accuracies of features (cosine) and of embeddings (by the kernel's
own distance) on validation images; it becomes the default there unless the final runs show its features a point below
SimCLR's. (Before the first run one choice for all dimensions was written down. The screening, which sees no test image,
showed that none is best in few and in many.)
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
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.results import write_results

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

SETS = ["mnist", "cifar10-jpeg-small", "tiny-imagenet-20c", "pacs-64px"]
DIMENSIONS = [2, 8, 32]
GROUPS = [[2, 8], [32]]  # few and many
NUMBERS = {"train": 3000, "validation": 1000, "test": 900}
IMAGE_SIZE, EPOCHS, NEIGHBOURS = 24, 12, 20
BACKBONE = {"channels": [12, 24, 48, 96], "stem_width": 8}  # a ResNet of width 12
SIMCLR = "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.2"
RAW = "--kernel student_t --feature_norm none"
CANDIDATES = {  # flags, and the distance of the kernel
    "simclr": (SIMCLR, "cosine"),
    "t_joint_2": (f"{RAW} --normalization joint --temperature 2", "euclidean"),
    "t_joint_low": (f"{RAW} --normalization joint --temperature 0.05", "euclidean"),
    "t_joint_auto": (f"{RAW} --normalization joint --temperature auto", "euclidean"),
    "t_anchor_auto": (f"{RAW} --normalization anchor --temperature auto", "euclidean"),
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


def planned(stage: str, arms: dict[int, list[str]]) -> list[tuple[str, str, int, int]]:
    """Data set, arm, dimension and seed of all runs of a stage; `arms` by dimension."""
    seeds = [SCREENING_SEED] if stage == "screen" else SEEDS
    pairs = itertools.product(seeds, DIMENSIONS, SETS)
    return [(name, arm, dimension, seed) for seed, dimension, name in pairs for arm in arms[dimension]]


def read(folder: Path, stage: str) -> list[dict]:
    """The finished runs of a stage."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / stage).glob("*.json"))]


def score(runs: list[dict], arm: str, dimension: int) -> float:
    """Mean of both accuracies over data sets."""
    here = [found for found in runs if (found["arm"], found["dimension"]) == (arm, dimension)]
    return mean(found["features"] + found["embeddings"] for found in here) / 2


def chosen(screened: list[dict]) -> dict[int, str]:
    """The best Student-t candidate for each dimension; ValueError while a run of the screening lacks."""
    if (lacking := len(SETS) * len(DIMENSIONS) * len(CANDIDATES) - len(screened)) > 0:
        raise ValueError(f"{lacking} runs of the screening lack: run the stage screen first.")
    candidates = [arm for arm in CANDIDATES if arm != "simclr"]
    found = {}
    for group in GROUPS:
        best = max(candidates, key=lambda arm, group=group: sum(score(screened, arm, d) for d in group))
        found |= dict.fromkeys(group, best)
    return found


def report(folder: Path) -> None:
    """results/defaults.json: accuracies of the screening, and of the final runs the values of every seed."""
    screened, finished = read(folder, "screen"), read(folder, "final")
    values: dict = {}
    for found in sorted(finished, key=lambda found: found["seed"]):
        of = values.setdefault(str(found["dimension"]), {}).setdefault(found["arm"], {})
        of.setdefault(found["dataset"], []).append([round(found[kind], 2) for kind in ("features", "embeddings")])
    metrics = {f"screening_{arm}_{d}": round(score(screened, arm, d), 3) for d in DIMENSIONS for arm in CANDIDATES}
    seconds = sum(found["cpu_seconds"] for found in screened + finished)
    protocol = {"image_size": IMAGE_SIZE, "epochs": EPOCHS, "neighbours": NEIGHBOURS, "backbone": BACKBONE}
    protocol |= {"arms": {arm: flags for arm, (flags, _) in CANDIDATES.items()}, "cpu_hours": round(seconds / 3600, 2)}
    about = {"dataset": "+".join(SETS), "seed": 0, "samples": NUMBERS, "protocol": protocol}
    write_results(RESULTS, metrics, **about, chosen=chosen(screened), final=values)


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
    if args.stage == "screen":
        arms = dict.fromkeys(DIMENSIONS, list(CANDIDATES))
    else:
        arms = {dimension: ["simclr", arm] for dimension, arm in chosen(read(folder, "screen")).items()}
    for dataset, arm, dimension, seed in planned(args.stage, arms):
        path = folder / args.stage / f"{dataset}-{arm}-{dimension}-{seed}.json"
        with claimed(path) as free:
            if free:
                write_json(path, found := run(folder, dataset, arm, dimension, seed, args.stage == "final"))
                print({name: value for name, value in found.items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(reported("defaults.py", main))
