"""The front matter of a model card, its figures and its estimates, from what `facts_of` read.

Front matter: https://github.com/huggingface/hub-docs/blob/main/modelcard.md. Energy is an estimate by nameplate: the
thermal design power that the makers state for accelerators, and _WATTS_PER_THREAD for processors, whose design power
lies between 2 and 6 W per thread in servers of the last ten years. Nothing is metered:
codecarbon would have to run while one trains. Emissions follow from the estimate by the
world's average of 2023, 480 g CO2e per kWh (Ember, Global Electricity Review 2024).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from ..autoencoder.choices import ARMS
from .licences import licence_entries

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LIBRARIES = {
    "encoder": "timm",
    "autoencoder": "transformers",
    "dit": "hf_dpssl",
    "drift": "hf_dpssl",
    "token": "hf_dpssl",
}
_AGAINST_TRAINING = ("dit", "drift")
# Ancestors by their part in the making: whose weights went on learning, and whose are used as they are. Others, such as
# a perceptual loss, are in no weight of the model.
_CONTINUED = ("initial encoder", "initial encoder and head", "encoder and codebook")
_BUILT_ON = ("autoencoder", "encoder of the latents")
_TASKS = {"encoder": "image-feature-extraction", "autoencoder": "image-to-image"}
_GENERATION = (
    "unconditional-image-generation"  # the Hub's task of generators that read no text, with classes or without
)
_TAGS = {
    "encoder": ["image-feature-extraction", "timm", "transformers", "self-supervised", "contrastive-learning"],
    "autoencoder": ["vq-vae", "autoencoder"],
    "dit": ["image-generation", "dit", "latent-diffusion"],
    "drift": ["image-generation", "one-step-generation", "dit"],
    "token": ["image-generation", "autoregressive", "vq"],
    "gan": ["gan", "image-generation"],
}
# What a card of a kind always lists, "not measured" where it was not.
_EXPECTED = {
    "encoder": ["knn_top1", "knn_top1_embeddings"],
    "autoencoder": ["psnr", "ssim"],
    "dit": ["fid", "class_consistency"],
    "drift": ["fid", "class_consistency"],
    "token": ["nats_per_image", "fid"],
    "gan": ["fid", "copies"],
}
_WATTS = {  # the first fragment that the accelerator's name contains
    "H100 PCIe": 350, "H100": 700, "H200": 700, "B200": 1000, "A100": 400, "V100": 300, "L40S": 350, "L40": 300,
    "L4": 72, "T4": 70, "A10": 150, "4090": 450, "3090": 350,
}  # fmt: skip
_WATTS_PER_THREAD = 5
_GRAMS_PER_KWH = 480


class Figure(NamedTuple):
    """A line of the table of results: key in results.json, type of the Hub, words for readers, value (None: none)."""

    name: str
    type: str
    label: str
    value: float | None


_ACCURACY = "accuracy"
_ENDS = {
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "infinity": "extrapolated to infinitely many images",
}
_LABELS = {  # pattern of the key: type, label
    r"knn_top1": (_ACCURACY, "kNN accuracy of {of}, %"),
    r"linear_top1": (_ACCURACY, "accuracy of a linear probe on {of}, %"),
    r"uniformity": ("uniformity", "uniformity of {of} on the sphere, lower is more even"),
    r"uniformity_raw": ("uniformity", "uniformity of {of} as they are, lower is more even"),
    r"alignment": ("alignment", "alignment of two views' {of} on the sphere, 0 is best"),
    r"alignment_raw": ("alignment", "alignment of two views' {of} as they are, 0 is best"),
    r"effective_rank": ("effective_rank", "effective rank of {of}"),
    r"psnr": ("psnr", "reconstruction PSNR, dB"),
    r"ssim": ("ssim", "reconstruction SSIM"),
    r"code_usage": ("code_usage", "codes in use, %"),
    r"code_perplexity": ("perplexity", "perplexity of the codes"),
    r"dead_codes": ("dead_codes", "codes never used"),
    r"nats_per_image": ("nll", "nats per held-out image"),
    r"nats_per_image_train": ("nll", "nats per training image"),
    r"nats_per_image_uniform": ("nll", "nats per image of codes drawn at random"),
    r"inception_score(_(?!std)(?P<by>.+))?": ("inception_score", "inception score by {judge}, higher is better"),
    r"copies": ("copies", "images suspiciously close to a training image, %"),
    r"copy_distance": ("copy_distance", "distance below which an image counts as a copy"),
    r"class_consistency": ("class_consistency", "images that a classifier takes for their class, %"),
    r"diversity": ("diversity", "diversity within classes, of that of real images"),
    r"(?P<re>r?)fid(_(?P<by>.+))?_(?P<end>low|high|infinity)": ("fid_{end}", "{re}Fréchet distance{by}, {end}"),
    r"(?P<ceiling>ceiling_)?(?P<re>r?)fid(_(?P<by>.+))?": ("fid", "{ceiling}{re}Fréchet distance{by}, lower is better"),
    r"(?P<ceiling>ceiling_)?(?P<re>r?)kid(_(?!std)(?P<by>.+))?": (
        "kid",
        "{ceiling}{re}kernel distance{by}, lower is better",
    ),
    r"(?P<ceiling>ceiling_)?(?P<re>r?)(?P<what>precision|recall|density|coverage)(_(?P<by>.+))?": (
        "{what}",
        "{ceiling}{re}{what}{by}",
    ),
}


def figures(kind: str, metrics: dict, elsewhere: Iterable[str] = ()) -> list[Figure]:
    """Lines of the table of results: what is expected of the kind, then all else that was measured.

    What is among the keys `elsewhere` (of later evaluations) does not count as not measured.
    """
    expected = _EXPECTED.get(kind, [])

    def stands_for(key: str, name: str) -> bool:  # a Frechet distance does in whatever features it was measured
        return key == name or (name == "fid" and key.startswith("fid_"))

    lacking = [name for name in expected if not any(stands_for(key, name) for key in [*metrics, *elsewhere])]
    order = sorted(
        metrics, key=lambda key: next((i for i, n in enumerate(expected) if stands_for(key, n)), len(expected))
    )
    found = [Figure(name, *_described(name), _finite(metrics[name])) for name in order]
    return found + [Figure(name, *_described(name), None) for name in lacking]


def _finite(value) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _described(name: str) -> tuple[str, str]:
    of = "embeddings" if name.endswith("_embeddings") else "features"
    if name.endswith("_guided"):
        metric_type, label = _described(name.removesuffix("_guided"))
        return metric_type, f"{label}, with guidance"
    key = name.removesuffix("_embeddings")
    for pattern, (metric_type, label) in _LABELS.items():
        if match := re.fullmatch(pattern, key):
            groups = match.groupdict()
            words = {"of": of, "by": f" in features of {groups['by']}" if groups.get("by") else ""}
            words["what"], words["judge"] = groups.get("what"), groups.get("by") or "Inception"
            words["ceiling"] = "real training images: " if groups.get("ceiling") else ""
            words["re"] = "reconstruction " if groups.get("re") else ""
            end = groups.get("end")
            return metric_type.format(**words, end=end), label.format(**words, end=_ENDS.get(end))
    return name, name.replace("_", " ")


def eval_results(facts: dict, results: dict) -> list[EvalResult]:
    """The measured figures as huggingface_hub's objects, for the front matter's model-index.

    First those of the training run, then those of `hf-dpssl evaluate`.
    """
    dataset, kind = facts["dataset"] or "unknown", facts["kind"]
    slug = re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-")
    counts = {"samples": facts["samples"]} if facts["samples"] else {}
    knn = {f"knn_{key}": value for key, value in (results.get("knn") or {}).items() if value is not None}
    found = []
    # A generator is compared with training images while it trains, which an older results.json does not say.
    reference = results.get("reference") or ("train" if kind in _AGAINST_TRAINING else "evaluation")
    for figure in figures(kind, facts["metrics"]):
        if figure.value is None or figure.name.startswith("ceiling_") or figure.name.endswith("_uniform"):
            continue  # not measured, or of something else than this model
        classifies = kind == "encoder" and figure.type == _ACCURACY
        found.append(
            EvalResult(
                task_type="image-classification" if classifies else _TASKS.get(kind, _GENERATION),
                dataset_type=(facts["hub_datasets"] or [hub_dataset(dataset) or slug])[0],
                dataset_name=dataset,
                dataset_split=_split(facts["splits"], "train" if figure.name.endswith("_train") else reference),
                metric_type=figure.type,
                metric_value=_rounded(figure.value),
                metric_name=figure.label,
                metric_args=counts | (knn if "knn" in figure.name else {}) or None,
            )
        )
    return found + [result for entry in results.get("evaluations") or [] for result in evaluation_results(entry)]


def evaluation_results(entry: dict) -> list[EvalResult]:
    """The figures of an entry of results.json's "evaluations", with what they depend on as their arguments."""
    kind, name, fingerprint = entry["kind"], entry["dataset"], entry["fingerprint"]
    slug = re.sub(r"[^\w.-]+", "-", name.lower()).strip("-")
    arguments = {"seed": entry["seed"], "samples": entry["samples"], "fingerprint": fingerprint["sha256"][:16]}
    judges = {part: fingerprint[part]["name"] for part in ("extractor", "classifier") if part in fingerprint}
    options = entry["options"]
    if options.get("evaluation_images") is not None:
        arguments["evaluation_images"] = options["evaluation_images"]
    knn = {name: options[name] for name in options if name.startswith("knn_") or name == "features"}
    classification = "image-classification" if kind == "encoder" else _GENERATION
    return [
        EvalResult(
            task_type=classification if f.type == _ACCURACY else _TASKS.get(kind, _GENERATION),
            dataset_type=hub_dataset(name) or slug,
            dataset_name=name,
            dataset_split=_split(entry.get("splits") or {}, options.get("reference", "evaluation")),
            metric_type=f.type,
            metric_value=_rounded(f.value),
            metric_name=f.label,
            metric_args=arguments | judges | (knn if f.name.startswith("knn") else {}),
        )
        for f in figures("", entry["metrics"])
        if f.value is not None
    ]


def _split(names: dict, part: str) -> str:
    """Name of a split in its data set, where it is known."""
    return names.get(part) or part


def _rounded(value: float) -> float:
    """To the four digits that the table of the card shows."""
    return float(f"{value:.4g}")


def is_decoupled(results: dict) -> bool:
    """Whether an autoencoder's encoder learned before its decoder (DAE), by its results."""
    return ARMS.get(results.get("arm"), (False,))[0]


def front_matter(
    facts: dict, results: dict, title: str, *, licence: str | None = None, license_link: str | None = None
) -> ModelCardData:
    """Metadata of the card; see the top of this file. licence, license_link: see `licence_entries`."""
    kind, licences = facts["kind"], licences_of(facts)
    decoupled = ["decoupled-autoencoder"] if kind == "autoencoder" and is_decoupled(results) else []
    datasets = {*facts["hub_datasets"], *(hub_dataset(name) for whole in licences for name in whole.split("+"))}
    found, (bases, relation), emitted = eval_results(facts, results), _bases(facts["lineage"]), emissions(facts)
    return ModelCardData(
        **licence_entries(licence, license_link, licences),
        library_name=_LIBRARIES.get(kind, "transformers"),
        pipeline_tag={"autoencoder": None}.get(kind, _TASKS.get(kind, _GENERATION)),
        tags=[*_TAGS.get(kind, []), *decoupled, "hf_dpssl"],
        datasets=sorted(datasets - {None}) or None,
        base_model=bases or None,
        **({"base_model_relation": relation} if bases else {}),
        **({"co2_eq_emissions": emitted} if emitted else {}),
        **({"model_name": title, "eval_results": found} if found else {}),
    )


def _bases(lineage: list[dict]) -> tuple[list[str], str]:
    """Hub ids of the models that this one was made from, and how: "finetune", or "adapter" of frozen ones."""
    found = {
        part["part"]: part["name"]
        for part in lineage
        if part["part"] in (*_CONTINUED, *_BUILT_ON) and HUB_ID.fullmatch(part["name"])
    }
    return list(found.values()), "finetune" if set(found) & set(_CONTINUED) else "adapter"


def licences_of(facts: dict) -> dict[str, str]:
    """Licence of each data set that the checkpoint or an ancestor was trained on, by name."""

    def visit(part: dict) -> dict[str, str]:
        own = {part["dataset"]: part.get("licence_of_data") or "unknown"} if part.get("dataset") else {}
        for other in part.get("lineage") or []:
            own = visit(other) | own
        return own

    name = facts["dataset"] or "unnamed data"
    return visit({"lineage": facts["lineage"]}) | {name: facts["licence_of_data"] or "unknown"}


def hub_dataset(name: str) -> str | None:
    """Hub id of a data set of the table in data.py; None for any other name."""
    from ..data.image_data import TABLE  # imports datasets

    entry = TABLE.get(name.strip().partition("@")[0])
    return None if entry is None else entry.hub_id


def energy(facts: dict) -> dict | None:
    """{"kwh", "watts" (of all processes), "assumption"} of the training; None where time or power is not known."""
    training, machine = facts["training"] or {}, facts["environment"] or {}
    if training.get("seconds") is None or not machine:
        return None
    processes = training["processes"]
    if training["device"] == "cpu":
        watts = _WATTS_PER_THREAD * (machine.get("threads") or 1)
        assumption = f"{_WATTS_PER_THREAD} W per processor thread"
    else:
        watts = next((watts for part, watts in _WATTS.items() if part in str(machine.get("accelerator"))), None)
        if watts is None:
            return None
        assumption = f"{watts} W, the nameplate power of a {machine['accelerator']}, for each process"
    kwh = watts * processes * training["seconds"] / 3.6e6
    return {"kwh": kwh, "watts": watts * processes, "assumption": assumption}


def emissions(facts: dict) -> dict | None:
    """Entry `co2_eq_emissions` of the front matter, in grams; None where the energy is not known."""
    used = energy(facts)
    if used is None:
        return None
    machine = facts["environment"]
    on_cpu = (facts["training"] or {}).get("device") == "cpu"
    return {
        "emissions": _rounded(used["kwh"] * _GRAMS_PER_KWH),
        "source": f"estimate: {used['assumption']}; {_GRAMS_PER_KWH} g CO2e per kWh, the world's average of 2023",
        "training_type": "pre-training",
        "hardware_used": str((machine.get("processor") if on_cpu else machine.get("accelerator")) or "unknown"),
    }
