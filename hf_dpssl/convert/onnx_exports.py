"""Encoders and autoencoders as ONNX files, compared with torch by onnxruntime before they are kept.

| checkpoint | file | inputs | outputs |
|---|---|---|---|
| encoder | encoder.onnx | pixel_values (B, 3, H, W), normalised | features (B, D) |
| autoencoder | encoder.onnx | pixel_values (B, C, H, W) in [-1, 1] | latents (B, c, h, w); of VQ: codes, quantized |
| | decoder.onnx | latents (B, c, h, w): the encoder's `quantized` where there is a codebook | pixel_values |

B is free. Latents are not normalised; their mean and standard deviation stand in export.json.
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

from ..hub.replay import TOLERANCE
from ..models.modeling_contrastive import ContrastiveEncoder
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


class _Codes(nn.Module):
    """Latents, codes and quantised latents; a plain product finds the codes, as tiles and candidates are no graph."""

    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model
        codes = torch.arange(model.config.num_codes).view(1, 1, -1)
        self.register_buffer("codebook", model.quantizer.lookup(codes)[0, :, 0].T.clone())  # (K, c)
        self.register_buffer("centre", self.codebook.mean(0))  # an offset would only add rounding

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents = self.model.encode_latents(pixel_values)
        vectors = _as_compared(self.model, latents).permute(0, 2, 3, 1)  # (B, h, w, c)
        centred = self.codebook - self.centre
        half_squares = centred.square().sum(1) / 2
        codes = (half_squares - (vectors - self.centre) @ centred.T).argmin(3)  # (B, h, w)
        return latents, codes, self.codebook[codes].permute(0, 3, 1, 2)


class _Images(nn.Module):
    def __init__(self, model: VQAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).pixel_values


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
    settings = encoder.config.pretrained_cfg or encoder.timm_model.pretrained_cfg
    images = torch.randn(max(_BATCHES), *settings["input_size"], generator=torch.Generator().manual_seed(0))
    differences = _write(_Features(encoder), folder / "encoder.onnx", images, "pixel_values", ["features"])
    return differences, {name: settings[name] for name in ("input_size", "mean", "std") if name in settings}


def write_autoencoder(model: VQAutoencoder, folder: Path) -> tuple[dict[str, float], dict]:
    """encoder.onnx and decoder.onnx of an autoencoder in eval mode; returns and raises as `write_encoder`."""
    config, path = model.config, folder / "encoder.onnx"
    size = (max(_BATCHES), config.num_channels, config.image_size, config.image_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if model.quantizer is None:
        differences = _write(_Latents(model), path, images, "pixel_values", ["latents"])
    else:
        outputs = ["latents", "codes", "quantized"]
        differences = _write(_Codes(model), path, images, "pixel_values", outputs, lambda *a: _with_codes(model, *a))
    with torch.no_grad():
        latents = model.encode_latents(images)
    differences |= _write(_Images(model), folder / "decoder.onnx", latents, "latents", ["pixel_values"])
    about = {"input_size": list(size[1:]), "range": [-1, 1], "quantizer": config.quantizer}
    return differences, about | {"latent_mean": config.latent_mean, "latent_std": config.latent_std}


def _with_codes(model: VQAutoencoder, images: Tensor, found: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of codes the distances are compared, since any of two equally near ones is right."""
    latents = model.encode_latents(images)
    vectors, codes = _as_compared(model, latents), found["codes"]
    distances = [(vectors - model.quantizer.lookup(c)).norm(dim=1) for c in (codes, model.quantize(latents).codes)]
    quantized = (found["quantized"], model.quantizer.lookup(codes))
    return {"latents": (found["latents"], latents), "codes": tuple(distances), "quantized": quantized}


def _write(
    module: nn.Module, path: Path, inputs: Tensor, name: str, outputs: list[str], pairs: Callable | None = None
) -> dict[str, float]:
    """Write a module and compare; `pairs(inputs, found)` gives (found, expected) where outputs are not just equal."""
    import onnxruntime

    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    options = {"input_names": [name], "output_names": outputs, "external_data": size > _ONE_FILE, "dynamo": True}
    options |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's code about torch's code
        torch.onnx.export(module.eval(), (inputs[:2],), path, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    differences = {f"{path.name}: {output}": 0.0 for output in outputs}
    with torch.no_grad():
        for batch in (inputs[:count] for count in _BATCHES):
            found = dict(zip(outputs, map(torch.from_numpy, session.run(None, {name: batch.numpy()})), strict=True))
            compared = pairs(batch, found) if pairs else {outputs[0]: (found[outputs[0]], module(batch))}
            for output, pair in compared.items():
                key = f"{path.name}: {output}"
                differences[key] = max(differences[key], relative_difference(*pair, key))
    return differences
