"""Arguments that the generators in a latent share."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.flags import option
from ..runs.recipe import RunArguments


@dataclass
class LatentRunArguments(RunArguments):
    """The autoencoder of a generator, and dropped classes."""

    autoencoder: str | None = option(
        None, "folder or Hub id of a VQAutoencoder; default: train or reuse our own", group="data"
    )
    autoencoder_recipe: str | None = option(None, "recipe of training/dae_vq.py when it has to be trained")
    autoencoder_args: str = option("", "flags of training/dae_vq.py when it has to be trained, in one string")
    flip_cache: bool = option(False, "cache mirrored images too; each epoch shows a random half of the images mirrored")
    unconditional: bool = option(False, "ignore the classes of the data set")
    class_dropout: float = option(
        0.1, "share of images whose label is dropped, for classifier-free guidance", group="optimiser"
    )

    evaluation_images: int = option(
        10_000, "at most so many images of each split, drawn at random, evaluate and measure", group="evaluation"
    )

    @property
    def encoders(self) -> list[str]:
        """Folders and Hub ids of encoders that the run will load."""
        return []

    @property
    def extractors(self) -> list[str]:
        """Names of feature extractors that the run will load."""
        return []

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"--class_dropout lies in [0, 1), got {self.class_dropout}.")
