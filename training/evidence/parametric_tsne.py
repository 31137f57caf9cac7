"""Train an encoder by parametric t-SNE: neighbours are those of the pixels, no augmentations; an arm of claim 1.

    python training/evidence/parametric_tsne.py --dataset FOLDER --image_size 28 --output_dir FOLDER

A step draws twice `--batch_size` pictures, as many as a contrastive step has views; P is that of t-SNE within them, of
their first 50 principal components, Q that of Student's t with one degree of freedom. Writes OUTPUT_DIR/encoder as
training/contrastive.py does: the encoder, `pretraining/` with its head, and results.json.

Source: van der Maaten, "Learning a parametric embedding by preserving local structure", AISTATS 2009; here of one
stage, without its pretraining by restricted Boltzmann machines, and with a convolutional network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm.auto import tqdm

from hf_dpssl import evaluation
from hf_dpssl.autoencoder.measures import Pictures, load_pictures
from hf_dpssl.cli.errors import reported
from hf_dpssl.contrastive.losses import t_sne
from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.contrastive.similarities import gaussian_similarities
from hf_dpssl.data import keyed_random
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.results import logged_curve, write_results

COMPONENTS = 50  # of the pixels, for the neighbours, as claim 4's t-SNE has; van der Maaten and Hinton 2008 took 30
DOF = 1.0  # of Q, as in the plane


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder, table name or Hub id")
    parser.add_argument("--image_size", type=int, required=True, help="side of the images")
    parser.add_argument("--architecture", default="resnet10t", help="timm model")
    parser.add_argument("--model_args", type=json.loads, help="JSON keyword arguments of timm.create_model")
    parser.add_argument("--projection_dim", type=int, default=2, help="dimension of the embeddings")
    parser.add_argument("--perplexity", type=float, default=30.0, help="of P, within the pictures of a step")
    parser.add_argument("--batch_size", type=int, default=256, help="half of the pictures of a step")
    parser.add_argument("--num_train_epochs", type=int, default=15, help="steps are those of a contrastive run")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="peak learning rate of AdamW")
    parser.add_argument("--warmup_steps", type=int, default=10, help="steps of linear warm-up")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the folder `encoder`")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run with command-line arguments `argv`; returns the exit status.

    Raises:
        ValueError: fewer training images than one step draws.
    """
    args = parser().parse_args(argv)
    accelerator = Accelerator()
    set_seed(args.seed)
    pictures = load_pictures(args.dataset, args.image_size, None)
    count = len(pictures["train"].labels)
    if count < 2 * args.batch_size:
        raise ValueError(
            f"{args.dataset} has {count} training images, fewer than the {2 * args.batch_size} of a step: "
            "lower --batch_size."
        )
    model = make_model(args).to(accelerator.device).train()
    history = train(model, pictures["train"].pixel_values, args)
    save(model.eval(), pictures, history, args)
    return 0


def make_model(args: argparse.Namespace) -> SimCLRForPreTraining:
    """An encoder and head like those of training/contrastive.py, of pictures in [-1, 1]."""
    preprocessing = {
        "input_size": [3, args.image_size, args.image_size],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    config = ContrastiveConfig(
        architecture=args.architecture,
        model_args=args.model_args,
        projection_dim=args.projection_dim,
        kernel="student_t",
        normalization="joint",
        feature_norm="none",
        temperature=1.0,
        dof=DOF,
        pretrained_cfg=preprocessing,
    )
    return SimCLRForPreTraining(config)


def drawn_rows(count: int, drawn: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of each of `steps` steps: `drawn` of `count` in a new order each epoch, the rest of which is left out."""
    each = count // drawn
    for step in range(steps):
        if step % each == 0:
            order = keyed_random.permutation(count, seed=seed, epoch=step // each)
        yield order[step % each * drawn :][:drawn]


def train(model: SimCLRForPreTraining, pixel_values: Tensor, args: argparse.Namespace) -> list[dict]:
    """Train on (N, 3, S, S) pictures; returns {"step", "loss"} of every step, KL(P || Q) in nats."""
    count = len(pixel_values)
    steps = args.num_train_epochs * (count // args.batch_size)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=args.learning_rate, weight_decay=1e-4)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=steps)
    components = PCA(COMPONENTS, random_state=0).fit_transform(pixel_values.flatten(1).numpy())
    components = torch.from_numpy(components).to(model.device)
    history = []
    drawn = drawn_rows(count, 2 * args.batch_size, steps, args.seed)
    for rows in tqdm(drawn, "parametric t-SNE", steps, unit="step", disable=None):
        images = pixel_values[rows].to(model.device)
        similarities = gaussian_similarities(components[rows], args.perplexity, normalization="joint")
        loss = t_sne(similarities.to(images), model(images).embeddings, dof=DOF)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        history.append({"step": len(history) + 1, "loss": float(loss.detach())})
    return history


def save(
    model: SimCLRForPreTraining, pictures: dict[str, Pictures], history: list[dict], args: argparse.Namespace
) -> None:
    """Write the encoder, its head, and the accuracy of its embeddings on the held-out images."""
    found = {name: embeddings(model, part.pixel_values) for name, part in pictures.items()}
    bank, query = (pictures[name].labels for name in ("train", "evaluation"))
    measured = evaluation.knn(found["train"], bank, found["evaluation"], query, k=20, metric="euclidean")
    metrics = {f"{name}_embeddings": value for name, value in measured.items()}
    samples = {name: len(part.labels) for name, part in pictures.items()}
    with atomic_folder(args.output_dir / "encoder") as folder:
        model.encoder.save_pretrained(folder)
        model.save_pretrained(folder / "pretraining")
        about = {
            "dataset": args.dataset,
            "seed": args.seed,
            "samples": samples,
            "loss_curve": logged_curve(history, "loss"),
        }
        write_results(folder / "results.json", metrics, **about)


@torch.no_grad()
def embeddings(model: SimCLRForPreTraining, pixel_values: Tensor) -> Tensor:
    """(N, D) of (N, 3, S, S)."""
    return torch.cat([model(part.to(model.device)).embeddings.cpu() for part in pixel_values.split(512)])


if __name__ == "__main__":
    sys.exit(reported("parametric_tsne.py", main))
