"""Write the measured tables of the READMEs from JSON files, so that no figure in them is typed.

    python training/evidence/readme.py --demo outputs/demo   # take over a demo's report and pictures, then write
    python training/evidence/readme.py --claims outputs/claims/quick    # take over the claims decided at a scale
    python training/evidence/readme.py                       # write from the files that are there

Each table stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import claim_page
import dae_gains
import dimensions_report
import dit_report
import gan_latents
import latents_report
import pacs_report
from claim_statements import differences, read_study
from paired_seeds import FEWEST_SEEDS, contains_zero, difference, verdict
from scipy.stats import kendalltau
from shipped_forecast import write_shipped_forecast

from hf_dpssl.evaluation.student_interval import student_interval

EVIDENCE = Path(__file__).parent
REPOSITORY = EVIDENCE.parent.parent
RESULTS = EVIDENCE / "results"
DEMO = RESULTS / "demo.json"
DEMO_BEFORE = RESULTS / "demo_before.json"  # of the demo that trained a DiT alone, for longer
BENCHMARKS = REPOSITORY / "tests" / "benchmarks" / "results"
WAITS = BENCHMARKS / "waits.json"
FRONT_DOOR = BENCHMARKS / "front_door.json"
SPEED = {  # results of make bench: the job's heading
    "contrastive": "loss, forward + backward",
    "augmentation": "two-view augmentation, training step",
    "neighbours": "nearest neighbours",
    "autoencoder": "quantiser and autoencoder",
    "token_guidance": "token transformer",
    "frechet": "Frechet distance, 2,048 dimensions",
    "dit": "latent DiT, 12 layers of width 384",
    "compiled": "training step, compiled by torch.compile",
    "drifting": "training step of a generator, 4 x 8 x 8 latents",
    "ranking": "score of one encoder, 10,000 samples, 2,048 features",
}
MODES = RESULTS / "augmentation_modes.json"
DIMENSIONS = RESULTS / "dimensions.json"
LATENTS = RESULTS / "latents.json"
MNIST_DOMAINS = {name: RESULTS / f"{name}.json" for name in ("colored_mnist", "rotated_mnist")}
DEFAULTS = RESULTS / "defaults.json"
GAN_LATENTS = RESULTS / "gan_latents.json"
DIT = RESULTS / "dit.json"
CLAIMS = RESULTS / "claims"  # a folder for each scale
QUICK = CLAIMS / "quick"
PACS = {  # results of pacs.py: a line above the table
    "pacs_zood": "Ten encoders, two of them untrained; linear probe of the other three domains.",
    "pacs_algorithms": "Frozen features of one encoder, a linear head.",
    "pacs_fine_tuning": "The same encoder, fine-tuned.",
}
SIZES = RESULTS / "size_costs.json"
SOLVERS = RESULTS / "solvers.json"
GAN_MEASURES = {  # start of the key (of each extractor, or of one): heading, format
    "fid_resnet56-cifar10": ("FID, resnet56-cifar10", "{:.2f}"),
    "kid_resnet56-cifar10": ("KID", "{:.4f}"),
    "inception_score_resnet56-cifar10": ("IS", "{:.2f}"),
    "precision_resnet56-cifar10": ("precision", "{:.2f}"),
    "recall_resnet56-cifar10": ("recall", "{:.2f}"),
    "fid_extractor": ("FID, self-supervised", "{:.3f}"),
    "kid_extractor": ("KID, self-supervised", "{:.4f}"),
}
PICTURES = ("samples.png", "map.png")
PAGES = {  # which tables stand on which page
    "README.md": ["generators"],
    "training/README.md": ["sizes"],
    "training/evidence/README.md": [
        "demo",
        "claims",
        "claims_cpu",
        "defaults",
        "modes",
        "dimensions",
        "latents",
        "gan_latents",
        "dit",
        "solvers",
    ],
    "training/evidence/claims.md": ["claim_sections", "autoencoders", "gan", "encoders"],
    "training/evidence/claims_cpu.md": ["claim_sections_cpu"],
    "training/evidence/dae.md": ["dae_claims", "budgets", "dae"],
    "training/evidence/one_step.md": [
        "one_step_claims",
        "one_step",
        "one_step_features",
        "one_step_joint",
        "one_step_photographs",
        "one_step_joint_photographs",
        "drifting",
        "demo_before",
    ],
    "training/evidence/domains.md": ["pacs", "colored_mnist", "rotated_mnist"],
    "tests/benchmarks/README.md": ["front_door", "waits", "speed"],
}


def sizes_table(report: dict) -> str:
    """Which size for how many images, with its memory and hours."""
    heads = ["images", "side, px", "encoder", "autoencoder", "generator", "batch, on GPUs", "steps of each stage"]
    heads += ["recipes to look at", "GB of a GPU: encoder, autoencoder, generator", "hours on A100s, in that order"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in report["rows"]:
        flags = [f"`{row[script]}`" for script in row["costs"]]
        cells = [f"{row['images']:,}", row["side"], *flags, f"{row['batch']} on {row['gpus']}", f"{row['steps']:,}"]
        cells.append(", ".join(f"[{name}](recipes/{name}.yaml)" for name in row["recipes"]))
        cells.append(", ".join(f"{costs['bytes'] / 1e9:.1f}" for costs in row["costs"].values()))
        hours = [costs["hours"]["A100"]["0.2"] for costs in row["costs"].values()]
        cells.append(", ".join(f"{value:.1f}" if value >= 0.1 else "< .1" for value in hours))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(
        [*lines, "", f"Command `{report['command']}`, torch {report['environment']['libraries']['torch']}."]
    )


def generators_block(report: dict) -> str:
    """What the demo's generators draw, on held-out digits, in Markdown."""
    return "\n".join([*generators_table(report["metrics"]), "", circumstances(report)])


def demo_table(report: dict) -> str:
    """Targets of the demo, accuracies, reconstruction quality and seconds, in Markdown."""
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
        "joint": "encoder and decoder together, then the decoder alone",
        "dae": "DAE of equal steps: encoder against a weak decoder, frozen, then the decoder",
    }
    lines += ["", "| autoencoder | reconstruction PSNR, dB |", "|---|---|"]
    lines += [f"| {title} | {decibels[name]:.1f} |" for name, title in titles.items()]
    return "\n".join([*lines, "", circumstances(report), "", seconds(metrics["seconds"], samples)])


GENERATORS_OF_DEMO = {
    "one_step": "one step, joint training's latents",
    "one_step_dae": "one step, DAE's latents",
    "dit": "DiT, joint training's latents",
    "dit_guided": "the same DiT, guidance 2",
}


def generators_table(metrics: dict) -> list[str]:
    """What each generator of the demo draws, and what that costs, in lines of Markdown."""
    lines = [
        "| generator | passes | seconds of training | of 300 samples | class consistency, % | diversity of real | "
        "copies, % | Frechet distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in GENERATORS_OF_DEMO.items():
        row = metrics["generators"][name]
        lines.append(
            f"| {title} | {row['passes']} | {row['training_seconds']:.0f} | {row['sampling_seconds']:.2f} | "
            f"{row['class_consistency']:.1f} | {row['diversity']:.2f} | {row['copies']:.1f} | "
            f"{row['frechet_distance']:.3f} |"
        )
    real = metrics["frechet_distance_of_real"]
    lines.append(f"| 300 real training digits | | | | | | | {real:.3f} |")
    lines += ["", "One seed: no verdict on the order of the rows. What decides is `hf-dpssl reproduce`."]
    return lines


def demo_before_table(before: dict, report: dict) -> str:
    """The DiT that the demo trained alone and for longer, beside what it trains now, in Markdown."""
    lines = [
        "| demo | generator | passes | seconds of training | class consistency, % | diversity of real | copies, % |",
        "|---|---|---|---|---|---|---|",
    ]
    trained = before["metrics"]["seconds"]["latent DiT"]
    for title, passes, end in (("DiT", 25, ""), ("the same DiT, guidance 2", 50, "_guided")):
        values = (before["metrics"][f"{name}{end}"] for name in ("class_consistency", "diversity", "copies"))
        consistency, diversity, copies = values
        lines.append(
            f"| before | {title} | {passes} | {trained:.0f} | {consistency:.1f} | {diversity:.2f} | {copies:.1f} |"
        )
    for name, title in GENERATORS_OF_DEMO.items():
        row = report["metrics"]["generators"][name]
        lines.append(
            f"| now | {title} | {row['passes']} | {row['training_seconds']:.0f} | {row['class_consistency']:.1f} | "
            f"{row['diversity']:.2f} | {row['copies']:.1f} |"
        )
    whole = [part["metrics"]["seconds"]["total"] for part in (before, report)]
    about = (
        f"The whole demo took {whole[0]:.0f} s and takes {whole[1]:.0f} s. One seed each; before, no Frechet distance "
    )
    about += "was measured."
    return "\n".join([*lines, "", about, "", f"Before: {circumstances(before)} Now: {circumstances(report)}"])


def drifting_table(report: dict) -> str:
    """Errors of the field beside plain loops, and steps of one-step generators beside a DiT's, in Markdown."""
    metrics = report["metrics"]
    lines = ["| largest error of the field | float64 | float32 |", "|---|---|---|"]
    for name, row in metrics["field_errors"].items():
        lines.append(f"| {name} | {row['float64']:.1e} | {row['float32']:.1e} |")
    lines += ["", "| step of training | ms | beside | ms | ratio |", "|---|---|---|---|---|"]
    for row in metrics["comparisons"]:
        times = f"{row['ours_ms']:.0f} | {row['peer']} | {row['theirs_ms']:.0f}"
        lines.append(f"| {row['what']} | {times} | {row['ratio']:.2f} |")
    sizes = ", ".join(f"{name} {count:,}" for name, count in metrics["parameters"].items())
    about = f"Parameters: {sizes}. Minimum of {report['samples']['rounds']} alternating rounds, processor's time."
    return "\n".join([*lines, "", f"{about} {circumstances(report)}"])


def seconds(parts: dict, samples: dict) -> str:
    """Where the demo's time went, and on how many images."""
    steps = ", ".join(f"{name} {value:.0f}" for name, value in parts.items() if name != "total")
    counts = ", ".join(f"{name.replace('_', '-')} {count}" for name, count in samples.items())
    return f"Seconds: {steps}; {parts['total']:.0f} in all. Images: {counts}."


def speed_table(report: dict, heading: str) -> str:
    """Times beside the peers', and extra memory where it was measured, in Markdown."""
    lines = [f"| {heading} | ours, ms | ours / peer | aim | peer |", "|---|---|---|---|---|"]
    for row in report["metrics"]["comparisons"]:
        aim = f"{row['aim']:.2f}" if row.get("aim") else ""
        lines.append(f"| {row['what']} | {row['ours_ms']:.2f} | {row['ratio']:.2f} | {aim} | {row['peer']} |")
    memory = report["metrics"].get("memory", [])
    if memory:
        parts = ", ".join(f"{row['what']} {row['extra_mb']:.0f} MB" for row in memory)
        where = f" at {memory[0]['pairs']:,} pairs (aim {memory[0]['aim_mb']} MB)" if "pairs" in memory[0] else ""
        lines += ["", f"Extra memory{where}: {parts}."]
    rounds = report["samples"]["rounds"]
    return "\n".join([*lines, "", f"Minimum of {rounds} alternating rounds. {circumstances(report)}"])


def front_door_table(report: dict) -> str:
    """Processor time until the command line answers, beside that of importing the libraries, in Markdown."""
    lines = ["| front door | user seconds | of the peer | aim | peer |", "|---|---|---|---|---|"]
    for what, row in report["metrics"].items():
        if row["peer"] != what:
            aim = f"{row['aim']:.2f}" if row["aim"] else ""
            seconds, ratio = f"{row['seconds_min']:.2f}", f"{row['ratio_min']:.2f}"
            lines.append(f"| `{what}` | {seconds} | {ratio} | {aim} | {row['peer']} |")
    rounds = report["samples"]["rounds"]
    return "\n".join([*lines, "", f"Minimum of {rounds} alternating rounds. {circumstances(report)}"])


def waits_table(report: dict) -> str:
    """Waits for a GPU and graphs of each training step, and what they were, in Markdown."""
    lines = ["| training step | waits | before | graphs | before |", "|---|---|---|---|---|"]
    for row in report["metrics"]["steps"]:
        numbers = (row[name] for name in ("waits", "waits_before", "graphs", "graphs_before"))
        cells = " | ".join("" if number is None else str(number) for number in numbers)
        lines.append(f"| {row['what']} | {cells} |")
    return "\n".join([*lines, "", circumstances(report)])


ARMS = {"simclr": "SimCLR", "gaussian_anchor": "Gaussian per anchor", "t_anchor": "t per anchor", "t_joint": "t-SimCLR"}


def dimensions_table(report: dict) -> str:
    """Accuracy of each arm by the dimension of its embeddings, paired differences and automatic temperatures."""
    metrics, settings, samples = report["metrics"], report["settings"], report["samples"]
    cells = {tuple(name.removesuffix("-d").split(", ")): row for name, row in metrics["accuracy"].items()}
    dimensions = sorted({int(dimension) for _, dimension in cells})
    lines = ["| 20-NN accuracy, percent (sd; temperature) | " + " | ".join(f"d = {d}" for d in dimensions) + " |"]
    lines.append("|---" * (len(dimensions) + 1) + "|")
    for arm, title in ARMS.items():
        rows = [cells.get((arm, str(dimension))) for dimension in dimensions]
        if any(rows):
            lines.append(f"| {title} | " + " | ".join(_accuracy(row) for row in rows) + " |")
    margin, differences = settings["margin"], dimensions_report.comparisons(metrics["accuracy"])
    lines += [
        "",
        f"| paired difference, points | mean (95 % interval) | by {margin:g} points or more |",
        "|---|---|---|",
    ]
    for name, entry in differences.items():
        lines.append(f"| {_titled(name)} | {_interval(entry, '.1f')} | {verdict(entry, margin)} |")
    if metrics["auto"]:
        lines += ["", '| `temperature="auto"` | accuracy | minus tuned | temperature at the end |', "|---|---|---|---|"]
    for name, entry in metrics["auto"].items():
        tuned = metrics["accuracy"].get(name)
        minus = _interval(difference(entry, tuned, "test_20nn"), ".1f") if tuned else ""
        ends = ", ".join(f"{value:.3g}" for value in entry["temperature_at_end"])
        lines.append(f"| {_titled(name)} | {entry['mean_20nn']:.1f} | {minus} | {ends} |")
    absent = "; ".join(_titled(entry) for entry in settings["missing"])
    missing = f" Not complete, seeds done: {absent}." if absent else ""
    about = f"{samples['train']:,} training, {samples['validation']:,} validation and {samples['test']:,} test images, "
    about += f"{settings['epochs']} epochs; temperature, learning rate and metric chosen on the validation images; "
    about += f"{settings['tuning_seeds']} seed and {settings['tuning_epochs']} epochs for the choice. "
    about += f"After an accuracy, * is not converged. {_intervals([*differences.values()])}"
    return "\n".join([*lines, "", f"{about}{missing} {circumstances(report)}"])


def latents_table(report: dict) -> str:
    """Measures of the arms and budgets, mean over seeds (standard deviation), and paired differences, in Markdown."""
    cells = report["metrics"]["cells"]
    differences = latents_report.comparisons(cells)
    lines = ["| | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    lines.append("| seeds | " + " | ".join(str(len(cell["seeds"])) for cell in cells.values()) + " |")
    steps = (" + ".join(str(steps) for steps in cell["stages"].values()) for cell in cells.values())
    lines.append("| steps | " + " | ".join(steps) + " |")
    flat = ("yes" if all(cell["converged"]) else "no" for cell in cells.values())
    lines.append("| all stages flat | " + " | ".join(flat) + " |")
    for name, (title, form, _) in latents_report.ROWS.items():
        lines.append(f"| {title} | " + " | ".join(_spread(cell[name], form) for cell in cells.values()) + " |")
    lines += _paired(differences, {name: latents_report.ROWS[name][0] for name in latents_report.COMPARED})
    samples, settings = report["samples"], report["settings"]
    counts = ", ".join(f"{name} {count:,}" for name, count in samples.items())
    about = f"{settings['runs']} runs. equal: of the same encoder. Images: {counts}. "
    about += _intervals([entry for values in differences.values() for entry in values.values()])
    if {"joint, total", "joint, encoder", *latents_report.WEAK} <= cells.keys():
        lines += ["", _encoder_share(cells)]
    return "\n".join([*lines, "", f"{about} {circumstances(report)}"])


def _encoder_share(cells: dict) -> str:
    """How much of the weak arms' gain in nats joint training has too when its encoder learns for as many steps."""
    gains = {name: mean(cells["joint, total"]["prior_nats"]) - mean(cell["prior_nats"]) for name, cell in cells.items()}
    alone, weak = gains["joint, encoder"], [gains[arm] for arm in latents_report.WEAK]
    saved = ", ".join(f"{name} {gains[name]:.1f}" for name in ("joint, encoder", *latents_report.WEAK))
    if min(weak) <= 0:
        return f"Nats per image that the small prior saves beside `joint, total`, means: {saved}; no gain to explain."
    shares = [alone / gain for gain in weak]
    most = "most" if min(shares) > 0.5 else "part" if alone > 0 else "none"
    return (
        "**DAE is compared with joint training of equal TOTAL steps, in which its encoder learns for fewer steps, and "
        f"an encoder that learns for fewer steps explains {most} of the gain** (column `joint, encoder`: as many steps "
        "of the encoder as DAE's, no weak decoder). Nats per image that the small prior saves beside `joint, total`, "
        f"means: {saved}; so {' and '.join(f'{share:.0%}' for share in shares)} of the weak arms' gain are there "
        "without a weak decoder."
    )


def gan_latents_table(report: dict) -> str:
    """Quality of generated images by the latent and by what it is sampled from, in Markdown."""
    heads = ("latent", "steps of the encoder", "steps in all", "sampled from", *(t for t, _ in GAN_MEASURES.values()))
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    budgets = {gan_latents.LATENTS[name]: budget for name, budget in gan_latents.BUDGETS.items()}
    for latent, densities in report["metrics"].items():
        steps = " | ".join(f"{count:,}" for count in budgets[latent].values()) if latent in budgets else " | "
        for density, values in densities.items():
            found = (form.format(values[key]) if key in values else "" for key, (_, form) in GAN_MEASURES.items())
            lines.append(f"| {latent} | {steps} | {density.replace('_', ' ')} | " + " | ".join(found) + " |")
    settings, samples = report["settings"], report["samples"]
    tuned = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings["chosen"].items())
    budget = gan_latents.BUDGETS["dae"]
    more = (
        f"**DAE-VAEGAN had {budget['in all'] - gan_latents.STEPS:,} steps more than every other row, all of them for "
        f"its encoder:** it learns for {budget['encoder']:,} against a weak generator and is frozen; the generator's "
        f"{gan_latents.STEPS:,} follow. VAEGAN's encoder learns in those {gan_latents.STEPS:,}. No row has as many "
        "steps in all without a weak generator. One seed: no intervals, and no verdict on any order of the rows."
    )
    about = f"Chosen on validation images with the noise latent: {tuned}, of {len(settings['tuning'])} settings. "
    about += "Images: " + ", ".join(f"{name} {count:,}" for name, count in samples.items())
    return "\n".join([*lines, "", more, "", f"{about}. {circumstances(report)}"])


def dit_table(report: dict) -> str:
    """Quality of the transformers by latent and size, mean over seeds (standard deviation), in Markdown."""
    metrics, settings, samples = report["metrics"], report["settings"], report["samples"]
    lines = [
        "| latent, transformer | parameters | seeds | " + " | ".join(t for t, _ in dit_report.ROWS.values()) + " |"
    ]
    lines.append("|---" * (len(dit_report.ROWS) + 3) + "|")
    for name, cell in metrics["cells"].items():
        values = " | ".join(_spread(cell[key], form) for key, (_, form) in dit_report.ROWS.items())
        lines.append(f"| {name} | {cell['parameters'] / 1e6:.2f} M | {len(cell['seeds'])} | {values} |")
    differences = dit_report.comparisons(metrics["cells"])
    lines += _paired(differences, {name: dit_report.ROWS[name][0] for name in dit_report.COMPARED})
    rates = ", ".join(f"{size} {rate:g}" for size, rate in settings["learning_rates"].items())
    about = f"{settings['runs']} runs; learning rates: {rates}. "
    about += "Images: " + ", ".join(f"{name} {count:,}" for name, count in samples.items())
    found = _intervals([entry for values in differences.values() for entry in values.values()])
    return "\n".join([*lines, "", f"{about}. {found} {circumstances(report)}"])


def solvers_table(report: dict) -> str:
    """Frechet distance by sampler, mean over sampling seeds (standard deviation), and ratios, in Markdown."""
    metrics, samples = report["metrics"], report["samples"]
    found = list(metrics["fid"])
    lines = ["| FID of images by | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for setting in metrics["fid"][found[0]]:
        cells = (_spread(metrics["fid"][data].get(setting) or [float("nan")], "{:.3f}") for data in found)
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    lines += ["", "| ratio of means | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for pair in metrics["ratios"][found[0]]:
        cells = (f"{metrics['ratios'][data].get(pair, float('nan')):.3f}" for data in found)
        lines.append(f"| {pair} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{name} {count:,}" for name, count in samples["generated"].items())
    seeds = ", ".join(f"{name} {len(next(iter(cells.values())))}" for name, cells in metrics["fid"].items())
    about = f"Images of a sampling seed: {counts}; sampling seeds: {seeds}; training images: {samples['reference']:,}. "
    about += "One training each: the spread is that of sampling, so no interval is stated."
    return "\n".join([*lines, "", f"{about} {circumstances(report)}"])


def _spread(values: list[float], form: str) -> str:
    text = form.format(mean(values))
    return f"{text} ({form.format(stdev(values))})" if len(values) > 1 else text


def _interval(entry: dict, form: str = ".3g") -> str:
    """Mean and interval; * where it lies on one side of 0."""
    if entry["interval"] is None:
        return f"{entry['mean']:+{form}} (one seed)"
    low, high = entry["interval"]
    if low == high == 0:
        return "equal"
    return f"{entry['mean']:+{form}} ({low:+{form}} to {high:+{form}}){'' if contains_zero(entry) else ' *'}"


def _paired(differences: dict[str, dict[str, dict]], titles: dict[str, str]) -> list[str]:
    """A table of {pair: {measure: difference}}, after an empty line."""
    lines = ["", "| paired difference (95 % interval) | " + " | ".join(titles.values()) + " |"]
    lines.append("|---" * (len(titles) + 1) + "|")
    for pair, values in differences.items():
        lines.append(f"| {pair} | " + " | ".join(_interval(values[name]) for name in titles) + " |")
    return lines


def _intervals(entries: list[dict]) -> str:
    """What the intervals of a table are, and what they settle."""
    entries = [entry for entry in entries if entry["interval"] != (0, 0)]  # those of one encoder compare nothing
    seeds = sorted({entry["seeds"] for entry in entries})
    open_ = sum(map(contains_zero, entries))
    text = f"Intervals: Student's t over {' or '.join(map(str, seeds))} paired seeds, not corrected for their number; "
    text += f"{open_} of {len(entries)} contain 0, the others bear a *."
    few = f" Fewer than {FEWEST_SEEDS} seeds: no verdict, whatever the interval."
    return text + (few if seeds[0] < FEWEST_SEEDS else "")


def modes_line(report: dict) -> str:
    """kNN accuracy after training with fused and with exact augmentation, in Markdown."""
    metrics, samples = report["metrics"], report["samples"]
    arms = {name: {"seeds": metrics["seeds"], "knn_top1": metrics[f"knn_top1_{name}"]} for name in ("fused", "exact")}
    means = ", ".join(f"{name} {_spread(arm['knn_top1'], '{:.2f}')}" for name, arm in arms.items())
    found = difference(arms["fused"], arms["exact"], "knn_top1")
    sign = "the sign is undecided" if contains_zero(found) else "the sign is settled"
    return (
        f"kNN accuracy after {samples['epochs']} epochs, percent (standard deviation over seeds): {means}; paired "
        f"difference {_interval(found, '.2f')}, the 95 % interval of Student's t over {found['seeds']} seeds: {sign}. "
        f"{samples['train']:,} training and {samples['evaluation']:,} held-out images. {circumstances(report)}"
    )


def _accuracy(row: dict | None) -> str:
    if row is None:
        return ""
    spread = f"{row['sd_20nn']:.1f}; " if row["sd_20nn"] is not None else "one seed; "
    return f"{row['mean_20nn']:.1f} ({spread}{row['temperature']:g}){'' if row['converged'] else ' *'}"


def _titled(name: str) -> str:
    return re.sub("|".join(ARMS), lambda match: ARMS[match[0]], name)


def circumstances(report: dict) -> str:
    """Command, data, seed, machine and versions behind a table."""
    machine = report["environment"]
    return (
        f"Command `{report['command']}`, data: {report['dataset']}, random seed {report['seed']}; "
        f"{claim_page.processor(machine)}, {machine['threads']} thread(s), torch {machine['libraries']['torch']}."
    )


def tables() -> dict[str, str]:
    """{name of the block: its Markdown}, for each result that is there."""
    blocks = {"sizes": sizes_table(read(SIZES))}
    if DEMO.exists():
        blocks |= {"demo": demo_table(read(DEMO)), "generators": generators_block(read(DEMO))}
        blocks["demo_before"] = demo_before_table(read(DEMO_BEFORE), read(DEMO))
    found = {name: BENCHMARKS / f"{name}.json" for name in SPEED if (BENCHMARKS / f"{name}.json").exists()}
    if found:
        blocks["speed"] = "\n\n".join(speed_table(read(path), SPEED[name]) for name, path in found.items())
    for folder in sorted(CLAIMS.glob("*")):
        blocks |= claim_blocks(folder)
    if QUICK.exists():
        blocks["dae"] = dae_gains.dae_tables(QUICK)
    for study in ONE_STEP_STUDIES:
        if (QUICK / f"{study}.json").exists():
            blocks[study] = one_step_table(read(QUICK / f"{study}.json"))
    for study, about in EVERY_ARM.items():
        if (QUICK / f"{study}.json").exists():
            blocks[study] = every_arm_tables(read(QUICK / f"{study}.json"), about)
    if (RESULTS / "pacs_zood.json").exists():
        blocks["pacs"] = pacs_tables()
    of_one_file = {
        "waits": (WAITS, waits_table),
        "front_door": (FRONT_DOOR, front_door_table),
        "drifting": (BENCHMARKS / "drifting.json", drifting_table),
        "defaults": (DEFAULTS, defaults_table),
        **{name: (path, mnist_domains_table) for name, path in MNIST_DOMAINS.items()},
        "modes": (MODES, modes_line),
        "latents": (LATENTS, latents_table),
        "gan_latents": (GAN_LATENTS, gan_latents_table),
        "dit": (DIT, dit_table),
        "solvers": (SOLVERS, solvers_table),
        "dimensions": (DIMENSIONS, dimensions_table),
    }
    blocks |= {name: made(read(path)) for name, (path, made) in of_one_file.items() if path.exists()}
    return blocks


def read(path: Path) -> dict:
    """A results file."""
    return json.loads(path.read_text(encoding="utf-8"))


def fill(text: str, blocks: dict[str, str]) -> str:
    """`text` with each block replaced; ValueError when the text has no place for one."""
    for name, block in blocks.items():
        pattern = f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m, b=block: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page needs one pair of markers <!-- {name}:begin --> and <!-- {name}:end -->.")
    return text


def take_over_claims(folder: Path) -> None:
    """Copy values and plots of decided claims into results/claims/SCALE, for a `folder` OUTPUT_DIR/SCALE.

    Raises:
        FileNotFoundError: a folder without any.
        ValueError: results of other numbers than the scale's, as those of gpu_plan.py; nothing is copied.
    """
    results = sorted(folder.glob("*.json"))
    if not results:
        raise FileNotFoundError(f"{folder} has no results (*.json): name OUTPUT_DIR/SCALE of hf-dpssl reproduce.")
    for path in results:
        study = read(path)["stated"]["study"]
        if found := differences(study["numbers"], read_study(path.stem, study["scale"])["numbers"]):
            raise ValueError(f"{path} is not of scale {study['scale']} as it is stated: {'; '.join(found)}.")
    kept = CLAIMS / read(results[0])["stated"]["study"]["scale"]
    kept.mkdir(parents=True, exist_ok=True)
    for path in results:  # a curve has a line for each number in the form of other results
        text = json.dumps(read(path), separators=(",", ":"))
        (kept / path.name).write_text(f"{text}\n", encoding="utf-8")
    for path in folder.glob("*.png"):
        shutil.copyfile(path, kept / path.name)


def claim_blocks(folder: Path) -> dict[str, str]:
    """Verdicts of claims with results at a scale: a table, and a section each, at scale quick on three pages."""
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    pictures = f"{folder.relative_to(EVIDENCE).as_posix()}/"
    if folder != QUICK:
        tables = [
            f"All arms of the study {study}, compared or not:\n\n{every_arm_tables(result, '')}"
            for study, result in ((next(iter(r["stated"]["claims"].values()))["study"], r) for r in results)
        ]
        sections = "\n\n".join([claim_page.sections(results, pictures).strip(), *tables])
        return {f"claims_{folder.name}": claim_page.table(results), f"claim_sections_{folder.name}": sections}
    studies = {claim["study"] for result in results for claim in result["stated"]["claims"].values()}
    others = studies.difference(ONE_STEP_STUDIES, DAE_STUDIES)
    pages = {"claim_sections": others, "one_step_claims": ONE_STEP_STUDIES, "dae_claims": DAE_STUDIES}
    parts = {name: claim_page.sections(results, pictures, wanted).strip() for name, wanted in pages.items()}
    return {"claims": claim_page.table(results)} | parts


ONE_STEP = {  # metric: heading, format
    "frechet_distance": ("Frechet distance", "{:.2f}"),
    "precision": ("precision", "{:.2f}"),
    "recall": ("recall", "{:.2f}"),
    "class_consistency": ("class consistency, %", "{:.1f}"),
    "diversity": ("diversity of real", "{:.2f}"),
    "copies_1": ("nearer to a training image than 1 % of held-out ones, %", "{:.1f}"),
    "copies_5": ("than 5 %, %", "{:.1f}"),
    "copies_25": ("than 25 %, %", "{:.1f}"),
    "images_per_second": ("images a second of one core", "{:.0f}"),
    "encoder_knn": ("20-NN of the encoder, %", "{:.1f}"),
    "encoder_rank": ("its effective rank", "{:.1f}"),
    "encoder_uniformity": ("its uniformity", "{:.2f}"),
}
DAE_STUDIES = ("budgets",)
ONE_STEP_STUDIES = (
    "one_step",
    "one_step_features",
    "one_step_photographs",
    "one_step_joint",
    "one_step_joint_photographs",
)


def one_step_table(report: dict) -> str:
    """All arms of a study of one-step generators that have run: means over the seeds (standard deviation)."""
    arms, cells = report["stated"]["study"]["arms"], report["metrics"]["cells"]
    columns = {name: about for name, about in ONE_STEP.items() if any(name in row for row in cells.values())}
    lines = ["| generator | " + " | ".join(title for title, _ in columns.values()) + " | CPU seconds |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for arm, row in cells.items():
        values = [_spread(row[name], how) if name in row else "" for name, (_, how) in columns.items()]
        lines.append(f"| {arms[arm]['says']} | {' | '.join(values)} | {mean(row['cpu_seconds']):.0f} |")
    counts = sorted({int(row["parameters"][0]) for row in cells.values()})
    sizes = f"{counts[0]:,} (dense layers) and {counts[-1]:,} (DiT)" if len(counts) > 1 else f"{counts[0]:,}"
    seeds = " or ".join(map(str, sorted({len(row["seeds"]) for row in cells.values()})))
    about = f"Means over {seeds} seeds (standard deviation); parameters {sizes}. CPU seconds: of training, where there "
    about += "was any, drawing and measuring."
    if "encoder_knn" in columns:
        lines += ["", encoder_agreement(cells)]
    return "\n".join([*lines, "", f"{about} {circumstances(report)}"])


def encoder_agreement(cells: dict) -> str:
    """Whether encoders that measure better give nearer images: Kendall's tau within each seed, mean and interval."""
    rows = [row for row in cells.values() if "encoder_knn" in row]
    seeds = set.intersection(*(set(row["seeds"]) for row in rows))
    parts = []
    for name, sign in (("encoder_knn", 1), ("encoder_rank", 1), ("encoder_uniformity", -1)):
        taus = []
        for seed in sorted(seeds):
            places = [row["seeds"].index(seed) for row in rows]
            measured = [sign * row[name][place] for row, place in zip(rows, places, strict=True)]
            near = [-row["frechet_distance"][place] for row, place in zip(rows, places, strict=True)]
            taus.append(float(kendalltau(measured, near).statistic))
        interval = student_interval(taus) if len(taus) > 1 else None
        bounds = f" ({interval['low']:.2f} to {interval['high']:.2f})" if interval else ""
        parts.append(f"{ONE_STEP[name][0].removeprefix('its ')} {mean(taus):.2f}{bounds}")
    return (
        f"Kendall's tau of the {len(rows)} encoders' measure, the better the higher, with how near the images are, "
        f"mean and 95 % over {len(seeds)} seeds: {'; '.join(parts)}."
    )


EVERY_ARM = {
    "autoencoders": "",
    "gan": "",
    "budgets": "",
    "encoders": "; a seed is a zoo of its own",
}  # of a study: what is to be said


def every_arm_tables(report: dict, more: str) -> str:
    """All arms of a study, compared or not, by all metrics: means over the seeds (sd), a table for a kind of arms."""
    study, cells = report["stated"]["study"], report["metrics"]["cells"]
    tables = []
    for names in dict.fromkeys(tuple(name for name in study["metrics"] if name in row) for row in cells.values()):
        lines = [
            f"| | {' | '.join(study['metrics'][name]['says'] for name in names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for arm, row in cells.items():
            if tuple(name for name in study["metrics"] if name in row) == names:
                values = [f"{mean(row[name]):.3g} ({stdev(row[name]):.2g})" for name in names]
                lines.append(f"| {study['arms'][arm]['says']} | {' | '.join(values)} |")
        tables.append("\n".join(lines))
    seeds = " or ".join(map(str, sorted({len(row["seeds"]) for row in cells.values()})))
    about = f"Means over {seeds} seeds (standard deviation){more}. {circumstances(report)}"
    return "\n\n".join([*tables, about])


def pacs_tables() -> str:
    """Those of the stages of pacs.py that have run."""
    parts = []
    for name, about in PACS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            report = read(path)
            table = pacs_report.zood_table(report) if name == "pacs_zood" else pacs_report.algorithms_table(report)
            parts.append("\n".join([about, "", *table, "", circumstances(report)]))
    if (RESULTS / "pacs_speed.json").exists():
        report = read(RESULTS / "pacs_speed.json")
        found = report["metrics"]
        parts.append(
            f"Ranking {len(report['encoders'])} encoders, from {report['samples']:,} pictures on, takes "
            f"{found['ranking_seconds']:.0f} s of a processor; fine-tuning each of them with ERM, every domain left "
            f"out once, {report['protocol']['steps']:,} steps, {found['fine_tuning_seconds']:,.0f} s (from 100 steps "
            f"of each): {found['times']:.0f} times as long. {circumstances(report)}"
        )
    if (RESULTS / "pacs_transfer.json").exists():
        report = read(RESULTS / "pacs_transfer.json")
        tuning = report["protocol"]["fine_tuning"]
        about = (
            "`--suite transfer` on parts of three of its sets, percent right (95 % of test images); fine-tuning of "
            f"{tuning['steps']} steps, rates {tuning['learning_rates']}, weight decays {tuning['weight_decays']}."
        )
        parts.append("\n".join([about, "", *pacs_report.transfer_table(report), "", circumstances(report)]))
    return "\n\n".join(parts)


def defaults_table(report: dict) -> str:
    """Untuned SimCLR and the untuned Student-t arm of each dimension: means over data sets and seeds, differences."""
    lines = ["| 20-NN, percent right | of | SimCLR | Student-t | difference (95 % interval) |", "|---|---|---|---|---|"]
    final = dict(sorted(report["final"].items(), key=lambda entry: int(entry[0])))
    for dimension, arms in final.items():
        chosen = report["chosen"][dimension]
        for place, kind in enumerate(("features", "embeddings")):
            values = {arm: _means_of_seeds(arms[arm], place) for arm in ("simclr", chosen)}
            pairs = zip(values[chosen], values["simclr"], strict=True)
            found = student_interval([ours - theirs for ours, theirs in pairs])
            cells = [f"{mean(values[arm]):.1f}" for arm in ("simclr", chosen)]
            difference = f"{found['mean']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
            lines.append(f"| {dimension} dimensions, {chosen} | {kind} | {' | '.join(cells)} | {difference} |")
    dimensions = list(final)
    lines += ["", f"| screening, one seed | {' | '.join(f'd = {number}' for number in dimensions)} |"]
    lines.append("|---" * (len(dimensions) + 1) + "|")
    for arm, flags in report["protocol"]["arms"].items():
        scores = [f"{report['metrics'][f'screening_{arm}_{number}']:.1f}" for number in dimensions]
        lines.append(f"| {arm}: `{flags}` | {' | '.join(scores)} |")
    seeds = len(next(iter(next(iter(final.values()))["simclr"].values())))
    about = (
        f"Means over {report['dataset'].replace('+', ', ')} and {seeds} seeds; {report['protocol']['cpu_hours']:.1f} "
    )
    return "\n".join([*lines, "", f"{about}hours of a processor. {circumstances(report)}"])


def _means_of_seeds(of_sets: dict[str, list], place: int) -> list[float]:
    """Of each seed the mean over data sets."""
    return [mean(values[place] for values in of_seed) for of_seed in zip(*of_sets.values(), strict=True)]


def mnist_domains_table(report: dict) -> str:
    """Rows of mnist_domains.py that have run, beside the published ones, and its questions."""
    lines = ["| selection | target | algorithm | draws | here | published |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        published = "" if row["published"] is None else f"{row['published']:.1f}"
        name = row["algorithm"] + (" *" if row["adapts"] else "")
        rule = row["selection"].replace("_", " ")
        draws = _draws(row)
        lines.append(f"| {rule} | {row['target']} | {name} | {draws} | {row['accuracy']:.1f} | {published} |")
    compared = [asked for asked in report["questions"] if "at_least" in asked]
    if compared:
        lines += ["", "| asked | draws | difference | at least | one class for all, % | |", "|---|---|---|---|---|---|"]
    for asked in compared:
        what = f"{asked['algorithm']} over erm, {asked['selection'].replace('_', ' ')}, {asked['target']}"
        far = asked["difference"] >= asked["at_least"]
        met = "met" if asked["met"] else "**missed**, no better than one class for all" if far else "**missed**"
        cells = [what, _draws(asked), f"{asked['difference']:.1f}", asked["at_least"], f"{asked['constant']:.1f}", met]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reproduced = [asked for asked in report["questions"] if "within" in asked]
    if reproduced:
        lines += ["", "| asked | draws | here - published | within | |", "|---|---|---|---|---|"]
    for asked in reproduced:
        what = f"{asked['algorithm']}, {asked['selection'].replace('_', ' ')}, {asked['target']} degrees"
        met = "met" if asked["met"] else "**missed**"
        lines.append(f"| {what} | {_draws(asked)} | {asked['difference']:+.1f} | {asked['within']} | {met} |")
    seconds = sum(report["protocol"]["seconds_of_runs"].values())
    adapts = (
        "\\* adapts to batches of the target at test time. " if any(row["adapts"] for row in report["rows"]) else ""
    )
    about = f"{adapts}Draw 0: DomainBed's defaults. "
    count = len(report["protocol"]["seconds_of_runs"])
    about += f"{count} run{'s' if count > 1 else ''}, {seconds / 60:.0f} minutes."
    if lacking := report["protocol"]["not_run"]:
        about += f" Not run: {', '.join(lacking)}."
    return "\n".join([*lines, "", f"{about} {circumstances(report)}"])


def _draws(row: dict) -> str:
    """The draws of a row, the one it took of several in bold."""
    several = len(row["draws"]) > 1 and "chosen_draw" in row
    return ", ".join(f"**{draw}**" if several and draw == row["chosen_draw"] else str(draw) for draw in row["draws"])


def main() -> None:
    """Take over a demo's results when asked, and write the tables into their pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder that the demo wrote")
    parser.add_argument("--claims", type=Path, help="folder of a scale that reproduce.py wrote")
    args = parser.parse_args()
    if args.demo:
        DEMO.parent.mkdir(exist_ok=True)
        shutil.copyfile(args.demo / "report.json", DEMO)
        for picture in PICTURES:
            shutil.copyfile(args.demo / picture, EVIDENCE / picture)
    if args.claims:
        take_over_claims(args.claims)
    blocks = tables()
    for page, names in PAGES.items():
        path = REPOSITORY / page
        text = fill(path.read_text(encoding="utf-8"), {name: blocks[name] for name in names})
        path.write_text(text, encoding="utf-8")
    if (QUICK / "weakness.json").exists():
        write_shipped_forecast(read(QUICK / "weakness.json"))


if __name__ == "__main__":
    main()
