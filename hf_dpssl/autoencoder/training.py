"""What training an autoencoder consists of besides its loop: arms, budgets, stages, validation and final measures.

Source: Hu et al. 2023 (DAE): an encoder learns against a weak decoder, is frozen, and then the real decoder learns. The
paper leaves open how the decoder is weakened and how steps are compared; both are options here.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.batches import evaluation_batches, unit_pixels
from ..data.image_table import ImageTable
from ..evaluation import codebook_usage, psnr, ssim
from ..models.configuration_vq import VQConfig
from ..models.gather import gather_rows, own_share, sum_over_processes
from ..models.modeling_vq import VQAutoencoder
from ..runs.console import say
from .choices import ARMS

logger = logging.getLogger(__name__)

LOW_USAGE = 50.0  # percent of the codes
FLAT_DECIBELS = 0.5  # gained in the last fifth of the steps by a curve that counts as converged
_EVALUATION_BATCH = 256


@dataclass
class Stage:
    """One optimisation: its name, its steps, whether encoder and codebook learn, and which decoder does.

    decoder: "first" (the one the model starts with), "keep" (go on with it), or "fresh".
    """

    name: str
    steps: int
    train_encoder: bool
    decoder: str = "first"
    flops_per_image: float = 0.0  # of a training step; this and what follows are known when it has run
    kept_decoder: dict[str, float] | None = None  # `BestDecoder.summary`
    seconds: float | None = None  # `TrainingLoop.seconds`


def stages_of(
    arm: str, budget: str | None, stage_1_steps: int, stage_2_steps: int, flops: dict[str, float]
) -> list[Stage]:
    """The stages of an arm under a budget.

    Args:
        arm: of ARMS.
        budget: of a joint arm: "total" (the sum of both stages' steps), "encoder" (stage 1's steps, then stage 2's for
            the decoder alone) or "flops" (as many steps as cost what both stages of a decoupled run cost).
        stage_1_steps, stage_2_steps: optimiser steps of the two stages.
        flops: operations of a step, {"joint", "stage_1", "stage_2"}; read for "flops" only.
    """
    if ARMS[arm][0]:
        return [Stage("stage-1", stage_1_steps, True), Stage("stage-2", stage_2_steps, False, "fresh")]
    if budget == "encoder":
        return [Stage("joint", stage_1_steps, True), Stage("decoder", stage_2_steps, False, "keep")]
    if budget == "flops":
        cost = stage_1_steps * flops["stage_1"] + stage_2_steps * flops["stage_2"]
        return [Stage("joint", max(1, round(cost / flops["joint"])), True)]
    return [Stage("joint", stage_1_steps + stage_2_steps, True)]


def step_flops(model: VQAutoencoder, image_size: int, *, train_encoder: bool) -> float:
    """Floating-point operations of forward and backward for one image: convolutions, attention, linear layers.

    Counted by shapes, on the meta device; the quantiser and the losses' own networks are left out. The model is left
    as it was.
    """
    model = copy.deepcopy(model).to("meta")
    model.quantizer = None
    model.config.encoder_frozen = not train_encoder
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # what is recomputed is not counted again
    count = 4 if model.config.equivariance_weight else 1  # of which each takes another turn
    images = torch.zeros(count, model.config.num_channels, image_size, image_size, device="meta")
    state = torch.random.get_rng_state()
    # Fused attention of a CPU is not counted, products are.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(images).loss.backward()
    torch.random.set_rng_state(state)
    return float(counter.get_total_flops() / count)


class Validation:
    """Reconstruction quality on fixed held-out images while training.

    Args:
        table: held-out images.
        rows: of the table that are used.
        num_channels: of the model.
        process: (number of this process, how many share the images).
    """

    def __init__(self, table: ImageTable, rows: Sequence[int], num_channels: int, process: tuple[int, int] = (0, 1)):
        index, count = process
        mine = rows[index::count]
        loader = evaluation_batches(table, _EVALUATION_BATCH, mine) if mine else ()
        self.batches = [unit_pixels(batch["images"], num_channels) for batch in loader]
        self.is_shared = count > 1

    @torch.no_grad()
    def psnr(self, model: VQAutoencoder) -> float:
        """Mean PSNR, dB, in eval mode (the model is left in its own); NaN where a reconstruction is not finite.

        Processes that share the images all call this, and find the same.
        """
        was_training = model.training
        model.eval()
        total = 0
        count = 0
        for batch in self.batches:
            pixel_values = batch.to(model.device)
            with torch.compiler.set_stance("force_eager"):  # what is compiled is compiled for training
                reconstructions = model(pixel_values).pixel_values.clamp(-1, 1).float()
            if not reconstructions.isfinite().all():
                total = math.nan  # the loop stops at a loss that is not finite, and says of which images
                break
            total += len(batch) * psnr(pixel_values, reconstructions, value_range=2.0)["psnr"]
            count += len(batch)
        model.train(was_training)
        if self.is_shared:
            total, count = sum_over_processes(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / max(1, count)


class BestDecoder:
    """A decoder whose validation PSNR is not below that at the start of its stage, which so never ends below it.

    Args:
        latest: keep the latest such decoder, where other terms than the reconstruction's make it better, instead of
            that of the highest PSNR.
    """

    def __init__(self, latest: bool = False):
        self.latest = latest
        self.start = None
        self.psnr = float("-inf")
        self.step = -1
        self.tensors = {}

    def offer(self, model: VQAutoencoder, psnr: float, step: int) -> None:
        """Keep a copy of the decoder if it is the best so far, or with `latest` good enough; first comes the start."""
        self.start = psnr if self.start is None else self.start
        if psnr >= self.start if self.latest else psnr > self.psnr:
            self.psnr = psnr
            self.step = step
            self.tensors = {name: value.detach().cpu().clone() for name, value in _decoder_state(model).items()}

    def summary(self) -> dict[str, float | int]:
        """For results.json: validation PSNR at the start and of the decoder that was kept, and the step it is from."""
        return {"psnr_at_start": self.start, "psnr_kept": self.psnr, "step_kept": self.step}

    def restore(self, model: VQAutoencoder) -> None:
        """Put the best decoder back."""
        model.load_state_dict(self.tensors, strict=False)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"psnr": self.psnr, "step": self.step, "tensors": self.tensors, "start": self.start}

    def load_state_dict(self, state: dict) -> None:
        """From a checkpoint."""
        self.psnr = state["psnr"]
        self.step = state["step"]
        self.tensors = state["tensors"]
        self.start = state["start"]


def _decoder_state(model: VQAutoencoder) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.startswith(("decoder.", "post_quant_conv."))}


def check_codebook_size(config: VQConfig, num_images: int) -> None:
    """ValueError when the codebook has more codes than all training images together have latent vectors."""
    vectors = num_images * config.latent_size**2
    if config.quantizer == "vq" and config.num_codes > vectors:
        raise ValueError(
            f"a codebook of {config.num_codes} codes is larger than the data: {num_images} training images of "
            f"{config.latent_size} x {config.latent_size} cells have {vectors} latent vectors. Use a smaller "
            "--num_codes, fewer levels, or more images."
        )


def batch_usage(codes: Tensor, num_codes: int) -> Tensor:
    """Percent of the codebook that a batch's codes (B, h, w) use, as a tensor: nothing waits for a GPU."""
    return torch.zeros(num_codes, device=codes.device).index_fill_(0, codes.flatten(), 100.0).mean()


def warn_of_low_usage(usage: dict[str, float], when: str) -> None:
    """Log a warning when less than half of the codebook is in use; `usage` holds "code_usage" and "dead_codes"."""
    if usage["code_usage"] < LOW_USAGE:
        logger.warning(
            "%s: only %.0f %% of the codes are in use (%d dead): try fewer codes, a higher --revival_threshold, "
            "--code_distance cosine, or --entropy_weight.", when, usage["code_usage"], usage["dead_codes"],
        )  # fmt: skip


def curve_summary(history: list[dict], stages: list[Stage]) -> dict:
    """What results.json says of the validation curves: {"plateau", "validation_psnr", "guard_lowered_weight"}."""
    validated = [entry for entry in history if "validation_psnr" in entry]
    return {
        "plateau": {stage.name: plateau(history, stage.name) for stage in stages},
        "validation_psnr": [[entry["step"], round(entry["validation_psnr"], 3)] for entry in validated],
        "guard_lowered_weight": [entry["step"] for entry in history if entry.get("guard")],
    }


def say_plateau(found: dict[str, dict | None]) -> None:
    """Print for each stage of `curve_summary`'s "plateau" whether its curve was flat at the end."""
    for name, curve in found.items():
        if curve is None:
            say(f"{name}: too few validations to say whether it converged")
        else:
            state = "converged" if curve["converged"] else "not converged: give it more steps"
            say(f"{name}: {curve['gain_in_last_fifth']:+.2f} dB of validation PSNR in the last fifth, {state}")


def plateau(history: list[dict], stage: str) -> dict[str, float | bool] | None:
    """Whether a stage's validation curve is flat: {"gain_in_last_fifth": dB, "converged"}; None with too few points."""
    points = [(e["step"], e["validation_psnr"]) for e in history if e.get("stage") == stage and "validation_psnr" in e]
    if len(points) < 3:
        return None
    first = points[0][0]
    last = points[-1][0]
    before = [value for step, value in points if step <= first + 0.8 * (last - first)]
    gain = points[-1][1] - before[-1]
    return {"gain_in_last_fifth": round(gain, 3), "converged": gain < FLAT_DECIBELS}


@torch.no_grad()
def measure_latents(
    model: VQAutoencoder, table: ImageTable, rows: Sequence[int], normalization: str = "channel"
) -> None:
    """Store mean and standard deviation of each latent channel over training images in the config.

    The processes share the images: all call this. Latents are those of float32, as caches hold them.

    normalization: "channel", or "scalar": one deviation for all channels, the root of their mean variance.
    """
    sums = torch.zeros(3, model.config.latent_channels, dtype=torch.float64)  # of ones, latents and their squares
    for batch in evaluation_batches(table, _EVALUATION_BATCH, own_share(rows)):
        pixel_values = unit_pixels(batch["images"], model.config.num_channels).to(model.device)
        latents = model.encode(pixel_values).latents.double().cpu()
        parts = (torch.ones_like(latents), latents, latents.pow(2))
        sums += torch.stack([part.sum((0, 2, 3)) for part in parts])
    count, total, squares = sum_over_processes(sums)
    mean = total / count
    variance = (squares / count - mean.pow(2)).clamp_min(1e-12)
    if normalization == "scalar":
        variance = variance.mean().expand_as(variance)
    model.config.latent_mean = mean.tolist()
    model.config.latent_std = variance.sqrt().tolist()


@torch.no_grad()
def evaluate(
    model: VQAutoencoder, table: ImageTable, rows: Sequence[int], accelerator: Accelerator
) -> tuple[dict[str, float], Tensor]:
    """PSNR, SSIM and code statistics on rows of held-out images; eight of the table at random, and as decoded: (16, C,
    H, W).

    The processes share the images, in the precision of the run: all call this, and find the same.
    """

    def decoded(images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pixels, their reconstructions and codes."""
        pixel_values = unit_pixels(images, model.config.num_channels).to(model.device)
        with accelerator.autocast():
            output = model(pixel_values)
        return pixel_values, output.pixel_values.clamp(-1, 1).float(), output.codes

    sums = torch.zeros(3, dtype=torch.float64)  # of ones, PSNR and SSIM
    codes = []
    numbers = []
    for batch in evaluation_batches(table, _EVALUATION_BATCH, own_share(rows)):
        pixel_values, reconstructions, found = decoded(batch["images"])
        found_of = [measure(pixel_values, reconstructions, value_range=2.0) for measure in (psnr, ssim)]
        sums += len(pixel_values) * torch.tensor([1.0, found_of[0]["psnr"], found_of[1]["ssim"]], dtype=torch.float64)
        numbers += batch["sample_ids"].tolist()
        if found is not None:
            codes.append(found.cpu())
    count, *totals = sum_over_processes(sums).tolist()
    metrics = {name: total / count for name, total in zip(("psnr", "ssim"), totals, strict=True)}
    if model.quantizer is not None:
        codes = gather_rows(torch.cat(codes) if codes else None, numbers)
        metrics |= codebook_usage(codes, model.config.num_codes)
    (shown,) = evaluation_batches(table, 8, table.random_rows(8))
    return metrics, torch.cat(decoded(shown["images"])[:2]).cpu()
