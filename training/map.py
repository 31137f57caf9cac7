"""A 2-D map of images by the three stages of t-SimCNE, beside t-SNE of pixels and of features.

    python training/map.py                                       # the embedded digits, CPU, minutes
    hf-dpssl map path/to/images --image_size 64
    accelerate launch training/map.py --recipe map-cifar10

Stage 1 trains encoder and head with a high-dimensional output, stage 2 replaces the last layer by a
2-D one and trains it alone, stage 3 trains everything at a low rate (Böhm, Berens & Kobak, ICLR 2023).
Writes OUTPUT_DIR/map.png, map.html (thumbnails on hover, no network), points.parquet, results.json, and
stage-1/, stage-2/, NAME/ as training/contrastive.py does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import contrastive
import numpy as np
import torch
import torch.nn.functional as F
from contrastive import ContrastiveArguments
from datasets import ClassLabel, Features, Value
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from hf_dpssl.cli.errors import reported
from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data.batches import evaluation_batches, spread_rows
from hf_dpssl.data.image_data import ImageData, load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.data.views import normalize
from hf_dpssl.embedding.embedder import best_device
from hf_dpssl.embedding.embeddings_table import write_columns
from hf_dpssl.evaluation import knn
from hf_dpssl.pages.map_page import write_map_page
from hf_dpssl.runs.plots import plot_map
from hf_dpssl.runs.recipe import option, parse, save_recipe
from hf_dpssl.runs.results import write_results

_PERPLEXITY = 30.0
_TSNE_INPUTS = 50  # principal components of pixels or features, as in van der Maaten & Hinton 2008
_TSNE_SIDE = 32  # larger images are averaged to this size before their pixels are compared


@dataclass
class MapArguments(ContrastiveArguments):
    """Three stages of contrastive training; --projection_dim is that of stage 1, the map has two dimensions."""

    output_dir: str = option("outputs/map", "folder of the run")
    normalization: str = option("anchor", "anchor (t-SimCNE) or joint (t-SimCLR)", choices=["joint", "anchor"])
    temperature: float = option(1.0, "divides the squared distance; t-SimCNE: 1")
    dof: float = option(1.0, "degrees of freedom of the Student-t kernel; t-SimCNE: 1, the Cauchy kernel")
    projection_dim: int = option(128, "dimension of the embeddings of stage 1; t-SimCNE: 128")
    projection_hidden_dim: int | None = option(1024, "width of the head; t-SimCNE: 1024")
    stage_1_epochs: int = option(100, "epochs of stage 1; t-SimCNE: 1000")
    stage_2_epochs: int = option(10, "epochs of stage 2, the last layer alone; t-SimCNE: 50")
    stage_3_epochs: int = option(50, "epochs of stage 3; t-SimCNE: 450")
    warmup_epochs: int = option(10, "epochs of linear warm-up of stages 1 and 3; t-SimCNE: 10")
    stage_3_share: float = option(0.1, "learning rate of stage 3, a share of --learning_rate; t-SimCNE: 0.001")
    knn_k: int = option(15, "neighbours of the kNN evaluation; t-SimCNE: 15")
    page_images: int = option(10_000, "at most so many images are on the interactive page")

    def __post_init__(self):
        super().__post_init__()
        for name in ("stage_1_epochs", "stage_2_epochs", "stage_3_epochs", "page_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.streaming or self.max_train_steps is not None or self.negatives == "queue":
            raise ValueError(
                "a map counts epochs, over negatives from the batch: leave out --streaming, --max_train_steps and "
                "--negatives queue."
            )


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the map."""
    args = parse(MapArguments, argv, __doc__)
    columns = {name: getattr(args, name) for name in ("image_column", "label_column")}
    data = load_images(args.dataset, **columns, revision=args.dataset_revision)
    folder, image_size = Path(args.output_dir), args.image_size or data.entry.image_size

    # Three stages
    steps_per_epoch = len(data.train) // (args.batch_size * int(os.environ.get("WORLD_SIZE", 1)))
    warmup = {"warmup_steps": args.warmup_epochs * steps_per_epoch}
    plane = {"projection_dim": 2}
    frozen = {"freeze": "all_but_last_layer", "warmup_steps": 0}
    gentle = {"learning_rate": args.learning_rate * args.stage_3_share, **warmup}
    first = train(args, "stage-1", args.stage_1_epochs, **warmup)
    second = train(args, "stage-2", args.stage_2_epochs, init_pretraining=str(first), **plane, **frozen)
    third = train(args, args.name, args.stage_3_epochs, init_pretraining=str(second), **plane, **gentle)
    if int(os.environ.get("RANK", 0)) != 0:
        return folder

    # Where each map puts the images
    splits = {"train": data.train, "held_out": data.evaluation}
    parts = [read(data, split, image_size, args, name) for name, split in splits.items()]
    parts = {name: torch.cat([part[name] for part in parts]) if torch.is_tensor(parts[0][name])
             else sum((part[name] for part in parts), []) for name in parts[0]}  # fmt: skip
    features, _ = represent(first, parts["images"], data)
    _, points = represent(third, parts["images"], data)
    side = min(image_size, _TSNE_SIDE)
    pixels = F.interpolate(parts["images"].float(), side, mode="area").flatten(1)
    held_out = np.array(parts["held_out"])
    by_pixels, how = tsne(pixels.numpy(), held_out, args.seed)
    by_features, _ = tsne(features.numpy(), held_out, args.seed)
    maps = {"pixels_tsne": by_pixels, "features_tsne": by_features, "map": points.numpy()}
    save(args, data, maps, parts, how, folder)
    return folder


def train(args: MapArguments, name: str, epochs: int, **changes) -> Path:
    """One stage, by training/contrastive.py; its settings are kept beside its folder as a recipe."""
    settings = {f.name: getattr(args, f.name) for f in fields(ContrastiveArguments)}
    stage = ContrastiveArguments(**settings | {"name": name, "num_train_epochs": epochs} | changes)
    recipe = Path(args.output_dir) / f"{name}.yaml"
    save_recipe(stage, recipe)
    return contrastive.main(["--recipe", str(recipe)])


def read(data: ImageData, split, image_size: int, args: MapArguments, name: str) -> dict:
    """images uint8 (N, 3, S, S), labels (N,), and lists rows, files, names, held_out, of evenly spread rows."""
    table = ImageTable(data, split, image_size, args.on_bad_image)
    batches = list(evaluation_batches(table, 512, spread_rows(len(table), args.evaluation_images)))
    rows = torch.cat([batch["sample_ids"] for batch in batches]).tolist()
    values = [split[row][data.image_column] for row in rows]
    files = [value.get("path") if isinstance(value, dict) else None for value in values]
    return {
        "images": torch.cat([batch["images"] for batch in batches]),
        "labels": torch.cat([batch["labels"] for batch in batches]),
        "rows": rows,
        "files": [Path(file).name if file else None for file in files],
        "held_out": [name == "held_out"] * len(rows),
    }


@torch.no_grad()
def represent(folder: Path, images: Tensor, data: ImageData) -> tuple[Tensor, Tensor]:
    """features (N, F) and embeddings (N, D) of a finished stage."""
    device = best_device()
    model = SimCLRForPreTraining.from_pretrained(folder / "pretraining").eval().to(device)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in data.entry.statistics)
    outputs = [model(normalize(part.to(device).float() / 255, mean, std)) for part in images.split(512)]
    return tuple(torch.cat([output[kind].cpu() for output in outputs]) for kind in ("features", "embeddings"))


def tsne(inputs: np.ndarray, held_out: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Points (N, 2) of rows (N, D), and how the held-out ones were placed; all choices of it are the libraries' own."""
    components = min(_TSNE_INPUTS, inputs.shape[1], int((~held_out).sum()))
    inputs = PCA(components, random_state=seed).fit(inputs[~held_out]).transform(inputs)
    perplexity = min(_PERPLEXITY, (int((~held_out).sum()) - 1) / 3)
    try:
        import openTSNE
    except ImportError:
        how = "scikit-learn, which has no map for new images: train and held-out images were embedded together"
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(inputs), how
    fitted = openTSNE.TSNE(perplexity=perplexity, initialization="pca", random_state=seed).fit(inputs[~held_out])
    points = np.empty((len(inputs), 2))
    points[~held_out], points[held_out] = fitted, fitted.transform(inputs[held_out])
    return points, "openTSNE, fitted to the train images; held-out images placed by its transform"


def save(args: MapArguments, data: ImageData, maps: dict, parts: dict, how: str, folder: Path) -> None:
    """kNN accuracy under each map, the figure, the page, the points and results.json."""
    held_out, labels, labelled = np.array(parts["held_out"]), parts["labels"], data.class_names is not None
    method = "t-SimCNE" if args.normalization == "anchor" and args.dof == args.temperature == 1 else "t-SimCLR"
    titles = dict(zip(maps, ("pixels by t-SNE", "features by t-SNE", f"{method} in 2-D"), strict=True))
    k = min(args.knn_k, int((~held_out).sum()))
    metrics, figure = {}, {}
    for name, points in maps.items():
        title = titles[name]
        if labelled:
            bank, queries = (torch.from_numpy(points[chosen]).float() for chosen in (~held_out, held_out))
            metrics[f"knn_top1_{name}"] = knn(
                bank, labels[~held_out], queries, labels[held_out], k=k, metric="euclidean"
            )["knn_top1"]
            title += f"\n{k}-NN accuracy of held-out images {metrics[f'knn_top1_{name}']:.1f} %"
        figure[title] = (points, labels.numpy() if labelled else np.zeros(len(points), int))
    plot_map(figure, data.class_names or [""], folder / "map.png")

    shown = np.arange(len(held_out))[:: -(-len(held_out) // args.page_images)]
    pages = {}
    for name, title in titles.items():
        score = f", {k}-NN {metrics[f'knn_top1_{name}']:.1f} %" if labelled else ""
        pages[title + score] = maps[name][shown]
    names = [parts["files"][i] or f"row {parts['rows'][i]}" for i in shown]
    write_map_page(
        folder / "map.html", pages, parts["images"][shown], names=names, labels=labels[shown].tolist(),
        class_names=data.class_names or [], held_out=held_out[shown].tolist(), title=f"{method} map of {data.name}",
    )  # fmt: skip

    features = {"held_out": Value("bool"), "row": Value("int64"), "file": Value("string")}
    columns = {"held_out": parts["held_out"], "row": parts["rows"], "file": parts["files"]}
    if labelled:
        features["label"] = ClassLabel(names=data.class_names)
        columns["label"] = [None if label < 0 else label for label in labels.tolist()]
    for name, points in maps.items():
        for axis in (0, 1):
            features[f"{name}_{'xy'[axis]}"] = Value("float32")
            columns[f"{name}_{'xy'[axis]}"] = points[:, axis].astype(np.float32)
    write_columns(folder / "points.parquet", columns, Features(features))
    write_results(
        folder / "results.json", metrics, dataset=data.name, seed=args.seed,
        samples={"train": int((~held_out).sum()), "held_out": int(held_out.sum()), "page": len(shown)},
        knn={"k": k, "metric": "euclidean"}, tsne=how, method=method,
    )  # fmt: skip
    print(f"{folder}/map.png, map.html: " + ", ".join(f"{name} {value:.1f} %" for name, value in metrics.items()))


if __name__ == "__main__":
    sys.exit(reported("map.py", main))
