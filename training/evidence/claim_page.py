"""The page of claims: a table, a paragraph and a plot of paired differences for each, from the values of every seed.

A result is what `claim_cells.write_study` wrote. Verdicts are taken when the page is written, so none is stored.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, stdev

from claim_decision import FLAT_SHARE, decide, margin_of, not_converged
from matplotlib.figure import Figure


def cells_of(result: dict) -> dict[str, dict[int, dict]]:
    """{arm: {seed: {"metrics", "curve"}}} of a result."""
    metrics = result["stated"]["study"]["metrics"]
    found: dict[str, dict[int, dict]] = {}
    for arm, row in result["metrics"]["cells"].items():
        found[arm] = {
            seed: {"metrics": {name: row[name][i] for name in metrics}, "curve": row["curve"][i]}
            for i, seed in enumerate(row["seeds"])
        }
    return found


def verdicts(results: list[dict]) -> dict[str, dict]:
    """{claim: its entry of `decide`, and "not_converged": arms}, in the order of their numbers.

    Families are corrected over all results.
    """
    claims: dict[str, dict] = {}
    metrics, cells, sizes = {}, {}, {}
    for result in results:
        stated = result["stated"]
        found = cells_of(result)
        for name, claim in stated["claims"].items():
            claims[name] = claim | {"seeds": stated["seeds"]}
            metrics[name] = stated["study"]["metrics"]
            cells[name] = found
        for family, parts in stated["families"].items():
            sizes[family] = sizes.get(family, {}) | parts
    entries = {}
    for family, parts in sizes.items():
        own = {name: claim for name, claim in claims.items() if claim["family"] == family}
        entries |= decide(own, metrics, cells, sum(parts.values()))
    for name, entry in entries.items():
        compared = {comparison[side] for comparison in entry["comparisons"] for side in ("first", "second")}
        entry["not_converged"] = [arm for arm in not_converged(cells[name]) if arm in compared]
    return {name: entries[name] for name in sorted(claims, key=lambda name: claims[name]["number"])}


def page(results: list[dict], pictures: str = "") -> str:
    """The whole page, in Markdown; `pictures` is the folder of the plots, as links name it."""
    entries = verdicts(results)
    of_claim = {name: result for result in results for name in result["stated"]["claims"]}
    head = ["| claim | verdict | seeds | |", "|---|---|---|---|"]
    for name, entry in entries.items():
        seeds = min(len(comparison["seeds"]) for comparison in entry["comparisons"])
        claim = of_claim[name]["stated"]["claims"][name]
        head.append(f"| {claim['number']} {name} | **{entry['verdict']}** | {seeds} | {summary(entry)} |")
    return "\n".join(head + [""] + [_section(name, entry, of_claim[name], pictures) for name, entry in entries.items()])


def summary(entry: dict) -> str:
    """Why the verdict on a claim is what it is, and which arms had not converged."""
    slow = f"; not converged: {', '.join(entry['not_converged'])}" if entry["not_converged"] else ""
    return entry["reason"] + slow


def _section(name: str, entry: dict, result: dict, pictures: str) -> str:
    stated = result["stated"]
    study, claim = stated["study"], stated["claims"][name]
    size = sum(stated["families"][claim["family"]].values())
    lines = [f"### {claim['number']}. {name}: {entry['verdict']}", "", f"{claim['hypothesis']} ({claim['source']})", ""]
    lines += [
        "| comparison | mean (95 % interval) | margin | p, corrected | seeds | |",
        "|---|---|---|---|---|---|",
    ]
    for comparison in entry["comparisons"]:
        metric = study["metrics"][comparison["metric"]]
        margin = _amount(margin_of(comparison, metric), metric)
        why = f": {comparison['reason']}" if comparison["reason"] else ""
        lines.append(
            f"| {metric['says']}: {comparison['first']} better than {comparison['second']} by | "
            f"{_interval(comparison, metric)} | {margin} | {comparison['p']:.2g} | {len(comparison['seeds'])} | "
            f"{comparison['verdict']}{why} |"
        )
    lines += ["", *_arms(entry, result), "", f"![Paired differences of {name}]({pictures}{name}.png)", ""]
    return "\n".join([*lines, _paragraph(claim, entry, result, size), ""])


def _arms(entry: dict, result: dict) -> list[str]:
    """The table of the arms that a claim compares, with their budgets."""
    study = result["stated"]["study"]
    arms = dict.fromkeys(c[side] for c in entry["comparisons"] for side in ("first", "second"))
    names = dict.fromkeys(c["metric"] for c in entry["comparisons"])
    slow = entry["not_converged"]
    budgets = dict.fromkeys(key for arm in arms for key in study["arms"][arm].get("budget", {}))
    costs = ["operations"] if "measured_budget" in study else []
    head = ["arm", *(study["metrics"][name]["says"] for name in names), *budgets, *costs, "CPU seconds", "converged"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        row = result["metrics"]["cells"].get(arm)
        if row is None:
            lines.append(f"| {arm}: {study['arms'][arm]['says']} |" + " |" * (len(head) - 1))
            continue
        parts = [f"{arm}: {study['arms'][arm]['says']}"] + [_spread(row[name]) for name in names]
        parts += [str(study["numbers"][study["arms"][arm]["budget"][key]]) for key in budgets]
        parts += [f"{row[key]:.2g}" for key in costs] + [f"{mean(row['cpu_seconds']):.0f}"]
        lines.append(f"| {' | '.join(parts)} | {'**not converged**' if arm in slow else 'yes'} |")
    return lines


def _paragraph(claim: dict, entry: dict, result: dict, size: int) -> str:
    stated = result["stated"]
    study, machine = stated["study"], result["environment"]
    slow = entry["not_converged"]
    curve = study["curve"]["says"]
    flat = f"All curves of {curve} are flat." if result["metrics"]["cells"] else f"There is no curve of {curve} yet."
    if slow:
        flat = f"Not converged, as the last quarter adds more than {FLAT_SHARE:.0%} of the change of {curve}: "
        flat += f"{', '.join(slow)}; the verdict is on this budget."
    samples = ", ".join(f"{count} {name}" for name, count in result["samples"].items())
    minutes = {name: value / 60 for name, value in result["cpu_seconds"].items()}
    spent = f"{minutes['cells']:.0f} minutes of CPU for the cells"
    spent += f", {minutes['grids']:.0f} for the grids" if result["tuning"] else ""
    spent += f", {minutes['shared']:.0f} for what they share" if result["weights"] else ""
    data = f"{study['data']['name']} at {study['data']['image_size']} px"
    parts = [
        f"Run: scale {study['scale']}, {data}, {samples} images, {stated['seeds']} paired seeds, {len(study['arms'])} "
        f"arms, {spent} (of a cell that was killed, the rest).",
        f"Came out: {entry['verdict']}; {entry['reason']}.",
        flat,
        f"If the method did nothing: {claim['no_op']}.",
        f"Differs from the paper: {claim['differs_from_paper']}",
        f"What would change our mind: {claim['change_of_mind']}",
        f"Intervals are Student's t over seeds, not corrected; p values are two-sided at the margin, corrected by Holm "
        f'for the {size} comparisons of the family "{claim["family"]}". Fingerprint of statement, images and shared '
        f"encoders: {result['fingerprint'][:16]}; {machine['processor']}, {machine['threads']} thread(s), torch "
        f"{machine['libraries']['torch']}.",
    ]
    return " ".join(" ".join(part.split()) for part in parts)


def _amount(value: float, metric: dict) -> str:
    return f"{100 * math.expm1(value):+.1f} %" if metric.get("relative") else f"{value:+.3g}"


def _interval(comparison: dict, metric: dict) -> str:
    if comparison["mean"] is None:
        return ""
    centre = _amount(comparison["mean"], metric)
    if comparison["low"] is None:
        return centre
    return f"{centre} ({_amount(comparison['low'], metric)} to {_amount(comparison['high'], metric)})"


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" ({stdev(values):.2g})" if len(values) > 1 else "")


def draw(name: str, entry: dict, result: dict, file) -> None:
    """Plot of a claim's paired differences: seeds, mean with its interval, no difference (0) and the margin; a PNG."""
    metrics = result["stated"]["study"]["metrics"]
    comparisons = entry["comparisons"]
    figure = Figure(figsize=(6.5, 0.9 * len(comparisons) + 1.2), layout="constrained")
    axes = figure.subplots(len(comparisons), squeeze=False)[:, 0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        metric = metrics[comparison["metric"]]
        values = comparison["differences"]
        axis.plot(values, [0] * len(values), "o", color="tab:blue", alpha=0.6)
        if comparison["low"] is not None:
            half = comparison["high"] - comparison["mean"]
            axis.errorbar(comparison["mean"], 0, xerr=half, fmt="s", color="black", capsize=4)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.axvline(margin_of(comparison, metric), color="tab:red", linestyle="--", linewidth=0.8)
        axis.set_yticks([])
        unit = " (log ratio)" if metric.get("relative") else ""
        title = f"{comparison['first']} better than {comparison['second']}, {metric['says']}{unit}: "
        axis.set_title(title + comparison["verdict"], fontsize=8)
        axis.tick_params(labelsize=7)
    figure.savefig(file, dpi=100, format="png")


def write_page(results: list[dict], folder: Path) -> dict[str, dict]:
    """Write claims.md and CLAIM.png for each claim of some results; returns `verdicts`."""
    from hf_dpssl.runs.atomic_files import atomic_file

    entries = verdicts(results)
    for result in results:
        for name in result["stated"]["claims"]:
            with atomic_file(folder / f"{name}.png", "wb") as file:
                draw(name, entries[name], result, file)
    with atomic_file(folder / "claims.md") as file:
        file.write(f"# Claims\n\n{page(results)}")
    return entries
