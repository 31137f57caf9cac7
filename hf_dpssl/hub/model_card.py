"""Model cards rendered from what a run wrote: configs, recipe.yaml and results.json; nothing is typed by hand.

A value that was not measured says so. The rendered part stands between marks; what a person writes around it, and what
he changes in the front matter, is kept by the next rendering (`merge_card`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from ..runs.atomic_files import atomic_file
from ..runs.lineage import read_json, well_formed
from ..runs.redaction import redacted, without_folders
from ..runs.shipped_folders import shipped_folder
from .card_data import HUB_ID, energy, eval_results, figures, front_matter, is_decoupled, licences_of
from .card_merge import marked_card, merge_card, with_entries
from .checkpoint_facts import KINDS, facts_of
from .eval_files import eval_files_of_folder
from .licences import KEYS as LICENCE_KEYS
from .licences import is_restricted, licence_entries

_OF_THE_MACHINE = (  # what a recipe says of the machine and not of the model
    "output_dir", "overwrite", "num_workers", "preload_gb", "log_with", "logging_steps", "checkpointing_steps",
    "checkpoints_total_limit", "resume_from_checkpoint", "num_processes",
)  # fmt: skip
_PICTURE = re.compile(r"(curves|samples|reconstructions|map)(-[\w-]+)?\.png")  # as runs name them
_CAPTIONS = {
    ("autoencoder", "reconstructions.png"): "Held-out images above, their reconstructions below.",
    ("dit", "samples.png"): "Samples with guidance {guidance_scale}.",
    ("dit", "samples-unguided.png"): "Samples without guidance.",
    ("drift", "samples.png"): "Samples, one pass each.",
    ("token", "samples.png"): "Samples without guidance.",
    ("token", "samples-guided.png"): "Samples with guidance {guidance_scale}.",
    ("gan", "samples.png"): "Samples.",
}
_SOFTWARE = ("hf_dpssl", "torch", "transformers", "diffusers", "timm")


def write_card(
    folder: Path,
    *,
    title: str | None = None,
    licence: str | None = None,
    license_link: str | None = None,
    license_of_data: str | None = None,
    output: Path | None = None,
) -> Path:
    """Write README.md into a finished checkpoint folder, or its generated part anew into the README.md that is there.

    Args:
        folder: holds a checkpoint with results.json and recipe.yaml.
        title: first heading; default: method and data set.
        licence, license_link: of the model, see `licence_entries`; by default what the card says stays.
        license_of_data: of the training images, where the files do not say it or say it wrongly; a restriction is
            repeated in the card.
        output: file to write instead; without it, figures on data sets of the Hub are written into .eval_results/, too,
            beside what stands there of other measurements.

    Returns:
        The file.

    Raises:
        FileNotFoundError: no checkpoint, or one that no training has finished.
        ValueError: a damaged file, an entry that lacks, a kind without card, or a README.md with damaged marks (see
            `merge_card`), which is left as it is.
    """
    in_folder, output = output is None, Path(output or folder / "README.md")
    options = {"licence": licence, "license_link": license_link, "license_of_data": license_of_data}
    generated = render_card(folder, title=title, **options)
    existing = ""
    if output.is_file():
        with open(output, encoding="utf-8", newline="") as file:  # with the line ends that it has
            existing = file.read()
    merged = merge_card(existing, generated)
    if licence is not None:
        merged = with_entries(merged, licence_entries(licence, license_link, {}), LICENCE_KEYS)
    files = {}
    if in_folder:
        found = eval_results(facts_of(folder), read_json(folder / "results.json"))
        files = eval_files_of_folder(found, folder)
    with atomic_file(output, "wb") as file:
        file.write(merged.encode("utf-8"))
    for name, text in files.items():
        with atomic_file(folder / name) as file:
            file.write(text)
    return output


def render_card(
    folder: Path,
    *,
    title: str | None = None,
    licence: str | None = None,
    license_link: str | None = None,
    license_of_data: str | None = None,
) -> str:
    """The generated card of a checkpoint folder as text; arguments and errors of `write_card`."""
    with well_formed(folder):
        return _render(folder, title, licence, license_link, license_of_data)


def _render(
    folder: Path, title: str | None, licence: str | None, license_link: str | None, license_of_data: str | None
) -> str:
    facts = facts_of(folder)
    kind = facts["kind"]
    if kind not in KINDS:
        raise ValueError(
            f"{folder} holds a {facts['class'] or 'model'}, for which there is no card: known are {KINDS}."
        )
    results = read_json(folder / "results.json")
    if results is None:
        raise FileNotFoundError(
            f"{folder} has no results.json, which the training scripts write: without it nothing is known to put into "
            "a card. Give the folder of a finished run."
        )
    recipe = _read_recipe(folder / "recipe.yaml")
    if license_of_data is not None:
        facts["licence_of_data"] = license_of_data
    title = title or _title(facts, results)
    licences = licences_of(facts)
    later = [name for entry in results.get("evaluations") or [] for name in entry["metrics"]]
    context = {
        "title": title,
        "facts": facts,
        "results": results,
        "recipe": recipe,
        "figures": figures(kind, facts["metrics"], later),
        "figures_of": partial(figures, ""),
        "decoupled": kind == "autoencoder" and is_decoupled(results),
        "licences": licences,
        "restricted": any(map(is_restricted, licences.values())),
        "pictures": _pictures(folder, kind, recipe),
        "own_layout": (read_json(folder / "config.json") or {}).get("model_type") == "dpssl_contrastive",
        "recipe_text": _recipe_text(recipe),
        "lineage": "\n".join(_lineage(facts["lineage"])),
    } | _circumstances(facts)
    try:
        text = _templates().get_template(f"{kind}.md").render(context)
    except UndefinedError as error:
        raise ValueError(
            f"results.json and recipe.yaml in {folder} lack what a card of a {kind} needs: {error}."
        ) from None
    metadata = front_matter(facts, results, title, licence=licence, license_link=license_link).to_dict()
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))
    return marked_card(metadata, text, given=LICENCE_KEYS if licence is not None else ())


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(shipped_folder("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"plain": _plain, "cell": _plain, "code": _code, "fenced": _fenced, "python": _python}
    environment.globals["number"] = _number
    return environment


def _plain(value) -> str:
    """Text as words of Markdown, whatever characters it holds: no markup, HTML, cell of a table or line of its own."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|~$#!])", r"\\\1", text)


def _code(value) -> str:
    """Text as code within a line, also of a table: `...`."""
    return "`" + " ".join(str(value).replace("`", "'").split()).replace("|", "\\|") + "`"


def _fenced(text: str, language: str) -> str:
    """Text as a block of code, between more backticks than it holds itself."""
    fence = "`" * (max(3, *(len(run) + 1 for run in re.findall("`+", text))) if "`" in text else 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _python(value) -> str:
    """A plain value as Python within a block of code."""
    return json.dumps(value).replace("`", "\\u0060")


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _read_recipe(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no recipe.yaml: give the folder of a finished run.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): it is damaged.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must be flags with values, not a {type(recipe).__name__}: it is damaged.")
    return recipe


def _title(facts: dict, results: dict) -> str:
    dataset = facts["dataset"] or "unnamed data"
    if facts["kind"] == "encoder":
        return f"{facts['method'] or 'Encoder'} on {dataset}"
    what = {
        "autoencoder": f"Autoencoder ({results.get('quantizer')}, {results.get('arm')})",
        "dit": "Latent DiT",
        "drift": "One-step generator",
        "token": "Token model",
        "gan": f"GAN ({results.get('latent')})",
    }
    return f"{what[facts['kind']]} of {dataset}"


def _pictures(folder: Path, kind: str, recipe: dict) -> list[dict]:
    """Sample pictures first, curves last."""
    names = sorted(path.name for path in folder.glob("*.png") if _PICTURE.fullmatch(path.name))
    ordered = [name for name in names if name != "curves.png"] + [name for name in names if name == "curves.png"]
    captions = {name: caption.format(**recipe) for (of, name), caption in _CAPTIONS.items() if of == kind}
    captions["curves.png"] = "Training curves."
    return [{"file": name, "caption": captions.get(name, f"{Path(name).stem}.")} for name in ordered]


def _recipe_text(recipe: dict) -> str:
    kept = {name: value for name, value in recipe.items() if name not in _OF_THE_MACHINE and value not in (None, [])}
    return yaml.safe_dump(redacted(kept), sort_keys=False, allow_unicode=True, width=1000).strip()


def _lineage(parts: list[dict], indent: str = "") -> Iterable[str]:
    for part in parts:
        name = without_folders(part["name"])
        is_id = HUB_ID.fullmatch(name)
        where = f"[{name}](https://huggingface.co/{name})" if is_id else f"local folder {_code(name)}"
        about = [f"commit `{part['revision'][:12]}`"] if part.get("revision") else []
        about += [f"fingerprint `{part['fingerprint'][:16]}`"] if part.get("fingerprint") else []
        if part.get("dataset"):
            licence = _plain(part.get("licence_of_data") or "licence unknown")
            about.append(f"trained on {_code(without_folders(part['dataset']))} ({licence})")
        yield f"{indent}- {_plain(part['part'])}: {', '.join([where, *about])}"
        yield from _lineage(part.get("lineage") or [], indent + "  ")


def _circumstances(facts: dict) -> dict:
    """{"hardware", "software", "duration", "energy", "parameters"} in words, None where not known."""
    training, machine = facts["training"] or {}, facts["environment"] or {}
    libraries, seconds, estimate = machine.get("libraries", {}), training.get("seconds"), energy(facts)
    hardware = None
    if machine:
        on_cpu = training.get("device", "cpu") == "cpu"
        hardware = (
            f"{machine.get('processor')}, {machine.get('threads')} thread(s)" if on_cpu else machine["accelerator"]
        )
        processes = training.get("processes", 1)
        hardware = f"{processes} x ({hardware})" if processes > 1 else hardware
    versions = [f"{name} {libraries[name]}" for name in _SOFTWARE if name in libraries]
    if estimate:
        assumed = f"assumed are {estimate['assumption']}; nothing was metered"
        amount = f"{estimate['kwh']:.2g} kWh" if estimate["kwh"] >= 0.1 else f"{1000 * estimate['kwh']:.2g} Wh"
        estimate = f"about {amount}, an estimate: {estimate['watts']:g} W for that time ({assumed})"
    counts = [f"{part} {count:,}" for part, count in facts["parameters"].items()]
    return {
        "hardware": hardware,
        "software": ", ".join(versions) or None,
        "duration": None if seconds is None else _duration(seconds),
        "energy": estimate,
        "parameters": "; ".join(counts),
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
