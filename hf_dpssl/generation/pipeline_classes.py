"""What the image pipelines share: names of classes, download from the Hub, decoded pictures."""

from __future__ import annotations

import difflib
import importlib
import operator
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..autoencoder import latent_codec
from ..models.registration import push_to_hub

OUTPUT_TYPES = ("pil", "np", "pt")
_LIBRARIES = ("diffusers", "transformers", "hf_dpssl")
_COMPONENTS = (ModelMixin, SchedulerMixin, PreTrainedModel)


def check_components(folder: Path, index: dict, parts: Iterable[str]) -> None:
    """Refuse a pipeline's folder that would have foreign code imported: loading imports what model_index.json names.

    Args:
        folder: of the pipeline.
        index: content of its model_index.json.
        parts: names of the components that are loaded.

    Raises:
        ValueError: a part that is no model or scheduler class of diffusers, transformers or hf_dpssl, a file of code in
            the place of one, or a pipeline class in a file of the folder; nothing of the folder has been run.
    """
    refusal = f"{folder} is not loaded, and none of its code was run:"
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{refusal} its pipeline class is {index.get('_class_name')!r}, code of the folder's own. Read that code, "
            "and load it with diffusers' custom_pipeline and trust_remote_code=True if you trust it."
        )
    for part in parts:
        entry = index.get(part)
        if entry is None or entry == [None, None]:
            continue
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
            raise ValueError(f"{refusal} model_index.json must give {part} as [library, class], got {entry!r}.")
        library, name = entry
        found = getattr(importlib.import_module(library), name, None) if library in _LIBRARIES else None
        if not (isinstance(found, type) and issubclass(found, _COMPONENTS)):
            raise ValueError(
                f"{refusal} its {part} is of the class {library}.{name}, and only model and scheduler classes of "
                f"{', '.join(_LIBRARIES)} are loaded."
            )
        if (folder / part / f"{library}.py").exists():  # which diffusers would take for the library
            raise ValueError(f"{refusal} {part}/{library}.py stands in the place of the library {library}: remove it.")


def joined(parts: list) -> Tensor | np.ndarray | list[Image.Image]:
    """Images of several batches, of any output type, as one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [image for part in parts for image in part]


class ClassConditionalPipeline(DiffusionPipeline):
    """A pipeline around a `vae` whose config holds `id2label` and `vae_fingerprint`; not used by itself.

    model_index.json names our components by their public names (["hf_dpssl", "VQAutoencoder"]), never by a module.
    """

    push_to_hub = push_to_hub

    def register_to_config(self, **entries) -> None:
        """As diffusers', which would write a component's module path into every published folder."""
        for name, value in entries.items():
            if isinstance(value, tuple) and str(value[0]).startswith("hf_dpssl."):
                entries[name] = ("hf_dpssl", value[1])
        super().register_to_config(**entries)

    @classmethod
    def load_config(cls, folder: str | os.PathLike, **options):
        """As diffusers', of a folder whose components are all known: `from_pretrained` asks for it before it imports.

        Raises:
            ValueError: see `check_components`.
        """
        loaded = super().load_config(folder, **options)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        check_components(Path(folder), index, cls._get_signature_keys(cls)[0])
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetch a pipeline of the Hub, which `from_pretrained` then loads; returns its folder.

        diffusers' own refuses components whose class is of a package that it does not know, like our autoencoder.
        """
        names = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        return snapshot_download(pretrained_model_name, allow_patterns=["*.json", "*.safetensors"], **options)

    def _register(
        self,
        id2label: dict | None,
        vae: latent_codec.Autoencoder,
        vae_fingerprint: str | None,
        generator: str,
        latent_statistics: dict | None = None,
        **modules,
    ) -> None:
        """Register modules and config.

        Raises:
            ValueError: the autoencoder is not the one of `vae_fingerprint` and `latent_statistics`, or the ids are not
                0, 1, 2, ...
        """
        self._check_fingerprint(vae, vae_fingerprint, generator, latent_statistics)
        self.register_modules(vae=vae, **modules)
        id2label = {str(class_id): name for class_id, name in (id2label or {}).items()}
        if missing := [i for i in range(len(id2label)) if str(i) not in id2label]:
            raise ValueError(f"id2label must have the ids 0 to {len(id2label) - 1}, but {missing[0]} is missing.")
        self.register_to_config(id2label=id2label, vae_fingerprint=vae_fingerprint)

    def _check_fingerprint(
        self, vae: latent_codec.Autoencoder, expected: str | None, generator: str, statistics: dict | None = None
    ) -> None:
        """ValueError unless an autoencoder, which another one may have replaced, has the expected latents.

        Of a generator of codes `statistics` are None: nothing is normalised.
        """
        if vae is getattr(self, "_checked_vae", None):
            return
        if expected is not None and any(tensor.is_meta for tensor in vae.state_dict().values()):
            raise ValueError(
                "the autoencoder was replaced and is offloaded layer by layer, so that it cannot be checked: replace "
                "it before enable_sequential_cpu_offload, and generate once."
            )
        if expected is not None and not latent_codec.has_fingerprint(vae, expected):
            found = latent_codec.fingerprint(vae)
            raise ValueError(
                f"this autoencoder (fingerprint {found[:12]}) is not the one the {generator} was trained "
                f"on ({expected[:12]}): its latents mean something else. Load the one saved with it."
            )
        if other := latent_codec.other_statistics(vae, statistics):
            raise ValueError(
                f"this autoencoder does not normalise its latents as the one the {generator} was trained on: {other}. "
                "Load the one saved with it."
            )
        self._checked_vae = vae

    @property
    def components(self) -> dict:
        """The parts of the pipeline and what belongs to them: `Pipeline(**pipe.components)` has the same classes."""
        _, options = self._get_signature_keys(self)
        return super().components | {name: self.config[name] for name in options}

    @property
    def class_names(self) -> list[str]:
        """Names by class id; empty for a model without classes."""
        names = self.config.id2label
        return [names[str(class_id)] for class_id in range(len(names))]

    def class_ids(self, class_labels: int | str | list[int | str]) -> list[int]:
        """Ids of classes given by id or name; of a name with commas ("tench, Tinca tinca") each part is one, too.

        Raises:
            ValueError: an id out of range, an unknown name (with the closest known ones), or a name of several classes
                (of which diffusers' DiTPipeline takes the last one in the order of the file).
        """
        class_labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
        return [self._class_of_name(label) if isinstance(label, str) else self._class_of_id(label) for label in labels]

    def class_mixtures(
        self, class_labels: int | str | list[int | str | tuple], null_class: int
    ) -> list[tuple[int, int, float]]:
        """(id, other id, share of the other) of each label: an id or name, or a tuple (a, b, share) between two.

        Raises:
            ValueError: as `class_ids`; a tuple of another form, or a share outside [0, 1].
        """
        labels = class_labels if isinstance(class_labels, list) else [class_labels]
        if not any(isinstance(label, tuple) for label in labels) or not isinstance(class_labels, list):
            return [(class_id, class_id, 0.0) for class_id in self.class_ids(class_labels)]
        rows = []
        for label in labels:
            first, second, share = label if isinstance(label, tuple) and len(label) == 3 else (label, label, 0.0)
            if isinstance(first, tuple) or not 0 <= share <= 1:
                raise ValueError(f"a class between two is (one, other, share of the other in [0, 1]), got {label}.")
            pair = [null_class if one is None else self.class_ids([one])[0] for one in (first, second)]
            rows.append((*pair, float(share)))
        return rows

    def _class_rows(
        self, class_labels, num_images: int | None, per_label: int, null_class: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Labels, labels to blend in and their shares, (N,) each; the last two None without blending."""
        self._check_counts(num_images=num_images, num_images_per_label=per_label)
        if class_labels is None:
            if per_label != 1:
                raise ValueError("num_images_per_label is for class_labels; for images without class give num_images.")
            rows = [(null_class, null_class, 0.0)] * (1 if num_images is None else num_images)
        else:
            rows = [row for row in self.class_mixtures(class_labels, null_class) for _ in range(per_label)]
        device = self._execution_device
        labels = torch.tensor([row[0] for row in rows], dtype=torch.int64, device=device)
        others = torch.tensor([row[1] for row in rows], dtype=torch.int64, device=device)
        weights = torch.tensor([row[2] for row in rows], dtype=torch.float32, device=device)
        return (labels, others, weights) if weights.any() else (labels, None, None)

    @staticmethod
    def _class_path(start: int | str | None, end: int | str | None, count: int) -> dict:
        """Arguments of a call for `count` images from one class to another; None is no class."""
        if start is None and end is None:
            return {"class_labels": None, "num_images": count}
        return {"class_labels": [(start, end, i / (count - 1)) for i in range(count)]}

    def _class_of_name(self, label: str) -> int:
        names = self.class_names
        parts = [[name, *(part.strip() for part in name.split(","))] for name in names]
        found = [class_id for class_id, of_class in enumerate(parts) if label in of_class]
        if len(found) > 1:
            theirs = next(class_id for class_id in reversed(self.config.id2label) if int(class_id) in found)
            raise ValueError(f"{label!r} is a name of classes {found}: give the id (diffusers takes {theirs}).")
        if not found:
            known = list(dict.fromkeys(part for of_class in parts for part in of_class))
            close = difflib.get_close_matches(label, known, 3) or names[:10]
            raise ValueError(f"unknown class {label!r}; known are for example {close} ({len(names)} in all).")
        return found[0]

    def _class_of_id(self, label: int) -> int:
        count = len(self.class_names)
        try:
            class_id = operator.index(label)
        except TypeError:
            raise ValueError(f"a class is an id (integer) or a name, got {label!r}.") from None
        if not 0 <= class_id < count:
            raise ValueError(f"class ids lie in [0, {count - 1}], got {label}; for no class pass None.")
        return class_id

    @staticmethod
    def _check_counts(**counts: int | None) -> None:
        """ValueError naming a count that is given and is no integer of at least 1."""
        for name, value in counts.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def _check_request(self, ids, class_labels, num_images, guidance_scale, generator, output_type, raw: str) -> None:
        """ValueError for a request that no image can answer; `raw` is the output type that skips the decoder."""
        if len(ids) == 0:
            raise ValueError("class_labels is empty: give at least one class, or None for images without class.")
        if class_labels is not None and num_images is not None:
            raise ValueError("num_images is for images without class; repeat class_labels for more images.")
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1 (1 = no guidance), got {guidance_scale}.")
        if output_type not in (*OUTPUT_TYPES, raw):
            allowed = ", ".join(repr(name) for name in OUTPUT_TYPES)
            raise ValueError(f"output_type must be {allowed} or {raw!r}, got {output_type!r}.")
        if isinstance(generator, list | tuple) and len(generator) != len(ids):
            raise ValueError(f"{len(ids)} images need one generator or {len(ids)}, got {len(generator)}.")

    def _pictures(self, pixel_values: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
        """Decoded images (N, C, H, W) in about [-1, 1] as `output_type` says."""
        images = (pixel_values / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays
