"""Arguments of what is measured of a generator's images while it trains (generation_monitor.py)."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.flags import option
from ..runs.recipe import RunArguments


@dataclass
class ValidationArguments(RunArguments):
    """How often the averaged weights are validated, by how many images, in whose features."""

    validation_steps: int = option(
        0, "steps between two validations of the averaged weights; 0: none", group="evaluation"
    )
    validation_images: int = option(1000, "images that a validation generates, without guidance")
    validation_extractor: str | None = option(
        None,
        "extractor of a validation's FID against training images: inception, timm:<model>, an encoder's folder ...",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.validation_images < 1:
            raise ValueError(f"--validation_images must be at least 1, got {self.validation_images}.")
        if self.validation_steps < 0:
            raise ValueError(f"--validation_steps must be 0 (none) or more, got {self.validation_steps}.")
        if self.validation_extractor and not self.validation_steps:
            raise ValueError("--validation_extractor needs --validation_steps of at least 1.")
        if self.validation_extractor and self.validation_images < 2:
            raise ValueError("--validation_extractor compares distributions: --validation_images of at least 2.")

    @property
    def sampling(self) -> dict:
        """Options of the generator's call for images that are measured."""
        return {}

    @property
    def grid(self) -> dict:
        """Options of the generator's call for the sample grids."""
        return {}
