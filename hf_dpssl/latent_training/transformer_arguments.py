"""Arguments that the trainers of transformers over latents share: size, validation and sample grids."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from ..runs.flags import option
from .dit_sizes import PRESETS, preset
from .latent_arguments import LatentRunArguments
from .validation_arguments import ValidationArguments


@dataclass
class TransformerRunArguments(ValidationArguments, LatentRunArguments):
    """Size of a DiT, and what is measured of its samples while it trains."""

    preset: str | None = option(None, "size of the DiT paper instead of the next four", choices=PRESETS, group="model")
    num_layers: int = option(4, "blocks of the transformer")
    width: int = option(128, "width of the transformer")
    num_heads: int = option(4, "attention heads")
    patch_size: int = option(2, "latent cells per token and side")

    ema_decay: float = option(0.998, "share of the old averaged weights kept at each step", group="optimiser")
    adam_beta2: float = option(0.99, "share kept of the mean squared gradient; the DiT paper has 0.999")
    weight_decay: float = option(0.0, "weight decay")
    warmup_steps: int = option(50, "steps of linear warm-up")
    gradient_checkpointing: bool = option(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    compile: bool = option(False, "compile the transformer with torch.compile")

    grid_images_per_class: int = option(
        10, "images of each of the first 10 classes in the sample grids", group="evaluation"
    )
    validation_classifier: str | None = option(
        None, "extractor with a classifier's head (resnet56-cifar10, timm:<model>) for class consistency"
    )
    best_metric: str | None = option(
        None,
        "validation metric by which OUTPUT_DIR/NAME-best is kept; default: FID, else class consistency",
        choices=["fid", "class_consistency"],
    )

    @property
    def extractors(self) -> list[str]:
        """Those of validations."""
        return [name for name in (self.validation_extractor, self.validation_classifier) if name]

    def __post_init__(self):
        super().__post_init__()
        self._apply_preset()
        if self.grid_images_per_class < 1:
            raise ValueError(f"--grid_images_per_class must be at least 1, got {self.grid_images_per_class}.")
        self._check_validation()

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

    def _check_validation(self) -> None:
        given = {"fid": self.validation_extractor, "class_consistency": self.validation_classifier}
        if self.validation_classifier and not self.validation_steps:
            raise ValueError("--validation_classifier needs --validation_steps of at least 1.")
        if self.best_metric and not given[self.best_metric]:
            flag = "--validation_extractor" if self.best_metric == "fid" else "--validation_classifier"
            raise ValueError(f"--best_metric {self.best_metric} needs {flag}.")
