"""Encoders, autoencoders and one-step generators as ONNX, compared with torch by onnxruntime before they are kept.

| checkpoint | file | inputs | outputs |
|---|---|---|---|
| encoder | encoder.onnx | pixel_values (B, 3, H, W), normalised | features (B, D) |
| autoencoder | encoder.onnx | pixel_values (B, C, H, W) in [-1, 1] | latents (B, c, h, w); of VQ: codes, quantized |
| | decoder.onnx | latents (B, c, h, w): the encoder's `quantized` where there is a codebook | pixel_values |
| one-step generator | generator.onnx | noise (B, c, h, w); class_labels (B,) int64 | latents; of VQ: codes; images |

B is free. Latents of an autoencoder are not normalised; their mean and standard deviation stand in export.json. A
generator takes standard normal noise, and the label after the last class for no class; its latents are normalised, its
images (B, C, H, W) lie in [0, 1].
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from ..autoencoder import latent_codec
from ..generation.dit_modulation import Modulations, can_be_split, forward_with_modulations
from ..generation.pipeline_vq_drift import NOISE_TIMESTEP, VQDriftPipeline
from ..hub.replay import TOLERANCE
from ..models.modeling_contrastive import ContrastiveEncoder, input_settings
from ..models.modeling_vq import VQAutoencoder

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 1 << 30  # bytes of weights up to which they are in the file itself; protobuf ends at 2 GiB
_BATCHES = (1, 3)  # compared with torch; the graph is traced with 2


class _Features(nn.Module):
    def __init__(self, encoder: ContrastiveEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values).pooler_output


class _Latents(nn.Module):
    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_latents(pixel_values)


class _Quantizer(nn.Module):
    """Codes and quantised latents; a plain product finds the codes, as tiles and candidates are no graph."""

    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model
        codes = torch.arange(model.config.num_codes).view(1, 1, -1)
        self.register_buffer("codebook", model.quantizer.lookup(codes)[0, :, 0].T.clone())  # (K, c)
        self.register_buffer("centre", self.codebook.mean(0))  # an offset would only add rounding

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        vectors = _as_compared(self.model, latents).permute(0, 2, 3, 1)  # (B, h, w, c)
        centred = self.codebook - self.centre
        half_squares = centred.square().sum(1) / 2
        codes = (half_squares - (vectors - self.centre) @ centred.T).argmin(3)  # (B, h, w)
        return codes, self.codebook[codes].permute(0, 3, 1, 2)


class _Codes(nn.Module):
    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model
        self.quantizer = _Quantizer(model)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = self.model.encode_latents(pixel_values)
        return latents, *self.quantizer(latents)


class _Images(nn.Module):
    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).pixel_values


class _Generator(nn.Module):
    """Noise and classes to images. A DiT's modulations at one time depend on the class alone: they become tables."""

    def __init__(self, pipeline: VQDriftPipeline):
        super().__init__()
        self.transformer = pipeline.transformer
        self.vae = pipeline.vae
        self.quantizer = _Quantizer(pipeline.vae) if _has_codes(pipeline) else None
        self.tables = nn.ParameterList()  # (classes and none, 6 or 2, 1, width) each
        if can_be_split(self.transformer):
            labels = torch.arange(pipeline.null_class + 1)
            tables = Modulations(self.transformer, torch.tensor([NOISE_TIMESTEP]), labels).at(0)
            self.tables.extend(nn.Parameter(table.detach(), requires_grad=False) for table in tables)

    def forward(self, noise: Tensor, class_labels: Tensor) -> tuple[Tensor, ...]:
        if len(self.tables):
            rows = [table[class_labels] for table in self.tables]
            latents = noise - forward_with_modulations(self.transformer, noise, rows)
        else:  # a LatentMLP, which has no time
            latents = noise - self.transformer(noise, class_labels=class_labels).sample
        if self.quantizer is None:
            return latents, _in_unit_range(latent_codec.decode(self.vae, latents))
        codes, quantized = self.quantizer(self.vae.denormalize_latents(latents))
        return latents, codes, _in_unit_range(self.vae.decode(quantized).pixel_values)


def _has_codes(pipeline: VQDriftPipeline) -> bool:
    return isinstance(pipeline.vae, VQAutoencoder) and pipeline.vae.quantizer is not None


def _in_unit_range(pixel_values: Tensor) -> Tensor:
    return (pixel_values / 2 + 0.5).clamp(0, 1)


def _as_compared(model: VQAutoencoder, latents: Tensor) -> Tensor:
    return nn.functional.normalize(latents, dim=1) if model.config.code_distance == "cosine" else latents


def check_libraries() -> None:
    """ImportError with the install command when one of the three libraries is missing."""
    lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(f"ONNX files need {', '.join(lacking)}: pip install 'hf_dpssl[onnx]'.")


def relative_difference(found: Tensor, expected: Tensor, name: str) -> float:
    """The largest difference as a share of the largest expected value (at least 1); RuntimeError beyond TOLERANCE."""
    if found.shape != expected.shape:
        raise RuntimeError(f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}.")
    value = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not value <= TOLERANCE:
        raise RuntimeError(f"{name} is {value:.2g} off ({TOLERANCE:g} is allowed), so nothing was written.")
    return value


def write_encoder(encoder: ContrastiveEncoder, folder: Path) -> tuple[dict[str, float], dict]:
    """encoder.onnx of an encoder in eval mode.

    Returns:
        Differences from torch by "file: output", see `relative_difference`; and what a user must know of the inputs.

    Raises:
        RuntimeError: onnxruntime computes something else than torch.
    """
    settings = input_settings(encoder)
    images = torch.randn(max(_BATCHES), *settings["input_size"], generator=torch.Generator().manual_seed(0))
    given = {"pixel_values": images}
    differences = _write(_Features(encoder), folder / "encoder.onnx", given, ["features"])
    return differences, {name: settings[name] for name in ("input_size", "mean", "std") if name in settings}


def write_autoencoder(model: VQAutoencoder, folder: Path) -> tuple[dict[str, float], dict]:
    """encoder.onnx and decoder.onnx of an autoencoder in eval mode; returns and raises as `write_encoder`."""
    config, path = model.config, folder / "encoder.onnx"
    size = (max(_BATCHES), config.num_channels, config.image_size, config.image_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = {"pixel_values": images}
    if model.quantizer is None:
        differences = _write(_Latents(model), path, given, ["latents"])
    else:
        outputs = ["latents", "codes", "quantized"]
        differences = _write(_Codes(model), path, given, outputs, lambda *a: _with_codes(model, *a))
    with torch.no_grad():
        latents = model.encode_latents(images)
    differences |= _write(_Images(model), folder / "decoder.onnx", {"latents": latents}, ["pixel_values"])
    about = {"input_size": list(size[1:]), "range": [-1, 1], "quantizer": config.quantizer}
    return differences, about | {"latent_mean": config.latent_mean, "latent_std": config.latent_std}


def write_generator(pipeline: VQDriftPipeline, folder: Path) -> tuple[dict[str, float], dict]:
    """generator.onnx of a one-step pipeline in float32; returns and raises as `write_encoder`.

    Compared are the pipeline's own latents, and its images of the codes that were found.
    """
    config = pipeline.transformer.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(max(_BATCHES), *shape, generator=torch.Generator().manual_seed(0))
    null = pipeline.null_class
    given = {"noise": noise, "class_labels": torch.tensor([0, null, null // 2])}
    outputs = ["latents", "codes", "images"] if _has_codes(pipeline) else ["latents", "images"]

    def pairs(batch: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        labels = [None if label == null else label for label in batch["class_labels"].tolist()]
        requests = [({"num_images": 1} if one is None else {"class_labels": [one]}) for one in labels]
        drawn = [
            pipeline(**request, latents=row[None], output_type="latent").images
            for request, row in zip(requests, batch["noise"], strict=True)
        ]
        latents = torch.cat(drawn)
        if "codes" not in found:
            images = _in_unit_range(latent_codec.decode(pipeline.vae, latents))
            return {"latents": (found["latents"], latents), "images": (found["images"], images)}
        codes = _distances_of_codes(pipeline.vae, pipeline.vae.denormalize_latents(latents), found["codes"])
        images = _in_unit_range(pipeline.vae.decode_codes(found["codes"]).pixel_values)
        return {"latents": (found["latents"], latents), "codes": codes, "images": (found["images"], images)}

    differences = _write(_Generator(pipeline), folder / "generator.onnx", given, outputs, pairs)
    with torch.no_grad():
        image = _in_unit_range(latent_codec.decode(pipeline.vae, noise[:1]))
    about = {"noise": list(shape), "image": list(image.shape[1:]), "range": [0, 1]}
    return differences, about | {"class_names": pipeline.class_names, "no_class": null}


def _with_codes(
    model: VQAutoencoder, given: dict[str, Tensor], found: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    latents = model.encode_latents(given["pixel_values"])
    codes = _distances_of_codes(model, latents, found["codes"])
    quantized = (found["quantized"], model.quantizer.lookup(found["codes"]))
    return {"latents": (found["latents"], latents), "codes": codes, "quantized": quantized}


def _distances_of_codes(model: VQAutoencoder, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Of codes the distances are compared, since any of two equally near ones is right."""
    vectors = _as_compared(model, latents)
    both = (codes, model.quantize(latents).codes)
    found, expected = ((vectors - model.quantizer.lookup(one)).norm(dim=1) for one in both)
    return found, expected


def _write(
    module: nn.Module, path: Path, inputs: dict[str, Tensor], outputs: list[str], pairs: Callable | None = None
) -> dict[str, float]:
    """Write a module and compare; `pairs(inputs, found)` gives (found, expected) where outputs are not just equal."""
    import onnxruntime

    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    options = {"input_names": list(inputs), "output_names": outputs, "external_data": size > _ONE_FILE, "dynamo": True}
    batch = torch.export.Dim("batch")
    options |= {"dynamic_shapes": tuple({0: batch} for _ in inputs), "verbose": False}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's code about torch's code
        torch.onnx.export(module.eval(), tuple(tensor[:2] for tensor in inputs.values()), path, **options)
    _forget_origin(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = {f"{path.name}: {output}": 0.0 for output in outputs}
    with torch.no_grad():
        for count in _BATCHES:
            given = {name: tensor[:count] for name, tensor in inputs.items()}
            arrays = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
            found = dict(zip(outputs, map(torch.from_numpy, arrays), strict=True))
            compared = pairs(given, found) if pairs else {outputs[0]: (found[outputs[0]], module(*given.values()))}
            for output, pair in compared.items():
                key = f"{path.name}: {output}"
                differences[key] = max(differences[key], relative_difference(*pair, key))
    return differences


def _forget_origin(path: Path) -> None:
    """Remove what torch notes of each node: lines of code, with folders of this machine."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graphs = [model.graph, *model.functions]
    for part in (*graphs, *(node for graph in graphs for node in graph.node), *_values(model.graph)):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    path.write_bytes(model.SerializeToString())


def _values(graph) -> list:
    return [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
