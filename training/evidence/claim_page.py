"""The page of claims: a table, a paragraph and a plot of paired differences for each, from the values of every seed.

A result is what `claim_cells.write_study` wrote. Verdicts are taken when the page is written, so none is stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from statistics import mean, stdev

from claim_decision import FLAT_SHARE, decide, judged_curve, margin_of, not_converged
from claim_forecast import correlations, forecast_cells
from claim_gains import draw_gains, gains_tables, save_small
from claim_sizes import with_parameters
from claim_statements import CLAIMS, counts, forecasts, metrics_of
from matplotlib.figure import Figure

from hf_dpssl.evaluation.student_interval import student_interval


def cells_of(result: dict) -> dict[str, dict[int, dict]]:
    """{arm: {seed: {"metrics", "curve", "curves"}}} of a result."""
    study = result["stated"]["study"]
    metrics = study["metrics"]
    found: dict[str, dict[int, dict]] = {}
    for arm, row in result["metrics"]["cells"].items():
        found[arm] = {
            seed: {"metrics": {name: row[name][i] for name in metrics if name in row}}
            for i, seed in enumerate(row["seeds"])
        }
        for i, seed in enumerate(row["seeds"] if "curve" in row else []):
            found[arm][seed]["curve"] = judged_curve(row["curve"][i], study["curve"])
        for i, seed in enumerate(row["seeds"] if "curves" in row else []):
            found[arm][seed]["curves"] = {
                name: judged_curve(curves[i], study["curves"][name]) for name, curves in row["curves"].items()
            }
    return with_parameters(found, study)


def verdicts(results: list[dict], source: Path = CLAIMS) -> dict[str, dict]:
    """{claim: its entry of `decide`, "not_converged": {arm: curves}, "curves": [those asked for beside the arms' own]}.

    In the order of the claims' numbers.

    Args:
        results: of one scale.
        source: folder of the claims; p values are corrected for the comparisons of all of them, run or not.
    """
    claims: dict[str, dict] = {}
    metrics, cells, learned, arms, curves = {}, {}, {}, {}, {}
    for result in results:
        stated = result["stated"]
        found = cells_of(result)
        forecast = forecast_cells(found, stated["study"]) if "forecast" in stated["study"] else {}
        for name, claim in stated["claims"].items():
            claims[name] = claim | {"seeds": stated["seeds"]}
            metrics[name] = metrics_of(stated["study"])
            cells[name] = found | forecast
            learned[name] = found
            arms[name] = stated["study"]["arms"]
            curves[name] = stated["study"].get("curves", {})
    entries = decide(claims, metrics, cells, compared_in_all(results, source))
    for name, entry in entries.items():
        compared = {comparison[side] for comparison in entry["comparisons"] for side in ("first", "second")}
        of_forecasts = not compared & learned[name].keys()  # a forecast is of all arms
        read = arms[name] if of_forecasts else {other for arm in compared for other in [arm, *behind(arms[name], arm)]}
        compared_metrics = {comparison["metric"] for comparison in entry["comparisons"]}
        more = [curve for curve, about in curves[name].items() if compared_metrics & set(about["metrics"])]
        slow = not_converged(learned[name], more)
        entry["not_converged"] = {arm: names for arm, names in slow.items() if arm in read}
        entry["curves"] = more
    return {name: entries[name] for name in sorted(claims, key=lambda name: claims[name]["number"])}


def compared_in_all(results: list[dict], source: Path = CLAIMS) -> int:
    """Comparisons of all claims of the results' scale, run or not."""
    stored = {name: len(claim["comparisons"]) for r in results for name, claim in r["stated"]["claims"].items()}
    stated = {}
    for scale in {result["stated"]["study"]["scale"] for result in results}:
        stated |= counts(scale, source)
    return sum((stated | stored).values())


def behind(arms: dict[str, dict], arm: str) -> list[str]:
    """The arms whose runs an arm reads or draws from (`needs`, `trained_as`), and those behind these."""
    found: dict[str, None] = {}
    waiting = [arm]
    while waiting:
        about = arms[waiting.pop()]
        before = [*about.get("needs", []), *([about["trained_as"]] if "trained_as" in about else [])]
        waiting += [other for other in before if other not in found]
        found |= dict.fromkeys(before)
    return list(found)


def table(results: list[dict], source: Path = CLAIMS) -> str:
    """A line for each claim: verdict, seeds, and why; and for what p values are corrected. In Markdown."""
    entries = verdicts(results, source)
    of_claim = {name: result for result in results for name in result["stated"]["claims"]}
    lines = ["| claim | verdict | seeds | |", "|---|---|---|---|"]
    for name, entry in entries.items():
        seeds = min(len(comparison["seeds"]) for comparison in entry["comparisons"])
        claim = of_claim[name]["stated"]["claims"][name]
        lines.append(f"| {claim['number']} {name} | **{entry['verdict']}** | {seeds} | {summary(entry)} |")
    about = (
        "p values are two-sided at the margin, of Student's t over seeds, and corrected by Holm for the "
        f"{compared_in_all(results, source)} comparisons of all claims of the scale; "
        "intervals in the sections are not corrected."
    )
    return "\n".join([*lines, "", about])


def sections(
    results: list[dict], pictures: str = "", studies: Collection[str] | None = None, source: Path = CLAIMS
) -> str:
    """A section for each claim, in Markdown.

    Args:
        results: all of them, over which p values are corrected.
        pictures: folder of the plots, as links name it.
        studies: whose claims are wanted; None: all.
        source: folder of the claims.
    """
    parts = []
    of_claim = {name: result for result in results for name in result["stated"]["claims"]}
    for name, entry in verdicts(results, source).items():
        if studies is None or of_claim[name]["stated"]["claims"][name]["study"] in studies:
            parts.append(_section(name, entry, of_claim[name], pictures))
    return "\n".join(parts)


def summary(entry: dict) -> str:
    """Why the verdict on a claim is what it is, and which arms had not converged."""
    slow = f"; not converged: {_slow(entry)}" if entry["not_converged"] else ""
    return entry["reason"] + slow


def _slow(entry: dict) -> str:
    """Arms that had not converged; which of their generators, where the arm's own curve is not it alone."""
    parts = []
    for arm, names in entry["not_converged"].items():
        others = ", ".join(name for name in names if name)
        own = "itself, " if others and "" in names else ""
        parts.append(f"{arm} ({own}{others})" if others else arm)
    return ", ".join(parts)


def _section(name: str, entry: dict, result: dict, pictures: str) -> str:
    stated = result["stated"]
    study, claim = stated["study"], stated["claims"][name]
    lines = [f"### {claim['number']}. {name}: {entry['verdict']}", "", f"{claim['hypothesis']} ({claim['source']})", ""]
    metrics = metrics_of(study)
    kinds = dict.fromkeys(_difference(metrics[comparison["metric"]]) for comparison in entry["comparisons"])
    lines += [
        f"| comparison | {' or '.join(kinds)}, mean (95 % interval) | margin | p, corrected | seeds | |",
        "|---|---|---|---|---|---|",
    ]
    for comparison in entry["comparisons"]:
        metric = metrics[comparison["metric"]]
        margin = _amount(margin_of(comparison, metric), metric)
        margin += f", a ratio of {1 + comparison['margin']:g}" if metric.get("relative") else ""
        why = f": {comparison['reason']}" if comparison["reason"] else ""
        lines.append(
            f"| {metric['says']}: {comparison['first']} better than {comparison['second']} by | "
            f"{_interval(comparison, metric)} | {margin} | {comparison['p']:.2g} | {len(comparison['seeds'])} | "
            f"{comparison['verdict']}{why} |"
        )
    lines += ["", *_arms(entry, result)]
    compared = {comparison[side] for comparison in entry["comparisons"] for side in ("first", "second")}
    if "dial" in study and compared <= study["dial"]["arms"].keys():
        lines += ["", dial_places(result), "", f"![{study['dial']['says']}]({pictures}{claim['study']}_dial.png)"]
    if "gains" in study:
        lines += [*gains_tables(study, cells_of(result), _interval), ""]
        lines.append(f"![{study['gains']['says']}]({pictures}{claim['study']}_gains.png)")
    lines += ["", f"![Paired differences of {name}]({pictures}{name}.png)", ""]
    return "\n".join([*lines, _paragraph(claim, entry, result), ""])


def _arms(entry: dict, result: dict) -> list[str]:
    """The table of the arms that a claim compares, with their budgets."""
    study = result["stated"]["study"]
    arms = dict.fromkeys(c[side] for c in entry["comparisons"] for side in ("first", "second"))
    if not arms.keys() <= study["arms"].keys():
        return _forecasts(result)
    names = dict.fromkeys(c["metric"] for c in entry["comparisons"])
    cells = cells_of(result)
    rows = result["metrics"]["cells"]
    slow = entry["not_converged"]
    budgets = dict.fromkeys(key for arm in arms for key in study["arms"][arm].get("budget", {}))
    costs = ["operations"] if "measured_budget" in study else []
    head = ["arm", *(study["metrics"][name]["says"] for name in names), *budgets, *costs, "CPU seconds", "converged"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        row = rows.get(arm)
        if row is None:
            lines.append(f"| {arm}: {study['arms'][arm]['says']} |" + " |" * (len(head) - 1))
            continue
        parts = [f"{arm}: {study['arms'][arm]['says']}"]
        for name in names:
            values = [cell["metrics"][name] for cell in cells[arm].values() if name in cell["metrics"]]
            parts.append(_spread(values) if values else "")
        before = [other for other in behind(study["arms"], arm) if other in rows]
        trained = "yes" if "curve" in row else "nothing is trained"
        if "curve" not in row and set(before) & set(slow):
            trained = "not what it reads"
        parts += [str(study["numbers"][study["arms"][arm]["budget"][key]]) for key in budgets]
        parts += [f"{row[key]:.2g}" for key in costs] + [_seconds(row, before, rows)]
        lines.append(f"| {' | '.join(parts)} | {'**not converged**' if arm in slow else trained} |")
    return lines


def _seconds(row: dict, before: list[str], rows: dict[str, dict]) -> str:
    """CPU seconds of a seed of an arm, and those of the arms whose runs it reads."""
    own = f"{mean(row['cpu_seconds']):.0f}"
    if not before:
        return own
    theirs = sum(mean(rows[other]["cpu_seconds"]) for other in before)
    return f"{own} + {theirs:.0f} of {before[0] if len(before) == 1 else f'{len(before)} arms'}"


def _forecasts(result: dict) -> list[str]:
    """The table of all forecasts: their correlations with each target, with Student's t interval."""
    study = result["stated"]["study"]
    columns = {name: about for name, about in metrics_of(study).items() if name not in study["metrics"]}
    lines = [
        f"| forecast | {' | '.join(about['says'] for about in columns.values())} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    cells = forecast_cells(cells_of(result), study)
    if not cells:
        return lines
    whole = correlations(cells_of(result), study, list(cells["forecast"]))
    for name in forecasts(study):
        title = study["metrics"][name]["says"] if name in study["metrics"] else "from all measures"
        parts = [student_interval([cell["metrics"][column] for cell in cells[name].values()]) for column in columns]
        values = [
            f"{whole[name][column]:.2f} ({part['low']:.2f} to {part['high']:.2f})"
            for column, part in zip(columns, parts, strict=True)
        ]
        lines.append(f"| {title} | {' | '.join(values)} |")
    about = (
        "Correlations of all seeds together, and Student's t interval of the jackknife over seeds, which corrects bias "
    )
    unseen = correlations(cells_of(result), study, list(cells["forecast"]), unseen=True)["forecast"]
    values = ", ".join(f"{unseen[column]:.2f}" for column in columns)
    about += (
        f"and may leave [-1, 1] where seeds differ much. From all measures, learned from other seeds alone: {values}."
    )
    return [*lines, "", about]


def dial_places(result: dict) -> str:
    """Where along a study's dial each metric is best, with Student's t interval over the seeds."""
    study = result["stated"]["study"]
    dial = study["dial"]
    cells = cells_of(result)
    seeds = sorted(set.intersection(*(set(cells.get(arm, {})) for arm in dial["arms"])))
    parts = []
    for name in dial["metrics"]:
        best = max if study["metrics"][name]["better"] == "higher" else min
        places = [dial["arms"][best(dial["arms"], key=lambda arm: cells[arm][seed]["metrics"][name])] for seed in seeds]
        if len(places) > 1:
            found = student_interval(places)
            interval = f"{found['mean']:.3g} ({found['low']:.2g} to {found['high']:.2g})"
            parts.append(f"{study['metrics'][name]['says']}: best at {interval}")
    values = ", ".join(map(str, dial["arms"].values()))
    found = "; ".join(parts) or f"of {len(seeds)} seeds nothing can be said"
    return f"Place of the best along the dial ({dial['says']}: {values}), mean and 95 % over seeds: {found}."


def draw_dial(result: dict, file) -> None:
    """Plot of a study's metrics over its dial, and of the others over the first one; a PNG.

    Above, seeds are thin lines, their mean is a thick one. Below, means over seeds of all arms that have both: those of
    the dial joined in its order, the others named.
    """
    study = result["stated"]["study"]
    dial = study["dial"]
    cells = cells_of(result)
    figure = Figure(figsize=(2.6 * len(dial["metrics"]), 5.2), layout="constrained")
    above, below = figure.subplots(2, len(dial["metrics"]), squeeze=False)
    values = list(dial["arms"].values())
    first, *others = dial["metrics"]
    below[0].axis("off")
    for panel, name in zip(below[1:], others, strict=True):
        _draw_against(panel, first, name, study, cells)
    for panel, name in zip(above, dial["metrics"], strict=True):
        seeds = sorted(set.intersection(*(set(cells.get(arm, {})) for arm in dial["arms"])))
        curves = [[cells[arm][seed]["metrics"][name] for arm in dial["arms"]] for seed in seeds]
        for curve in curves:
            panel.plot(values, curve, "o-", color="tab:blue", alpha=0.25, linewidth=0.8, markersize=2)
        if curves:
            panel.plot(
                values, [mean(column) for column in zip(*curves, strict=True)], "o-", color="black", markersize=4
            )
        panel.set_title(study["metrics"][name]["says"], fontsize=8)
        panel.set_xlabel(dial["says"], fontsize=7)
        panel.tick_params(labelsize=7)
    save_small(figure, file)


def _draw_against(panel, across: str, up: str, study: dict, cells: dict) -> None:
    """Means over seeds of one metric against those of another, a point an arm."""
    means = {}
    for arm, of_seed in cells.items():
        found = [cell["metrics"] for cell in of_seed.values() if {across, up} <= cell["metrics"].keys()]
        if found:
            means[arm] = tuple(mean(metrics[name] for metrics in found) for name in (across, up))
    joined = [means[arm] for arm in study["dial"]["arms"] if arm in means]
    if joined:
        panel.plot(*zip(*joined, strict=True), "o-", color="black", markersize=4, linewidth=0.8)
    ends = [*study["dial"]["arms"]][:: max(1, len(study["dial"]["arms"]) - 1)]
    for arm, place in means.items():
        if arm not in study["dial"]["arms"]:
            panel.plot(*place, "o", markersize=4)
        elif arm not in ends:
            continue
        label = f"{study['dial']['arms'].get(arm, arm)}"
        panel.annotate(label, place, xytext=(3, 3), textcoords="offset points", fontsize=6)
    panel.margins(x=0.45, y=0.2)
    panel.set_xlabel(study["metrics"][across]["says"], fontsize=7)
    panel.set_title(study["metrics"][up]["says"], fontsize=8)
    panel.tick_params(labelsize=7)


def _paragraph(claim: dict, entry: dict, result: dict) -> str:
    stated = result["stated"]
    study, machine = stated["study"], result["environment"]
    slow = entry["not_converged"]
    curves = [study["curve"], *(study["curves"][name] for name in entry["curves"])]
    said = [f"the logarithm of {about['says']}" if about.get("relative") else about["says"] for about in curves]
    curve = "; ".join(said)
    flat = (
        f"All curves of {curve} of the arms that it reads are flat."
        if result["metrics"]["cells"]
        else f"There is no curve of {curve} yet."
    )
    if slow:
        flat = f"Not converged, as the last quarter makes more than {FLAT_SHARE:.0%} of the change of {curve}: "
        flat += f"{_slow(entry)}; the verdict is on this budget."
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
        f"Fingerprint of statement, images and shared "
        f"encoders: {result['fingerprint'][:16]}; {processor(machine)}, {machine['threads']} thread(s), torch "
        f"{machine['libraries']['torch']}.",
        *(
            f"Seeds {', '.join(map(str, part['seeds']))} by an earlier run on {processor(part['environment'])}, "
            f"torch {part['environment']['libraries']['torch']}."
            for part in result.get("before", [])
            if part["seeds"]
        ),
    ]
    return " ".join(" ".join(part.split()) for part in parts)


def processor(environment: dict) -> str:
    """The processor of a result, with its vector instructions where they were recorded: they decide rounding."""
    instructions = f" ({environment['instructions']})" if "instructions" in environment else ""
    return environment["processor"] + instructions


def _difference(metric: dict) -> str:
    """What the figures of a comparison by a metric are, as the head of its table says it."""
    first, second = ("second", "first") if metric["better"] == "lower" else ("first", "second")
    what = f"{first} / {second} - 1" if metric.get("relative") else f"{first} - {second}"
    return f"{what} (lower is better)" if metric["better"] == "lower" else what


def _amount(value: float, metric: dict) -> str:
    return f"{100 * math.expm1(value):+.1f} %" if metric.get("relative") else f"{value:+.3g}"


def _interval(comparison: dict, metric: dict) -> str:
    if comparison["mean"] is None:
        return ""
    centre = _amount(comparison["mean"], metric)
    if comparison["low"] is None:
        return centre
    bounds = [f"{which} that in {seeds} seeds" for which, seeds in comparison.get("bounds", {}).items()]
    interval = f"{centre} ({_amount(comparison['low'], metric)} to {_amount(comparison['high'], metric)})"
    return ", ".join([interval, *bounds])


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g}" + (f" ({stdev(values):.2g})" if len(values) > 1 else "")


def draw(name: str, entry: dict, result: dict, file) -> None:
    """Plot of a claim's paired differences: seeds, mean with its interval, no difference (0) and the margin; a PNG."""
    metrics = metrics_of(result["stated"]["study"])
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
        title = f"{comparison['first']} better than {comparison['second']}, {metric['says']}{unit}"
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.savefig(file, dpi=100, format="png")


def write_page(results: list[dict], folder: Path, source: Path = CLAIMS) -> dict[str, dict]:
    """Write claims.md, CLAIM.png of each claim, and STUDY_dial.png or STUDY_gains.png; returns `verdicts`."""
    from hf_dpssl.runs.atomic_files import atomic_file

    entries = verdicts(results, source)
    for result in results:
        for name in result["stated"]["claims"]:
            with atomic_file(folder / f"{name}.png", "wb") as file:
                draw(name, entries[name], result, file)
        about = result["stated"]["study"]
        study = next(iter(result["stated"]["claims"].values()))["study"]
        if "dial" in about:
            with atomic_file(folder / f"{study}_dial.png", "wb") as file:
                draw_dial(result, file)
        if "gains" in about:
            with atomic_file(folder / f"{study}_gains.png", "wb") as file:
                draw_gains(about, cells_of(result), file)
    with atomic_file(folder / "claims.md") as file:
        file.write(f"# Claims\n\n{table(results, source)}\n\n{sections(results, source=source)}")
    return entries
