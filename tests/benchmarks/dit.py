"""Speed of the latent DiT's pipeline and training beside what others do, in one run on the same weights.

    make bench        # or: python tests/benchmarks/dit.py [--rounds 7] [--threads 1] [--only WORD]

Pipelines: a transformer of 12 layers of width 384 on 16 x 16 x 4 latents, patch 2, 1000 classes, learned variance, and
a small AutoencoderKL; guidance 4, DDIM. Ours beside diffusers' DiTPipeline with the same weights, noise and images
(`agreement` says how far these differ); beside itself in bfloat16, and with guidance over half of the steps.

Training, a step on 64 images: of cached latents beside encoding the images (f8, 64 px, in memory as uint8) in each
step; and training/dae_dit.py as a user starts it, timed inside, beside a bare loop over fixed tensors of forward,
backward, AdamW and the average of the weights.

Time is the processor's. Writes tests/benchmarks/results/dit.json.
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from diffusers.training_utils import EMAModel
from timing import Comparison, compare, parser

from hf_dpssl import VQAutoencoder, VQConfig, VQDiTPipeline
from hf_dpssl.data.batches import ordered_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer, training_example
from hf_dpssl.latent_training.latent_cache import build_latent_cache
from hf_dpssl.models.matrix_products import has_fast_bfloat16
from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.shipped_folders import shipped_folder
from hf_dpssl.runs.training_loop import TrainingLoop

RESULTS = Path(__file__).parent / "results" / "dit.json"
SIZE = dict(num_layers=12, width=384, num_heads=6, patch_size=2)
TRAINED = dict(num_layers=6, width=256, num_heads=4, patch_size=2)
STEPS, BATCHES, TRAINING_BATCH, TRAINING_STEPS = 8, (1, 4, 16), 64, 8
BARE = "forward, backward, AdamW and EMA alone"


def pipelines() -> tuple[VQDiTPipeline, DiTPipeline]:
    """Ours and diffusers' around the same modules, far from the zero output of an untrained DiT."""
    torch.manual_seed(0)
    transformer = make_transformer(
        **SIZE, latent_channels=4, latent_size=16, num_classes=1000, learned_variance=True
    ).eval()
    for parameter in transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    levels = 4
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False)
    both = VQDiTPipeline(transformer, vae, scheduler), DiTPipeline(transformer, vae, scheduler)
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
    return both


def drawing(pipeline, batch: int, **options) -> Callable[[], np.ndarray]:
    """A call that draws `batch` images (B, H, W, 3)."""
    labels = [7 * i % 1000 for i in range(batch)]

    def draw() -> np.ndarray:
        generator = [torch.Generator().manual_seed(i) for i in range(batch)]
        common = dict(guidance_scale=4.0, num_inference_steps=STEPS, generator=generator, output_type="np")
        return pipeline(labels, **common, **options).images

    return draw


def pipeline_rows(agreement: dict[str, float]) -> list[Comparison]:
    """Ours beside diffusers' at several batch sizes, in bfloat16, and with guidance over half of the steps."""
    ours, stock = pipelines()
    plain = VQDiTPipeline(**ours.components)
    plain.precompute_modulations = False
    plain.set_progress_bar_config(disable=True)
    modules = (copy.deepcopy(module).to(torch.bfloat16) for module in (ours.transformer, ours.vae))
    half = VQDiTPipeline(*modules, ours.scheduler)
    half.set_progress_bar_config(disable=True)
    rows, peer = [], "diffusers DiTPipeline"
    for batch in BATCHES:
        theirs = drawing(stock, batch)
        expected = theirs()
        ways = {"modulations precomputed": ours} | ({"modulations in each step": plain} if batch == 1 else {})
        for name, pipeline in ways.items():
            call = drawing(pipeline, batch)
            difference = float(np.abs(call() - expected).max())
            agreement[f"batch {batch}, {name}, largest difference from {peer}"] = difference
            if difference > 1e-4:
                raise SystemExit(f"{name}: images differ from {peer} by {difference}")
            aim = 0.92 if batch == 1 and pipeline is ours else 1.0
            rows.append(Comparison(f"batch {batch}, {name}", peer, _number(call), _number(theirs), aim=aim))
    full, short = drawing(ours, 4), drawing(half, 4)
    agreement["batch 4, bfloat16, mean difference from float32"] = float(np.abs(short() - full()).mean())
    aim = 0.6 if has_fast_bfloat16(torch.device("cpu")) else None
    rows.append(Comparison("batch 4, bfloat16", "float32", _number(short), _number(full), aim=aim))
    interval = drawing(ours, 4, guidance_interval=(0.0, 0.45))  # 4 of 8
    rows.append(
        Comparison("batch 4, half of the steps guided", "all guided", _number(interval), _number(full), aim=0.78)
    )
    return rows


def _number(draw: Callable[[], np.ndarray]) -> Callable[[], float]:
    return lambda: float(draw().mean())


def make_autoencoder(image_size: int, widths: list[int]) -> VQAutoencoder:
    """Untrained, with statistics of its latents."""
    torch.manual_seed(0)
    groups = dict(norm_num_groups=min(32, widths[0]), mid_block_attention=False)
    config = VQConfig(image_size=image_size, encoder_block_out_channels=widths, latent_channels=4, **groups)
    autoencoder = VQAutoencoder(config).eval()
    autoencoder.config.latent_mean, autoencoder.config.latent_std = [0.0] * 4, [1.0] * 4
    return autoencoder


class Step:
    """A bare training step of TRAINED on given tensors."""

    def __init__(self, latent_size: int, num_classes: int):
        sizes = dict(latent_channels=4, latent_size=latent_size, num_classes=num_classes)
        self.model = make_transformer(**TRAINED, **sizes).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = EMAModel(self.model.parameters(), decay=0.998)

    def __call__(self, noised: torch.Tensor, timesteps: torch.Tensor, target: torch.Tensor, labels: torch.Tensor):
        """Forward, backward, AdamW and EMA; returns the loss."""
        loss = F.mse_loss(self.model(noised, timestep=timesteps, class_labels=labels).sample, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        return loss.item()


def cache_rows(folder: Path) -> list[Comparison]:
    """Training steps on cached latents beside steps that encode their images, f8 at 64 px."""
    autoencoder, data = make_autoencoder(64, [64, 64, 128, 128]), load_images("digits")
    table = ImageTable(data, data.train.select(range(256)), 64)
    table.preload(2**30)
    cached = build_latent_cache(autoencoder, table, folder / "latents", batch_size=64)
    step, scheduler = Step(8, 10), make_scheduler("flow")

    def train(source, latents: Callable[[dict], torch.Tensor]) -> float:
        loss = 0.0
        for batch, _ in zip(ordered_batches(source, TRAINING_BATCH, 0), range(2), strict=False):
            key = dict(sample_ids=batch["sample_ids"], epoch=batch["epoch"], seed=0)
            example = training_example(latents(batch), objective="flow", scheduler=scheduler, **key)
            loss += step(*example[:3], batch["labels"])
        return loss

    @torch.no_grad()
    def encoded(batch: dict) -> torch.Tensor:
        return autoencoder.encode(batch["images"].float() / 127.5 - 1).latents

    def ours() -> float:
        return train(cached, lambda batch: batch["latents"])

    return [
        Comparison("two training steps on the cache", "encoding in each", ours, lambda: train(table, encoded), aim=0.5)
    ]


class Script:
    """training/dae_dit.py, timed from its first batch to its last: data, step, log and progress, no start and end."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(shipped_folder("training")))
        make_autoencoder(16, [16, 16]).save_pretrained(folder / "autoencoder")
        flags = {f"--{name}": value for name, value in TRAINED.items()}
        flags |= {"--autoencoder": folder / "autoencoder", "--output_dir": folder / "run", "--dataset": "digits"}
        flags |= {"--batch_size": TRAINING_BATCH, "--max_train_steps": TRAINING_STEPS + 1, "--sampling_steps": 1}
        flags |= {"--max_grad_norm": 0}
        self.argv = [str(item) for pair in flags.items() for item in pair] + ["--overwrite"]

    def seconds_per_step(self) -> float:
        """Of one run of TRAINING_STEPS steps."""
        import dae_dit

        moments, iterate = [], TrainingLoop.__iter__

        def watched(loop):
            for batch in iterate(loop):
                moments.append(time.process_time())
                yield batch

        TrainingLoop.__iter__ = watched
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                dae_dit.main(self.argv)
        finally:
            TrainingLoop.__iter__ = iterate
        return (moments[-1] - moments[0]) / (len(moments) - 1)


def script_row(folder: Path, rounds: int) -> dict:
    """The script beside a bare loop, as `compare` does, but with the script's own clock."""
    script, step = Script(folder), Step(8, 10)
    generator = torch.Generator().manual_seed(0)
    noised, target = (torch.randn(TRAINING_BATCH, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps, labels = torch.arange(TRAINING_BATCH) * 15.0, torch.arange(TRAINING_BATCH) % 10

    def bare() -> float:
        step(noised, timesteps, target, labels)
        start = time.process_time()
        for _ in range(TRAINING_STEPS):
            step(noised, timesteps, target, labels)
        return (time.process_time() - start) / TRAINING_STEPS

    measured = [(script.seconds_per_step(), bare()) for _ in range(rounds)]
    ours, theirs = (1e3 * min(values) for values in zip(*measured, strict=True))
    row = {"what": f"step of dae_dit.py, batch {TRAINING_BATCH}", "peer": BARE, "same_value": False, "aim": 1.05}
    row |= {"ours_ms": round(ours, 3), "theirs_ms": round(theirs, 3), "ratio": round(ours / theirs, 3)}
    print(f"{row['what']:<44} {ours:>9.2f} ms  {row['ratio']:>6.3f} of {BARE} (aim {row['aim']})")
    return row


def main() -> None:
    """Run all comparisons and write the JSON."""
    flags = parser(__doc__, 7)
    flags.add_argument("--only", choices=["pipeline", "cache", "script"], help="some comparisons, and write nothing")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    measured, agreement = [], {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "pipeline"):
            measured += compare(pipeline_rows(agreement), args.rounds, clock=time.process_time)
        if args.only in (None, "cache"):
            measured += compare(cache_rows(Path(folder)), args.rounds, clock=time.process_time)
        if args.only in (None, "script"):
            measured.append(script_row(Path(folder), args.rounds))
    if args.only:
        print(agreement)
        return
    RESULTS.parent.mkdir(exist_ok=True)
    samples = {"rounds": args.rounds, "steps": STEPS, "transformer": SIZE, "trained": TRAINED}
    samples |= {"fast_bfloat16": has_fast_bfloat16(torch.device("cpu"))}
    metrics = {"comparisons": measured, "agreement": agreement}
    write_results(RESULTS, metrics, dataset="untrained models", seed=0, samples=samples)


if __name__ == "__main__":
    main()
