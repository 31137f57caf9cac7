"""Contrastive encoders over any timm backbone: their configuration, and the bare encoder.

`ContrastiveEncoder` is the bare backbone and saves a folder in timm's own layout, which stock AutoModel,
AutoImageProcessor, pipelines and timm load without this package. The models that train it are in
modeling_contrastive_pretraining.py.

Source: Chen et al. 2020 (SimCLR, MoCo-v2), He et al. 2020 (MoCo), Hu et al., ICLR 2023.
"""

from __future__ import annotations

import json
import math
import os

import timm
import torch
from torch import Tensor, nn
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from .blocks import use_small_image_stem_
from .choices import (
    FEATURE_NORMS,
    KERNELS,
    NORMALIZATIONS,
    STEMS,
    check_batch_norm,
    check_learnable_dof,
    check_share,
    check_temperature,
)
from .complete_weights import draw_after_meta_, load_complete

_METHOD_FIELDS = [
    "stem",
    "kernel",
    "normalization",
    "feature_norm",
    "temperature",
    "perplexity",
    "dof",
    "learnable_dof",
    "projection_hidden_dim",
    "projection_dim",
    "projection_layers",
    "projection_batch_norm",
    "batch_norm",
    "batch_norm_splits",
    "queue_size",
    "momentum",
    "vae_fingerprint",
    "latent_statistics",
    "sigreg_weight",
]


class ContrastiveConfig(TimmWrapperConfig):
    """Backbone and contrastive method.

    Args:
        architecture: timm model name.
        model_args: keyword arguments of `timm.create_model`.
        pretrained_cfg: timm's preprocessing entry: input_size, mean, std, interpolation, crop_pct.
        stem: "timm", or "small_image" for a ResNet on images of about 32 px, which stock timm cannot express
            (two variants of it, for encoders of other libraries, stand in choices.py).
        kernel: "cosine" or "student_t".
        normalization: "anchor" (one denominator per anchor) or "joint" (t-SimCLR; no queue).
        feature_norm: of embeddings: "l2", "batch" (batch norm without affine, t-MoCo-v2) or "none".
        temperature: > 0, divides the cosine or the squared distance; "auto" sets it by `perplexity`.
        perplexity: with temperature="auto", that of Q as a share of the candidates, in (0, 1); None: 0.2, or 0.6 at
            the first step where nothing bounds the embeddings (Student-t and feature_norm="none").
        dof: degrees of freedom of the Student-t kernel.
        learnable_dof: train dof too, within (0.1, 1000), from `dof` on.
        projection_hidden_dim: width of the projection head; None = feature width.
        projection_dim: dimension of the embeddings.
        projection_layers: linear layers of the head, 1 to 3.
        projection_batch_norm: batch norm after every hidden linear layer.
        batch_norm: images over which batch norms take their statistics in pretraining: "local" (of this process),
            "global" (of all processes) or "split" (each of `batch_norm_splits` parts of the process's batch).
        batch_norm_splits: at least 2 with "split", otherwise 1.
        queue_size: MoCo's negatives.
        momentum: share of the old key encoder kept at each step.
        vae_fingerprint: of an encoder of latents, that of the VQAutoencoder whose normalised latents it takes in place
            of pictures; input_size is then theirs. None: it takes pictures.
        latent_statistics: that autoencoder's latent_mean and latent_std, by which they were normalised.
        sigreg_weight: in (0, 1) the loss is LeJEPA with this weight of SIGReg, in place of a contrastive one, and the
            embeddings are free (feature_norm="none"); 0: contrastive.
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
        temperature: float | str = 8.0,  # t-SimCLR training script; its loss class says 0.5
        perplexity: float | None = None,
        dof: float = 5.0,
        learnable_dof: bool = False,
        projection_hidden_dim: int | None = None,
        projection_dim: int = 128,
        projection_layers: int = 2,
        projection_batch_norm: bool = False,
        batch_norm: str = "local",
        batch_norm_splits: int = 1,
        queue_size: int = 65536,
        momentum: float = 0.999,
        vae_fingerprint: str | None = None,
        latent_statistics: dict | None = None,
        sigreg_weight: float = 0.0,
        dpssl: dict | None = None,
        **kwargs,
    ):
        self.stem = stem
        self.kernel = kernel
        self.normalization = normalization
        self.feature_norm = feature_norm
        self.temperature = temperature
        self.perplexity = perplexity
        self.dof = dof
        self.learnable_dof = learnable_dof
        self.projection_hidden_dim = projection_hidden_dim
        self.projection_dim = projection_dim
        self.projection_layers = projection_layers
        self.projection_batch_norm = projection_batch_norm
        self.batch_norm = batch_norm
        self.batch_norm_splits = batch_norm_splits
        self.queue_size = queue_size
        self.momentum = momentum
        self.vae_fingerprint = vae_fingerprint
        self.latent_statistics = latent_statistics
        self.sigreg_weight = sigreg_weight
        self.dpssl = dpssl or {}
        self.pretrained_cfg = pretrained_cfg or {}
        self._check()
        if model_args:  # as timm writes them: transformers would pass the number of classes twice
            model_args = {name: value for name, value in model_args.items() if name != "num_classes"}
        super().__init__(architecture=architecture, model_args=model_args, **kwargs)

    def _check(self) -> None:
        choices = dict(stem=STEMS, kernel=KERNELS, normalization=NORMALIZATIONS, feature_norm=FEATURE_NORMS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.kernel == "cosine" and self.normalization == "joint":
            raise ValueError("normalization='joint' is defined for kernel='student_t'; use 'anchor' with 'cosine'.")
        check_batch_norm(self.batch_norm, self.batch_norm_splits)
        if not 1 <= self.projection_layers <= 3:
            raise ValueError(f"projection_layers must be 1, 2 or 3, got {self.projection_layers}.")
        check_temperature(self.temperature)
        if self.perplexity is not None:
            check_share(self.perplexity)
        if self.learnable_dof:
            if self.kernel != "student_t":
                raise ValueError(f"learnable_dof=True needs kernel='student_t', got {self.kernel!r}.")
            check_learnable_dof(self.dof)
        for name in ("dof", "projection_dim", "queue_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0 <= self.sigreg_weight < 1:
            raise ValueError(f"sigreg_weight must lie in (0, 1), or be 0 for none, got {self.sigreg_weight}.")
        if self.sigreg_weight and self.feature_norm != "none":
            raise ValueError(
                "sigreg_weight draws embeddings towards a standard normal distribution: they need feature_norm='none', "
                f"got {self.feature_norm!r}."
            )
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

    def _layer_names(self) -> dict:
        """The entries by which timm finds the layers that `num_classes` and `in_chans` exchange."""
        entry = timm.get_pretrained_cfg(self.architecture)
        names = {} if entry is None else {"classifier": entry.classifier, "first_conv": entry.first_conv}
        if (self.model_args or {}).get("in_chans", 3) not in (1, 3):
            names.pop("first_conv", None)  # timm converts from 1 and 3 channels, and draws others at random
        return {name: layer for name, layer in names.items() if layer}

    def to_timm_dict(self, num_features: int) -> dict:
        """The config.json that stock timm and transformers read; the method goes under `dpssl`."""
        method = {name: getattr(self, name) for name in _METHOD_FIELDS}
        timm_dict = {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": num_features,
            "pretrained_cfg": self._layer_names() | self.pretrained_cfg | {"num_classes": 0},
            "dpssl": self.dpssl | {"method": method},
        }
        if not self.do_pooling:
            timm_dict["do_pooling"] = False
        if self.model_args:  # never with num_classes, which AutoModel would then get twice
            timm_dict["model_args"] = {k: v for k, v in self.model_args.items() if k != "num_classes"}
        if getattr(self, "auto_map", None):
            timm_dict["auto_map"] = self.auto_map
        return timm_dict


def input_settings(encoder: TimmWrapperModel) -> dict:
    """What an encoder says of its input (input_size, mean, std, ...); where it says nothing, its architecture does."""
    return encoder.timm_model.pretrained_cfg | (getattr(encoder.config, "pretrained_cfg", None) or {})


def check_sees_pictures(config: TimmWrapperConfig, name: str) -> None:
    """ValueError for an encoder of latents where pictures are to be given; `config` may be stock, of timm's layout."""
    method = (getattr(config, "dpssl", None) or {}).get("method") or {}
    fingerprint = getattr(config, "vae_fingerprint", None) or method.get("vae_fingerprint")
    if fingerprint:
        raise ValueError(
            f"{name} takes an autoencoder's latents (fingerprint {fingerprint[:12]}), not pictures: give an encoder of "
            "pictures, or call it on `autoencoder.normalize_latents(autoencoder.encode_latents(pixel_values))`."
        )


class ContrastiveEncoder(TimmWrapperModel):
    """The bare backbone: `last_hidden_state` and pooled features `pooler_output` (B, num_features).

    `save_pretrained` writes timm's layout (config.json and model.safetensors with timm's keys), so
    that the folder loads with stock transformers and timm. Only with a small-image stem is it this
    class's own layout, which needs hf_dpssl or trust_remote_code.
    """

    config_class = ContrastiveConfig
    _supports_sdpa = True  # timm dispatches attention itself
    _no_split_modules = ["ContrastiveEncoder"]  # as TimmWrapperModel names itself: timm's models are kept whole
    gradient_checkpointing = False  # by this name transformers finds out whether it is on

    def __init__(self, config: ContrastiveConfig):
        super().__init__(config)
        if config.stem != "timm":
            use_small_image_stem_(self.timm_model, config.stem)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The parent redraws timm's weights; they stay as timm made them. Buffers that are not in
        # the checkpoint are recomputed by the timm module itself.
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def init_weights(self) -> None:
        """As `PreTrainedModel.init_weights`; a model built on the meta device gets what the constructor draws."""
        draw_after_meta_(self)
        super().init_weights()

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs) -> None:
        self.gradient_checkpointing = enable
        super()._set_gradient_checkpointing(enable)

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
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """Write the folder described in the class docstring; arguments as `PreTrainedModel.save_pretrained`.

        With adapters (`add_adapter`) only those are written, as by every class of transformers.
        """
        options = {"max_shard_size": max_shard_size, "variant": variant} | kwargs
        if self.config.stem != "timm" or getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **options)
            return
        state_dict = self.state_dict() if state_dict is None else state_dict
        weights = {key.removeprefix("timm_model."): value for key, value in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, weights, **options)
        if is_main_process:
            with open(os.path.join(save_directory, "config.json"), "w", encoding="utf-8") as file:
                file.write(json.dumps(self.config.to_timm_dict(self.num_features), indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory))), **kwargs)


if __name__.startswith("hf_dpssl."):  # not in the copy beside published weights
    from .registration import register

    register(ContrastiveConfig, ContrastiveEncoder)
