"""Contrastive encoders over any timm backbone: SimCLR, t-SimCLR, MoCo-v2 and t-MoCo-v2.

The four methods are a table, not four classes: kernel {cosine, student_t} x negatives {batch,
queue}. `ContrastiveEncoder` is the bare backbone and saves a folder in timm's own layout, which
stock AutoModel, AutoImageProcessor, pipelines and timm load without this package.

Source: Chen et al. 2020 (SimCLR, MoCo-v2), He et al. 2020 (MoCo), Hu et al., ICLR 2023.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel
from transformers.utils import ModelOutput

from .blocks import FEATURE_NORMS, ProjectionHead, use_small_image_stem_
from .gather import gather_with_gradient, gather_without_gradient
from .kernels import KERNELS
from .losses import NORMALIZATIONS, info_nce, moco, t_simclr
from .momentum import ema_update_, enqueue_
from .weights import load_complete

STEMS = ("timm", "small_image")
_METHOD_FIELDS = (
    "stem kernel normalization feature_norm temperature dof projection_hidden_dim projection_dim "
    "projection_layers projection_batch_norm queue_size momentum"
).split()


class ContrastiveConfig(TimmWrapperConfig):
    """Backbone and contrastive method.

    Args:
        architecture: timm model name.
        model_args: keyword arguments of `timm.create_model`.
        pretrained_cfg: timm's preprocessing entry: input_size, mean, std, interpolation, crop_pct.
        stem: "timm", or "small_image" for a ResNet on images of about 32 px, which stock timm cannot express.
        kernel: "cosine" or "student_t".
        normalization: "anchor" (one denominator per anchor) or "joint" (t-SimCLR; no queue).
        feature_norm: of embeddings: "l2", "batch" (batch norm without affine, t-MoCo-v2) or "none".
        temperature: > 0, divides the cosine or the squared distance.
        dof: degrees of freedom of the Student-t kernel.
        projection_hidden_dim: width of the projection head; None = feature width.
        projection_dim: dimension of the embeddings.
        projection_layers: linear layers of the head, 1 to 3.
        projection_batch_norm: batch norm after every hidden linear layer.
        queue_size: MoCo's negatives.
        momentum: share of the old key encoder kept at each step.
        dpssl: recipe and metrics of the run that made the checkpoint.

    Raises:
        ValueError: on a combination that is not defined, with what is allowed.
    """

    model_type = "dpssl_contrastive"

    def __init__(
        self,
        architecture: str = "resnet50",
        model_args: dict | None = None,
        pretrained_cfg: dict | None = None,
        stem: str = "timm",
        kernel: str = "student_t",
        normalization: str = "joint",
        feature_norm: str = "none",
        temperature: float = 8.0,  # t-SimCLR training script; its loss class says 0.5
        dof: float = 5.0,
        projection_hidden_dim: int | None = None,
        projection_dim: int = 128,
        projection_layers: int = 2,
        projection_batch_norm: bool = False,
        queue_size: int = 65536,
        momentum: float = 0.999,
        dpssl: dict | None = None,
        **kwargs,
    ):
        self.stem = stem
        self.kernel = kernel
        self.normalization = normalization
        self.feature_norm = feature_norm
        self.temperature = temperature
        self.dof = dof
        self.projection_hidden_dim = projection_hidden_dim
        self.projection_dim = projection_dim
        self.projection_layers = projection_layers
        self.projection_batch_norm = projection_batch_norm
        self.queue_size = queue_size
        self.momentum = momentum
        self.dpssl = dpssl or {}
        self.pretrained_cfg = pretrained_cfg or {}
        self._check()
        super().__init__(architecture=architecture, model_args=model_args, **kwargs)

    def _check(self) -> None:
        choices = dict(stem=STEMS, kernel=KERNELS, normalization=NORMALIZATIONS, feature_norm=FEATURE_NORMS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.kernel == "cosine" and self.normalization == "joint":
            raise ValueError("normalization='joint' is defined for kernel='student_t'; use 'anchor' with 'cosine'.")
        if not 1 <= self.projection_layers <= 3:
            raise ValueError(f"projection_layers must be 1, 2 or 3, got {self.projection_layers}.")
        for name in ("temperature", "dof", "projection_dim", "queue_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum is the share kept of the old key encoder, in [0, 1], got {self.momentum}.")

    def _get_generation_parameters(self) -> dict:
        return {}  # `temperature` is the kernel's; transformers would take it for text generation's

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Also reads the timm layout, where the contrastive method stands under `dpssl`."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "dpssl_contrastive" != config_dict.get("model_type"):
            dpssl = dict(config_dict.get("dpssl") or {})
            config_dict |= dpssl.pop("method", {}) | {"dpssl": dpssl, "model_type": cls.model_type}
            config_dict.pop("num_features", None)
        config_dict.setdefault("label_names", [])
        return config_dict, kwargs

    def to_timm_dict(self, num_features: int) -> dict:
        """The config.json that stock timm and transformers read; the method goes under `dpssl`."""
        method = {name: getattr(self, name) for name in _METHOD_FIELDS}
        timm_dict = {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": num_features,
            "pretrained_cfg": self.pretrained_cfg | {"num_classes": 0},
            "dpssl": self.dpssl | {"method": method},
        }
        if self.model_args:  # never with num_classes, which AutoModel would then get twice
            timm_dict["model_args"] = {k: v for k, v in self.model_args.items() if k != "num_classes"}
        if getattr(self, "auto_map", None):
            timm_dict["auto_map"] = self.auto_map
        return timm_dict


@dataclass
class ContrastiveOutput(ModelOutput):
    """loss: scalar or None; embeddings, paired_embeddings: (B, projection_dim); features: (B, num_features), pooled."""

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    paired_embeddings: Tensor | None = None
    features: Tensor | None = None


class ContrastiveEncoder(TimmWrapperModel):
    """The bare backbone: `last_hidden_state` and pooled features `pooler_output` (B, num_features).

    `save_pretrained` writes timm's layout (config.json and model.safetensors with timm's keys), so
    that the folder loads with stock transformers and timm. Only with stem="small_image" is it this
    class's own layout, which needs hf_dpssl or trust_remote_code.
    """

    config_class = ContrastiveConfig
    _supports_sdpa = True  # timm dispatches attention itself

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        if config.stem == "small_image":
            use_small_image_stem_(self.timm_model)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parent redraws timm's weights; they stay as timm made them. Buffers that are not in
        # the checkpoint are recomputed by the timm module itself.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    @property
    def num_features(self) -> int:
        """Width of the pooled features."""
        return getattr(self.timm_model, "head_hidden_size", None) or self.timm_model.num_features

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> ContrastiveEncoder:
        """As `PreTrainedModel.from_pretrained`; a `pretraining` folder works too. ValueError when weights lack."""
        mapping = kwargs.pop("key_mapping", None) or {r"^encoder\.timm_model\.": "timm_model."}
        return load_complete(super().from_pretrained, *args, key_mapping=mapping, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the folder described in the class docstring; arguments as `PreTrainedModel.save_pretrained`."""
        if self.config.stem != "timm":
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            for custom in (self, self.config):
                if custom._auto_class is not None:
                    custom_object_save(custom, save_directory, config=self.config)
            state_dict = self.state_dict() if state_dict is None else state_dict
            weights = {key.removeprefix("timm_model."): value.contiguous() for key, value in state_dict.items()}
            save_file(weights, os.path.join(save_directory, "model.safetensors"), metadata={"format": "pt"})
            with open(os.path.join(save_directory, "config.json"), "w", encoding="utf-8") as file:
                file.write(json.dumps(self.config.to_timm_dict(self.num_features), indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)


class ContrastivePreTrainedModel(PreTrainedModel):
    """What both pretraining classes share: config, `encoder` as base model, and a head."""

    config_class = ContrastiveConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    _supports_sdpa = True  # as the encoder
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        self.encoder = ContrastiveEncoder(config)
        self.head = self._make_head()

    def _make_head(self) -> ProjectionHead:
        config, width = self.config, self.encoder.num_features
        sizes = (width, config.projection_hidden_dim or width, config.projection_dim, config.projection_layers)
        return ProjectionHead(*sizes, batch_norm=config.projection_batch_norm, feature_norm=config.feature_norm)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Reached for the heads only, the encoder has its own: torch's defaults, as in the papers' code.
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        loaded = any(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
        if isinstance(module, nn.Linear | nn.BatchNorm1d) and not loaded:
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> ContrastivePreTrainedModel:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of encoder and head, for the optimiser."""
        return [*self.encoder.parameters(), *self.head.parameters()]

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(pixel_values).pooler_output
        return features, self.head(features)


class SimCLRForPreTraining(ContrastivePreTrainedModel):
    """SimCLR (kernel="cosine") and t-SimCLR (kernel="student_t"): negatives are the rest of the global batch."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, paired_pixel_values: Tensor | None = None, weights: Tensor | None = None, **kwargs
    ) -> ContrastiveOutput:
        """Embed one view, and with `paired_pixel_values` (the other view, same order) compute the loss.

        Args:
            pixel_values: (B, C, H, W), normalised with the config's mean and std.
            paired_pixel_values: (B, C, H, W), second view of the same images.
            weights: (B,) weight of each pair.
        """
        if paired_pixel_values is None:
            features, embeddings = self._embed(pixel_values)
            return ContrastiveOutput(embeddings=embeddings, features=features)
        # One pass over both views: batch norm sees 2B images, as in the papers' code.
        features, embeddings = self._embed(torch.cat([pixel_values, paired_pixel_values]))
        embeddings, paired = embeddings.chunk(2)
        view_1, view_2 = gather_with_gradient(embeddings), gather_with_gradient(paired)
        weights = None if weights is None else gather_without_gradient(weights)
        config = self.config
        if config.kernel == "cosine":
            loss = info_nce(view_1, view_2, temperature=config.temperature, weights=weights)
        else:
            options = {"temperature": config.temperature, "dof": config.dof, "normalization": config.normalization}
            loss = t_simclr(view_1, view_2, **options, weights=weights)
        return ContrastiveOutput(loss, embeddings, paired, features.chunk(2)[0])


class MoCoForPreTraining(ContrastivePreTrainedModel):
    """MoCo-v2 (kernel="cosine") and t-MoCo-v2 (kernel="student_t"): negatives are a queue of earlier keys.

    In training mode each forward with two views moves the key encoder and, after the loss, puts the
    keys of all processes into the queue. Only rows that hold a key are used while it fills; the very
    first step takes the keys of its own batch as negatives.
    """

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        if config.normalization == "joint":
            raise ValueError("normalization='joint' needs all pairs of a batch; MoCo's queue takes 'anchor'.")
        self.key_encoder = ContrastiveEncoder(config)
        self.key_head = self._make_head()
        self.register_buffer("queue", torch.zeros(config.queue_size, config.projection_dim))
        self.register_buffer("queue_cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.post_init()
        self._copy_query_to_key()

    def _copy_query_to_key(self) -> None:
        # After post_init, which may draw weights: before it, queries and keys would start apart.
        if self.head[0].weight.device.type != "meta":
            self.key_encoder.load_state_dict(self.encoder.state_dict())
            self.key_head.load_state_dict(self.head.state_dict())
        self.train(self.training)

    def train(self, mode: bool = True) -> MoCoForPreTraining:
        """As `nn.Module.train`; the key branch stays without gradient, also after `from_pretrained`."""
        super().train(mode)
        self.key_encoder.requires_grad_(False)
        self.key_head.requires_grad_(False)
        return self

    @torch.no_grad()
    def _keys(self, pixel_values: Tensor) -> Tensor:
        if self.training:
            key_parameters = [*self.key_encoder.parameters(), *self.key_head.parameters()]
            ema_update_(key_parameters, self.trainable_parameters(), self.config.momentum)
        return self.key_head(self.key_encoder(pixel_values).pooler_output)

    def forward(self, pixel_values: Tensor, paired_pixel_values: Tensor | None = None, **kwargs) -> ContrastiveOutput:
        """Queries of `pixel_values` (B, C, H, W); with `paired_pixel_values` also keys and the loss."""
        features, queries = self._embed(pixel_values)
        if paired_pixel_values is None:
            return ContrastiveOutput(embeddings=queries, features=features)
        keys = self._keys(paired_pixel_values)
        all_keys = gather_without_gradient(keys)
        filled = int(self.queue_filled)
        # A copy, since the queue is written before the backward pass reads it.
        negatives = self.queue[:filled].clone() if filled else all_keys
        config = self.config
        loss = moco(queries, keys, negatives, kernel=config.kernel, temperature=config.temperature, dof=config.dof)
        if self.training:
            enqueue_(self.queue, self.queue_cursor, self.queue_filled, all_keys)
        return ContrastiveOutput(loss, queries, keys, features)
