"""What training an autoencoder consists of besides its loop: arms, budgets, stages, validation and final measures.

Source: Hu et al. 2023 (DAE): an encoder learns against a weak decoder, is frozen, and then the real decoder learns. The
paper leaves open how the decoder is weakened and how steps are compared; both are options here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .batches import evaluation_batches
from .evaluation import codebook_usage, psnr, ssim
from .image_table import ImageTable
from .modeling_vq import VQAutoencoder

# arm: (decoupled, stage 1's decoder is narrow, stage 1's decoder has dropout)
ARMS = {
    "dae": (True, True, True),
    "weak_dropout": (True, False, True),
    "weak_width": (True, True, False),
    "decoupled": (True, False, False),
    "joint": (False, False, False),
    "joint_dropout": (False, False, True),
}
BUDGETS = ("total", "encoder", "flops")
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


def stages_of(arm: str, budget: str, stage_1_steps: int, stage_2_steps: int, flops: dict[str, float]) -> list[Stage]:
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
    """Floating-point operations of forward and backward for one image; of convolutions and products only.

    The losses' own networks are not counted. The model is left as it was.
    """
    model = copy.deepcopy(model).cpu().train()
    if not train_encoder:
        model.freeze_encoder()
    if model.quantizer is not None:
        model.quantizer.is_initialized.fill_(1)
    state = torch.random.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, model.config.num_channels, image_size, image_size)).loss.backward()
    torch.random.set_rng_state(state)
    return float(counter.get_total_flops())


class Validation:
    """Reconstruction quality on fixed held-out images while training.

    Args:
        table: held-out images.
        rows: of the table that are used.
        num_channels: of the model.
    """

    def __init__(self, table: ImageTable, rows: range, num_channels: int):
        self.batches = [_pixels(batch, num_channels) for batch in evaluation_batches(table, _EVALUATION_BATCH, rows)]

    @torch.no_grad()
    def psnr(self, model: VQAutoencoder) -> float:
        """Mean PSNR, dB, in eval mode; the model is left in the mode it was in."""
        was_training = model.training
        model.eval()
        total = count = 0
        for batch in self.batches:
            pixel_values = batch.to(model.device)
            reconstructions = model(pixel_values).pixel_values.clamp(-1, 1).float()
            total += len(batch) * psnr(pixel_values, reconstructions)["psnr"]
            count += len(batch)
        model.train(was_training)
        return total / count


class BestDecoder:
    """The decoder of the highest validation PSNR seen, so that a decoder stage never ends below its start."""

    def __init__(self):
        self.psnr, self.step, self.tensors = float("-inf"), -1, {}

    def offer(self, model: VQAutoencoder, psnr: float, step: int) -> None:
        """Keep a copy of the decoder when it is the best so far."""
        if psnr > self.psnr:
            self.psnr, self.step = psnr, step
            self.tensors = {name: value.detach().cpu().clone() for name, value in _decoder_state(model).items()}

    def restore(self, model: VQAutoencoder) -> None:
        """Put the best decoder back."""
        model.load_state_dict(self.tensors, strict=False)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"psnr": self.psnr, "step": self.step, "tensors": self.tensors}

    def load_state_dict(self, state: dict) -> None:
        """From a checkpoint."""
        self.psnr, self.step, self.tensors = state["psnr"], state["step"], state["tensors"]


def _decoder_state(model: VQAutoencoder) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.startswith(("decoder.", "post_quant_conv."))}


def plateau(history: list[dict], stage: str) -> dict[str, float | bool] | None:
    """Whether a stage's validation curve is flat: {"gain_in_last_fifth": dB, "converged"}; None with too few points."""
    points = [(e["step"], e["validation_psnr"]) for e in history if e.get("stage") == stage and "validation_psnr" in e]
    if len(points) < 3:
        return None
    first, last = points[0][0], points[-1][0]
    before = [value for step, value in points if step <= first + 0.8 * (last - first)]
    gain = points[-1][1] - before[-1]
    return {"gain_in_last_fifth": round(gain, 3), "converged": gain < FLAT_DECIBELS}


@torch.no_grad()
def measure_latents(model: VQAutoencoder, table: ImageTable, rows: range) -> None:
    """Store mean and standard deviation of each latent channel over training images in the config."""
    count, total, squares = 0, 0.0, 0.0
    for batch in evaluation_batches(table, _EVALUATION_BATCH, rows):
        latents = model.encode(_pixels(batch, model.config.num_channels).to(model.device)).latents.double().cpu()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.pow(2).sum((0, 2, 3))
    mean = total / count
    model.config.latent_mean = mean.tolist()
    model.config.latent_std = (squares / count - mean.pow(2)).clamp_min(1e-12).sqrt().tolist()


@torch.no_grad()
def evaluate(model: VQAutoencoder, table: ImageTable, rows: range) -> tuple[dict[str, float], Tensor]:
    """PSNR, SSIM and code statistics on held-out images, and a picture (16, C, H, W): eight of them, and as decoded."""
    count, totals, codes, pictures = 0, {"psnr": 0.0, "ssim": 0.0}, [], None
    for batch in evaluation_batches(table, _EVALUATION_BATCH, rows):
        pixel_values = _pixels(batch, model.config.num_channels).to(model.device)
        output = model(pixel_values)
        reconstructions = output.pixel_values.clamp(-1, 1).float()
        count += len(pixel_values)
        for measure in (psnr, ssim):
            for name, value in measure(pixel_values, reconstructions).items():
                totals[name] += len(pixel_values) * value
        if pictures is None:
            pictures = torch.cat([pixel_values[:8], reconstructions[:8]]).cpu()
        if output.codes is not None:
            codes.append(output.codes.cpu())
    metrics = {name: total / count for name, total in totals.items()}
    if codes:
        metrics |= codebook_usage(torch.cat(codes), model.config.num_codes)
    return metrics, pictures


def _pixels(batch: dict, num_channels: int) -> Tensor:
    pixel_values = batch["images"].float() / 127.5 - 1
    return pixel_values.mean(1, keepdim=True) if num_channels == 1 else pixel_values
