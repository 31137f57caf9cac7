"""The tables of pacs.py in Markdown: a zoo on PACS at 64 pixels, and algorithms on frozen and on learned features."""

from __future__ import annotations

from itertools import product

from hf_dpssl.domains.selection import as_markdown
from hf_dpssl.evaluation.student_interval import student_interval

METHODS = {
    "single": "ZooD, the first one",
    "ensemble": "ZooD, three side by side",
    "selection": "ZooD, features selected from them",
    "random": "as many of their features at random",
    "best": "the best one, known afterwards",
}
MEASURES = {
    "score": "ZooD's score",
    "labels": "its labels alone",
    "stability": "its stability alone",
    "log_me": "LogME",
    "h_score": "H-score",
    "nce": "NCE",
    "trans_rate": "TransRate",
    "knn_top1": "kNN across domains",
    "in_domain_top1": "accuracy in the domains",
    "width": "width",
}


def zood_table(report: dict) -> list[str]:
    """Every encoder alone, what is made of them, and how measures agree with accuracy."""
    metrics = report["metrics"]
    targets = metrics["targets"]
    lines = [
        f"| percent right in the domain left out | {' | '.join(targets)} | mean |",
        "|---" * (len(targets) + 2) + "|",
    ]
    for entry in metrics["encoders"]:
        values = [target["encoders"][entry["name"]]["accuracy"] for target in targets.values()]
        lines.append(_row(entry["name"], values))
    for key, title in METHODS.items():
        values = [target[key]["accuracy"] for target in targets.values()]
        interval = metrics["methods"][key]
        lines.append(_row(f"**{title}**", values) + f" ({interval['low']:.1f} to {interval['high']:.1f})")
    lines = [line if line.endswith("|") else f"{line} |" for line in lines]
    groups = metrics["agreement"]
    lines += ["", f"| agreement with accuracy | {' | '.join(f'tau, {group} | regret' for group in groups)} |"]
    lines.append("|---" * (1 + 2 * len(groups)) + "|")
    for measure, title in MEASURES.items():
        cells = []
        for found in groups.values():
            value = found[measure]
            tau = value["tau"]
            cells.append(f"{tau['mean']:.2f} ({tau['low']:.2f} to {tau['high']:.2f}) | {value['regret']:.1f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def transfer_table(report: dict) -> list[str]:
    """Each encoder on parts of other sets, by each protocol of the suite."""
    rows = report["rows"]
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    lines = [f"| set | encoder | {' | '.join(protocols)} |", "|---" * (2 + len(protocols)) + "|"]
    found = {(row["title"], row["encoder"], row["protocol"]): row for row in rows}
    titles, encoders = (list(dict.fromkeys(row[name] for row in rows)) for name in ("title", "encoder"))
    for title, encoder in product(titles, encoders):
        cells = []
        for protocol in protocols:
            row = found[title, encoder, protocol]
            cells.append(f"{row['mean']:.1f} ({row['low']:.1f} to {row['high']:.1f})")
        lines.append(f"| {title} | {encoder} | {' | '.join(cells)} |")
    return lines


def _row(title: str, values: list[float]) -> str:
    return f"| {title} | {' | '.join(f'{value:.1f}' for value in values)} | {sum(values) / len(values):.1f}"


def algorithms_table(report: dict) -> list[str]:
    """A table for each rule of selection."""
    rows = [row | {"interval": student_interval(row["means"])} for row in report["rows"]]
    return as_markdown(rows, list(rows[0]["domains"]), report["notes"]).strip().splitlines()
