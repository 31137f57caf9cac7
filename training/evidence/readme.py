"""Write the measured tables of README.md from JSON files, so that no figure in it is typed.

    python training/evidence/readme.py --demo outputs/demo   # take over a demo's report and pictures, then write
    python training/evidence/readme.py                       # write from the files that are there

Each table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

EVIDENCE = Path(__file__).parent
REPOSITORY = EVIDENCE.parent.parent
DEMO = EVIDENCE / "results" / "demo.json"
SPEED = REPOSITORY / "tests" / "benchmarks" / "results" / "losses_and_quantizer.json"
PICTURES = ("samples.png", "map.png")


def demo_table(report: dict) -> str:
    """Targets of the demo, reconstruction quality and seconds, in Markdown."""
    metrics, samples = report["metrics"], report["samples"]
    lines = ["| measure, on held-out digits | reached | target | |", "|---|---|---|---|"]
    for name, entry in report["targets"].items():
        lines.append(
            f"| {name} | {entry['value']:.4g} | {entry['target']} | {'met' if entry['met'] else '**missed**'} |"
        )
    lines += ["", "| kNN accuracy, percent | unmoved digits | shifted and rotated digits |", "|---|---|---|"]
    rows = {"raw pixels (256-d)": metrics["knn_raw_pixels"]}
    names = {"t_simclr": "t-SimCLR", "pca": "PCA", "untrained": "untrained encoder"}
    for dimension in (32, 2):
        for key, name in names.items():
            rows[f"{name}, {dimension}-d"] = metrics[f"knn_{dimension}d"][key]
    lines += [f"| {name} | {values['plain']:.1f} | {values['moved']:.1f} |" for name, values in rows.items()]
    decibels = metrics["reconstruction_psnr"]
    titles = {
        "dae": "DAE: encoder against a weak decoder, frozen, then the decoder",
        "joint_equal_total_steps": "joint training, the sum of both stages' steps",
        "joint_equal_encoder_steps": "joint training for stage 1's steps, then the decoder alone",
        "without_quantizer": "joint, without quantiser (an upper bound)",
    }
    lines += ["", "| autoencoder | reconstruction PSNR, dB |", "|---|---|"]
    lines += [f"| {title} | {decibels[name]:.1f} |" for name, title in titles.items()]
    return "\n".join([*lines, "", circumstances(report), "", seconds(metrics["seconds"], samples)])


def seconds(parts: dict, samples: dict) -> str:
    """Where the demo's time went, and on how many images."""
    steps = ", ".join(f"{name} {value:.0f}" for name, value in parts.items() if name != "total")
    counts = ", ".join(f"{name.replace('_', '-')} {count}" for name, count in samples.items())
    return f"Seconds: {steps}; {parts['total']:.0f} in all. Images: {counts}."


def speed_table(report: dict) -> str:
    """Times beside the peers', in Markdown."""
    lines = ["| forward + backward | ours, ms | ours / peer | peer |", "|---|---|---|---|"]
    for row in report["metrics"]["comparisons"]:
        lines.append(f"| {row['what']} | {row['ours_ms']:.2f} | {row['ratio']:.2f} | {row['peer']} |")
    rounds = report["samples"]["rounds"]
    return "\n".join([*lines, "", f"Minimum of {rounds} alternating rounds. {circumstances(report)}"])


def circumstances(report: dict) -> str:
    """Command, data, seed, machine and versions behind a table."""
    machine = report["environment"]
    libraries = ", ".join(f"{n} {machine['libraries'][n]}" for n in ("torch", "transformers", "diffusers", "timm"))
    return (
        f"Command `{report['command']}`, data: {report['dataset']}, random seed {report['seed']}; "
        f"{machine['processor']}, {machine['threads']} threads, Python {machine['python']}, {libraries}."
    )


def tables() -> dict[str, str]:
    """{name of the block: its Markdown}, for each result that is there."""
    sources = {"demo": (DEMO, demo_table), "speed": (SPEED, speed_table)}
    return {
        name: make(json.loads(path.read_text(encoding="utf-8")))
        for name, (path, make) in sources.items()
        if path.exists()
    }


def fill(text: str, blocks: dict[str, str]) -> str:
    """`text` with each block replaced; ValueError when the text has no place for one."""
    for name, block in blocks.items():
        pattern = f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md needs one pair of markers <!-- {name}:begin --> and <!-- {name}:end -->.")
    return text


def main() -> None:
    """Take over a demo's results when asked, and write README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that the demo wrote")
    args = parser.parse_args()
    if args.demo:
        DEMO.parent.mkdir(exist_ok=True)
        shutil.copyfile(args.demo / "report.json", DEMO)
        for picture in PICTURES:
            shutil.copyfile(args.demo / picture, EVIDENCE / picture)
    readme = REPOSITORY / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
