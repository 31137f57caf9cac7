"""Arguments of training/map.py: those of contrastive training, in three stages."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.choices import FEATURE_NORMS, NORMALIZATIONS
from .contrastive_arguments import ContrastiveArguments
from .flags import option


@dataclass
class MapArguments(ContrastiveArguments):
    """Three stages of contrastive training; --projection_dim is that of stage 1, the map has two dimensions."""

    output_dir: str = option("outputs/map", "folder of the run")
    normalization: str = option("anchor", "anchor (t-SimCNE) or joint (t-SimCLR)", choices=NORMALIZATIONS)
    feature_norm: str = option("none", "normalisation of the points", choices=FEATURE_NORMS)
    temperature: float = option(1.0, "divides the squared distance; t-SimCNE: 1")
    dof: float = option(1.0, "degrees of freedom of the Student-t kernel; t-SimCNE: 1, the Cauchy kernel")
    projection_dim: int = option(128, "dimension of the embeddings of stage 1; t-SimCNE: 128")
    projection_hidden_dim: int | None = option(1024, "width of the head; t-SimCNE: 1024")
    stage_1_epochs: int = option(100, "epochs of stage 1; t-SimCNE: 1000", group="optimiser")
    stage_2_epochs: int = option(10, "epochs of stage 2, the last layer alone; t-SimCNE: 50")
    stage_3_epochs: int = option(50, "epochs of stage 3; t-SimCNE: 450")
    warmup_epochs: int = option(10, "epochs of linear warm-up of stages 1 and 3; t-SimCNE: 10")
    stage_3_share: float = option(0.1, "learning rate of stage 3, a share of --learning_rate; t-SimCNE: 0.001")
    knn_k: int = option(15, "neighbours of the kNN evaluation; t-SimCNE: 15")
    evaluation_images: int = option(
        10_000, "at most so many images of each split, drawn at random, evaluate and measure", group="evaluation"
    )
    page_images: int = option(10_000, "at most so many images are on the interactive page", group="evaluation")

    def __post_init__(self):
        super().__post_init__()
        for name in ("stage_1_epochs", "stage_2_epochs", "stage_3_epochs", "page_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.streaming or self.max_train_steps is not None or self.negatives == "queue":
            raise ValueError(
                "a map counts epochs, over negatives from the batch: leave out --streaming, --max_train_steps and "
                "--negatives queue."
            )
