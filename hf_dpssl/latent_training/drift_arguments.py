"""Arguments of training/dae_drift.py: start, field, sets of a step and optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..models.choices import FIELD_KERNELS, FIELD_SCALES
from ..runs.flags import option
from .transformer_arguments import TransformerRunArguments


@dataclass
class DriftArguments(TransformerRunArguments):
    """Autoencoder, one-step generator, field and optimiser; the defaults generate the embedded digits."""

    architecture: str | None = option(
        None,
        "of the generator: dit; or mlp, --num_layers dense blocks of --width over the whole latent, for small ones; "
        "default: mlp for the embedded digits without --autoencoder or a flag of the DiT, else dit",
        choices=["dit", "mlp"],
        group="model",
    )
    init_from: str | None = option(
        None, "folder or Hub id of a VQDiTPipeline (objective flow) whose transformer is the start"
    )

    batch_size: int = option(
        320, "generated images per process and step, a multiple of --images_per_set", group="optimiser"
    )
    class_dropout: float = option(0.1, "share of sets that are of all classes, for samples without class")
    features: list[str] = option(
        ["latent"],
        "spaces of the field: latent, or the folder or Hub id of an encoder, of these latents (contrastive.py "
        "--autoencoder) or of decoded pictures; several are averaged",
    )
    kernel: str = option("exponential", "of distances in these spaces", choices=FIELD_KERNELS)
    scales: list[float] = option([], f"of the kernel, in mean distances; default: {FIELD_SCALES}")
    dof: float = option(1.0, "degrees of freedom of --kernel student_t")
    symmetric: bool = option(True, "normalise affinities over real and over generated images, not over real ones only")
    images_per_set: int = option(32, "generated images of a set, all of one class; they repel each other")
    real_per_set: int = option(48, "real images of a set, of the same class; they attract")
    guidance_scale: float = option(1.0, "above 1: real images of all classes repel too; trades diversity for fidelity")
    negatives_per_set: int = option(16, "with guidance: images of all classes in a set")
    max_train_steps: int = option(1000, "optimiser steps")
    learning_rate: float = option(1e-3, "peak learning rate")

    name: str = option("drift", "subfolder of output_dir for the finished pipeline", group="run")

    @property
    def encoders(self) -> list[str]:
        """Those whose features are spaces of the field."""
        return [name for name in self.features if name != "latent"]

    def __post_init__(self):
        super().__post_init__()
        least = {"max_train_steps": 1, "images_per_set": 2, "real_per_set": 2, "negatives_per_set": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"--{name} must be at least {number}, got {getattr(self, name)}.")
        if self.batch_size % self.images_per_set:
            raise ValueError(
                f"--batch_size {self.batch_size} must be a multiple of --images_per_set {self.images_per_set}: a batch "
                "is whole sets."
            )
        if bad := [scale for scale in [*self.scales, self.dof] if not 0 < scale < math.inf]:
            raise ValueError(f"--scales and --dof must be positive and finite, got {bad[0]}.")
        if not 1 <= self.guidance_scale < math.inf:
            raise ValueError(f"--guidance_scale must be at least 1 (1 = no guidance), got {self.guidance_scale}.")
        if self.guidance_scale > 1 and self.unconditional:
            raise ValueError("--guidance_scale is between classes: leave it out with --unconditional.")
        of_dit = ("preset", "init_from", "gradient_checkpointing")
        if self.architecture is None:
            tiny = self.dataset == "digits" and not self.autoencoder
            defaults = {field.name: field.default for field in fields(self)}
            asked = any(getattr(self, name) != defaults[name] for name in (*of_dit, "num_heads", "patch_size"))
            self.architecture = "mlp" if tiny and not asked else "dit"
        if self.architecture == "mlp":
            for name in of_dit:
                if getattr(self, name):
                    raise ValueError(f"--{name} is of a DiT: leave it out, or --architecture mlp.")
        if not self.features:
            raise ValueError("--features must name at least one space: latent, or an encoder.")
        if self.streaming:
            raise ValueError("sets are drawn by class from the whole data set: leave out --streaming.")

    @property
    def sets_per_batch(self) -> int:
        """Sets per process and step."""
        return self.batch_size // self.images_per_set

    def negative_weight(self, count: int) -> float:
        """Weight of each of `count` negatives of a set, 0 without guidance.

        They hold a share (s - 1) / s of what repels, s the guidance scale: where (1 / s) of the generator's density and
        (1 - 1 / s) of that of all classes balance the class's, the former is s p(x | class) - (s - 1) p(x).
        """
        return (self.images_per_set - 1) * (self.guidance_scale - 1) / count

    @property
    def field(self) -> dict:
        """Options of `drift_field`."""
        return {
            "kernel": self.kernel,
            "scales": self.scales or None,
            "dof": self.dof,
            "symmetric": self.symmetric,
        }
