"""A one-step generator's step beside a DiT's, and how far its field is from plain loops.

    make bench        # or: python tests/benchmarks/drifting.py [--rounds 7] [--threads 1]

Steps are forward, backward, clip, AdamW and average of the weights, on latents of 4 x 8 x 8 numbers and the defaults of
training/dae_drift.py and training/dae_dit.py: of a step 320 images in ten sets beside 48 real ones each, or the DiT's
batch. Networks have equal parameters within 10 %: dense layers, 3 of width 256, and a DiT, 4 of width 128.

Errors are the largest ones of the field, whose root mean square is about the number of scales, of 32 generated, 48 real
and 16 repelling points in 256 dimensions with weights, beside loops over lists of Python's floats.

Time is the processor's. Writes tests/benchmarks/results/drifting.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from timing import Comparison, compare, parser
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from loops import field_by_loops, points

from hf_dpssl.contrastive import drift_field, drift_loss
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer, objective_loss, training_example
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.latent_training.drift_arguments import DriftArguments
from hf_dpssl.latent_training.drift_training import generate
from hf_dpssl.models.choices import FIELD_KERNELS, FIELD_SCALES
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "drifting.json"
CLASSES = 10


def networks() -> dict[str, nn.Module]:
    """Dense layers and a DiT, new ones."""
    torch.manual_seed(0)
    return {
        "dense": LatentMLP(in_channels=4, sample_size=8, num_layers=3, width=256, num_embeds_ada_norm=CLASSES),
        "DiT": make_transformer(
            num_layers=4, width=128, num_heads=4, patch_size=2, latent_channels=4, latent_size=8, num_classes=CLASSES
        ),
    }


def updating(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], float]:
    """A step of training on the same numbers each time."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.99), weight_decay=0, fused=True)
    averages = EMAModel(model.parameters(), decay=0.998, foreach=True)

    def step() -> float:
        value = loss(model)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.step(model.parameters())
        return value.item()

    return step


def one_step_loss(model: nn.Module) -> Tensor:
    """Of the default sets of dae_drift.py."""
    args, generator = DriftArguments(), torch.Generator().manual_seed(1)
    real = torch.randn(args.sets_per_batch, args.real_per_set, 4, 8, 8, generator=generator)
    noise = torch.randn(args.batch_size, 4, 8, 8, generator=generator)
    labels = torch.arange(args.sets_per_batch).repeat_interleave(args.images_per_set)
    return drift_loss(generate(model, noise, labels).unflatten(0, (args.sets_per_batch, -1)), real, **args.field).loss


def flow_loss(batch: int) -> Callable[[nn.Module], Tensor]:
    """Of a batch of dae_dit.py."""
    scheduler, ids = make_scheduler("flow"), torch.arange(batch)
    clean = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module) -> Tensor:
        options = {"objective": "flow", "scheduler": scheduler}
        noised, timesteps, target = training_example(clean, ids, 0, seed=0, **options)
        output = model(noised, timestep=timesteps, class_labels=ids % CLASSES).sample
        return objective_loss(output, target, timesteps, **options)["loss"]

    return loss


def comparisons() -> list[Comparison]:
    """Steps of one-step generators beside the DiT's own, and beside as many images of it."""
    batches = {"one step": DriftArguments().batch_size, "flow": DiTArguments().batch_size}
    calls = {name: updating(model, one_step_loss) for name, model in networks().items()}
    flow = {batch: updating(networks()["DiT"], flow_loss(batch)) for batch in {*batches.values()}}
    rows = []
    for batch in dict.fromkeys((batches["flow"], batches["one step"])):
        for name, call in calls.items():
            what = f"one step, {name}, {batches['one step']} images"
            rows.append(Comparison(what, f"DiT's flow, {batch} images", call, flow[batch]))
    return rows


def errors() -> dict[str, dict[str, float]]:
    """{kernel and affinities: {dtype: the field's largest error}}."""
    given = points(32, 256, 1), points(48, 256, 2) + 0.1, points(16, 256, 3), points(64, 1, 4)[:, 0].abs()
    given = [part.float().double() for part in given]  # the same numbers in both
    found = {}
    for kernel in FIELD_KERNELS:
        for symmetric in (True, False):
            options = {"kernel": kernel, "scales": FIELD_SCALES[kernel], "dof": 1.0, "symmetric": symmetric}
            expected = torch.tensor(field_by_loops(*(part.tolist() for part in given), **options), dtype=torch.float64)
            row = found[f"{kernel}, {'symmetric' if symmetric else 'per anchor'}"] = {}
            for dtype in (torch.float64, torch.float32):
                generated, real, negatives, weights = (part.to(dtype) for part in given)
                field = drift_field(generated, real, negatives=negatives, weights=weights, **options).field
                row[str(dtype).removeprefix("torch.")] = float((field.double() - expected).abs().max())
    return found


def main() -> None:
    """Compare, measure, and write the JSON."""
    args = parser(__doc__, 7).parse_args()
    torch.set_num_threads(args.threads)
    found = errors()
    for name, row in found.items():
        print(f"{name:<24} " + "  ".join(f"{dtype} {error:.1e}" for dtype, error in row.items()))
    rows = compare(comparisons(), args.rounds, time.process_time)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in networks().items()}
    metrics = {"comparisons": rows, "field_errors": found, "parameters": sizes}
    write_results(RESULTS, metrics, dataset="random numbers", seed=0, samples={"rounds": args.rounds})


if __name__ == "__main__":
    main()
