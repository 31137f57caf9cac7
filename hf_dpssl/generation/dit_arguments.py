"""Arguments of training/dae_dit.py: transformer, objective, optimiser, validation and alignment."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..runs.flags import option
from .choices import OBJECTIVES
from .dit_sizes import PRESETS, preset
from .latent_arguments import LatentRunArguments


@dataclass
class DiTArguments(LatentRunArguments):
    """Autoencoder, transformer, objective and optimiser; the defaults generate the embedded digits."""

    preset: str | None = option(None, "size of the DiT paper instead of the next four", choices=PRESETS, group="model")
    num_layers: int = option(4, "blocks of the transformer")
    width: int = option(128, "width of the transformer")
    num_heads: int = option(4, "attention heads")
    patch_size: int = option(2, "latent cells per token and side")
    learned_variance: bool = option(False, "predict the variance too, by the hybrid loss (objective epsilon)")
    align_encoder: str | None = option(None, "folder or Hub id of a contrastive encoder that tokens are aligned with")
    align_block: int | None = option(
        None, "block whose tokens are aligned, from 1; default: a third of the depth, <= 8"
    )
    align_width: int = option(2048, "width of the alignment's projector")

    objective: str = option("flow", "what is predicted", choices=OBJECTIVES, group="optimiser")
    min_snr_gamma: float | None = option(None, "clip the weights of the loss by min-SNR; 5 in its paper")
    timestep_sampling: str = option("uniform", "noise levels of a flow", choices=["uniform", "logit_normal"])
    logit_std: float = option(1.0, "spread of logit-normal noise levels")
    ema_decay: float = option(0.998, "share of the old averaged weights kept at each step")
    max_train_steps: int = option(2400, "optimiser steps")
    learning_rate: float = option(2e-3, "peak learning rate")
    adam_beta2: float = option(0.99, "share kept of the mean squared gradient; the DiT paper has 0.999")
    weight_decay: float = option(0.0, "weight decay")
    warmup_steps: int = option(50, "steps of linear warm-up")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    compile: bool = option(False, "compile the transformer with torch.compile")

    sampling_steps: int = option(25, "denoising steps of the sample grids and of validations", group="evaluation")
    guidance_scale: float = option(1.5, "guidance of the guided sample grid")
    grid_images_per_class: int = option(10, "images of each of the first 10 classes in the sample grids")
    validation_steps: int = option(0, "steps between two validations of the averaged weights; 0: none")
    validation_images: int = option(1000, "images that a validation generates, without guidance")
    validation_extractor: str | None = option(
        None,
        "extractor of a validation's FID against training images: inception, timm:<model>, an encoder's folder ...",
    )
    validation_classifier: str | None = option(
        None, "extractor with a classifier's head (resnet56-cifar10, timm:<model>) for class consistency"
    )
    best_metric: str | None = option(
        None,
        "validation metric by which OUTPUT_DIR/NAME-best is kept; default: FID, else class consistency",
        choices=["fid", "class_consistency"],
    )

    name: str = option("dit", "subfolder of output_dir for the finished pipeline", group="run")

    def __post_init__(self):
        super().__post_init__()
        self._apply_preset()
        for name in (
            "max_train_steps",
            "sampling_steps",
            "grid_images_per_class",
            "validation_images",
            "align_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.validation_steps < 0:
            raise ValueError(f"--validation_steps must be 0 (none) or more, got {self.validation_steps}.")
        self._check_objective()
        self._check_validation()
        if self.align_block is not None and not 1 <= self.align_block <= self.num_layers:
            raise ValueError(f"--align_block lies in [1, {self.num_layers}], got {self.align_block}.")
        if self.align_encoder and self.streaming:
            raise ValueError("--align_encoder reads images by row, which a stream has not: leave out --streaming.")

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in asdict(preset(self.preset)).items():
            if getattr(self, name) not in (value, defaults[name]):
                raise ValueError(
                    f"--preset {self.preset} has --{name} {value}, got {getattr(self, name)}: leave one out."
                )
            setattr(self, name, value)

    def _check_objective(self) -> None:
        if self.learned_variance and self.objective != "epsilon":
            raise ValueError(f"--learned_variance needs --objective epsilon, got {self.objective}.")
        if self.timestep_sampling == "logit_normal" and self.objective != "flow":
            raise ValueError(f"--timestep_sampling logit_normal needs --objective flow, got {self.objective}.")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"--min_snr_gamma must be positive, got {self.min_snr_gamma}.")
        if not self.logit_std > 0:
            raise ValueError(f"--logit_std must be positive, got {self.logit_std}.")

    def _check_validation(self) -> None:
        given = {"fid": self.validation_extractor, "class_consistency": self.validation_classifier}
        if any(given.values()) and not self.validation_steps:
            raise ValueError(
                "--validation_extractor and --validation_classifier need --validation_steps of at least 1."
            )
        if self.best_metric and not given[self.best_metric]:
            flag = "--validation_extractor" if self.best_metric == "fid" else "--validation_classifier"
            raise ValueError(f"--best_metric {self.best_metric} needs {flag}.")

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and spread for `diffusion.training_example`; None: uniform noise levels."""
        return (0.0, self.logit_std) if self.timestep_sampling == "logit_normal" else None
