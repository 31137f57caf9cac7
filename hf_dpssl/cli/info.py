"""The subcommand `hf-dpssl info`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..runs.console import printable
from .parsing import command_parser, local_folder, parse_command


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "info",
        "What a checkpoint is: kind, sizes, data, results, lineage. Read are its config files and the "
        "headers of its weights; no weights are loaded or downloaded.",
    )
    parser.add_argument("checkpoint", help="folder, or Hub id: ORG/NAME or ORG/NAME@REVISION")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl info`: returns the exit status; errors of `describe_checkpoint`."""
    args = parse_command(parser(), argv)
    from ..runs.lineage import well_formed

    with well_formed(args.checkpoint):
        facts = describe_checkpoint(args.checkpoint)
        text = json.dumps(facts, indent=2) if args.json else printable(_table(facts))
    print(text)
    return 0


def describe_checkpoint(checkpoint: str) -> dict:
    """`facts_of` a folder or Hub id, with "licences" and, on the Hub, "revision" (the commit).

    Raises:
        FileNotFoundError: no checkpoint. OSError, ValueError: a Hub that cannot be reached, a damaged file.
    """
    from ..hub.card_data import licences_of
    from ..hub.checkpoint_facts import facts_of
    from ..hub.remote_facts import remote_facts

    if Path(checkpoint).exists() or checkpoint.partition("@")[0].count("/") != 1 or checkpoint[0] in "./~":
        facts = facts_of(local_folder(checkpoint))
    else:
        facts = remote_facts(checkpoint)
    return facts | {"licences": licences_of(facts) if facts["dataset"] else {}}


def _table(facts: dict) -> str:
    from ..hub.card_data import figures

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
