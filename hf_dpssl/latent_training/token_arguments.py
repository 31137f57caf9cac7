"""Arguments of training/dae_ar.py: language model over codes, optimiser, measures and sample grids."""

from __future__ import annotations

from dataclasses import dataclass

from ..generation.choices import ARCHITECTURES
from ..runs.flags import option
from .latent_arguments import LatentRunArguments


@dataclass
class ARArguments(LatentRunArguments):
    """Autoencoder, language model and optimiser; the defaults generate the embedded digits."""

    name: str = option("ar", "subfolder of output_dir for the finished pipeline", group="run")
    architecture: str = option("gpt2", "causal language model of transformers", choices=ARCHITECTURES, group="model")
    num_layers: int = option(2, "blocks of the transformer")
    width: int = option(64, "width of the transformer")
    num_heads: int = option(4, "attention heads")
    dropout: float = option(0.1, "dropout; of the attention weights alone with --architecture llama")
    gradient_checkpointing: bool = option(False, "compute activations twice instead of storing them")
    compile: bool = option(False, "compile the language model with torch.compile")
    ema_decay: float = option(0.995, "share of the old averaged weights kept at each step", group="optimiser")
    max_train_steps: int = option(800, "optimiser steps")
    learning_rate: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(0.05, "weight decay of the matrices; embeddings, norms and biases have none")
    warmup_steps: int = option(50, "steps of linear warm-up")
    validation_steps: int = option(
        200, "steps between two measurements on held-out codes, rounded up to a log entry", group="evaluation"
    )
    guidance_scale: float = option(2.0, "guidance of the guided sample grid")
    temperature: float = option(1.0, "temperature of the sample grids")
    top_k: int | None = option(None, "the sample grids draw among the so many most probable codes only")
    extractor: list[str] = option([], "judge generated images in features of: inception, or an encoder's folder or id")
    num_generated: int = option(1000, "images that --extractor judges, of all classes in turn")
    samples_per_class: int = option(10, "pictures of each class (of at most 10), or per row, in the sample grids")

    @property
    def extractors(self) -> list[str]:
        """Those that judge generated images."""
        return self.extractor

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout lies in [0, 1), got {self.dropout}.")
        for name in (
            "max_train_steps",
            "validation_steps",
            "num_layers",
            "num_heads",
            "samples_per_class",
            "num_generated",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")

    def measures_at(self, step: int) -> bool:
        """Whether held-out codes are measured in the loop after so many steps; those after the last come after it."""
        every = self.logging_steps * -(-self.validation_steps // self.logging_steps)
        return step % every == 0 and step < self.max_train_steps
