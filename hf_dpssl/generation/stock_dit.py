"""A latent DiT as a folder that diffusers alone loads: DiTPipeline with VQModel or AutoencoderKL.

What the stock classes lack is put into the weights where it can be: the class table grows to 1001 rows with the null
class last, and a shift of the latents goes into the 1x1 convolutions and the codebook. What they cannot express is
refused with all reasons.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel, VQModel
from torch import Tensor

from ..autoencoder import latent_codec
from ..models.modeling_vq import VQAutoencoder
from ..runs.atomic_files import atomic_folder
from .interval_channel import takes_interval
from .scheduler_steps import uses_variance

STOCK_CLASSES = 1000  # DiTPipeline's null class is the literal 1000


def export_dit_pipeline(pipeline: DiffusionPipeline, folder: str | os.PathLike) -> None:
    """Write a VQDiTPipeline as a DiTPipeline folder, whole or not at all.

    Its images are the same where guidance acts at all steps and latents are snapped to codes.

    Raises:
        ValueError: with every reason why the stock classes cannot express the model.
    """
    reasons = reasons_against(pipeline)
    if reasons:
        raise ValueError("diffusers' DiTPipeline cannot express this pipeline: " + "; ".join(reasons) + ".")
    vae = pipeline.vae
    if isinstance(vae, VQAutoencoder):
        vae = stored_autoencoder(vae)
    stock = DiTPipeline(stock_transformer(pipeline.transformer), vae, pipeline.scheduler)
    with atomic_folder(folder) as target:
        stock.save_pretrained(target)
        index = Path(target) / "model_index.json"
        content = json.loads(index.read_text(encoding="utf-8"))
        content["id2label"] = dict(pipeline.config.id2label)  # DiTPipeline reads it and does not save it
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def reasons_against(pipeline: DiffusionPipeline) -> list[str]:
    """Why DiTPipeline cannot express a pipeline; empty when it can."""
    scheduler = pipeline.scheduler
    name = type(pipeline.scheduler).__name__
    reasons = []
    if pipeline.null_class > STOCK_CLASSES:
        reasons.append(f"it has {pipeline.null_class} classes, DiTPipeline at most {STOCK_CLASSES}")
    if takes_interval(pipeline.transformer):
        reasons.append(
            "its transformer predicts mean velocities, and is shown the interval, which DiTPipeline does not"
        )
    if not hasattr(scheduler, "scale_model_input"):
        reasons.append(
            f"{name} has no scale_model_input, which DiTPipeline calls: a flow needs a solver with flow sigmas"
        )
    if uses_variance(scheduler):
        reasons.append(f"{name} takes a learned variance, which DiTPipeline cuts off: set variance_type='fixed_small'")
    if str(scheduler.config.get("variance_type")).startswith("fixed_large"):
        reasons.append(f"{name} adds noise in its last step: set variance_type='fixed_small'")
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(10)
    if abs(float(getattr(scheduler, "init_noise_sigma", 1.0)) - 1) > 1e-6:
        reasons.append(f"{name} starts from noise of another scale than 1, which DiTPipeline does not apply")
    return reasons + reasons_against_autoencoder(pipeline.vae)


def reasons_against_autoencoder(vae: latent_codec.Autoencoder) -> list[str]:
    """Why VQModel and AutoencoderKL cannot express an autoencoder; empty when one of them can."""
    if not isinstance(vae, VQAutoencoder):
        shifted = getattr(vae.config, "shift_factor", None)
        return [f"DiTPipeline ignores the autoencoder's shift_factor {shifted}"] if shifted else []
    config = vae.config
    reasons = []
    if config.quantizer == "none":
        reasons.append("diffusers has no plain autoencoder (quantizer 'none')")
    if config.quantizer == "vq" and config.code_distance != "l2":
        reasons.append(f"VQModel finds codes by L2 distance, not by {config.code_distance!r}")
    if config.backbone is not None:
        reasons.append("its encoder is a timm backbone")
    for name in ("block_out_channels", "layers_per_block"):
        encoder = getattr(config, f"encoder_{name}")
        decoder = getattr(config, f"decoder_{name}")
        if encoder != decoder and config.backbone is None:
            reasons.append(f"encoder and decoder differ in {name} ({encoder} and {decoder})")
    if config.quantizer == "kl" and config.encoder_out_channels != config.latent_channels:
        reasons.append("AutoencoderKL has as many channels in the encoder's output as in the latents")
    if config.latent_mean is None or config.latent_std is None:
        reasons.append("the autoencoder's config has no latent_mean and latent_std")
    elif max(config.latent_std) - min(config.latent_std) > 1e-6 * max(config.latent_std):
        reasons.append(
            f"its latents are scaled per channel (latent_std {config.latent_std}), VQModel has one scaling_factor: "
            "train with `hf-dpssl train dae_vq --latent_normalization scalar`"
        )
    return reasons


@torch.no_grad()
def stock_transformer(transformer: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The same transformer with 1001 label rows: its classes, copies of the null row, and the null row last."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    stock = DiTTransformer2DModel(**config | {"num_embeds_ada_norm": STOCK_CLASSES})
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        if name.endswith("class_embedder.embedding_table.weight"):
            missing = STOCK_CLASSES + 1 - len(tensor)
            tensor = torch.cat([tensor[:-1], tensor[-1:].expand(missing + 1, -1)])
        tensors[name] = tensor
    stock.load_state_dict(tensors)
    return stock.to(transformer.dtype).eval()


@torch.no_grad()
def stock_autoencoder(vae: VQAutoencoder) -> VQModel | AutoencoderKL:
    """The same autoencoder as a VQModel or AutoencoderKL in float32, whose latents are shifted by our mean."""
    config = vae.config
    levels = len(config.encoder_block_out_channels)
    attention = ["Attn" if level in config.attention_levels else "" for level in range(levels)]
    settings = {
        "in_channels": config.num_channels,
        "out_channels": config.num_channels,
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in attention),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(attention)),
        "block_out_channels": tuple(config.encoder_block_out_channels),
        "layers_per_block": config.encoder_layers_per_block,
        "latent_channels": config.encoder_out_channels,
        "norm_num_groups": config.norm_num_groups,
        "mid_block_add_attention": config.mid_block_attention,
        "sample_size": config.image_size,
        "scaling_factor": 1 / config.latent_std[0],
    }
    if config.quantizer == "vq":
        stock = VQModel(**settings, num_vq_embeddings=config.num_codes, vq_embed_dim=config.latent_channels)
    else:
        stock = AutoencoderKL(**settings)
    wanted = stock.state_dict()
    tensors = {
        name.replace("quantizer.codebook", "quantize.embedding.weight"): tensor.float().clone()
        for name, tensor in vae.state_dict().items()
    }
    tensors = _shifted({name: tensor for name, tensor in tensors.items() if name in wanted}, config.latent_mean)
    stock.load_state_dict(tensors)
    return stock.eval()


def stored_autoencoder(vae: VQAutoencoder) -> VQModel | AutoencoderKL:
    """`stock_autoencoder` as it is written: encoder and decoder in the autoencoder's precision, which loses nothing.

    The 1x1 convolutions and the codebook stay float32: rounded, what the shift has made of them would be other latents
    and codes. diffusers loads the whole as float32, or rounds it where `torch_dtype` asks for that.
    """
    stock = stock_autoencoder(vae)
    for part in (stock.encoder, stock.decoder):
        part.to(vae.dtype)
    return stock


def _shifted(tensors: dict[str, Tensor], mean: list[float]) -> dict[str, Tensor]:
    """Weights of an autoencoder whose latents are those of `tensors` less `mean`, with the same images."""
    shift = tensors["quant_conv.bias"].new_tensor(mean)
    tensors["quant_conv.bias"][: len(mean)] -= shift  # of AutoencoderKL the mean comes first, then the log variance
    if "quantize.embedding.weight" in tensors:
        tensors["quantize.embedding.weight"] -= shift
    tensors["post_quant_conv.bias"] += tensors["post_quant_conv.weight"][:, :, 0, 0] @ shift
    return tensors
