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

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from timing import Comparison, compare, parser

from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.views import MODES, NATURAL, TwoViews
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig
from hf_dpssl.runs.results import write_results

sys.path.insert(0, str(Path(__file__).parent.parent))
from pictures import photograph_patches

RESULTS = Path(__file__).parent / "results" / "augmentation.json"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
AIMS = {(32, "exact"): 1 / 3, (32, "fused"): 1 / 7, (224, "exact"): 1 / 1.5, (224, "fused"): 1 / 2.5}  # of the time


def view_rows(size: int, batch_size: int) -> list[Comparison]:
    """Two views of each of `batch_size` images: both our modes beside lightly."""
    images, ids = photograph_patches(batch_size, size), torch.arange(batch_size)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    a = replace(NATURAL, blur=0.5 if size == 224 else 0)
    transform = SimCLRTransform(
        input_size=size, cj_prob=a.jitter, cj_bright=a.brightness, cj_contrast=a.contrast, cj_sat=a.saturation,
        cj_hue=a.hue, min_scale=a.crop_scale[0], random_gray_scale=a.grey, gaussian_blur=a.blur, hf_prob=a.flip,
    )  # fmt: skip

    def ours(views: TwoViews) -> float:
        return views(images, ids, 0)[0].flatten()[0].item()

    def theirs() -> float:
        views = zip(*(transform(picture) for picture in pictures), strict=True)
        return [torch.stack(view) for view in views][0].flatten()[0].item()

    rows = []
    for mode in MODES:
        call = partial(ours, TwoViews(a, MEAN, STD, 0, mode=mode))
        what = f"{2 * batch_size} views, {size} px, {mode}"
        rows.append(Comparison(what, "lightly SimCLRTransform", call, theirs, aim=round(AIMS[size, mode], 3)))
    return rows


def step_row(batch_size: int, mode: str) -> Comparison:
    """A whole SimCLR step with ResNet-18 at 32 pixels beside the bare backbone's on 2 x `batch_size` images."""
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

    def whole() -> float:
        batch = next(batches)
        loss = model(*views(batch["images"], batch["sample_ids"], batch["epoch"])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def bare() -> float:
        loss = backbone(ready).square().mean()
        loss.backward()
        bare_optimizer.step()
        bare_optimizer.zero_grad()
        return loss.item()

    return Comparison(f"whole SimCLR step, {2 * batch_size} views, {mode}", "bare backbone", whole, bare, aim=1.1)


def main() -> None:
    """Run all comparisons and write the JSON."""
    args = parser(__doc__, 9).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [*view_rows(32, 256), *view_rows(224, 32), *(step_row(128, mode) for mode in MODES)]
    measured = compare(rows, args.rounds, clock=time.process_time)
    for row, batch_size in zip(measured, (256, 256, 32, 32), strict=False):
        row["times_faster"] = round(1 / row["ratio"], 2)
        row["views_per_second"], row["their_views_per_second"] = (
            round(2e3 * batch_size / row[name]) for name in ("ours_ms", "theirs_ms")
        )
    RESULTS.parent.mkdir(exist_ok=True)
    dataset = "parts of scikit-learn's sample photographs (views), digits at 32 pixels (steps)"
    write_results(RESULTS, {"comparisons": measured}, dataset=dataset, seed=0, samples={"rounds": args.rounds})


if __name__ == "__main__":
    main()
