"""The transfer suite: an encoder on nine sets, by neighbours, by a linear classifier, and by fine-tuning all of it.

    knn        20 nearest neighbours (cosine) among train and validation
    linear     logistic regression on standardised features, its strength chosen on validation, then trained on train
               and validation
    finetune   as fine_tuning.py says; learning rate and weight decay chosen on validation, then trained on both

The test images are read once, at the end. Everything that was measured is kept as soon as it is there, and a later call
goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from ..embedding.embedder import ImageEmbedder
from ..embedding.embeddings_table import dataset_fingerprint
from ..embedding.encoder_evaluation import extract_features
from ..evaluation.neighbours import nearest_neighbours
from ..evaluation.probes import STRENGTHS
from ..models.weight_hashes import combined_sha256
from ..runs.atomic_files import atomic_file, write_json
from ..runs.console import one_line
from ..runs.lineage import read_json
from ..runs.redaction import without_folders
from .fine_tuning import LEARNING_RATES, WEIGHT_DECAYS, Setting, accuracy, fine_tune, grid
from .transfer_sets import TRANSFER_SETS, TransferData, load_transfer_set

PROTOCOLS = ("knn", "linear", "finetune")
_NEIGHBOURS = 20


def transfer(
    encoder: str,
    *,
    sets: Sequence[str] = tuple(TRANSFER_SETS),
    sources: dict[str, str] | None = None,
    protocols: Sequence[str] = ("knn", "linear"),
    folder: str | os.PathLike,
    steps: int = 5000,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    batch_size: int = 64,
    seed: int = 0,
) -> dict:
    """Measure an encoder on several sets.

    Args:
        encoder: folder or Hub id.
        sets: of TRANSFER_SETS.
        sources: by set, where it is read from; others are read from the Hub.
        protocols: of PROTOCOLS.
        folder: of features/ and of what has been measured, measured.json; a later call goes on with these.
        steps, learning_rates, weight_decays, batch_size: of fine-tuning; weight decays divided by the learning rate.
        seed: of fine-tuning.

    Returns:
        {"rows": for each set and protocol {"set", "title", "source", "whole", "difference", "protocol", "metric",
        "mean", "low", "high", "train", "validation", "test" images, "classes", "chosen" settings, "published":
        {"MoCo-v2", "t-MoCo-v2"} of whole sets that were fine-tuned}, or {"set", "error"}; "fingerprint": the encoder's;
        "precision" in which it computed features, "float32" or "bfloat16" (fine-tuning is float32)}

    Raises:
        ValueError: unknown or repeated sets or protocols, sources of other sets, an encoder that cannot be loaded, or
            no set that can be measured.
    """
    sources = dict(sources or {})
    for name, given, allowed in (("set", [*sets, *sources], TRANSFER_SETS), ("protocol", protocols, PROTOCOLS)):
        if not given or (unknown := sorted(set(given) - set(allowed))):
            raise ValueError(f"{name}s are of {', '.join(allowed)}, got {', '.join(unknown) if given else 'none'}.")
    for name, given in (("set", sets), ("protocol", protocols)):
        if twice := sorted({key for key in given if list(given).count(key) > 1}):
            raise ValueError(f"{', '.join(twice)}: a {name} is measured once, got it twice.")
    if unread := sorted(set(sources) - set(sets)):
        raise ValueError(
            f"{', '.join(unread)}: a source of a set that is not among those measured ({', '.join(sets)})."
        )
    if steps < 1 or batch_size < 1 or not learning_rates or min(learning_rates) <= 0 or min(weight_decays) < 0:
        raise ValueError("steps, batch_size and learning rates must be larger than 0, weight decays 0 or larger.")
    embedder = ImageEmbedder(encoder, mixed_precision=True)
    kept = _Kept(Path(folder))
    settings = grid(learning_rates, weight_decays)
    training = {"steps": steps, "batch_size": batch_size, "seed": seed}
    rows = []
    for key in tqdm(sets, "transfer sets", unit="set"):
        try:
            given = load_transfer_set(key, sources.get(key))
            for protocol in protocols:
                options = training | {"grid": settings} if protocol == "finetune" else {"neighbours": _NEIGHBOURS}
                name = _fingerprint(embedder.fingerprint, given, {"protocol": protocol, **options})
                if (found := kept.get(name)) is None:
                    found = _measured(embedder, encoder, given, protocol, settings, training, kept)
                    kept.put(name, found)
                rows.append(_about(given, protocol) | found)
        except (ValueError, OSError, ArithmeticError) as error:  # the other sets go on
            rows.append({"set": key, "error": f"{type(error).__name__}: {one_line(error)}"})
    if all("error" in row for row in rows):
        raise ValueError("no set could be measured: " + " ".join(f"{row['set']}: {row['error']}" for row in rows))
    return {"rows": rows, "fingerprint": embedder.fingerprint, "precision": embedder.precision}


class _Kept:
    """Results by fingerprint in a file that is whole after each of them, and features beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "measured.json"
        self.results = read_json(self.path) or {}

    def get(self, name: str) -> dict | None:
        return self.results.get(name)

    def put(self, name: str, result: dict) -> None:
        self.results[name] = result
        write_json(self.path, self.results)

    def features(self, name: str, extract: Callable[[], Tensor]) -> Tensor:
        path = self.folder / "features" / f"{name}.safetensors"
        if path.exists():
            return load_file(path)["features"]
        found = extract()
        with atomic_file(path, "wb") as file:
            file.write(save({"features": found.contiguous()}))
        return found


def _fingerprint(encoder: str, given: TransferData, options: dict) -> str:
    parts = {name: getattr(given, name) for name in ("train", "validation", "test")}
    hashes = {name: dataset_fingerprint({name: part.images}) + str(list(part.rows)) for name, part in parts.items()}
    return combined_sha256({"encoder": encoder, "options": repr(sorted(options.items()))} | hashes)[:32]


def _about(given: TransferData, protocol: str) -> dict:
    spec = TRANSFER_SETS[given.key]
    counts = {name: len(getattr(given, name).rows) for name in ("train", "validation", "test")}
    about = {"set": given.key, "title": given.title, "source": without_folders(given.source), "whole": given.whole}
    about |= {"difference": given.difference, "protocol": protocol, "metric": spec.metric, **counts}
    about["classes"] = len(given.class_names)
    if given.whole and protocol == "finetune":
        about["published"] = dict(zip(("MoCo-v2", "t-MoCo-v2"), spec.published, strict=True))
    return about


def _measured(
    embedder: ImageEmbedder,
    encoder: str,
    given: TransferData,
    protocol: str,
    settings: list[Setting],
    training: dict,
    kept: _Kept,
) -> dict:
    metric = TRANSFER_SETS[given.key].metric
    test = given.test.labels
    if protocol == "finetune":
        return _fine_tuned(embedder.fingerprint, encoder, given, settings, training, kept)
    batch_size = training["batch_size"]
    x = {}
    for name in ("train", "validation", "test"):
        part = getattr(given, name)
        about = {"encoder": embedder.fingerprint, "images": part.images._fingerprint, "rows": str(list(part.rows))}

        def extract(part=part) -> Tensor:
            return extract_features(embedder, given.data, part.images, part.rows, batch_size)[0]

        x[name] = kept.features(combined_sha256(about)[:32], extract)
    together = torch.cat([x["train"], x["validation"]])
    labels = np.concatenate([given.train.labels, given.validation.labels])
    if protocol == "knn":
        k = min(_NEIGHBOURS, len(together))
        _, nearest = nearest_neighbours(together, x["test"], k=k)
        votes = np.apply_along_axis(np.bincount, 1, labels[nearest.numpy()], minlength=len(given.class_names))
        return accuracy(votes.argmax(1), test, metric) | {"chosen": {"k": k}}
    scores = []
    for strength in STRENGTHS:
        model = _logistic(strength).fit(x["train"].numpy(), given.train.labels)
        predicted = model.predict(x["validation"].numpy())
        scores.append(accuracy(predicted, given.validation.labels, metric)["mean"])
    best = STRENGTHS[int(np.argmax(scores))]
    predicted = _logistic(best).fit(together.numpy(), labels).predict(x["test"].numpy())
    return accuracy(predicted, test, metric) | {"chosen": {"c": best, "validation": max(scores)}}


def _logistic(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def _fine_tuned(fingerprint: str, encoder: str, given: TransferData, settings, training: dict, kept: _Kept) -> dict:
    metric = TRANSFER_SETS[given.key].metric
    classes = len(given.class_names)
    scores = []
    for setting in tqdm(settings, "grid", unit="run", leave=False):
        name = _fingerprint(fingerprint, given, {"tried": setting, **training})
        if (found := kept.get(name)) is None:
            try:
                predict = fine_tune(encoder, given.data, [given.train], classes, setting, **training)
                found = accuracy(predict(given.validation), given.validation.labels, metric)
            except FloatingPointError as error:  # too large a rate, which cannot be the best one
                found = {"mean": 0.0, "diverged": str(error)}
            kept.put(name, found)
        scores.append(found["mean"])
    best = settings[int(np.argmax(scores))]
    predict = fine_tune(encoder, given.data, [given.train, given.validation], classes, best, **training)
    chosen = {"learning_rate": best.learning_rate, "weight_decay": best.weight_decay, "validation": max(scores)}
    return accuracy(predict(given.test), given.test.labels, metric) | {"chosen": chosen | {"tried": len(settings)}}
