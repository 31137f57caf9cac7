"""Does the fused augmentation teach as well as the exact one? kNN accuracy after training, with paired seeds.

    python training/evidence/augmentation_modes.py      # needs cifar10-jpeg-small under DPSSL_DATA; minutes on a CPU

Trains the same small SimCLR encoder in both modes of `TwoViews` (same initial weights, order and random parameters of
the views) and writes training/evidence/results/augmentation_modes.json. Runs that OUTPUT_DIR holds already are read,
not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import contrastive

from hf_dpssl.data.views import MODES
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "augmentation_modes.json"
DATASET = "cifar10-jpeg-small"
SETTINGS = (
    "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.5 --knn_metric cosine "
    "--augmentation natural --image_size 32 --batch_size 128"
).split() + ["--model_args", '{"channels": [16, 32, 64, 128]}']


def train(mode: str, seed: int, epochs: int, folder: Path) -> tuple[float, dict]:
    """kNN accuracy in percent, and the numbers of images, after training in this mode."""
    target = folder / f"{mode}-{seed}-{epochs}"
    if not (target / "encoder" / "results.json").exists():
        run = ["--dataset", DATASET, "--augmentation_mode", mode, "--seed", seed, "--num_train_epochs", epochs]
        contrastive.main([str(a) for a in [*SETTINGS, *run, "--output_dir", target, "--overwrite", True]])
    results = json.loads((target / "encoder" / "results.json").read_text(encoding="utf-8"))
    return results["metrics"]["knn_top1"], results["samples"]


def main() -> None:
    """Train both modes with every seed and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="paired seeds, two or more")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each run")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/augmentation_modes"), help="folder of the runs"
    )
    args = parser.parse_args()
    accuracy: dict[str, list[float]] = {mode: [] for mode in MODES}
    for seed in args.seeds:
        for mode in MODES:
            value, samples = train(mode, seed, args.epochs, args.output_dir)
            accuracy[mode].append(value)
    metrics = {"seeds": args.seeds} | {f"knn_top1_{mode}": values for mode, values in accuracy.items()}
    write_results(
        RESULTS, metrics, dataset=DATASET, seed=0, samples=samples | {"seeds": len(args.seeds), "epochs": args.epochs}
    )
    for mode, values in accuracy.items():
        print(f"{mode}: kNN {statistics.mean(values):.2f} +- {statistics.stdev(values):.2f} %")
    differences = [round(f - e, 2) for f, e in zip(accuracy["fused"], accuracy["exact"], strict=True)]
    print(f"fused - exact, points, by seed: {differences}")


if __name__ == "__main__":
    main()
