"""Ranking a zoo, which is a list of encoders, on pictures of several domains: features once, then closed forms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.image_table import BadImageError
from ..domains.cached_features import features_of, views_of
from ..domains.domain_data import DomainData
from ..embedding.embedder import ImageEmbedder
from ..evaluation.geometry import effective_rank
from ..evaluation.neighbours import nearest_neighbours
from ..evaluation.student_interval import student_interval
from ..runs.console import one_line
from .baselines import accuracy_in_domain, h_score, knn_across_domains, log_me, nce_of_clusters, trans_rate
from .encoder_facts import encoder_facts
from .ranking import leave_one_domain_out
from .view_likelihood import held_out_views
from .zoo_list import ZooEntry


def rank_zoo(
    zoo: Sequence[ZooEntry],
    given: DomainData,
    *,
    features: str = "features",
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    on_bad_image: str = "error",
    seed: int = 0,
) -> list[dict]:
    """Score every encoder, best first; those that failed stand last.

    With labels the score is that of `leave_one_domain_out`, whose mean over domains is ranked. Without, it is the share
    in percent of a domain's pictures of which one random view is nearest, among the second views of all pictures of
    the domain, to its own second view: features that tell pictures apart and not how they are cropped or coloured.

    Args:
        zoo: as `read_zoo` returns it.
        given: the pictures.
        features: "features" (of the backbone) or "embeddings" (of the head).
        cache: folder in which features are kept, by encoder and pictures, those of views by seed too; None: nowhere.
        batch_size: pictures embedded at once.
        on_bad_image: "error", or "skip" to leave unreadable pictures out.
        seed: of the views.

    Returns:
        For each encoder {"name", "encoder", "score": {"mean", "low", "high"} over domains, "domains": {its parts},
        "behind": the same three of the first one's score minus this one's, domain by domain, "width", "parameters",
        "megabytes" of weights, "seconds", "cached" (whether nothing was embedded), "fingerprint", "precision" in which
        the encoder computed ("float32", or "bfloat16" on a GPU that does), and what `encoder_facts` says} and, with
        labels, "labels", "stability", "knn_top1" and what baselines.py measures, without them "effective_rank" and
        "views" (`held_out_views`); or {"name", "encoder", "error"}.

    Raises:
        ValueError: no encoder could be measured. BadImageError: an unreadable picture, with on_bad_image="error"; a
            domain of which no picture can be read, with "skip".
    """
    reading = {"batch_size": batch_size, "on_bad_image": on_bad_image}
    entries = for_every_encoder(zoo, lambda entry: _measured(entry, given, features, cache, reading, seed))
    done = [entry for entry in entries if "score" in entry]
    done.sort(key=lambda entry: -entry["score"]["mean"])
    best = _scores(done[0])
    for entry in done:
        entry["behind"] = student_interval([first - own for first, own in zip(best, _scores(entry), strict=True)])
    return done + [entry for entry in entries if "error" in entry]


def for_every_encoder(zoo: Sequence[ZooEntry], measure: Callable[[ZooEntry], dict]) -> list[dict]:
    """What `measure` returns for each encoder, with "name" and "encoder"; of those that fail "error" in its place.

    An encoder whose "fingerprint" is that of an earlier one fails: a copy would count twice in all that follows.

    Raises:
        ValueError: all of them fail. BadImageError: a picture that cannot be read, which no other encoder can mend.
    """
    entries = []
    first: dict[str, str] = {}
    for entry in tqdm(zoo, "encoders", unit="encoder"):
        who = {"name": entry.name, "encoder": entry.encoder}
        try:
            measured = measure(entry)
            if (same := first.setdefault(measured["fingerprint"], entry.name)) != entry.name:
                raise ValueError(f"it is the same encoder as {same!r}, weights and input: leave one of them out.")
            entries.append(who | measured)
        except BadImageError:
            raise
        except Exception as error:  # libraries and the Hub raise many kinds, and the other encoders go on
            entries.append(who | {"error": f"{type(error).__name__}: {one_line(error)}"})
    if all("error" in entry for entry in entries):
        raise ValueError("no encoder could be measured: " + "; ".join(f"{e['encoder']}: {e['error']}" for e in entries))
    return entries


def _scores(entry: dict) -> list[float]:
    return [parts["score"] for parts in entry["domains"].values()]


def _measured(entry: ZooEntry, given: DomainData, kind: str, cache, reading: dict, seed: int) -> dict:
    start = time.perf_counter()
    embedder = ImageEmbedder(entry.encoder, kind=kind, mixed_precision=True)
    found, rows, cached = features_of(embedder, given, cache, reading)
    domains = given.domains[rows]
    if given.labels is None:
        first, second, also_cached = views_of(embedder, given, rows, cache, reading, seed=seed)
        cached = cached and also_cached
        per_domain = _agreement(first, second, domains)
        likelihoods = held_out_views(first, second, domains, seed=seed)
        more = effective_rank(found, centre=True) | {"views": sum(likelihoods) / len(likelihoods)}
    else:
        labels = given.labels[rows]
        per_domain = leave_one_domain_out(found, labels, domains)
        more = {part: sum(parts[part] for parts in per_domain) / len(per_domain) for part in ("labels", "stability")}
        more |= baselines(found, labels, domains, seed=seed)
    weights = embedder.model.state_dict().values()
    return {
        "score": student_interval([parts["score"] for parts in per_domain]),
        "domains": dict(zip(given.domain_names, per_domain, strict=True)),
        **more,
        "width": embedder.dimension,
        "parameters": sum(parameter.numel() for parameter in embedder.model.parameters()),
        "megabytes": sum(weight.numel() * weight.element_size() for weight in weights) / 1e6,
        "seconds": time.perf_counter() - start,
        "cached": cached,
        "fingerprint": embedder.fingerprint,
        "precision": embedder.precision,
        **encoder_facts(entry, given.data.name, given.class_names),
    }


def baselines(features: Tensor, labels: Tensor, domains: Tensor, *, seed: int) -> dict[str, float]:
    """What others would rank by, of features (N, D), class ids and domain ids (N,): see baselines.py."""
    right = knn_across_domains(features, labels, domains)
    return {
        "knn_top1": sum(right) / len(right),
        "in_domain_top1": accuracy_in_domain(features, labels),
        "log_me": log_me(features, labels),
        "h_score": h_score(features, labels),
        "nce": nce_of_clusters(features, labels, domains, seed=seed),
        "trans_rate": trans_rate(features, labels),
    }


def _agreement(first: Tensor, second: Tensor, domains: Tensor) -> list[dict[str, float]]:
    """Of each domain: percent of first views whose nearest second view (cosine) is of the same picture."""
    found = []
    for domain in domains.unique().tolist():
        inside = domains == domain
        _, nearest = nearest_neighbours(second[inside], first[inside], k=1)
        right = nearest[:, 0] == torch.arange(len(nearest))
        found.append({"samples": len(nearest), "score": 100 * float(right.double().mean())})
    return found
