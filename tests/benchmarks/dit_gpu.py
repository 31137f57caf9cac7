"""Training of the paper's DiT sizes on a GPU: images per second, and their share of the GPU's matrix rate.

    python tests/benchmarks/dit_gpu.py [--sizes dit-s-2 dit-b-2] [--batch_size 256] [--steps 50] [--no_compile]

A step is the training script's: noise, timesteps and dropped labels by sample, forward in bfloat16 and the loss, by
torch.compile, backward, fused AdamW and the average of the weights, on random latents of 32 x 32 x 4 that lie on the
device as those of a cache would. Its rate is 6 operations per multiplication of a forward pass (dit_sizes.py), over
the fastest of a few square products of bfloat16 matrices. Aim: dit-b-2 at 35 % or more.

Writes tests/benchmarks/results/dit_gpu.json on a GPU; `--device cpu` only tries whether it runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from hf_dpssl.generation.diffusion import (
    dropped_labels,
    make_scheduler,
    make_transformer,
    objective_loss,
    training_example,
)
from hf_dpssl.generation.dit_sizes import DiTSize, multiplications, preset
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "dit_gpu.json"
NUM_CLASSES, CHANNELS, OBJECTIVE = 1000, 4, "epsilon"
WARM_UP = 5  # steps: compilation and the choice of kernels


def seconds_each(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of a call, over `repeats` calls in a row."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize()
    return (time.perf_counter() - start) / repeats


def matrix_rate(device: torch.device) -> float:
    """Operations per second of the fastest square product of bfloat16 matrices."""
    rates = []
    for side in (4096, 8192, 16384) if device.type == "cuda" else (512,):
        left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds_each(lambda left=left, right=right: left @ right, WARM_UP, device)
        rates.append(2 * side**3 / seconds_each(lambda left=left, right=right: left @ right, 20, device))
    return max(rates)


def training_step(
    size: DiTSize, latent_size: int, batch_size: int, device: torch.device, compiled: bool
) -> Callable[[], None]:
    """One step of training, on the same latents each time."""
    model = make_transformer(
        num_layers=size.num_layers, width=size.width, num_heads=size.num_heads, patch_size=size.patch_size,
        latent_channels=CHANNELS, latent_size=latent_size, num_classes=NUM_CLASSES, learned_variance=True,
    ).to(device).train()  # fmt: skip
    if compiled:
        model.compile()
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, **fused)
    ema, scheduler = EMAModel(model.parameters(), decay=0.9999, foreach=True), make_scheduler(OBJECTIVE, True)
    latents = torch.randn(batch_size, CHANNELS, latent_size, latent_size, device=device)
    labels, ids = (torch.arange(batch_size, device=device) % count for count in (NUM_CLASSES, batch_size))

    def step() -> None:
        key = dict(sample_ids=ids, epoch=0, seed=0)
        noised, timesteps, target = training_example(latents, objective=OBJECTIVE, scheduler=scheduler, **key)
        kept = dropped_labels(labels, probability=0.1, null_class=NUM_CLASSES, **key)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(noised, timestep=timesteps, class_labels=kept).sample
        loss = objective_loss(prediction.float(), target, timesteps, objective=OBJECTIVE, scheduler=scheduler)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return step


def main(argv: list[str] | None = None) -> dict:
    """Measure and, on a GPU, write the JSON; returns {size: figures}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["dit-s-2", "dit-b-2"], help="names of the paper's sizes")
    parser.add_argument("--batch_size", type=int, default=256, help="images of a step")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--latent_size", type=int, default=32, help="cells a side")
    parser.add_argument("--no_compile", action="store_true", help="without torch.compile")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu tries whether the benchmark runs")
    device = torch.device(args.device)
    found, rate = {}, matrix_rate(device)
    for name in args.sizes:
        size = preset(name)
        shape = dict(latent_size=args.latent_size, in_channels=CHANNELS, out_channels=2 * CHANNELS)
        operations = 6 * multiplications(size, **shape, embedders=size.num_layers + 1)
        step = training_step(size, args.latent_size, args.batch_size, device, not args.no_compile)
        seconds_each(step, WARM_UP, device)
        images = args.batch_size / seconds_each(step, args.steps, device)
        found[name] = {"images_per_second": images, "share_of_matrix_rate": images * operations / rate}
        print(f"{name}: {images:.0f} images/s, {100 * images * operations / rate:.1f} % of {rate / 1e12:.3g} TFLOPS")
    if device.type == "cuda":
        metrics = {"sizes": found, "matrix_teraflops": rate / 1e12, "gpu": torch.cuda.get_device_name()}
        samples = {"steps": args.steps, "batch_size": args.batch_size}
        write_results(RESULTS, metrics, dataset="random latents", seed=0, samples=samples, aim={"dit-b-2": 0.35})
    return found


if __name__ == "__main__":
    main()
