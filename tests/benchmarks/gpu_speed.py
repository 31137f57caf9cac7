"""Speed and memory on a GPU: the t-SimCLR loss, SimCLR's training step, the DiT paper's sizes, a one-step generator.

A share of the peak is operations per second over those of the fastest of a few square products of bfloat16 matrices,
measured here; where the card's own figure is known, over that too. Operations are counted by torch's flop counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_dpssl.contrastive.drifting import drift_loss
from hf_dpssl.contrastive.isotropy import DIRECTIONS, lejepa, random_directions
from hf_dpssl.contrastive.losses import clip, t_simclr
from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.data.views import NATURAL, TwoViews
from hf_dpssl.latent_training.diffusion import (
    dropped_labels,
    make_scheduler,
    make_transformer,
    objective_loss,
    training_example,
)
from hf_dpssl.latent_training.dit_sizes import DiTSize, preset
from hf_dpssl.latent_training.drift_training import generate
from hf_dpssl.models.matrix_products import full_float32
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig

AIMS = {
    "simclr views_per_second": 40_000,
    "dit-b-2 share_of_matrix_rate": 0.35,
    "dit-xl-2 share_of_matrix_rate": 0.35,
}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bfloat16 without sparsity, of NVIDIA's data sheets (SXM)
WARM_UP = 5  # steps: compilation and the choice of kernels
NUM_CLASSES, CHANNELS, OBJECTIVE = 1000, 4, "epsilon"
TINY = DiTSize(1, 32, 2, 2)


def scaled(full: int, scale: float, least: int = 1) -> int:
    """A number of things at this scale."""
    return max(least, round(full * scale))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of a call, over `repeats` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def timed(work: Callable[[], object], repeats: int, device: torch.device) -> dict:
    """{"ms" of a call, "extra_mb" at its peak beyond what was held before (None on a CPU), "warm_up_seconds"}."""
    warm_up = seconds_each(work, WARM_UP if repeats > 1 else 1, device) * (WARM_UP if repeats > 1 else 1)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    seconds = seconds_each(work, repeats, device)
    extra = (torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None
    return {"ms": 1e3 * seconds, "extra_mb": extra, "warm_up_seconds": warm_up}


def matrix_rate(device: torch.device) -> float:
    """Operations per second of the fastest square product of bfloat16 matrices."""
    rates = []
    for side in (4096, 8192, 16384) if device.type == "cuda" else (128,):
        left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds_each(lambda left=left, right=right: left @ right, WARM_UP, device)
        rates.append(2 * side**3 / seconds_each(lambda left=left, right=right: left @ right, 20, device))
    return max(rates)


def backend_of(scale: float) -> str:
    """Of torch.compile; a trial needs no compiler."""
    return "inductor" if scale == 1 else "eager"


# The loss


def dense_t_simclr(view_1: Tensor, view_2: Tensor, *, temperature: float, dof: float) -> Tensor:
    """Joint t-SimCLR as one writes it down: the matrix of all 2N x 2N pairs, and autograd through it."""
    points = torch.cat([view_1, view_2])
    squares = points.square().sum(1)
    distances = (squares[:, None] + squares - 2 * points @ points.T).clamp_min(0)
    log_k = -(dof + 1) / 2 * torch.log1p(distances / (temperature * dof))
    count = len(view_1)
    positives = log_k.diagonal(count).mean()
    itself = torch.eye(2 * count, dtype=torch.bool, device=points.device)
    return log_k.masked_fill(itself, -torch.inf).flatten().logsumexp(0) - positives


def loss(device: torch.device, scale: float) -> Iterator[dict]:
    """t-SimCLR of 16,384 pairs beside the dense one; clip beside open_clip's, where that is installed; LeJEPA.

    All in float32 without TF32, which the training scripts before may have turned on, and which ours never use.
    """
    with full_float32():
        yield from losses_of(device, scale)


def losses_of(device: torch.device, scale: float) -> Iterator[dict]:
    """As `loss`, in whatever precision products have."""
    pairs = scaled(16_384, scale, 16)
    repeats = scaled(20, scale, 2)
    views = [torch.randn(pairs, 128, device=device, requires_grad=True) for _ in range(2)]
    values = {}

    def call(name: str, function: Callable[..., Tensor], **options) -> Callable[[], None]:
        def work() -> None:
            for view in views:
                view.grad = None
            values[name] = function(*views, **options)
            values[name].backward()
            values[name] = values[name].detach()

        return work

    kernel = {"temperature": 8.0, "dof": 5.0}
    yield {"pairs": pairs, "ours": timed(call("ours", t_simclr, **kernel), repeats, device)}
    yield {"dense": timed(call("dense", dense_t_simclr, **kernel), repeats, device)}
    difference = float((values["ours"] - values["dense"]).abs() / values["dense"].abs())
    yield {"difference_to_dense": difference, "passed": difference < 1e-4}
    yield {"clip, ours": timed(call("clip, ours", clip, temperature=0.07), repeats, device)}
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        yield {"clip, open_clip": "open_clip is not installed: pip install 'hf_dpssl[bench]'"}
    else:
        peer, scale_of_logits = ClipLoss(), torch.tensor(1 / 0.07, device=device)

        def theirs(image: Tensor, text: Tensor) -> Tensor:
            return peer(F.normalize(image, dim=1), F.normalize(text, dim=1), scale_of_logits)

        yield {"clip, open_clip": timed(call("clip, open_clip", theirs), repeats, device)}
        apart = float((values["clip, ours"] - values["clip, open_clip"]).abs() / values["clip, open_clip"].abs())
        yield {"difference_to_open_clip": apart, "passed": max(difference, apart) < 1e-4}
    directions = random_directions(DIRECTIONS, 128, step=0)
    yield {"lejepa": timed(call("lejepa", lejepa, directions=directions, weight=0.05), repeats, device)}


# Training steps


def simclr(device: torch.device, scale: float) -> Iterator[dict]:
    """SimCLR, ResNet-18 with the small-image stem, 32 px: views, forward in bfloat16, backward and update."""
    images = scaled(2048, scale, 4)
    repeats = scaled(50, scale, 2)
    narrow = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]} if scale < 1 else None
    method = {"kernel": "cosine", "normalization": "anchor", "temperature": 0.5, "stem": "small_image"}
    model = SimCLRForPreTraining(ContrastiveConfig("resnet18", narrow, **method))
    model = model.to(device, memory_format=torch.channels_last).train()
    model.compile(backend=backend_of(scale))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    views = TwoViews(NATURAL, [0.5] * 3, [0.25] * 3, 0)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, device=device)
    ids = torch.arange(images, device=device)

    def step() -> None:
        both = [view.contiguous(memory_format=torch.channels_last) for view in views(pixels, ids, 0)]
        with torch.autocast(device.type, torch.bfloat16):
            value = model(*both).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = timed(step, repeats, device)
    yield {"images": images, "views_per_second": 2e3 * images / found["ms"]} | found
    yield {"augmentation_ms": 1e3 * seconds_each(lambda: views(pixels, ids, 0), repeats, device)}


def transformer_of(size: DiTSize, latent_size: int, device: torch.device, **options) -> nn.Module:
    """A transformer of the DiT paper in training."""
    return make_transformer(
        num_layers=size.num_layers, width=size.width, num_heads=size.num_heads, patch_size=size.patch_size,
        latent_channels=CHANNELS, latent_size=latent_size, num_classes=NUM_CLASSES, **options,
    ).to(device).train()  # fmt: skip


def operations_of_step(model: nn.Module, latent_size: int, device: torch.device) -> int:
    """Operations of forward and backward pass of one image; two of a multiplication."""
    latents = torch.randn(1, CHANNELS, latent_size, latent_size, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.autocast(device.type, torch.bfloat16):
        model(latents, timestep=labels.float(), class_labels=labels).sample.float().sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def dit_step(model: nn.Module, latents: Tensor) -> Callable[[], None]:
    """One step as training/dae_dit.py's, on latents (B, C, h, w) that lie on the device as those of a cache do."""
    device = latents.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    ema, scheduler = EMAModel(model.parameters(), decay=0.9999, foreach=True), make_scheduler(OBJECTIVE, True)
    labels, ids = (torch.arange(len(latents), device=device) % count for count in (NUM_CLASSES, len(latents)))

    def step() -> None:
        key = dict(sample_ids=ids, epoch=0, seed=0)
        noised, timesteps, target = training_example(latents, objective=OBJECTIVE, scheduler=scheduler, **key)
        kept = dropped_labels(labels, probability=0.1, null_class=NUM_CLASSES, **key)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(noised, timestep=timesteps, class_labels=kept).sample
        value = objective_loss(prediction.float(), target, timesteps, objective=OBJECTIVE, scheduler=scheduler)["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return step


def dit(device: torch.device, scale: float) -> Iterator[dict]:
    """Images per second of DiT-B/2 and XL/2 on latents of 32 x 32 x 4, and their share of the bfloat16 peak."""
    latent_size = 32 if scale == 1 else 8
    rate = matrix_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    nominal = next((peak for card, peak in PEAKS.items() if card in name), None)
    yield {"matrix_teraflops": rate / 1e12, "nominal_teraflops": nominal and nominal / 1e12}
    for title, batch in (("dit-b-2", 256), ("dit-xl-2", 128)):
        size = preset(title) if scale == 1 else TINY
        images = scaled(batch, scale, 2)
        model = transformer_of(size, latent_size, device, learned_variance=True)
        operations = operations_of_step(model, latent_size, device)
        model.compile(backend=backend_of(scale))
        step = dit_step(model, torch.randn(images, CHANNELS, latent_size, latent_size, device=device))
        row = timed(step, scaled(30, scale, 2), device)
        per_second = 1e3 * images / row["ms"]
        row |= {"batch": images, "images_per_second": per_second, "gigaflop_per_image": operations / 1e9}
        row["share_of_matrix_rate"] = per_second * operations / rate
        row["share_of_nominal_peak"] = nominal and per_second * operations / nominal
        yield {title: row}
        del model, step


def drift(device: torch.device, scale: float) -> Iterator[dict]:
    """A step of a one-step generator: DiT-S/2 in bfloat16, the field of sets of latents in float32, and the update."""
    latent_size = 32 if scale == 1 else 8
    sets, count, real_count = scaled(16, scale, 2), scaled(16, scale, 3), scaled(64, scale, 4)
    model = transformer_of(preset("dit-s-2") if scale == 1 else TINY, latent_size, device)
    model.compile(backend=backend_of(scale))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    shape = (CHANNELS, latent_size, latent_size)
    noise = torch.randn(sets * count, *shape, device=device)
    real = torch.randn(sets, real_count, *shape, device=device)
    labels = torch.arange(sets, device=device).repeat_interleave(count)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            generated = generate(model, noise, labels)
        value = drift_loss(generated.unflatten(0, (sets, count)), real).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = timed(step, scaled(30, scale, 2), device)
    yield row | {"sets": sets, "images": sets * count, "images_per_second": 1e3 * sets * count / row["ms"]}
