"""Which of all checkpoints and draws a run reports, by DomainBed's three rules, and the table of it.

| rule | chosen by | among |
|---|---|---|
| training_domains | mean accuracy on the held-out fifths of the training domains | all checkpoints and draws |
| oracle | accuracy on a fifth of the target itself: not to be had by a user | the last checkpoint of each draw |
| leave_one_domain_out | mean over the other domains of the accuracy on each when it is held out too | as the first |

What is reported is the accuracy on the target's other four fifths.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.student_interval import student_interval

FEWEST_SEEDS = 5  # of which an interval is stated


def chosen(rule: str, target: str, runs: Sequence[dict]) -> dict | None:
    """The checkpoint that a rule takes.

    Args:
        rule: one of the table.
        target: domain that is held out.
        runs: records of one algorithm and seed, all draws; runs that hold out another domain as well serve the last
            rule only.

    Returns:
        {"accuracy", "validation", "draw", "step"}, or None where the runs that the rule needs are not there.
    """
    alone = [run for run in runs if run["targets"] == [target]]
    found = []
    for run in sorted(alone, key=lambda run: run["draw"]):
        pairs = [other for other in runs if other["draw"] == run["draw"] and len(other["targets"]) == 2]
        pairs = [other for other in pairs if target in other["targets"]]
        candidates = _candidates(rule, target, run, pairs)
        if candidates:
            found.append(max(candidates, key=lambda candidate: candidate["validation"]) | {"draw": run["draw"]})
    # Of equals the first checkpoint and the last draw, as DomainBed.
    return max(reversed(found), key=lambda candidate: candidate["validation"]) if found else None


def _candidates(rule: str, target: str, run: dict, pairs: list[dict]) -> list[dict]:
    records = [record for record in run["records"] if "targets" in record]
    if rule == "training_domains":
        validations = [_mean(record["held_out"].values()) for record in records]
    elif rule == "oracle":
        records = records[-1:]
        validations = [record["targets"][target]["fifth"] for record in records]
    elif rule == "leave_one_domain_out":
        others = set(run["records"][0]["held_out"])
        tables = {}
        for pair in pairs:
            name = next(name for name in pair["targets"] if name != target)
            measured = [record for record in pair["records"] if "targets" in record]
            tables[name] = {record["step"]: record["targets"][name]["accuracy"] for record in measured}
        if set(tables) != others:
            return []
        records = [record for record in records if all(record["step"] in table for table in tables.values())]
        validations = [_mean(table[record["step"]] for table in tables.values()) for record in records]
    else:
        raise ValueError(f"there is no rule of selection {rule!r}.")
    return [
        {"accuracy": record["targets"][target]["accuracy"], "validation": validation, "step": record["step"]}
        for record, validation in zip(records, validations, strict=True)
    ]


def table(runs: Sequence[dict], rules: Sequence[str], domains: Sequence[str]) -> list[dict]:
    """A row for each algorithm and rule for which every domain has been a target.

    All rows of a rule are of the same seeds and draws, those that are there for every algorithm which is there at all:
    equal budgets, whatever part of a plan has run.

    Returns:
        Rows {"selection", "algorithm", "adapts", "domains": {name: accuracy}, "mean", "worst", "interval": {"mean",
        "low", "high"} of the mean over seeds, or None below five, "seeds", "draws", "chosen"}, in percent.
    """
    rows = []
    for rule in rules:
        by_algorithm = {name: [run for run in runs if run["algorithm"] == name] for name in _in_order(runs)}
        complete = {name: _complete(rule, mine, domains) for name, mine in by_algorithm.items()}
        soups = {name for name, mine in by_algorithm.items() if "runs" in mine[0]}
        budgets = [found for name, found in complete.items() if found and name not in soups]
        shared = set.intersection(*budgets) if budgets else set()
        for name, mine in by_algorithm.items():
            kept = complete[name] if name in soups else shared & complete[name]
            seeds = sorted({seed for seed, _ in kept})
            if not seeds:
                continue
            found = {}
            for seed in seeds:
                of_seed = [run for run in mine if run["seed"] == seed and (seed, run["draw"]) in kept]
                found[seed] = {domain: chosen(rule, domain, of_seed) for domain in domains}
            means = [_mean(of["accuracy"] for of in found[seed].values()) for seed in seeds]
            per_domain = {domain: _mean(found[seed][domain]["accuracy"] for seed in seeds) for domain in domains}
            row = {"selection": rule, "algorithm": name, "adapts": mine[0]["adapts"], "domains": per_domain}
            row |= {"mean": _mean(means), "worst": min(per_domain.values())}
            row |= {"interval": student_interval(means) if len(means) >= FEWEST_SEEDS else None}
            draws = mine[0]["of"] if name in soups else min(sum(of == seed for of, _ in kept) for seed in seeds)
            row |= {"seeds": len(seeds), "draws": draws}
            rows.append(row | {"chosen": {str(seed): found[seed] for seed in seeds}})
    return rows


def as_markdown(rows: Sequence[dict], domains: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The rows as tables, one for each rule; methods that adapt to the target are marked."""
    lines = []
    for rule in _in_order(rows, "selection"):
        warning = ": it sees a fifth of the target" if rule == "oracle" else ""
        lines += [f"Selection by {rule.replace('_', ' ')}{warning}. Accuracy in percent.", ""]
        lines.append(f"| algorithm | {' | '.join(domains)} | mean | 95 % interval | worst | seeds x draws |")
        lines.append(f"|---|{'---|' * (len(domains) + 4)}")
        for row in (row for row in rows if row["selection"] == rule):
            interval = row["interval"]
            around = f"{interval['low']:.1f} - {interval['high']:.1f}" if interval else f"below {FEWEST_SEEDS} seeds"
            cells = [f"{row['domains'][domain]:.1f}" for domain in domains]
            cells += [f"{row['mean']:.1f}", around, f"{row['worst']:.1f}", f"{row['seeds']} x {row['draws']}"]
            lines.append(f"| {row['algorithm']}{' *' if row['adapts'] else ''} | {' | '.join(cells)} |")
        lines.append("")
    if any(row["adapts"] for row in rows):
        lines.append(
            "\\* adapts to batches of at most 64 pictures of the target at test time; the others see each alone."
        )
    return "\n".join([*lines, *notes]) + "\n"


def _complete(rule: str, runs: Sequence[dict], domains: Sequence[str]) -> set[tuple[int, int]]:
    """The (seed, draw) with which every domain has been a target, as far as the rule needs it."""
    found = set()
    for seed, draw in {(run["seed"], run["draw"]) for run in runs}:
        mine = [run for run in runs if (run["seed"], run["draw"]) == (seed, draw)]
        if all(chosen(rule, domain, mine) is not None for domain in domains):
            found.add((seed, draw))
    return found


def _in_order(rows: Sequence[dict], key: str = "algorithm") -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
