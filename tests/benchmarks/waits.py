"""How often a training step makes the host wait for a GPU, and of how many graphs it is when compiled; without a GPU.

    python tests/benchmarks/waits.py

The steps of tests/rehearsal/training_steps.py, which its tests hold to their budgets: views, forward, backward,
clipping and update. `BEFORE` was counted by these functions on the package before it was made to wait less: that of
2026-11-29, with the cases that it had; of domains.py 2026-11-30. Writes tests/benchmarks/results/waits.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from hf_dpssl.data.views import NATURAL, TwoViews
from hf_dpssl.runs.rehearsal import rehearsal
from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.shipped_folders import shipped_folder

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(shipped_folder("training")), str(TESTS / "rehearsal")]

from training_steps import CASES, Graphs, batch, waits_of  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "waits.json"
BEFORE = {  # waits, graphs of two steps
    "contrastive SimCLR": (12, 18),
    "contrastive t-SimCLR": (12, 17),
    "contrastive SimCLR auto": (16, 31),
    "contrastive t-SimCLR auto": (15, 34),
    "contrastive MoCo": (16, 19),
    "contrastive t-MoCo": (16, 20),
    "contrastive t-MoCo auto": (18, 39),
    "dae_vq": (4, 16),
    "dae_vq kl": (0, 1),
    "dae_vq adversarial": (4, 16),
    "dae_dit flow": (0, 1),
    "dae_dit epsilon": (0, 1),
    "dae_ar llama": (0, 1),
    "dae_gan dae": (0, 1),
    "dae_gan noise": (0, 1),
    **dict.fromkeys((name for name in CASES if name.startswith("domains")), (4, None)),
    "domains sagnet": (10, None),
    "views fused": (7, None),
    "views exact": (43, None),
}


def graphs_of(name: str) -> int:
    """Graphs with an operation of what --compile compiles, over two steps: the first starts queue and codebook."""
    torch._dynamo.reset()
    modules, prepare, step = CASES[name]()
    graphs = Graphs()
    modules[0].compile(backend=graphs)
    prepare()
    for seed in range(2):
        torch.manual_seed(seed)  # of dropout
        step(batch())
    return graphs.count


def waits_of_views(mode: str) -> int:
    """Of both views of a batch."""
    given = batch()
    with rehearsal() as rehearsed:
        images, ids = (rehearsed.fake_of(given[name]) for name in ("images", "sample_ids"))
        TwoViews(NATURAL, [0.5] * 3, [0.2] * 3, 0, mode=mode)(images, ids, 0)
        return len(rehearsed.syncs)


def main() -> None:
    """Count, print, write."""
    description = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=description).parse_args()
    torch.manual_seed(0)
    compiled = {name: not name.startswith("domains") for name in CASES}
    found = {name: (len(waits_of(name)), graphs_of(name) if compiled[name] else None) for name in CASES}
    found |= {f"views {mode}": (waits_of_views(mode), None) for mode in ("fused", "exact")}
    rows = []
    for name, (waits, graphs) in found.items():
        waits_before, graphs_before = BEFORE.get(name, (None, None))
        row = {"what": name, "waits": waits, "waits_before": waits_before}
        rows.append(row | {"graphs": graphs, "graphs_before": graphs_before})
        print(f"{name:<28} waits {waits} (before: {waits_before}), graphs {graphs} (before: {graphs_before})")
    write_results(RESULTS, {"steps": rows}, dataset="random numbers", seed=0, samples={"steps": 2})


if __name__ == "__main__":
    main()
