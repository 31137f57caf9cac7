"""Train the network that judges generated images: a small classifier of real ones, which no generator has seen.

    python training/evidence/judge_network.py --dataset FOLDER --image_size 16 --output_dir FOLDER

Writes OUTPUT_DIR/model.safetensors and judge.json: side, classes and accuracy on the data's held-out images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_dpssl.autoencoder.measures import load_pictures
from hf_dpssl.cli.errors import reported
from hf_dpssl.runs.atomic_files import atomic_folder, write_json

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

from demo import FEATURES, classifier_of, train_classifier


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder, table name or Hub id")
    parser.add_argument("--image_size", type=int, required=True, help="side of the images, divisible by 4")
    parser.add_argument("--epochs", type=int, default=10, help="of the training images")
    parser.add_argument("--output_dir", required=True, help="folder of the judge")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status."""
    args = parser().parse_args(argv)
    if args.image_size % 4:
        raise ValueError(f"--image_size must be divisible by 4, got {args.image_size}.")
    pictures = load_pictures(args.dataset, args.image_size, None)
    train, held_out = pictures["train"], pictures["evaluation"]
    images = {"train": train.pixel_values / 2 + 0.5, "train_classes": train.labels}
    judge = train_classifier(images, args.epochs)
    found = judge(held_out.pixel_values / 2 + 0.5).argmax(1)
    about = {"side": args.image_size, "classes": int(train.labels.max()) + 1}
    about["held_out_accuracy"] = 100 * float((found == held_out.labels).double().mean())
    with atomic_folder(Path(args.output_dir)) as folder:
        save_file(judge.state_dict(), folder / "model.safetensors")
        write_json(folder / "judge.json", about)
    return 0


def load_judge(folder: Path) -> nn.Sequential:
    """The classifier of a folder that `main` wrote; input (N, 3, S, S) in [0, 1]."""
    about = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    judge = classifier_of(about["side"], about["classes"])
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval()


def features_of(judge: nn.Sequential, images: Tensor) -> Tensor:
    """(N, 128) means over positions of the last convolution."""
    return judge[:FEATURES](images).mean((2, 3))


if __name__ == "__main__":
    sys.exit(reported("judge_network.py", main))
