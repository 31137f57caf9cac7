"""Views per second beside lightly's, and a whole SimCLR step beside the bare backbone's, on one CPU core.

    make bench        # or: python tests/benchmarks/augmentation.py [--rounds 9] [--threads 1]

Ours and theirs alternate; the minimum of all rounds counts, in CPU seconds of the process, so that other programs on
the machine count less. Both make two batches of views: we of a batch of uint8 tensors as our loader gives it, lightly's
SimCLRTransform of one Pillow picture at a time, stacked. Both get the same strengths and probabilities; blur only at
224 pixels (lightly: Pillow's approximation by boxes; we: the Gaussian of torchvision). The whole step is loader, keyed
draws, augmentation, encoder and head, t-SimCLR loss and optimiser; the bare one forward, backward and optimiser of
the backbone alone on as many ready images. Writes tests/benchmarks/results/augmentation.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from tqdm import tqdm

from hf_dpssl.batches import ImageSource
from hf_dpssl.data import load_images
from hf_dpssl.modeling_contrastive import ContrastiveConfig
from hf_dpssl.modeling_contrastive_pretraining import SimCLRForPreTraining
from hf_dpssl.results import write_results
from hf_dpssl.transforms import MODES, NATURAL, TwoViews

sys.path.insert(0, str(Path(__file__).parent.parent))
from pictures import photograph_patches

RESULTS = Path(__file__).parent / "results" / "augmentation.json"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def view_calls(size: int, batch_size: int) -> dict[str, Callable]:
    """Calls that make two views of each of `batch_size` images: of both our modes, and lightly's."""
    images, ids = photograph_patches(batch_size, size), torch.arange(batch_size)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    a = replace(NATURAL, blur=0.5 if size == 224 else 0)
    theirs = SimCLRTransform(
        input_size=size, cj_prob=a.jitter, cj_bright=a.brightness, cj_contrast=a.contrast, cj_sat=a.saturation,
        cj_hue=a.hue, min_scale=a.crop_scale[0], random_gray_scale=a.grey, gaussian_blur=a.blur, hf_prob=a.flip,
    )  # fmt: skip

    def lightly() -> list[torch.Tensor]:
        return [torch.stack(views) for views in zip(*(theirs(picture) for picture in pictures), strict=True)]

    ours = {mode: partial(TwoViews(a, MEAN, STD, 0, mode=mode), images, ids, 0) for mode in MODES}
    return ours | {"lightly": lightly}


def step_calls(batch_size: int, mode: str) -> dict[str, Callable]:
    """A whole SimCLR step with ResNet-18 at 32 pixels, and the bare backbone's on 2 x `batch_size` images."""
    source = ImageSource(load_images("digits"), image_size=32, batch_size=batch_size, seed=0)
    views, batches = TwoViews(NATURAL, MEAN, STD, 0, mode=mode), iter(source.loader())
    config = ContrastiveConfig(
        architecture="resnet18",
        pretrained_cfg={"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
        kernel="student_t",
        normalization="joint",
        feature_norm="none",
        temperature=2.0,
        dof=5.0,
        projection_dim=128,
    )
    model, backbone = SimCLRForPreTraining(config).train(), timm.create_model("resnet18", num_classes=0).train()
    optimizer, bare_optimizer = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, backbone))
    ready = torch.cat(views(*(next(batches)[name] for name in ("images", "sample_ids", "epoch"))))

    def whole() -> None:
        batch = next(batches)
        model(*views(batch["images"], batch["sample_ids"], batch["epoch"])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def bare() -> None:
        backbone(ready).square().mean().backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()

    return {"whole": whole, "bare": bare}


def fastest(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Minimum CPU seconds of each call over alternating rounds."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # warm-up
    for _ in tqdm(range(rounds), desc=" and ".join(calls), leave=False):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    """Run all comparisons and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    metrics: dict[str, list] = {"views": [], "steps": []}
    for size, batch_size in ((32, 256), (224, 32)):
        seconds = fastest(view_calls(size, batch_size), args.rounds)
        rates = {name: round(2 * batch_size / value) for name, value in seconds.items()}
        for mode in MODES:
            ratio = round(seconds["lightly"] / seconds[mode], 2)
            row = {"size": size, "batch_size": batch_size, "mode": mode, "views_per_second": rates[mode]}
            metrics["views"].append(row | {"lightly_views_per_second": rates["lightly"], "ratio": ratio})
            print(f"{size:>3} px {mode:<5} {rates[mode]:>6} views/s, {ratio:>5} x lightly")
    for mode in MODES:
        seconds = fastest(step_calls(128, mode), args.rounds)
        row = {f"{name}_ms": round(1e3 * value, 1) for name, value in seconds.items()}
        metrics["steps"].append({"mode": mode, **row, "ratio": round(seconds["whole"] / seconds["bare"], 3)})
        print("step, {mode:<5} {whole_ms:>7} ms, {ratio:>5} of the bare backbone".format(**metrics["steps"][-1]))
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "images_per_step": 128, "step_size": 32, "step_architecture": "resnet18"}
    dataset = "parts of scikit-learn's sample photographs (views), digits at 32 pixels (steps)"
    write_results(RESULTS, metrics, dataset=dataset, seed=0, samples=samples)


if __name__ == "__main__":
    main()
