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
from dataclasses import fields
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.runs.console import say
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments, MapArguments
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(MapArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import contrastive
import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Features, Value
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data.batches import evaluation_batches
from hf_dpssl.data.image_data import ImageData, load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.data.subsets import random_rows
from hf_dpssl.data.views import normalize
from hf_dpssl.embedding.embedder import best_device
from hf_dpssl.embedding.embeddings_table import write_columns
from hf_dpssl.evaluation import knn
from hf_dpssl.pages.map_page import write_map_page
from hf_dpssl.runs.plots import plot_map
from hf_dpssl.runs.results import write_results

_PERPLEXITY = 30.0
_TSNE_INPUTS = 50  # principal components of pixels or features, as in van der Maaten & Hinton 2008
_TSNE_SIDE = 32  # larger images are averaged to this size before their pixels are compared


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the map."""
    args = parse(MapArguments, argv, __doc__)
    columns = {name: getattr(args, name) for name in ("image_column", "label_column")}
    data = load_images(args.dataset, **columns, revision=args.dataset_revision)
    folder, image_size = Path(args.output_dir), args.image_size or data.entry.image_size

    # Three stages
    steps_per_epoch = len(data.train) // (args.batch_size * int(os.environ.get("WORLD_SIZE", 1)))
    first, _, third = [train(stage) for stage in stages_of(args, steps_per_epoch)]
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


def stages_of(args: MapArguments, steps_per_epoch: int) -> list[ContrastiveArguments]:
    """The arguments of training/contrastive.py in each stage, which starts from the one before."""
    folder = Path(args.output_dir)
    warmup = {"warmup_steps": args.warmup_epochs * steps_per_epoch}
    plane = {"projection_dim": 2}
    frozen = {"freeze": "all_but_last_layer", "warmup_steps": 0, "init_pretraining": str(folder / "stage-1")}
    gentle = {"learning_rate": args.learning_rate * args.stage_3_share, "init_pretraining": str(folder / "stage-2")}
    settings = {f.name: getattr(args, f.name) for f in fields(ContrastiveArguments)}
    stages = (
        {"name": "stage-1", "num_train_epochs": args.stage_1_epochs} | warmup,
        {"name": "stage-2", "num_train_epochs": args.stage_2_epochs} | plane | frozen,
        {"name": args.name, "num_train_epochs": args.stage_3_epochs} | plane | gentle | warmup,
    )
    return [ContrastiveArguments(**settings | changes) for changes in stages]


def train(stage: ContrastiveArguments) -> Path:
    """One stage, by training/contrastive.py; its settings are kept beside its folder as a recipe."""
    recipe = Path(stage.output_dir) / f"{stage.name}.yaml"
    save_recipe(stage, recipe)
    return contrastive.main(["--recipe", str(recipe)])


def read(data: ImageData, split, image_size: int, args: MapArguments, name: str) -> dict:
    """images uint8 (N, 3, S, S), labels (N,), and lists rows, files, names, held_out, of rows drawn at random."""
    table = ImageTable(data, split, image_size, args.on_bad_image)
    batches = list(evaluation_batches(table, 512, table.random_rows(args.evaluation_images)))
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
    known = (labels >= 0).numpy()
    chosen = (known & ~held_out, known & held_out)  # the bank and the queries of the neighbours
    k, judged = min(args.knn_k, int(chosen[0].sum())), all(part.any() for part in chosen)
    if labelled and not known.all():
        say(f"{(~known).sum()} images without class are on the map and not among the neighbours")
    metrics, figure = {}, {}
    for name, points in maps.items():
        title = titles[name]
        if judged:
            places, classes = ([torch.as_tensor(x)[torch.from_numpy(c)] for c in chosen] for x in (points, labels))
            (bank, queries), (bank_labels, found) = places, classes
            metrics[f"knn_top1_{name}"] = knn(
                bank.float(), bank_labels, queries.float(), found, k=k, metric="euclidean"
            )["knn_top1"]
            title += f"\n{k}-NN accuracy of held-out images {metrics[f'knn_top1_{name}']:.1f} %"
        figure[title] = (points, labels.numpy() if labelled else np.zeros(len(points), int))
    plot_map(figure, data.class_names or [""], folder / "map.png")

    shown = np.array(random_rows(len(held_out), args.page_images, labels=labels, seed=args.seed))
    pages = {}
    for name, title in titles.items():
        score = f", {k}-NN {metrics[f'knn_top1_{name}']:.1f} %" if judged else ""
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
        knn={"k": k, "metric": "euclidean"}, tsne=how, method=method, images=data.account(),
    )  # fmt: skip
    say(f"{folder}/map.png, map.html: " + ", ".join(f"{name} {value:.1f} %" for name, value in metrics.items()))


if __name__ == "__main__":
    sys.exit(reported("map.py", main))
