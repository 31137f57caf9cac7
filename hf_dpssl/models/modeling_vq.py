"""VQ autoencoder for joint and decoupled training (DAE): encoder, quantiser, and a decoder that can be exchanged.

Blocks are diffusers', the quantiser is ours. DAE (Hu et al., NeurIPS 2023): after training with a weakened
decoder, encoder, pre-quantiser convolution and codebook are frozen and the real decoder learns.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .autoencoder_blocks import build_decoder, build_encoder
from .backbone_encoder import BackboneEncoder  # noqa: F401  transformers < 5.13 copies only the direct siblings ...
from .blocks import use_small_image_stem_  # noqa: F401  ... of this file, so that it names theirs too
from .call_arguments import check_pixel_values, ignore_labels
from .choices import VQ_CHOICES  # noqa: F401
from .codebook_search import nearest_codes  # noqa: F401
from .complete_weights import draw_after_meta_, load_complete
from .configuration_vq import VQConfig
from .float32_module import Float32Module  # noqa: F401
from .gather import is_distributed  # noqa: F401
from .matrix_products import product  # noqa: F401
from .quantizer import QuantizerOutput, VectorQuantizer
from .weight_hashes import combined_sha256, rounded_sha256, value_sha256

FROZEN_MODULES = ("encoder", "quant_conv", "quantizer")
_ROUNDED_MODULES = ("encoder", "quant_conv")  # in half precision; the codebook is float32 always


@dataclass
class VQEncoderOutput(ModelOutput):
    """latents: (B, C, h, w), before quantisation (with KL the mean); codes: (B, h, w) int64, or None."""

    latents: Tensor | None = None
    codes: Tensor | None = None


@dataclass
class VQDecoderOutput(ModelOutput):
    """pixel_values: (B, num_channels, H, W), about [-1, 1], not clamped."""

    pixel_values: Tensor | None = None


@dataclass
class VQAutoencoderOutput(ModelOutput):
    """loss = recon + commitment_weight * commit + codebook + entropy_weight * entropy + kl_weight * kl
    + equivariance_weight * equivariance (scalars).

    pixel_values: reconstruction (B, C, H, W). kl: nats, summed over an image's latents, per pixel value.
    perplexity: exp of the entropy of this batch's code usage, in [1, num_codes].
    """

    loss: Tensor | None = None
    recon: Tensor | None = None
    commit: Tensor | None = None
    codebook: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    perplexity: Tensor | None = None
    pixel_values: Tensor | None = None
    latents: Tensor | None = None
    codes: Tensor | None = None
    equivariance: Tensor | None = None


class VQAutoencoder(PreTrainedModel):
    """Encoder, 1x1 convolution, quantiser, 1x1 convolution, decoder; images in [-1, 1].

    `forward`, `encode`, `decode` and `decode_codes` give a tuple with return_dict=False. Attentions and hidden states
    are not given out, and checkpoints that lack weights are refused instead of being completed at random. As the `vae`
    of a pipeline it keeps transformers' file names and config (no `register_to_config`), and decodes whole: no tiles.
    """

    config_class = VQConfig
    base_model_prefix = "vq_autoencoder"
    main_input_name = "pixel_values"
    _no_split_modules = ["ResnetBlock2D", "Attention", "BackboneEncoder", "VectorQuantizer"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps

    def __init__(self, config: VQConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        factor = 2 if config.quantizer == "kl" else 1  # mean and log variance
        self.quant_conv: nn.Module = nn.Identity()  # a backbone's features are the latents as they are
        if config.backbone is None:
            self.quant_conv = nn.Conv2d(factor * config.encoder_out_channels, factor * config.latent_channels, 1)
        self.quantizer = None
        if config.quantizer == "vq":
            self._keep_in_fp32_modules_strict = ["quantizer.codebook", "quantizer.counts", "quantizer.sums"]
            self.quantizer = VectorQuantizer(
                config.num_codes,
                config.latent_channels,
                decay=config.codebook_decay,
                revival_threshold=config.revival_threshold,
                update=config.codebook_update,
                distance=config.code_distance,
                gradient=config.quantizer_gradient,
                entropy_temperature=config.entropy_temperature if config.entropy_weight else None,
            )
        self._build_decoder()
        self.post_init()

    def _build_decoder(self) -> None:
        self.post_quant_conv = nn.Conv2d(self.config.latent_channels, self.config.encoder_out_channels, 1)
        self.decoder = build_decoder(self.config)

    @property
    def last_decoder_layer(self) -> Tensor:
        """The weight at which the adaptive weight of an adversarial term compares gradients (Esser et al. 2021)."""
        return self.decoder.conv_out.weight

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every block keeps the initialisation of the library it comes from."""

    def get_input_embeddings(self) -> None:
        """None: images have no embeddings. By this quantisers and adapters know that there is nothing to leave out."""

    def init_weights(self) -> None:
        """As `PreTrainedModel.init_weights`; a model built on the meta device gets what the constructor draws."""
        draw_after_meta_(self)
        super().init_weights()

    def _apply(self, fn, recurse: bool = True):
        # Half precision loses which weights these are the rounding of: it is recorded before.
        weight = self.post_quant_conv.weight
        if weight.dtype == torch.float32 and not weight.is_meta and not self.config.encoder_frozen:
            if fn(weight.detach()[:0]).dtype != torch.float32:
                self._record_encoder()
        return super()._apply(fn, recurse)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> VQAutoencoder:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

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
        """As `PreTrainedModel.save_pretrained`; records the encoder's hashes, or checks those of a frozen one.

        Raises:
            RuntimeError: as `check_encoder_unchanged`, before anything is written.
        """
        if self.config.encoder_frozen:
            self.check_encoder_unchanged()
        self._record_encoder()
        super().save_pretrained(
            save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, **kwargs
        )

    def train(self, mode: bool = True) -> VQAutoencoder:
        """As `nn.Module.train`; a frozen encoder stays in eval mode and without gradient, also after loading."""
        super().train(mode)
        if self.config.encoder_frozen:
            for name in self.frozen_modules:
                if (module := getattr(self, name)) is not None:
                    module.eval().requires_grad_(False)
        return self

    @property
    def frozen_modules(self) -> tuple[str, ...]:
        """What `freeze_encoder` freezes: all that decides the codes, or all but the codebook."""
        return FROZEN_MODULES if self.config.codebook_frozen else FROZEN_MODULES[:2]

    @can_return_tuple
    def encode(self, pixel_values: Tensor) -> VQEncoderOutput:
        """Latents (B, C, h, w) before quantisation and codes (B, h, w) of images (B, num_channels, H, W) in [-1, 1].

        Raises:
            ValueError: values that are not finite or outside [-1, 1], or another shape.
        """
        check_pixel_values(pixel_values)
        latents = self.encode_latents(pixel_values)
        codes = None if self.quantizer is None else self.quantize(latents).codes
        return VQEncoderOutput(latents=latents, codes=codes)

    def encode_latents(self, pixel_values: Tensor) -> Tensor:
        """The latents of `encode` alone: a differentiable map."""
        return self._moments(pixel_values)[0]

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Nearest codes of latents (B, C, h, w); ValueError for a model without quantiser."""
        if self.quantizer is None:
            raise ValueError("this autoencoder has no codebook (config.quantizer is not 'vq'); decode the latents.")
        return self.quantizer(latents)

    @can_return_tuple
    def decode(self, latents: Tensor) -> VQDecoderOutput:
        """Images of latents or quantised latents (B, C, h, w); nothing is quantised here.

        Raises:
            ValueError: latents of other channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"latents must be (B, {self.config.latent_channels}, h, w), got {tuple(latents.shape)}.")
        hidden = self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))
        return VQDecoderOutput(pixel_values=self.decoder(hidden))

    @can_return_tuple
    def decode_codes(self, codes: Tensor) -> VQDecoderOutput:
        """Images of codes (B, h, w); IndexError on an id outside the codebook, ValueError on another shape."""
        if self.quantizer is None:
            raise ValueError("this autoencoder has no codebook (config.quantizer is not 'vq'), so it has no codes.")
        if codes.ndim != 3 or codes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"codes must be (B, h, w) of int64 or int32, got {tuple(codes.shape)} of {codes.dtype}: reshape "
                "sequences, and convert, first."
            )
        hook = getattr(self.quantizer, "_hf_hook", None)  # accelerate's, which brings weights before `forward` alone
        if hook is None:
            return self.decode(self.quantizer.lookup(codes), return_dict=True)
        (codes,), _ = hook.pre_forward(self.quantizer, codes)
        return self.decode(hook.post_forward(self.quantizer, self.quantizer.lookup(codes)), return_dict=True)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, return_loss: bool = True, **others) -> VQAutoencoderOutput:
        """Reconstruct images (B, num_channels, H, W) in [-1, 1]; `loss` makes transformers.Trainer work as is.

        `return_loss`: False leaves `loss` out; by this name transformers.Trainer knows to report eval_loss.
        `others`: `labels`, which are not read.
        """
        ignore_labels(others)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.encoder_frozen):
            latents, log_variance = self._moments(pixel_values)
        config = self.config
        zero = latents.new_zeros((), dtype=torch.float32)
        quantized = latents
        codes = None
        perplexity = None
        commit = zero
        codebook = zero
        entropy = zero
        kl = zero
        if self.quantizer is not None:
            output = self.quantizer(latents)
            quantized = output.quantized
            codes = output.codes
            perplexity = output.perplexity
            commit = output.commitment
            codebook = output.codebook_loss
            entropy = output.entropy
        elif log_variance is not None:
            quantized, kl = self._sample(latents, log_variance, pixel_values[0].numel())
        reconstruction = self.decode(quantized, return_dict=True).pixel_values
        distance = F.mse_loss if config.reconstruction_loss == "l2" else F.l1_loss
        recon = distance(reconstruction.float(), pixel_values.to(reconstruction.device).float())
        commit, codebook, entropy, kl = (term.to(recon.device) for term in (commit, codebook, entropy, kl))
        loss = recon + config.commitment_weight * commit + codebook
        loss = loss + config.entropy_weight * entropy + config.kl_weight * kl
        equivariance = zero
        if config.equivariance_weight and self.training and not config.encoder_frozen:
            equivariance = self._equivariance(quantized, pixel_values)
            loss = loss + config.equivariance_weight * equivariance.to(loss.device)
        loss = loss if return_loss else None
        return VQAutoencoderOutput(
            loss, recon, commit, codebook, entropy, kl, perplexity, reconstruction, latents, codes, equivariance
        )

    def _equivariance(self, quantized: Tensor, pixel_values: Tensor) -> Tensor:
        """Mean distance of what is decoded from transformed latents (B, C, h, w) to the transformed images.

        The images take turns at the transforms by their place in the batch, whose order is random already.
        Source: Kouzelis et al. 2025 (EQ-VAE); Skorokhodov et al. 2025 (scale equivariance).
        """
        distance = F.mse_loss if self.config.reconstruction_loss == "l2" else F.l1_loss
        turns = [lambda x, k=k: x.rot90(k, (2, 3)) for k in (1, 2, 3)]
        halves = [lambda x: F.avg_pool2d(x, 2)]
        by_name = {"rotations": turns, "scales": halves}
        transforms = [transform for name in self.config.equivariance_transforms for transform in by_name[name]]
        total = quantized.new_zeros((), dtype=torch.float32)
        for place, transform in enumerate(transforms[: len(quantized)]):
            own, wanted = quantized[place :: len(transforms)], pixel_values[place :: len(transforms)]
            decoded = self.decode(transform(own), return_dict=True).pixel_values.float()
            target = transform(wanted.to(decoded.device).float())
            total = total + len(own) / len(quantized) * distance(decoded, target).to(total.device)
        return total

    def _moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents, or with KL their mean and log variance."""
        channels = self.config.num_channels
        factor = self.config.downsampling_factor
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must be (B, {channels}, H, W), got {tuple(pixel_values.shape)}.")
        if any(side % factor or side < factor for side in pixel_values.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of {factor}, the side of a latent cell, "
                f"got {tuple(pixel_values.shape[2:])}: resize or pad the images."
            )
        moments = self.quant_conv(self.encoder(pixel_values.to(self.post_quant_conv.weight.dtype)))
        if self.config.quantizer != "kl":
            return moments, None
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # diffusers' bounds

    def _sample(self, mean: Tensor, log_variance: Tensor, pixel_count: int) -> tuple[Tensor, Tensor]:
        """Latents drawn in training mode (the mean otherwise), and the KL to the standard normal per pixel value."""
        mu = mean.float()
        log_variance = log_variance.float()
        kl = 0.5 * (mu.pow(2) + log_variance.exp() - 1 - log_variance).sum() / (len(mu) * pixel_count)
        if self.training and not self.config.encoder_frozen:
            return (mu + (log_variance / 2).exp() * torch.randn_like(mu)).to(mean.dtype), kl
        return mean, kl

    def freeze_encoder(self) -> dict[str, str]:
        """Freeze encoder, quant_conv and, unless `config.codebook_frozen` is False, codebook.

        Returns the hashes that `config.encoder_sha256` now holds.
        """
        self.config.encoder_frozen = True
        self._record_encoder()
        self.train(self.training)
        return self.config.encoder_sha256

    def check_encoder_unchanged(self) -> None:
        """Check the frozen tensors against `config.encoder_sha256`.

        Rounded in half precision they are the same, also after `.float()`.

        Raises:
            RuntimeError: naming every frozen tensor that is another one, or that there are no hashes to compare with.
        """
        expected = self.config.encoder_sha256
        if not expected:
            raise RuntimeError(
                "config.encoder_frozen is True, but config.encoder_sha256 says nothing of what was frozen: call "
                "model.freeze_encoder(), which freezes the weights as they are and records their hashes."
            )
        found = self._original_hashes()
        frozen = (name for name in expected.keys() | found.keys() if name.split(".")[0] in self.frozen_modules)
        changed = sorted(name for name in frozen if expected.get(name) != found.get(name))
        if changed:
            raise RuntimeError(f"{len(changed)} frozen tensors have changed since they were frozen: {changed[:5]}.")

    def replace_decoder(
        self, block_out_channels: list[int], layers_per_block: int, dropout: float = 0.0, dropout_kind: str = "element"
    ) -> None:
        """Put a freshly initialised decoder (and post_quant_conv) in place of the present one.

        Device, precision, memory format and gradient checkpointing are those of the present one.
        """
        config = copy.copy(self.config)
        config.decoder_block_out_channels = list(block_out_channels)
        config.decoder_layers_per_block = layers_per_block
        config.decoder_dropout = dropout
        config.decoder_dropout_kind = dropout_kind
        config._check()
        self.config = config
        old = self.decoder
        reference = self.last_decoder_layer
        self._build_decoder()
        channels_last = reference.is_contiguous(memory_format=torch.channels_last) and not reference.is_contiguous()
        for module in (self.post_quant_conv, self.decoder):
            module.to(reference.device, reference.dtype).train(self.training)
            if channels_last:
                module.to(memory_format=torch.channels_last)
        if old.gradient_checkpointing:
            for module in self.decoder.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = old._gradient_checkpointing_func

    def hash_encoder(self) -> dict[str, str]:
        """SHA-256 of the values of every tensor of encoder, quant_conv and codebook, by name."""
        state = self.state_dict()
        return value_sha256({name: t for name, t in state.items() if name.split(".")[0] in FROZEN_MODULES})

    def _original_hashes(self) -> dict[str, str]:
        """`hash_encoder` of the recorded weights where the present ones are a rounding of them, else of these."""
        if getattr(self, "hf_quantizer", None) is not None and self.config.encoder_sha256:
            return dict(self.config.encoder_sha256)  # quantised while they were loaded: no values are left to hash
        found = self.hash_encoder()
        rounded = {name: value for name, value in found.items() if name.split(".")[0] in _ROUNDED_MODULES}
        if combined_sha256(rounded) in (self.config.encoder_rounded_sha256 or ()):
            found |= {name: self.config.encoder_sha256[name] for name in rounded}
        return found

    def _record_encoder(self) -> None:
        """Keep in the config which weights these are, and what half precision would make of them."""
        config = self.config
        if getattr(self, "hf_quantizer", None) is not None:
            return
        recorded = config.encoder_sha256 or {}
        config.encoder_sha256 = self._original_hashes()
        state = {name: t for name, t in self.state_dict().items() if name.split(".")[0] in _ROUNDED_MODULES}
        if not config.encoder_rounded_sha256 or any(recorded.get(n) != config.encoder_sha256[n] for n in state):
            config.encoder_rounded_sha256 = rounded_sha256(state)

    def fingerprint(self) -> str:
        """One hash of everything that decides latents and codes; a generator stores that of its autoencoder.

        These are encoder, quant_conv and codebook, and of the config what their shapes do not show. Weights rounded in
        half precision have the fingerprint of the float32 ones that the config records.
        """
        return latent_fingerprint(self.config, self._original_hashes())

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std with the config's statistics: about zero mean and unit variance."""
        mean, std = self._latent_statistics(latents)
        return (latents - mean) / std

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize_latents`."""
        mean, std = self._latent_statistics(latents)
        return latents * std + mean

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latent_mean is None or self.config.latent_std is None:
            raise ValueError(
                "this autoencoder's config has no latent_mean and latent_std; training/dae_vq.py measures "
                "them when training ends. Set both (one number per latent channel) before generating."
            )
        numbers = torch.tensor([self.config.latent_mean, self.config.latent_std], dtype=latents.dtype)
        mean, std = numbers.to(latents.device, non_blocking=True).view(2, 1, -1, 1, 1)
        return mean, std


def latent_fingerprint(config: VQConfig, hashes: dict[str, str]) -> str:
    """`VQAutoencoder.fingerprint` of a config and the hashes of encoder, quant_conv and codebook."""
    default = VQConfig()
    settings = {name: getattr(config, name) for name in ("code_distance", "norm_num_groups", "backbone")}
    changed = {name: json.dumps(v, sort_keys=True) for name, v in settings.items() if v != getattr(default, name)}
    return combined_sha256(hashes | changed)


if __name__.startswith("hf_dpssl."):  # not in the copy beside published weights
    from .registration import register

    register(VQConfig, VQAutoencoder)
