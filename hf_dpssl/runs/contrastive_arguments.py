"""Arguments of contrastive training: training/contrastive.py, and training/map.py, which trains in three stages."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields

from ..data.choices import AUGMENTATIONS, MODES
from ..models.choices import BATCH_NORMS, FEATURE_NORMS, KERNELS, MOMENTUM_SCHEDULES, NORMALIZATIONS, STEMS
from .flags import option
from .recipe import RunArguments

_FEW = 16  # dimensions
_OF_QUEUE = ("queue_size", "momentum", "momentum_schedule")


@dataclass
class ContrastiveArguments(RunArguments):
    """Method, backbone and optimiser; the defaults are t-SimCLR on the embedded digits."""

    name: str = option("encoder", "subfolder of output_dir for the finished encoder", group="run")
    negatives: str = option("batch", "batch (SimCLR) or queue (MoCo)", choices=["batch", "queue"], group="model")
    kernel: str = option("student_t", "similarity of embeddings", choices=KERNELS)
    normalization: str | None = option(
        None, "denominator over all pairs or per anchor; default: joint, with cosine or a queue anchor",
        choices=NORMALIZATIONS,
    )  # fmt: skip
    feature_norm: str | None = option(
        None, "normalisation of embeddings; default: batch, with cosine or more than 16 dimensions l2",
        choices=FEATURE_NORMS,
    )  # fmt: skip
    temperature: str | None = option(
        None, "divides the cosine or the squared distance; auto: set by --perplexity; default: auto, with cosine 0.2"
    )
    perplexity: float | None = option(
        None, "of Q, as a share of the candidates, in (0, 1); with --temperature auto only"
    )
    dof: float = option(5.0, "degrees of freedom of the Student-t kernel")
    learnable_dof: bool = option(False, "train the degrees of freedom too")
    sigreg_weight: float = option(
        0.0, "LeJEPA with this weight of SIGReg, in (0, 1), in place of a contrastive loss; kernel and temperature rest"
    )
    queue_size: int | None = option(
        None, "negatives of --negatives queue; default: up to half of the data set's images"
    )
    momentum: float = option(0.999, "share of the old key encoder kept at each step, with --negatives queue")
    momentum_schedule: str = option("constant", "or cosine: from --momentum to 1", choices=MOMENTUM_SCHEDULES)
    architecture: str = option("resnet10t", "timm model")
    model_args: str | None = option('{"channels": [32, 64, 128, 256]}', "JSON keyword arguments of timm.create_model")
    init_encoder: str | None = option(None, "folder or Hub id of an encoder of this architecture to start from")
    init_pretraining: str | None = option(
        None, "encoder folder with `pretraining/` to start from: encoder and head; another projection_dim is drawn anew"
    )
    freeze: str = option("none", "what is held fixed", choices=["none", "all_but_last_layer"])
    autoencoder: str | None = option(
        None, "folder or Hub id of a VQAutoencoder: the encoder learns the views' normalised latents, not pictures"
    )
    stem: str = option("timm", "timm, or small_image: 3x3 stride-1 stem of a ResNet", choices=STEMS)
    projection_dim: int = option(32, "dimension of the embeddings")
    projection_hidden_dim: int | None = option(None, "width of the head; default: the features'")
    projection_layers: int = option(2, "linear layers of the head")
    projection_batch_norm: bool = option(False, "batch norm in the head")
    batch_norm: str = option("local", "statistics per process, over all, or per part of a batch", choices=BATCH_NORMS)
    batch_norm_splits: int = option(1, "parts of a process's batch with --batch_norm split")
    augmentation: str | None = option(
        None, "preset of views; default: what suits the data set", choices=AUGMENTATIONS, group="data"
    )
    augmentation_mode: str = option("fused", "colours as one matrix, or exactly as torchvision v2", choices=MODES)
    num_train_epochs: int = option(100, "epochs", group="optimiser")
    max_train_steps: int | None = option(None, "steps instead of epochs; needed with --streaming")
    optimizer: str = option("adamw", "optimiser", choices=["adamw", "sgd"])
    learning_rate: float = option(2e-3, "peak learning rate")
    weight_decay: float = option(1e-4, "weight decay")
    batch_size: int = option(256, "images per process and step; each gives two views")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    compile: bool = option(False, "compile the model with torch.compile")
    channels_last: bool = option(
        False, "memory format of the encoder; faster for bf16 on GPUs and for small pictures on CPUs: try both"
    )
    knn_k: int = option(20, "neighbours of the kNN evaluation", group="evaluation")
    knn_metric: str = option("cosine", "similarity of the kNN evaluation", choices=["cosine", "euclidean"])

    def depends_on_length(self) -> bool:
        """Whether MoCo's momentum rises to 1 at the end."""
        return self.negatives == "queue" and self.momentum_schedule != "constant"

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train_epochs", "max_train_steps", "knn_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not self.learning_rate >= 0:
            raise ValueError(f"--learning_rate must not be negative, got {self.learning_rate}.")
        self._check_model_args()
        given = [field for field in fields(ContrastiveArguments) if field.name in _OF_QUEUE]
        given = [field.name for field in given if getattr(self, field.name) != field.default]
        if given and self.negatives != "queue":
            raise ValueError(f"--{given[0]} is of --negatives queue: leave it out, or give that.")
        # Chosen over data sets and dimensions that nobody tuned: training/evidence/defaults.py.
        cosine = self.kernel == "cosine"
        if self.normalization is None:
            self.normalization = "anchor" if cosine or self.negatives == "queue" else "joint"
        if self.sigreg_weight and self.negatives == "queue":
            raise ValueError("--sigreg_weight needs no negatives: leave --negatives queue out.")
        if self.sigreg_weight and self.feature_norm is None:
            self.feature_norm = "none"
        if self.feature_norm is None:
            self.feature_norm = "l2" if cosine or self.projection_dim > _FEW else "batch"
        if self.temperature is None:  # 0 is none: it stays, and is refused
            self.temperature = "0.2" if cosine else "auto"
        if self.temperature != "auto":
            try:
                self.temperature = float(self.temperature)
            except ValueError:
                raise ValueError(f"--temperature must be a number or auto, got {self.temperature!r}.") from None
        if self.perplexity is not None and self.temperature != "auto":
            raise ValueError(f"--perplexity is of --temperature auto, which is {self.temperature}: leave it out.")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                "--gradient_accumulation_steps > 1 would change the loss: negatives come from one batch (or, with a "
                "queue, from keys that the accumulated batches themselves enqueue). Use a larger --batch_size or "
                "more processes; embeddings are gathered over processes with their gradient."
            )
        if self.init_encoder and self.init_pretraining:
            raise ValueError("--init_pretraining holds an encoder already: leave --init_encoder out.")
        if self.streaming and self.max_train_steps is None:
            raise ValueError("--streaming needs --max_train_steps: the length of a stream is not known.")

    def _check_model_args(self) -> None:
        """ValueError unless --model_args are keyword arguments that a backbone of RGB pictures may get."""
        given = self.model_args or "{}"
        try:
            values = json.loads(given)
        except ValueError as error:
            raise ValueError(f"--model_args must be a JSON object, got {given!r}: {error}.") from None
        if not isinstance(values, dict):
            raise ValueError(f'--model_args must be a JSON object such as {{"drop_path_rate": 0.1}}, got {given}.')
        if values.get("in_chans", 3) != 3:
            raise ValueError(
                f"--model_args in_chans {values['in_chans']}: views are RGB, of 3 channels, and latents "
                "have their autoencoder's; leave it out."
            )
        if values.get("num_classes", 0) != 0:
            raise ValueError(f"--model_args num_classes {values['num_classes']}: an encoder has none; leave it out.")


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
        for name in ("warmup_epochs", "stage_3_share"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.streaming or self.max_train_steps is not None or self.negatives == "queue":
            raise ValueError(
                "a map counts epochs, over negatives from the batch: leave out --streaming, --max_train_steps and "
                "--negatives queue."
            )
