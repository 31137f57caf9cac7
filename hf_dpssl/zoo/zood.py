"""ZooD (Dong et al. 2022) from end to end: rank a zoo, put the best encoders together, keep the features that tell.

Each domain is left out once, as the target, of which nothing is used but to count what is right in the end. From the
other domains alone:

    single       the encoder of the highest score (ranking.py)
    ensemble     the features of the `top` encoders of the highest scores, side by side
    selection    those of them that `select_features` keeps
    random       as many of them, drawn at random: what selection must beat
    best         the encoder that is best on the target: known afterwards only, the most that choosing one can reach

each with a linear probe trained on the other domains. How well a measure orders encoders is Kendall's tau, weighted
hyperbolically (Vigna 2015; scipy), between it and these accuracies. As small changes of the set-up change which
measure wins (Agostinelli et al. 2022), tau is taken of all classes and of draws of half of them, averaged for each
target; the interval is over targets. Regret is what taking the first one by a measure costs, in percent right.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import weightedtau
from torch import Tensor
from tqdm.auto import tqdm

from ..domains.cached_features import features_of
from ..domains.domain_checks import check_domains
from ..domains.domain_data import DomainData
from ..embedding.embedder import ImageEmbedder
from ..evaluation.feature_checks import check_clouds
from ..evaluation.probes import linear_probe
from ..evaluation.student_interval import student_interval
from .encoder_facts import encoder_facts
from .feature_selection import select_features
from .ranking import leave_one_domain_out
from .zoo_list import ZooEntry
from .zoo_ranking import baselines, for_every_encoder

METHODS = ("single", "ensemble", "selection", "random", "best")


def zood(
    zoo: Sequence[ZooEntry],
    given: DomainData,
    *,
    top: int = 3,
    draws: int = 2,
    features: str = "features",
    cache: str | os.PathLike | None = None,
    batch_size: int = 64,
    on_bad_image: str = "error",
    seed: int = 0,
) -> dict:
    """Measure all that the top of this file names.

    Args:
        zoo: as `read_zoo` returns it.
        given: labelled pictures of three domains or more.
        top: encoders of the ensemble; all where there are fewer.
        draws: of half of the classes, for each target; none where there are fewer than four classes.
        features, cache, batch_size, on_bad_image: as of `rank_zoo`.
        seed: of draws, clusters and probes.

    Returns:
        {"encoders": for each one {"name", "encoder", "width", "seconds", "trained", "fingerprint", "precision" as of
        `rank_zoo`, and what `encoder_facts` says} or "error"; "targets": by name {"samples", "encoders": {name:
        {"accuracy", "score", and the measures}}, and of each method "accuracy" and what it took}; "methods": accuracy
        of each {"mean", "low", "high"} over targets; "not_stated": {method: targets for which no feature was selected}
        of those that lack there; "agreement": {"all", and "trained" where some are not: {measure: {"tau": the same
        three, "regret"}}}; "draws": of half of the classes that were made for each target}.

    Raises:
        ValueError: fewer than three domains, no labels, a class that two domains lack, or numbers out of range.
    """
    if top < 1 or draws < 0:
        raise ValueError(f"top must be at least 1 and draws at least 0, got {top} and {draws}.")
    _check(given)
    reading = {"batch_size": batch_size, "on_bad_image": on_bad_image}
    found: dict[str, Tensor] = {}
    tables: dict[str, list[list[dict]]] = {}
    kept_rows = []

    def measure(entry: ZooEntry) -> dict:
        start = time.perf_counter()
        embedder = ImageEmbedder(entry.encoder, kind=features, mixed_precision=True)
        values, rows, _ = features_of(embedder, given, cache, reading)
        about = {"width": embedder.dimension, "seconds": time.perf_counter() - start, "trained": entry.trained}
        found[entry.name] = values
        kept_rows.append(rows)
        tables[entry.name] = _tables(values, **_ids(given, rows), draws=draws, seed=seed)
        about |= {"fingerprint": embedder.fingerprint, "precision": embedder.precision}
        return about | encoder_facts(entry, given.data.name, given.class_names)

    encoders = for_every_encoder(zoo, measure)
    found = {entry["name"]: found[entry["name"]] for entry in encoders if "error" not in entry}
    trained = [entry.name for entry in zoo if entry.trained and entry.name in found]
    measured = _put_together(found, tables, **_ids(given, kept_rows[0]), trained=trained, top=top, seed=seed)
    return {"encoders": encoders} | measured


def zood_of_features(
    found: dict[str, Tensor],
    labels: Tensor,
    domains: Tensor,
    domain_names: Sequence[str],
    *,
    trained: Sequence[str] | None = None,
    top: int = 3,
    draws: int = 2,
    seed: int = 0,
) -> dict:
    """As `zood`, without "encoders", of features that are there.

    Args:
        found: features (N, D) by name of the encoder, of any D.
        labels, domains: (N,) ids from 0 on; domain_names: by id.
        trained: encoders among which agreement is stated too; None: all.
        top, draws, seed: as of `zood`.
    """
    ids = {"labels": labels, "domains": domains, "domain_names": domain_names}
    tables = {encoder: _tables(values, **ids, draws=draws, seed=seed) for encoder, values in found.items()}
    return _put_together(found, tables, **ids, trained=trained, top=top, seed=seed)


def _put_together(
    found: dict[str, Tensor],
    tables: dict[str, list[list[dict]]],
    labels: Tensor,
    domains: Tensor,
    domain_names: Sequence[str],
    *,
    trained: Sequence[str] | None,
    top: int,
    seed: int,
) -> dict:
    """As `zood_of_features`, from the `_tables` of each encoder."""
    targets: dict[str, dict] = {}
    setups: dict[str, list[dict]] = {}  # of each target: measures and accuracies of all encoders
    for target, name in enumerate(tqdm(domain_names, "domains left out", unit="domain")):
        new = domains == target
        of_target = [tables[encoder][target] for encoder in found]
        setups[name] = [dict(zip(found, rows, strict=True)) for rows in zip(*of_target, strict=True)]
        table = setups[name][0]
        targets[name] = {"samples": int(new.sum()), "encoders": table} | _methods(found, table, labels, new, top, seed)
    lacking = {
        method: [name for name, parts in targets.items() if parts[method]["accuracy"] is None] for method in METHODS
    }
    summary = {
        method: student_interval([parts[method]["accuracy"] for parts in targets.values()])
        for method in METHODS
        if not lacking[method]
    }
    groups = {"all": list(found)}
    if trained and len(trained) < len(found):
        groups["trained"] = list(trained)
    agreement = {group: _agreement(setups, names) for group, names in groups.items() if len(names) >= 3}
    about = {"not_stated": {method: names for method, names in lacking.items() if names}}
    about["draws"] = min(len(tables) for tables in setups.values()) - 1
    return {"targets": targets, "methods": summary, "agreement": agreement} | about


def _check(given: DomainData) -> None:
    if given.labels is None:
        raise ValueError("the zoo is measured by accuracy: pictures without classes have none.")
    if len(given.domain_names) < 3:
        raise ValueError(
            f"three domains or more are needed, got {given.domain_names}: one is the target, and the encoders are "
            "ranked by leaving out each of the others. hf-dpssl rank needs two."
        )
    rows = list(given.rows)
    labels, domains = given.labels[rows], given.domains[rows]
    for target, name in enumerate(given.domain_names):
        others = domains != target
        names = [other for other in given.domain_names if other != name]
        try:
            check_domains(labels[others], _compact(domains[others]), given.class_names, names)
        except ValueError as error:
            raise ValueError(f"with domain {name!r} as the target: {error}") from None


def _compact(ids: Tensor) -> Tensor:
    return torch.unique(ids, return_inverse=True)[1]


def _ids(given: DomainData, rows: Tensor) -> dict:
    return {"labels": given.labels[rows], "domains": given.domains[rows], "domain_names": given.domain_names}


def _tables(
    values: Tensor, labels: Tensor, domains: Tensor, domain_names: Sequence[str], *, draws: int, seed: int
) -> list[list[dict]]:
    """Of each target what one encoder reaches, with all classes and then with each draw of half of them.

    Raises:
        ValueError: features that cannot be measured, such as those that are the same for all pictures of some domains;
            names the target.
    """
    check_clouds(values)
    found = []
    for target, name in enumerate(domain_names):
        new = domains == target
        setups = [torch.ones_like(new), *_draws(labels, domains, draws, [seed, target])]
        found.append([])
        for number, at in enumerate(setups):
            try:
                found[-1].append(_row(values[at], _compact(labels[at]), domains[at], new[at], seed))
            except ValueError as error:
                part = f" and {len(labels[at].unique())} classes" if number else ""
                raise ValueError(f"with domain {name!r} as the target{part}: {error}") from error
    return found


def _row(values: Tensor, labels: Tensor, domains: Tensor, new: Tensor, seed: int) -> dict[str, float]:
    """Of one encoder: its accuracy where `new`, and its score and the baselines from all others."""
    old = ~new
    others = _compact(domains[old])
    scores = leave_one_domain_out(values[old], labels[old], others)
    mean = {part: float(np.mean([parts[part] for parts in scores])) for part in ("score", "labels", "stability")}
    row = {"accuracy": _accuracy(values, labels, new, seed)} | mean | {"width": values.shape[1]}
    return row | baselines(values[old], labels[old], others, seed=seed)


def _accuracy(values: Tensor, labels: Tensor, new: Tensor, seed: int) -> float:
    """Percent of the target that a linear probe of the other domains classifies right."""
    return linear_probe(values[~new], labels[~new], values[new], labels[new], seed=seed)["linear_top1"]


def _methods(found: dict[str, Tensor], table: dict, labels: Tensor, new: Tensor, top: int, seed: int) -> dict:
    order = sorted(table, key=lambda name: -table[name]["score"])
    chosen = order[:top]
    together = torch.cat([found[name] for name in chosen], 1)
    best = max(table, key=lambda name: table[name]["accuracy"])
    selected = select_features(together[~new], labels[~new])
    kept = int(selected.kept.sum())
    of = dict(zip(chosen, selected.kept.split([found[name].shape[1] for name in chosen]), strict=True))
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(together.shape[1])[:kept])
    counts = {name: int(part.sum()) for name, part in of.items()}
    return {
        "single": {"encoder": order[0], "accuracy": table[order[0]]["accuracy"]},
        "ensemble": {"encoders": chosen, "accuracy": _accuracy(together, labels, new, seed)},
        "selection": {
            "features": counts,
            "of": together.shape[1],
            "accuracy": _accuracy(together[:, selected.kept], labels, new, seed) if kept else None,
        },
        "random": {"features": kept, "accuracy": _accuracy(together[:, drawn], labels, new, seed) if kept else None},
        "best": {"encoder": best, "accuracy": table[best]["accuracy"]},
    }


def _draws(labels: Tensor, domains: Tensor, draws: int, seed: list[int]) -> list[Tensor]:
    """Rows of half of the classes that all domains have, drawn anew each time; none of fewer than four."""
    everywhere = [set(labels[domains == domain].tolist()) for domain in domains.unique().tolist()]
    classes = np.array(sorted(set.intersection(*everywhere)))
    if len(classes) < 4:
        return []
    random = np.random.default_rng(seed)
    chosen = [torch.from_numpy(random.permutation(classes)[: (len(classes) + 1) // 2]) for _ in range(draws)]
    return [torch.isin(labels, part) for part in chosen]


def _agreement(setups: dict[str, list[dict]], names: list[str]) -> dict[str, dict]:
    """Of each measure its tau and regret over set-ups of these encoders; a measure that is constant orders nothing."""
    measures = [key for key in setups[next(iter(setups))][0][names[0]] if key != "accuracy"]
    found = {}
    for measure in measures:
        taus, regrets = [], []
        for tables in setups.values():
            pairs = [np.array([(t[name][measure], t[name]["accuracy"]) for name in names]).T for t in tables]
            taus.append(float(np.mean([_tau(values, truth) for values, truth in pairs])))
            regrets.append(float(np.mean([truth.max() - truth[values.argmax()] for values, truth in pairs])))
        found[measure] = {"tau": student_interval(taus), "regret": float(np.mean(regrets))}
    return found


def _tau(values: np.ndarray, truth: np.ndarray) -> float:
    tau = weightedtau(values, truth).statistic
    return 0.0 if np.isnan(tau) else float(tau)
