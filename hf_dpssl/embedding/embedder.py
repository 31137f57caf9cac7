"""From pictures to vectors, with any image encoder: ours, timm's, or a stock one of transformers.

Each encoder sees pictures as its own image processor prepares them. `features` are the pooled output
of the backbone, `embeddings` that of the head in a folder's `pretraining/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from ..contrastive.modeling_pretraining import MoCoForPreTraining, SimCLRForPreTraining
from ..data.decoding import to_square_tensor
from ..data.views import normalize
from ..models.matrix_products import gpu_computes_in_bfloat16
from ..models.modeling_contrastive import ContrastiveConfig, check_sees_pictures
from ..models.weight_hashes import combined_sha256, tensor_sha256
from ..runs.lineage import well_formed
from .choices import KINDS

# Said outright: where nothing is said, transformers asks on the terminal whether to run a repository's code.
_NO_CODE = {"trust_remote_code": False}
UNTRAINED = "untrained:"  # before the name of a timm architecture: random weights, the same ones every time
_PRETRAINING = {cls.__name__: cls for cls in (SimCLRForPreTraining, MoCoForPreTraining)}


class Preprocessor:
    """RGB pictures to normalised pixel_values (B, 3, H, W), as the encoder's own image processor does.

    Args:
        encoder: folder or Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: an encoder that says nothing about its input, or of latents.
    """

    def __init__(self, encoder: str, revision: str | None = None):
        self.small_image = encoder.startswith(UNTRAINED)
        if self.small_image:
            name = encoder.removeprefix(UNTRAINED)
            if not timm.is_model(name):
                raise ValueError(f"timm has no architecture {name!r}: timm.list_models() names all.")
            settings = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
            self.settings = {name: settings[name] for name in ("input_size", "mean", "std")}
            return
        try:
            config = AutoConfig.from_pretrained(encoder, revision=revision, **_NO_CODE)
        except (OSError, ValueError, KeyError) as error:
            raise _no_processor(encoder, error) from error
        check_sees_pictures(config, repr(encoder))
        try:
            self.small_image = isinstance(config, ContrastiveConfig)  # a stem that only our class can express
            if self.small_image:
                self.settings = {name: config.pretrained_cfg[name] for name in ("input_size", "mean", "std")}
                return
            self.processor = AutoImageProcessor.from_pretrained(encoder, revision=revision, **_NO_CODE)
        except (OSError, ValueError, KeyError) as error:
            raise _no_processor(encoder, error) from error
        self.settings = self.processor.to_dict()

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """pixel_values (B, 3, H, W) float32 of B pictures of any size."""
        if not self.small_image:
            return self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        images = torch.stack([to_square_tensor(picture, self.settings["input_size"][-1]) for picture in pictures])
        statistics = (torch.tensor(self.settings[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        return normalize(images.float() / 255, *statistics)


def _no_processor(encoder: str, error: Exception) -> ValueError:
    name = encoder.removeprefix("timm:")
    if not Path(encoder).exists() and timm.is_model(name):
        weights = timm.get_pretrained_cfg(name).hf_hub_id
        ours = f"its weights are {weights!r} of the Hub; " if weights else ""
        return ValueError(f"{encoder!r} is an architecture of timm: {ours}random ones are {UNTRAINED + name!r}.")
    return ValueError(
        f"{encoder!r} holds no image processor (preprocessor_config.json, or pretrained_cfg in timm's config.json): "
        f"{error}"
    )


class ImageEmbedder:
    """An image encoder in eval mode as a function of pictures; `fingerprint` decides its numbers, `dimension` is D.

    Args:
        encoder: folder or Hub id of a ContrastiveEncoder, a timm model or an image model of transformers;
            `id@revision` on the Hub. "untrained:NAME" is a timm architecture with random weights of a fixed seed.
        kind: "features" (pooled output of the backbone; of a CLIP-like model its image features) or
            "embeddings" (after the head; needs the subfolder `pretraining`).
        device: where it runs; default: the accelerator, or the CPU.
        mixed_precision: a GPU that computes in bfloat16 does so (autocast), as suits accuracies and rankings; features
            then differ in their third digit from those of other machines. `rounded` says whether it does.

    Raises:
        ValueError: no such encoder, no image encoder, an unknown kind, no head, weights that lack, or an
            encoder that takes no RGB pictures, gives numbers that are not finite, or other ones for the same picture
            each time.
    """

    def __init__(
        self,
        encoder: str,
        *,
        kind: str = "features",
        device: torch.device | str | None = None,
        mixed_precision: bool = False,
    ):
        if kind not in KINDS:
            raise ValueError(f"features must be one of {KINDS}, got {kind!r}.")
        name = str(encoder)
        revision = None
        if not Path(name).exists() and "@" in name:
            name, _, revision = name.partition("@")
        self.name = str(encoder)
        self.kind = kind
        self.first_token = False
        load = _load_with_head if kind == "embeddings" else self._load
        with well_formed(name):
            self.preprocess = Preprocessor(name, revision)
            self.model = load(name, revision).eval().requires_grad_(False)
        self.device = torch.device(device or best_device())
        self.rounded = mixed_precision and self.device.type == "cuda" and gpu_computes_in_bfloat16()
        hashes = tensor_sha256(self.model.state_dict())
        settings = json.dumps(self.preprocess.settings, sort_keys=True, default=str)
        about = {"kind": kind, "input": hashlib.sha256(settings.encode()).hexdigest()}
        if self.rounded:  # other numbers, which no cache may give for those of float32
            about["precision"] = "bfloat16"
        self.fingerprint = combined_sha256(hashes | about)
        self.model.to(self.device)
        self.dimension = self._check()

    @property
    def precision(self) -> str:
        """In which the encoder computes; features are float32 always."""
        return "bfloat16" if self.rounded else "float32"

    def _load(self, name: str, revision: str | None) -> nn.Module:
        if name.startswith(UNTRAINED):
            return _untrained(name)
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, **_NO_CODE)
            if getattr(config, "model_args", None):  # as timm writes them, which transformers then passes twice
                config.model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
            options = {"config": config, "revision": revision, "output_loading_info": True, **_NO_CODE}
            model, info = AutoModel.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the encoder {name!r}: {error}") from error
        if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
            raise ValueError(f"{name!r} is a {type(model).__name__}, which takes {model.main_input_name}, not images.")
        # The checkpoint of a classifier holds no pooler, which AutoModel would draw at random.
        missing = sorted(info["missing_keys"])
        self.first_token = bool(missing) and all(key.startswith("pooler.") for key in missing)
        if missing and not self.first_token:
            raise ValueError(
                f"{name!r} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:3])}."
            )
        return model

    @torch.no_grad()
    def _check(self) -> int:
        pixel_values = self.preprocess([Image.linear_gradient("L").convert("RGB")] * 8)
        try:
            first = self(pixel_values)
        except torch.OutOfMemoryError:  # a RuntimeError too, which says itself what lacks
            raise
        except RuntimeError as error:
            raise ValueError(
                f"{self.name!r} cannot take the pixel_values {tuple(pixel_values.shape)} that its own processor makes "
                f"of RGB pictures: {error}. Use an encoder of three channels."
            ) from error
        if not bool(torch.isfinite(first).all()):
            raise ValueError(
                f"{self.name!r} gives numbers that are not finite for a grey ramp: train it again, or take another."
            )
        second = self(pixel_values)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"{self.name!r} gives other numbers for the same picture each time ({type(self.model).__name__} masks "
                "or samples in eval mode): use a model without that."
            )
        return first.shape[1]

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        """float32 (B, D) on the CPU, of pixel_values (B, 3, H, W)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.rounded):
            return self.embed(pixel_values.to(self.device)).float().cpu()

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, D) of pixel_values (B, 3, H, W), where these are, with gradient if one is asked for."""
        if self.kind == "embeddings":
            return self.model(pixel_values).embeddings
        if hasattr(self.model, "get_image_features"):
            return self._pool(self.model.get_image_features(pixel_values=pixel_values))
        return self._pool(self.model(pixel_values))

    def _pool(self, output) -> Tensor:
        if torch.is_tensor(output):  # get_image_features before transformers 5
            return output
        pooled = None if self.first_token else getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state  # (B, T, C) tokens or (B, C, H, W)
        return hidden[:, 0] if self.first_token else hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 (B, D) on the CPU, of B RGB pictures."""
        return self(self.preprocess(pictures))


def _load_with_head(name: str, revision: str | None) -> PreTrainedModel:
    place = {"subfolder": "pretraining", "revision": revision}
    try:
        if Path(name).exists() and not (Path(name) / "pretraining" / "config.json").exists():
            raise FileNotFoundError(f"{name}/pretraining/config.json")
        config = ContrastiveConfig.from_pretrained(name, **place)
    except OSError as error:
        raise ValueError(
            f"{name!r} has no folder pretraining/ with a head: use --features features, the backbone's output."
        ) from error
    architecture = (config.architectures or ["none"])[0]
    if architecture not in _PRETRAINING:
        raise ValueError(f"the head in {name!r} is of a {architecture}; known are {sorted(_PRETRAINING)}.")
    return _PRETRAINING[architecture].from_pretrained(name, **place)


def _untrained(name: str) -> nn.Module:
    """The timm architecture that "untrained:<name>" names, with its weights drawn from seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name.removeprefix(UNTRAINED), pretrained=False, num_classes=0)


def timm_model(name: str) -> nn.Module:
    """The pretrained timm model that "timm:<model>" names; ValueError for one that cannot be had."""
    try:
        return timm.create_model(name.removeprefix("timm:"), pretrained=True)
    except Exception as error:  # timm and the Hub raise many kinds
        raise ValueError(
            f"cannot load {name!r}: {error}. timm's weights come from the Hub at first use; offline, name a folder."
        ) from error


def best_device(rank: int = 0) -> torch.device:
    """The accelerator of process `rank` on this machine, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, rank % torch.accelerator.device_count())
