"""A stored input and output of a checkpoint, by which anybody can see that it computes what it did where it was made.

`replay.safetensors` holds inputs drawn with seed 0 and what the model made of them on a CPU in float32. Compared is
(two items of each, no ties that rounding could turn over: nothing is quantised or sampled on the way):

| checkpoint | inputs | outputs |
|---|---|---|
| encoder | pixel_values | features; with `pretraining/` also embeddings |
| autoencoder | pixel_values; codes, or latents where it has no codebook | latents, images of the codes or latents |
| latent DiT | noise, classes | latents after 4 guided steps, images of drawn latents |
| one-step generator | noise, classes | latents, images of drawn latents |
| token model | codes, classes | nats of each code given those before it, images of the codes |
| GAN | latents, and pixel_values where it has an encoder | images, means |

Source: timm stores such a pair beside its weights and replays it (tests/test_models.py, test_model_inference).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, VQModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..autoencoder import latent_codec
from ..contrastive import modeling_pretraining
from ..contrastive.modeling_pretraining import ContrastivePreTrainedModel
from ..generation.interval_channel import latent_channels
from ..generation.pipeline_vq_dit import VQDiTPipeline
from ..generation.pipeline_vq_drift import VQDriftPipeline
from ..generation.pipeline_vq_token import VQTokenPipeline, code_nats
from ..models.modeling_contrastive import ContrastiveEncoder, input_settings
from ..models.modeling_vaegan import VAEGAN
from ..models.modeling_vq import VQAutoencoder
from ..runs.console import one_line
from ..runs.lineage import read_json

FILE_NAME = "replay.safetensors"
TOLERANCE = 1e-4  # of the largest output (at least 1): float32 on another CPU or in another version
_NUM_STEPS = 4
Tensors = dict[str, Tensor]
# What libraries raise of configs whose values have wrong types.
_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError)
_PIPELINES = {
    "VQDiTPipeline": "dit",
    DiTPipeline.__name__: "dit",
    "VQDriftPipeline": "drift",
    "VQTokenPipeline": "token",
}
_MODELS = {"dpssl_contrastive": "encoder", "dpssl_vq": "autoencoder", "dpssl_vaegan": "gan"}


def checkpoint_kind(folder: str | os.PathLike) -> str:
    """ "encoder", "autoencoder", "dit", "drift", "token", "gan", or "other" for a checkpoint of another library.

    Raises:
        FileNotFoundError: no checkpoint; names checkpoints one level below, if there are any.
    """
    folder = Path(folder)
    for name in ("model_index.json", "config.json"):
        if (content := read_json(folder / name)) is not None:
            break
    else:
        below = sorted(path.parent.name for n in ("config", "model_index") for path in folder.glob(f"*/{n}.json"))
        hint = f" Did you mean one of its folders {below}?" if below else ""
        raise FileNotFoundError(f"{folder} is no finished checkpoint: it has no config.json or model_index.json.{hint}")
    class_name = str(content.get("_class_name"))
    if class_name in (VQModel.__name__, AutoencoderKL.__name__):
        return "autoencoder"
    if class_name in _PIPELINES:
        return _PIPELINES[class_name]
    if "dpssl" in content and "architecture" in content:
        return "encoder"
    return _MODELS.get(str(content.get("model_type")), "other")


def record(folder: str | os.PathLike) -> bytes | None:
    """Content of `replay.safetensors` for a checkpoint folder; None for a checkpoint of another library."""
    kind = checkpoint_kind(folder)
    if kind not in _KINDS:
        return None
    draw, run, model = _open(folder, kind)
    inputs = draw(model, torch.Generator().manual_seed(0))
    outputs = run(model, inputs)
    tensors = {f"input.{name}": tensor for name, tensor in inputs.items()}
    tensors |= {f"output.{name}": tensor.contiguous() for name, tensor in outputs.items()}
    return save(tensors, {"replay": json.dumps({"kind": kind, "seed": 0, "tolerance": TOLERANCE})})


def replay(folder: str | os.PathLike, pair: str | os.PathLike) -> float:
    """Run a checkpoint folder on the inputs of a stored pair.

    Returns:
        The largest difference of an output, as a share of the largest value of that output (at least 1).

    Raises:
        ValueError: outputs differ by more than TOLERANCE, or the pair is of another model or damaged.
    """
    kind = checkpoint_kind(folder)
    try:
        with safe_open(pair, "pt") as file:
            about = json.loads((file.metadata() or {}).get("replay", "{}"))
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{pair} is no stored pair, or damaged ({error}): remove it, a push makes a new one."
        ) from error
    if about.get("kind") != kind or kind not in _KINDS:
        raise ValueError(
            f"{pair} is a pair of a checkpoint of kind {about.get('kind')!r}, {folder} is of kind {kind!r}."
        )
    _, run, model = _open(folder, kind)
    inputs = {name.removeprefix("input."): tensor for name, tensor in stored.items() if name.startswith("input.")}
    try:
        outputs = run(model, inputs)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} does not take the stored inputs, which are of another model: {error}") from error
    expected = {name.removeprefix("output."): t for name, t in stored.items() if name.startswith("output.")}
    if {n: t.shape for n, t in outputs.items()} != {n: t.shape for n, t in expected.items()}:
        raise ValueError(f"{folder} gives other outputs ({sorted(outputs)}) than the stored pair ({sorted(expected)}).")
    largest = 0.0
    for name, tensor in expected.items():
        difference = float((outputs[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise ValueError(f"{folder} does not reproduce the stored {name}: it is {difference:.2g} off.")
        largest = max(largest, difference)
    return largest


def fitting_pair(folder: str | os.PathLike, pairs: list[bytes | None]) -> bytes | None:
    """The first of these pairs that the checkpoint reproduces, else a new one as `record` makes it."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, FILE_NAME)
        for pair in (pair for pair in pairs if pair is not None):
            path.write_bytes(pair)
            try:
                replay(folder, path)
                return pair
            except ValueError:
                continue  # of another model, or of earlier weights
    return record(folder)


def _open(folder: str | os.PathLike, kind: str) -> tuple[Callable, Callable, object]:
    load, draw, run = _KINDS[kind]
    try:
        return draw, torch.no_grad()(run), load(Path(folder))
    except _MALFORMED as error:
        what = one_line(error)[:200]
        raise ValueError(
            f"{folder} cannot be loaded ({type(error).__name__}: {what}): its files are damaged."
        ) from error


def _load_encoder(folder: Path) -> list:
    models = [ContrastiveEncoder.from_pretrained(folder)]
    if (folder / "pretraining" / "config.json").is_file():
        config = json.loads((folder / "pretraining" / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or [None])[0]
        model_class = getattr(modeling_pretraining, str(name), None)
        if not (isinstance(model_class, type) and issubclass(model_class, ContrastivePreTrainedModel)):
            raise ValueError(f"{folder}/pretraining is of the class {name!r}, which is none of this package.")
        models.append(model_class.from_pretrained(folder, subfolder="pretraining"))
    return [model.eval().float() for model in models]


def _draw_for_encoder(models: list, generator: torch.Generator) -> Tensors:
    return {"pixel_values": torch.randn(2, *input_settings(models[0])["input_size"], generator=generator)}


def _run_encoder(models: list, inputs: Tensors) -> Tensors:
    outputs = {"features": models[0](inputs["pixel_values"]).pooler_output}
    if len(models) > 1:
        outputs["embeddings"] = models[1](inputs["pixel_values"]).embeddings
    return outputs


def _load_autoencoder(folder: Path) -> latent_codec.Autoencoder:
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    model_class = {VQModel.__name__: VQModel, AutoencoderKL.__name__: AutoencoderKL}.get(name, VQAutoencoder)
    return model_class.from_pretrained(folder).eval().float()


def _draw_latents(vae: latent_codec.Autoencoder, generator: torch.Generator) -> Tensors:
    """codes (2, h, w), or normalised latents (2, C, h, w) where there is no codebook."""
    config = vae.config
    side = getattr(config, "image_size", None) or config.sample_size
    side //= latent_codec.downsampling_factor(vae)
    if getattr(vae, "quantizer", None) is not None:
        return {"codes": torch.randint(config.num_codes, (2, side, side), generator=generator)}
    return {"latents": torch.randn(2, latent_codec.latent_channels(vae), side, side, generator=generator)}


def _decode(vae: latent_codec.Autoencoder, inputs: Tensors) -> Tensor:
    if "codes" in inputs:
        return vae.decode_codes(inputs["codes"]).pixel_values
    return latent_codec.decode(vae, inputs["latents"], quantize=False)


def _draw_for_autoencoder(vae: latent_codec.Autoencoder, generator: torch.Generator) -> Tensors:
    config = vae.config
    side = getattr(config, "image_size", None) or config.sample_size
    channels = getattr(config, "num_channels", None) or config.in_channels
    pixel_values = torch.rand(2, channels, side, side, generator=generator) * 2 - 1
    return {"pixel_values": pixel_values} | _draw_latents(vae, generator)


def _run_autoencoder(vae: latent_codec.Autoencoder, inputs: Tensors) -> Tensors:
    return {"latents": latent_codec.encode(vae, inputs["pixel_values"]), "images": _decode(vae, inputs)}


def _load_pipeline(pipeline_class: type) -> Callable[[Path], object]:
    def load(folder: Path):
        pipeline = pipeline_class.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def _draw_classes(pipeline, generator: torch.Generator) -> Tensors:
    count = len(pipeline.class_names)
    return {"classes": torch.randint(count, (2,), generator=generator)} if count else {}


def _draw_for_dit(pipeline: VQDiTPipeline | VQDriftPipeline, generator: torch.Generator) -> Tensors:
    config = pipeline.transformer.config
    channels = latent_channels(pipeline.transformer)
    noise = torch.randn(2, channels, config.sample_size, config.sample_size, generator=generator)
    return {"noise": noise} | _draw_classes(pipeline, generator) | _draw_latents(pipeline.vae, generator)


def _run_dit(pipeline: VQDiTPipeline, inputs: Tensors) -> Tensors:
    labels = inputs["classes"].tolist() if "classes" in inputs else None
    options = {"num_images": None if labels else 2, "generator": [0, 1], "num_inference_steps": _NUM_STEPS}
    latents = pipeline(labels, latents=inputs["noise"], output_type="latent", **options).images
    return {"latents": latents, "images": _decode(pipeline.vae, inputs)}


def _run_drift(pipeline: VQDriftPipeline, inputs: Tensors) -> Tensors:
    labels = inputs["classes"].tolist() if "classes" in inputs else None
    latents = pipeline(labels, num_images=None if labels else 2, latents=inputs["noise"], output_type="latent").images
    return {"latents": latents, "images": _decode(pipeline.vae, inputs)}


def _draw_for_tokens(pipeline: VQTokenPipeline, generator: torch.Generator) -> Tensors:
    return _draw_latents(pipeline.vae, generator) | _draw_classes(pipeline, generator)


def _run_tokens(pipeline: VQTokenPipeline, inputs: Tensors) -> Tensors:
    labels = inputs.get("classes", torch.zeros(2, dtype=torch.int64))  # without classes, 0 is the null class
    nats = code_nats(pipeline.language_model, inputs["codes"], labels, pipeline.vae.config.num_codes)
    return {"nats": nats, "images": _decode(pipeline.vae, inputs)}


def _load_gan(folder: Path) -> VAEGAN:
    return VAEGAN.from_pretrained(folder).eval().float()


def _draw_for_gan(model: VAEGAN, generator: torch.Generator) -> Tensors:
    config, inputs = model.config, {"latents": torch.randn(2, model.config.latent_dim, generator=generator)}
    if config.has_encoder:
        size = (2, config.num_channels, config.image_size, config.image_size)
        inputs["pixel_values"] = torch.rand(size, generator=generator) * 2 - 1
    return inputs


def _run_gan(model: VAEGAN, inputs: Tensors) -> Tensors:
    outputs = {"images": model.decode(inputs["latents"])}
    if "pixel_values" in inputs:
        outputs["means"] = model.encode(inputs["pixel_values"])[0]
    return outputs


_KINDS = {  # how to load, what to draw, what to compute
    "encoder": (_load_encoder, _draw_for_encoder, _run_encoder),
    "autoencoder": (_load_autoencoder, _draw_for_autoencoder, _run_autoencoder),
    "dit": (_load_pipeline(VQDiTPipeline), _draw_for_dit, _run_dit),
    "drift": (_load_pipeline(VQDriftPipeline), _draw_for_dit, _run_drift),
    "token": (_load_pipeline(VQTokenPipeline), _draw_for_tokens, _run_tokens),
    "gan": (_load_gan, _draw_for_gan, _run_gan),
}
