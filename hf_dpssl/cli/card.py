"""The subcommands `hf-dpssl card` and `hf-dpssl info`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

from ..hub.card_data import figures, licences_of
from ..hub.checkpoint_facts import CONFIG_FILES, PARTS, facts_of
from ..hub.model_card import write_card


def card_command(argv: list[str]) -> int:
    """`hf-dpssl card`: returns the exit status; errors of `write_card`."""
    parser = argparse.ArgumentParser(
        prog="hf-dpssl card",
        description="Write the model card of a finished checkpoint, or its generated part anew: what you wrote around "
        "that part, and what you changed in the front matter, is kept. README.md removed, all is written afresh.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="as a training script writes it: encoder/, autoencoder/, dit/, ar/, gan/")
    parser.add_argument("--title", help="first heading (default: method and data set)")
    parser.add_argument("--dataset_license", help="licence of the training images, where the files do not say it")
    parser.add_argument("--output", help="file to write (default: README.md in the folder)")
    args = parser.parse_args(argv)
    folder, output = _local(args.folder), args.output and Path(args.output)
    if output and output.is_dir():
        raise ValueError(f"--output {output} is a folder: give a file.")
    written = write_card(folder, title=args.title, license_of_data=args.dataset_license, output=output)
    print(f"{written}: written")
    return 0


def info_command(argv: list[str]) -> int:
    """`hf-dpssl info`: returns the exit status; errors of `describe_checkpoint`."""
    parser = argparse.ArgumentParser(
        prog="hf-dpssl info",
        description="What a checkpoint is: kind, sizes, data, results, lineage. Read are its config files and the "
        "headers of its weights; no weights are loaded or downloaded.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="folder, or Hub id: ORG/NAME or ORG/NAME@REVISION")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)
    facts = describe_checkpoint(args.checkpoint)
    print(json.dumps(facts, indent=2) if args.json else _table(facts))
    return 0


def describe_checkpoint(checkpoint: str) -> dict:
    """`facts_of` a folder or Hub id, with "licences" and, on the Hub, "revision" (the commit).

    Raises:
        FileNotFoundError: no checkpoint. OSError, ValueError: a Hub that cannot be reached, a damaged file.
    """
    if Path(checkpoint).exists() or checkpoint.partition("@")[0].count("/") != 1 or checkpoint[0] in "./~":
        facts = facts_of(_local(checkpoint))
    else:
        facts = _on_the_hub(checkpoint)
    return facts | {"licences": licences_of(facts) if facts["dataset"] else {}}


def _local(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{name} {what}: give the folder of a finished checkpoint.")
    return folder


def _on_the_hub(checkpoint: str) -> dict:
    repo_id, _, revision = checkpoint.partition("@")
    found: list[str] = []
    try:
        for name in CONFIG_FILES:
            try:
                path = hf_hub_download(repo_id, name, revision=revision or None)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) and not found and name == "config.json":
                    raise  # no network and nothing in the cache
                continue
            found.append(name)
            folder = Path(path).parents[name.count("/")]
            revision = folder.name
    except (HTTPError, HFValidationError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status in (401, 403, 404)  # not to be tried again
        message = f"cannot read {checkpoint!r} from the Hub: {' '.join(str(error).split())}"
        raise OSError(message) from None if refused else error
    if not {"config.json", "model_index.json"} & set(found):
        raise FileNotFoundError(f"{repo_id} is no checkpoint: it has no config.json or model_index.json.")
    facts = facts_of(folder) | {"revision": revision}
    facts["parameters"] = facts["parameters"] or _remote_parameters(repo_id, revision, found)
    facts["fingerprint"] = facts["fingerprint"] or _remote_sha256(repo_id, revision)
    return facts


def _remote_parameters(repo_id: str, revision: str, found: list[str]) -> dict[str, int]:
    """As `count_parameters`, from the headers of the files; without those that cannot be had."""
    counts = {}
    for part in PARTS:
        if part and f"{part}/config.json" not in found:
            continue
        for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
            try:
                path = f"{part}/{name}".lstrip("/")
                metadata = HfApi().parse_safetensors_file_metadata(repo_id, path, revision=revision)
            except (EntryNotFoundError, HTTPError, OSError):
                continue
            counts[part or "model"] = sum(metadata.parameter_count.values())
            break
    return counts


def _remote_sha256(repo_id: str, revision: str) -> str | None:
    try:
        etag = get_hf_file_metadata(hf_hub_url(repo_id, "model.safetensors", revision=revision)).etag or ""
    except (EntryNotFoundError, HTTPError, OSError):
        return None
    return etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None


def _table(facts: dict) -> str:
    latents, training = facts["latents"] or {}, facts["training"] or {}
    side = latents.get("side")
    shape = f"{latents['channels']} x {side} x {side}" if side else latents.get("dimension")
    seconds = training.get("seconds")
    versions = (facts["environment"] or {}).get("libraries", {})
    codes = f", {latents['codes']} codes" if latents.get("codes") else ""
    size = ", ".join(f"{name} {value}" for name, value in facts["size"].items())
    image = f"{facts['num_channels']} x {facts['image_size']} x {facts['image_size']}" if facts["image_size"] else None
    rows = {
        "kind": facts["kind"],
        "class": facts["class"],
        "method": facts["method"],
        "revision": facts.get("revision"),
        "size": size,
        "parameters": ", ".join(f"{part} {count:,}" for part, count in facts["parameters"].items()),
        "images": image,
        "latents": f"{shape} ({latents.get('quantizer') or latents.get('origin')}{codes})" if shape else None,
        "classes": f"{len(facts['classes'])}: {', '.join(facts['classes'][:10])}" if facts["classes"] else None,
        "fingerprint": facts["fingerprint"],
        "trained on": facts["dataset"],
        "licences": "; ".join(f"{name}: {licence}" for name, licence in facts["licences"].items()),
        "training time": None if seconds is None else f"{seconds:.1f} s, {training['processes']} process(es)",
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("hf_dpssl", "torch") if name in versions),
    }
    may_lack = ("method", "revision", "latents", "classes")  # not every kind has them
    kept = {name: value or "not known" for name, value in rows.items() if value or name not in may_lack}
    lines = [f"{name:<15}{value}" for name, value in kept.items()]
    lines += [f"{'ancestor':<15}{part['part']}: {part['name']}" for part in facts["lineage"]]
    later = [name for entry in facts["evaluations"] for name in entry["metrics"]]
    for figure in figures(facts["kind"], facts["metrics"], later):
        value = "not measured" if figure.value is None else f"{figure.value:.4g}"
        lines.append(f"{'result':<15}{figure.label}: {value}")
    for entry in facts["evaluations"]:
        found = [f"{f.label} {f.value:.4g}" for f in figures("", entry["metrics"]) if f.value is not None]
        lines.append(f"{'evaluated on':<15}{entry['dataset']}, seed {entry['seed']}: {'; '.join(found)}")
    return "\n".join(lines)
