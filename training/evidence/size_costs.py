"""Which size for how many images, and what it costs on a GPU: computed, not measured.

    python training/evidence/size_costs.py    # a minute; writes results/size_costs.json
    python training/evidence/readme.py        # and from it the table of training/README.md

Memory: `hf-dpssl rehearse`, of a GPU, the largest stage. Hours: operations of all steps over an assumed share of the
peak of the row's A100 (run_times.py), if images come fast enough; a small model takes longer, since its launches are
waited for. An autoencoder's discriminator and perceptual network, which these rows do not have, come on top.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm.auto import tqdm

EVIDENCE = Path(__file__).parent
sys.path[:0] = [str(EVIDENCE), str(EVIDENCE.parent)]

import rehearse  # noqa: E402
from run_times import PEAK_TERAFLOPS, SHARES_OF_PEAK, seconds_of  # noqa: E402

from hf_dpssl.runs.results import write_results  # noqa: E402

CLASSES = "imagenet-1k"  # whose 1,000 classes the models are rehearsed for; no image is read
# Images, side, GPUs, batch of all of them, steps of each stage, flags by script, recipes that are nearest.
SIZES = [
    {
        "images": 1_000, "side": 64, "gpus": 1, "batch": 64, "steps": 5_000,
        "contrastive": "--architecture resnet18",
        "dae_vq": "--encoder_channels 32 64 64 --decoder_channels 48 96 96",
        "dae_dit": "--num_layers 6 --width 256",
        "recipes": ["digits"],
    },
    {
        "images": 10_000, "side": 64, "gpus": 1, "batch": 128, "steps": 20_000,
        "contrastive": "--architecture resnet18",
        "dae_vq": "--preset f4",
        "dae_dit": "--preset dit-s-2",
        "recipes": ["t-simclr-resnet50-cifar10", "gan-cifar10-jpeg"],
    },
    {
        "images": 100_000, "side": 128, "gpus": 4, "batch": 256, "steps": 100_000,
        "contrastive": "--architecture resnet50",
        "dae_vq": "--preset f8",
        "dae_dit": "--preset dit-b-2",
        "recipes": ["vq-dae-f16-faceshq", "ar-faceshq"],
    },
    {
        "images": 1_000_000, "side": 256, "gpus": 8, "batch": 256, "steps": 400_000,
        "contrastive": "--architecture resnet50",
        "dae_vq": "--preset f8",
        "dae_dit": "--preset dit-xl-2",
        "recipes": ["t-moco-v2-resnet50-imagenet", "vq-dae-f8-imagenet", "dit-xl2-imagenet"],
    },
]  # fmt: skip
SCRIPTS = ("contrastive", "dae_vq", "dae_dit")


def costs_of(size: dict, script: str) -> dict:
    """{"bytes": of a GPU, "hours": {GPU: {share of its peak: hours}}} of one script at one size."""
    flags = f"--dataset {CLASSES} --image_size {size['side']} --batch_size {size['batch'] // size['gpus']}".split()
    flags += [*size[script].split(), "--mixed_precision", "bf16"]
    if script == "contrastive":
        flags += ["--model_args", "{}"]
    if script == "dae_dit":
        flags += ["--autoencoder_args", f"{size['dae_vq']} --image_size {size['side']}"]
    asked = rehearse.parsed([script, *flags])
    process = rehearse.Process(size["gpus"], "bf16", sharded=False)
    stages = [rehearse.memory_of(asked, number, process) for number in range(len(rehearse.stage_names(asked)))]
    operations = sum(stage["operations"] for stage in stages) * size["steps"]
    hours = {
        gpu: {share: seconds / 3600 for share, seconds in by_share.items()}
        for gpu, by_share in seconds_of(operations).items()
    }
    return {"bytes": max(stage["bytes"]["total"] for stage in stages), "hours": hours}


def main() -> list[dict]:
    """Compute all sizes and write the results; returns the rows."""
    rows = [
        size | {"costs": {script: costs_of(size, script) for script in SCRIPTS}}
        for size in tqdm(SIZES, desc="sizes", unit="size")
    ]
    metrics = {
        f"{script}_{row['images']}_bytes": costs["bytes"] for row in rows for script, costs in row["costs"].items()
    }
    assumed = {"peak_teraflops": PEAK_TERAFLOPS, "shares_of_peak": list(SHARES_OF_PEAK)}
    about = {"note": "computed, not measured: see the top of size_costs.py", "assumed": assumed}
    output = EVIDENCE / "results" / "size_costs.json"
    write_results(output, metrics, dataset="none", seed=0, samples={"images": 0}, rows=rows, **about)
    return rows


if __name__ == "__main__":
    main()
