"""Key layout of taming-transformers' VQGAN and of latent diffusion's first stages, as ours.

| taming, latent diffusion | ours |
|---|---|
| encoder.down.i.block.j, attn.j, downsample.conv | encoder.down_blocks.i.resnets.j, attentions.j, downsamplers.0.conv |
| decoder.up.i (level i, 0 = full resolution) | decoder.up_blocks.(n - 1 - i) |
| mid.block_1, attn_1, block_2 | mid_block.resnets.0, attentions.0, resnets.1 |
| norm, q, k, v, proj_out (1x1 convolutions) | group_norm, to_q, to_k, to_v, to_out.0 (linear maps) |
| nin_shortcut, norm_out | conv_shortcut, conv_norm_out |
| quantize.embedding.weight | quantizer.codebook |

Source: Esser et al. 2021 (VQGAN), CompVis/taming-transformers (MIT), taming/modules/diffusionmodules/model.py;
Rombach et al. 2022 (latent diffusion), whose first stages have the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

NORM_GROUPS = 32  # a literal in taming's code
PREFIXES = ("", "first_stage_model.")
_MARK = "decoder.conv_in.weight"
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
_CODEBOOK = "quantize.embedding.weight"
_AVERAGES = {"quantize.embedding.cluster_size": "quantizer.counts", "quantize.embedding.embed_avg": "quantizer.sums"}
# What belongs to training, or to options that change neither latents nor images.
_UNUSED = ("quantize.used",)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RENAMED = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def find_prefix(names: Iterable[str]) -> str | None:
    """Where the autoencoder's keys stand: "" or "first_stage_model."; None when this is another layout."""
    names = set(names)
    marks = (_MARK, "encoder.down.0.block.0.conv1.weight")
    return next((prefix for prefix in PREFIXES if all(prefix + mark in names for mark in marks)), None)


def split_autoencoder(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The autoencoder's tensors without the prefix, and the rest (losses, averages of weights, a diffusion model).

    Raises:
        ValueError: a Gumbel-softmax quantiser, which assigns codes by a learned projection instead of by distance.
    """
    own, rest = {}, {}
    for name, value in tensors.items():
        short = name[len(prefix) :] if name.startswith(prefix) else ""
        taken = short.startswith(_PARTS) and not short.startswith(_UNUSED)
        (own if taken else rest)[short if taken else name] = value
    if "quantize.embed.weight" in own:
        raise ValueError(
            "the file holds taming's Gumbel-softmax quantiser (quantize.embed, quantize.proj); codes by distance "
            "(quantize.embedding.weight) and KL autoencoders (no quantize) are supported."
        )
    return own, rest


def read_settings(tensors: Mapping[str, Tensor]) -> dict:
    """Fields of `VQConfig` that the shapes of taming's tensors determine; all but the image size.

    Raises:
        ValueError: missing tensors, or an architecture that is none of ours; the message names what was found.
    """
    _need(tensors, "encoder.conv_in.weight", "encoder.conv_out.weight", _MARK, "decoder.conv_out.weight")
    encoder = _levels(tensors, "encoder.down", "downsample", last_has_none=True)
    decoder = _levels(tensors, "decoder.up", "upsample", last_has_none=False)
    if len(encoder) != len(decoder):
        raise ValueError(f"the encoder has {len(encoder)} levels and the decoder {len(decoder)}: incomplete file?")
    widths, depths, attention = zip(*encoder, strict=True)
    decoder_widths, decoder_depths, decoder_attention = zip(*decoder, strict=True)
    if len(set(depths)) > 1 or len(set(decoder_depths)) > 1 or decoder_depths[0] < 2:
        raise ValueError(f"blocks per level must be the same at all levels, got {depths} and {decoder_depths}.")
    mid = ["encoder.mid.attn_1.q.weight" in tensors, "decoder.mid.attn_1.q.weight" in tensors]
    if attention != decoder_attention or mid[0] != mid[1]:
        raise ValueError(
            "encoder and decoder must hold attention at the same levels, got "
            f"{_where(attention, mid[0])} and {_where(decoder_attention, mid[1])}."
        )
    first = tensors["encoder.conv_in.weight"].shape[0]
    if first != widths[0]:
        raise ValueError(
            f"the first convolution has {first} channels and the first level {widths[0]} (ch_mult starts with "
            f"{widths[0] / first:g}); supported are architectures whose ch_mult starts with 1."
        )
    uneven = [width for width in widths + decoder_widths if width % NORM_GROUPS]
    if uneven:
        raise ValueError(f"taming's group norms have {NORM_GROUPS} groups, which do not divide the widths {uneven}.")
    return {
        "encoder_block_out_channels": list(widths),
        "decoder_block_out_channels": list(decoder_widths),
        "encoder_layers_per_block": depths[0],
        "decoder_layers_per_block": decoder_depths[0] - 1,
        "norm_num_groups": NORM_GROUPS,
        "mid_block_attention": mid[0],
        "attention_levels": [level for level, held in enumerate(attention) if held],
    } | _bottleneck(tensors)


def _bottleneck(tensors: Mapping[str, Tensor]) -> dict:
    """Channels of images, z and latents, and the quantiser."""
    channels = tensors["encoder.conv_in.weight"].shape[1]
    if tensors["decoder.conv_out.weight"].shape[0] != channels:
        raise ValueError(
            f"the encoder takes {channels} channels and the decoder returns "
            f"{tensors['decoder.conv_out.weight'].shape[0]}; an autoencoder of ours has the same on both sides."
        )
    z_in, z_out = tensors["encoder.conv_out.weight"].shape[0], tensors[_MARK].shape[1]
    is_vq = _CODEBOOK in tensors
    if z_in != z_out * (1 if is_vq else 2) and (is_vq or z_in != z_out):
        raise ValueError(
            f"the encoder ends with {z_in} channels and the decoder starts with {z_out}: supported are z and z "
            "(double_z: False) with quantize.embedding.weight, and 2 z and z (double_z: True) without quantiser."
        )
    kind = "vq" if is_vq else "kl" if z_in == 2 * z_out else "none"
    post = tensors.get("post_quant_conv.weight")
    settings = {
        "num_channels": channels,
        "encoder_out_channels": z_out,
        "latent_channels": z_out if post is None else post.shape[1],
        "quantizer": kind,
    }
    if is_vq:
        settings["num_codes"] = tensors[_CODEBOOK].shape[0]
    return settings


def rename(tensors: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Tensors of taming's autoencoder by our names, 1x1 convolutions of attention as linear maps."""
    renamed = {}
    for name, value in tensors.items():
        new = re.sub(r"\.up\.(\d+)\.", lambda found: f".up_blocks.{num_levels - 1 - int(found[1])}.", name)
        for pattern, replacement in _RENAMED:
            new = re.sub(pattern, replacement, new)
        if found := re.fullmatch(r"(.+\.attentions\.\d+)\.(norm|q|k|v|proj_out)\.(weight|bias)", new):
            new = f"{found[1]}.{_ATTENTION[found[2]]}.{found[3]}"
            value = value.flatten(1) if value.ndim == 4 else value
        if new == _CODEBOOK:
            new = "quantizer.codebook"
        renamed[_AVERAGES.get(new, new)] = value
    return renamed


def resolution_of(content: object, settings: dict, source: str) -> int:
    """The resolution in the YAML of a training of taming or latent diffusion.

    Args:
        content: the parsed file; the autoencoder's entry (with `ddconfig`) may stand anywhere in it.
        settings: what `read_settings` found in the tensors.
        source: named in messages.

    Raises:
        ValueError: no such entry, or one that contradicts the tensors.
    """
    params = _find_params(content)
    if params is None:
        raise ValueError(f"{source} has no `ddconfig` with a resolution: give the YAML of the autoencoder's training.")
    dd = params["ddconfig"]
    widths, resolution = settings["encoder_block_out_channels"], dd["resolution"]
    sides = [resolution // 2**level for level in range(len(widths))]
    found = {
        "ch * ch_mult": widths,
        "num_res_blocks": settings["encoder_layers_per_block"],
        "z_channels": settings["encoder_out_channels"],
        "in_channels": settings["num_channels"],
        "embed_dim": settings["latent_channels"],
        "n_embed": settings.get("num_codes"),
        "attn_resolutions": sorted(sides[level] for level in settings["attention_levels"]),
    }
    said = {**dd, **params}
    said["ch * ch_mult"] = [dd["ch"] * multiple for multiple in dd.get("ch_mult", (1, 2, 4, 8))]
    said["attn_resolutions"] = sorted(set(sides) & set(dd.get("attn_resolutions", ())))
    wrong = [f"{n}: {said[n]} instead of {value}" for n, value in found.items() if n in said and said[n] != value]
    if wrong:
        raise ValueError(f"{source} is not the configuration of these tensors; {'; '.join(wrong)}.")
    return resolution


def _find_params(node: object) -> dict | None:
    if isinstance(node, Mapping):
        if isinstance(node.get("ddconfig"), Mapping) and "resolution" in node["ddconfig"]:
            return dict(node)
        return next((found for value in node.values() if (found := _find_params(value)) is not None), None)
    return None


def _levels(
    tensors: Mapping[str, Tensor], part: str, resampling: str, *, last_has_none: bool
) -> list[tuple[int, int, bool]]:
    """(width, residual blocks, attention) of each level, 0 = full resolution."""
    levels = []
    count = _count(tensors, part)
    for level in range(count):
        name = f"{part}.{level}"
        blocks, attentions = _count(tensors, f"{name}.block"), _count(tensors, f"{name}.attn")
        _need(tensors, *(f"{name}.block.{block}.conv1.weight" for block in range(max(blocks, 1))))
        if attentions not in (0, blocks):
            raise ValueError(
                f"{name} has {blocks} blocks and {attentions} attentions: one each, or none, is supported."
            )
        resamples = level < count - 1 if last_has_none else level > 0
        if resamples and f"{name}.{resampling}.conv.weight" not in tensors:
            raise ValueError(
                f"{name}.{resampling}.conv.weight is missing: the file is incomplete, or the model resamples without "
                "convolutions (resamp_with_conv: False), which is not supported."
            )
        levels.append((tensors[f"{name}.block.{blocks - 1}.conv1.weight"].shape[0], blocks, attentions > 0))
    return levels


def _count(tensors: Mapping[str, Tensor], part: str) -> int:
    found = {int(name[len(part) + 1 :].split(".")[0]) for name in tensors if name.startswith(f"{part}.")}
    return max(found, default=-1) + 1


def _need(tensors: Mapping[str, Tensor], *names: str) -> None:
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise ValueError(f"the file lacks {', '.join(lacking)}: it is incomplete.")


def _where(attention: Iterable[bool], mid: bool) -> list:
    return [level for level, held in enumerate(attention) if held] + ["mid"] * mid
