"""What the image pipelines share: names of classes, download from the Hub, decoded pictures."""

from __future__ import annotations

import difflib

import numpy as np
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from .modeling_vq import VQAutoencoder

OUTPUT_TYPES = ("pil", "np", "pt")


class ClassConditionalPipeline(DiffusionPipeline):
    """A pipeline around a `vae` whose config holds `id2label` and `vae_fingerprint`; not used by itself."""

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch a pipeline of the Hub, which `from_pretrained` then loads; returns its folder.

        diffusers' own refuses components whose class is of a package that it does not know, like our autoencoder.
        """
        names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors"], **options)

    def _register(
        self, id2label: dict | None, vae: VQAutoencoder, vae_fingerprint: str | None, generator: str, **modules
    ) -> None:
        """Register modules and config; ValueError when the autoencoder is not the one of `vae_fingerprint`."""
        if vae_fingerprint is not None and vae_fingerprint != vae.fingerprint():
            raise ValueError(
                f"this autoencoder (fingerprint {vae.fingerprint()[:12]}) is not the one the {generator} was trained "
                f"on ({vae_fingerprint[:12]}): its latents mean something else. Load the one saved with it."
            )
        self.register_modules(vae=vae, **modules)
        id2label = {str(class_id): name for class_id, name in (id2label or {}).items()}
        self.register_to_config(id2label=id2label, vae_fingerprint=vae_fingerprint)

    @property
    def class_names(self) -> list[str]:
        """Names by class id; empty for a model without classes."""
        names = self.config.id2label
        return [names[str(class_id)] for class_id in range(len(names))]

    def class_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        """Ids of classes given by id or name.

        Raises:
            ValueError: an id out of range, or an unknown name (with the closest known ones).
        """
        names = self.class_names
        labels = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        ids = []
        for label in labels:
            if isinstance(label, str):
                if label not in names:
                    close = difflib.get_close_matches(label, names, 3) or names[:10]
                    raise ValueError(f"unknown class {label!r}; known are for example {close} ({len(names)} in all).")
                ids.append(names.index(label))
            elif 0 <= int(label) < len(names):
                ids.append(int(label))
            else:
                raise ValueError(f"class ids lie in [0, {len(names) - 1}], got {label}; for no class pass None.")
        return ids

    def _check_request(self, ids, class_labels, num_images, guidance_scale, generator, output_type, raw: str) -> None:
        """ValueError for a request that no image can answer; `raw` is the output type that skips the decoder."""
        if not ids:
            raise ValueError("class_labels is empty: give at least one class, or None for images without class.")
        if class_labels is not None and num_images is not None:
            raise ValueError("num_images is for images without class; repeat class_labels for more images.")
        if guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1 (1 = no guidance), got {guidance_scale}.")
        if output_type not in (*OUTPUT_TYPES, raw):
            allowed = ", ".join(repr(name) for name in OUTPUT_TYPES)
            raise ValueError(f"output_type must be {allowed} or {raw!r}, got {output_type!r}.")
        if isinstance(generator, list) and len(generator) != len(ids):
            raise ValueError(f"{len(ids)} images need one generator or {len(ids)}, got {len(generator)}.")

    def _pictures(self, pixel_values: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
        """Decoded images (N, C, H, W) in about [-1, 1] as `output_type` says."""
        images = (pixel_values / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
