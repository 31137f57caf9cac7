"""Arguments of training/dae_dit.py: objective, optimiser, sampling and alignment."""

from __future__ import annotations

from dataclasses import dataclass

from ..generation.choices import OBJECTIVES
from ..runs.flags import option
from .transformer_arguments import TransformerRunArguments


@dataclass
class DiTArguments(TransformerRunArguments):
    """Autoencoder, transformer, objective and optimiser; the defaults generate the embedded digits."""

    learned_variance: bool = option(
        False, "predict the variance too, by the hybrid loss (objective epsilon)", group="model"
    )
    align_encoder: str | None = option(None, "folder or Hub id of a contrastive encoder that tokens are aligned with")
    align_block: int | None = option(
        None, "block whose tokens are aligned, from 1; default: a third of the depth, <= 8"
    )
    align_width: int = option(2048, "width of the alignment's projector")

    objective: str = option(
        "flow", "what is predicted; mean_flow draws in one step", choices=OBJECTIVES, group="optimiser"
    )
    min_snr_gamma: float | None = option(None, "clip the weights of the loss by min-SNR; 5 in its paper")
    timestep_sampling: str = option("uniform", "noise levels of a flow", choices=["uniform", "logit_normal"])
    logit_std: float = option(1.0, "spread of logit-normal noise levels")
    max_train_steps: int = option(2400, "optimiser steps")
    learning_rate: float = option(2e-3, "peak learning rate")

    sampling_steps: int | None = option(
        None, "denoising steps of the sample grids and of validations; default: 25, mean_flow 1", group="evaluation"
    )
    guidance_scale: float = option(1.5, "guidance of the guided sample grid")

    name: str = option("dit", "subfolder of output_dir for the finished pipeline", group="run")

    @property
    def encoders(self) -> list[str]:
        """The one that tokens are aligned with."""
        return [self.align_encoder] if self.align_encoder else []

    def __post_init__(self):
        super().__post_init__()
        if self.sampling_steps is None:
            self.sampling_steps = 1 if self.objective == "mean_flow" else 25
        for name in ("max_train_steps", "sampling_steps", "align_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        self._check_objective()
        if self.align_block is not None and not 1 <= self.align_block <= self.num_layers:
            raise ValueError(f"--align_block lies in [1, {self.num_layers}], got {self.align_block}.")
        if self.align_encoder and self.streaming:
            raise ValueError("--align_encoder reads images by row, which a stream has not: leave out --streaming.")

    def _check_objective(self) -> None:
        if self.learned_variance and self.objective != "epsilon":
            raise ValueError(f"--learned_variance needs --objective epsilon, got {self.objective}.")
        if self.timestep_sampling == "logit_normal" and self.objective != "flow":
            raise ValueError(f"--timestep_sampling logit_normal needs --objective flow, got {self.objective}.")
        if self.min_snr_gamma is not None and self.objective == "mean_flow":
            raise ValueError("--min_snr_gamma is not for --objective mean_flow, which has weights of its own.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"--min_snr_gamma must be positive, got {self.min_snr_gamma}.")
        if not self.logit_std > 0:
            raise ValueError(f"--logit_std must be positive, got {self.logit_std}.")

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and spread for `diffusion.training_example`; None: uniform noise levels."""
        return (0.0, self.logit_std) if self.timestep_sampling == "logit_normal" else None

    @property
    def sampling(self) -> dict:
        """Options of the pipeline's call for samples that are measured."""
        return {"guidance_scale": 1.0, "num_inference_steps": self.sampling_steps}

    @property
    def grid(self) -> dict:
        """Options of the pipeline's call for the sample grid."""
        return self.sampling | {"guidance_scale": self.guidance_scale}
