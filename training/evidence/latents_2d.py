"""D^G in two dimensions: which latent needs the smaller generator? One picture and its numbers, about a minute or two.

    python training/evidence/latents_2d.py              # writes outputs/latents_2d/latents_2d.png and .json

P_x has five modes on a ring. Three latents P_z of two dimensions: a Gaussian; a mixture of five Gaussians elsewhere;
an encoder of the data, trained with a weaker decoder and dropout (DAE). For each of them small generators are
trained adversarially and their samples are told from held-out data by fresh critics
(`hf_dpssl.autoencoder.complexity_curve`). Encoded latents of the fresh samples are those of held-out data.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from hf_dpssl.autoencoder.complexity_curve import Budget, critic_gap, generator_gaps, rows_of, train_generator
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.runs.results import write_results

LATENTS = {"gaussian": "Gaussian", "mixture": "mixture of five", "encoded": "encoded (DAE)"}
MODES = 5
SAMPLES = 10_000


def five_modes(count: int, random: torch.Generator) -> Tensor:
    """P_x: (count, 2), narrow Gaussians at the corners of a pentagon."""
    angle = 2 * math.pi / MODES * torch.randint(MODES, (count,), generator=random) + math.pi / 2
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2, generator=random)


def gaussian(count: int, random: torch.Generator) -> Tensor:
    """P_z without knowledge of the data: (count, 2)."""
    return torch.randn(count, 2, generator=random)


def mixture(count: int, random: torch.Generator) -> Tensor:
    """P_z that knows the number of modes, not where they are: (count, 2), four corners of a square and its middle."""
    places = torch.tensor([[0.0, 0.0], [1.4, 1.4], [-1.4, 1.4], [1.4, -1.4], [-1.4, -1.4]])
    return places[torch.randint(MODES, (count,), generator=random)] + 0.25 * torch.randn(count, 2, generator=random)


def train_encoder(data: Tensor, seed: int, *, steps: int = 1000) -> nn.Module:
    """Stage 1 of DAE on vectors: an encoder with a narrower decoder under dropout; latents have unit variance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "encoder"))
        encoder = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2), nn.BatchNorm1d(2, affine=False))
        decoder = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, 2))
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 5e-3, fused=True)
        for _ in range(steps):
            batch = data[torch.randint(len(data), (256,))]
            loss = (decoder(encoder(batch)) - batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return encoder.eval().requires_grad_(False)


def sources(seed: int) -> dict:
    """{"train", "test": data; "drawn", "held_out": {latent: sampler}}; the same in every process."""
    train, test = (five_modes(SAMPLES, torch.Generator().manual_seed(derive_seed(seed, s))) for s in ("train", "test"))
    encoder = train_encoder(train, seed)
    drawn = {"gaussian": gaussian, "mixture": mixture, "encoded": rows_of(encoder(train))}
    return {"train": train, "test": test, "drawn": drawn, "held_out": drawn | {"encoded": rows_of(encoder(test))}}


def measure(name: str, width: int, seed: int, budget: Budget) -> tuple[Tensor, Tensor, Tensor]:
    """One point of the curve: gaps of the critics, 1,000 latents and the samples made of them; in its own process."""
    torch.set_num_threads(1)
    given = sources(seed)
    drawn, fresh = given["drawn"][name], given["held_out"][name]
    generator = train_generator(drawn, given["train"], width, seed=seed, budget=budget)
    gaps = generator_gaps(generator, drawn, fresh, given["train"], given["test"], seed=seed, budget=budget)
    latents = fresh(1000, torch.Generator().manual_seed(derive_seed(seed, "picture")))
    return gaps, latents, generator(latents)


def draw(data: Tensor, results: dict, widths: list[int], floor: float, path: Path) -> None:
    """Rows: latents; columns: P_z, samples of each generator. On the right P_x and the curves."""
    figure = Figure(figsize=(2.0 * (len(widths) + 1) + 4.4, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.0 * (len(widths) + 1), 4.4])
    grid = left.subplots(len(LATENTS), len(widths) + 1)
    for row, (name, title) in enumerate(LATENTS.items()):
        _scatter(grid[row, 0], results[name, widths[0]][1], "0.35", 3.2)
        grid[row, 0].set_ylabel(title, fontsize=11)
        for column, width in enumerate(widths, start=1):
            gaps, _, samples = results[name, width]
            _scatter(grid[row, column], samples, f"C{row}", 3.2)
            grid[row, column].text(0, -3.45, f"gap {float(gaps.mean()):.2f}", ha="center", va="center", fontsize=9)
            if row == 0:
                grid[row, column].set_title(f"g(z), width {width}", fontsize=11)
    grid[0, 0].set_title("$P_z$", fontsize=11)
    top, bottom = right.subplots(2, 1, height_ratios=[1, 1.35])
    _scatter(top, data[:1000], "black", 3.2)
    top.set_title("$P_x$: five modes", fontsize=11)
    for row, (name, title) in enumerate(LATENTS.items()):
        gaps = torch.stack([results[name, width][0] for width in widths])
        bottom.errorbar(
            widths,
            gaps.mean(1),
            gaps.std(1, correction=0),
            color=f"C{row}",
            marker="o",
            markersize=4,
            capsize=3,
            label=title,
        )
    bottom.axhline(floor, color="0.5", linestyle=":", label="data against data")
    bottom.axhline(math.log(2), color="0.5", linestyle="--", label="log 2: told apart")
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(widths, [str(width) for width in widths])
    bottom.set_title("Gap of fresh critics: $D^G(P_z, P_x)$", fontsize=11)
    bottom.set(xlabel="width of the generator", ylabel="nats, lower is nearer to the data")
    bottom.grid(alpha=0.3)
    bottom.legend(fontsize=8)
    canvas = io.BytesIO()
    figure.savefig(canvas, dpi=75)
    Image.open(canvas).convert("RGB").quantize(48).save(path, optimize=True)  # few colours: a third of the size


def _scatter(axis, points: Tensor, color: str, limit: float) -> None:
    axis.scatter(points[:, 0], points[:, 1], s=2, linewidths=0, color=color, alpha=0.6)
    axis.set(xlim=(-limit, limit), ylim=(-limit - 0.6, limit), xticks=[], yticks=[], aspect="equal")


def main(argv: list[str] | None = None) -> None:
    """Measure every latent at every width, in as many processes as there are cores, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="units of the generators")
    parser.add_argument("--steps", type=int, default=Budget.generator_steps, help="of each generator's training")
    parser.add_argument("--critic_steps", type=int, default=Budget.critic_steps, help="of each fresh critic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; changes nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/latents_2d"))
    args = parser.parse_args(argv)
    start, widths = time.perf_counter(), sorted(set(args.widths))
    budget = Budget(generator_steps=args.steps, critic_steps=args.critic_steps)
    jobs = [(name, width) for width in reversed(widths) for name in LATENTS]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        running = {job: pool.submit(measure, *job, args.seed, budget) for job in jobs}
        results = {job: future.result() for job, future in running.items()}
    given = sources(args.seed)
    floor = critic_gap(five_modes, given["train"], given["test"], seed=args.seed, budget=budget)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(given["train"], results, widths, floor, args.output_dir / "latents_2d.png")
    metrics: dict = {"data_against_data": floor}
    for name in LATENTS:
        gaps = {width: results[name, width][0].tolist() for width in widths}
        means = {f"complexity_w{width}": sum(values) / len(values) for width, values in gaps.items()}
        found = {"complexity": sum(means.values()) / len(means)} | means
        metrics[name] = found | {f"critics_w{width}": values for width, values in gaps.items()}
    write_results(
        args.output_dir / "latents_2d.json",
        metrics,
        dataset="five Gaussians on a ring, drawn",
        seed=args.seed,
        samples={"train": SAMPLES, "test": SAMPLES},
        unit="nats, Jensen-Shannon gap of fresh critics on held-out data; 0 is best, log 2 is worst",
        budget=vars(budget),
        seconds=round(time.perf_counter() - start, 1),
    )
    for name, title in LATENTS.items():
        print(title, *(f"{width}: {metrics[name][f'complexity_w{width}']:.3f}" for width in widths), sep="  ")


if __name__ == "__main__":
    main()
