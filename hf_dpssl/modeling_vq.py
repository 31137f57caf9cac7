"""VQ autoencoder for decoupled training (DAE): encoder, quantiser, and a decoder that can be exchanged.

Blocks are diffusers', the quantiser is ours. DAE (Hu et al., NeurIPS 2023): after training with a weakened
decoder, encoder, pre-quantiser convolution and codebook are frozen and the real decoder learns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .gather import is_distributed  # noqa: F401  transformers < 5.13 copies only the direct siblings of this file
from .quantizer import QuantizerOutput, VectorQuantizer
from .weights import combined_sha256, load_complete, tensor_sha256

FROZEN_MODULES = ("encoder", "quant_conv", "quantizer")
_COUNTS = "image_size num_channels latent_channels num_codes norm_num_groups encoder_layers_per_block".split()


class VQConfig(PretrainedConfig):
    """Architecture, training scheme and measured statistics of a `VQAutoencoder`.

    Args:
        image_size: height and width in pixels; a multiple of the downsampling factor.
        num_channels: image channels.
        encoder_block_out_channels: width of each encoder level; n levels downsample by 2^(n - 1).
        decoder_block_out_channels: likewise for the decoder, same number of levels; None = encoder's.
        encoder_layers_per_block: residual blocks per encoder level.
        decoder_layers_per_block: residual blocks per decoder level (diffusers adds one more); None = encoder's.
        norm_num_groups: groups of the group norms; divides every width.
        mid_block_attention: self-attention at the lowest resolution.
        latent_channels: channels of latents and codes.
        quantizer: "vq", or "none" for a plain autoencoder.
        num_codes: size of the codebook.
        codebook_decay: share kept of the codebook's running statistics.
        revival_threshold: codes used below this share of the mean restart.
        commitment_weight: weight of the commitment term (0.25 in van den Oord et al. 2017).
        reconstruction_loss: "l2" or "l1".
        decoder_dropout: dropout inside the decoder's residual blocks; weakens a stage-1 decoder.
        encoder_frozen: encoder, quant_conv and codebook take no gradient and no update.
        encoder_sha256: hash of every tensor of encoder, quant_conv and codebook; in decoupled training
            taken before stage 2 and checked after it.
        latent_mean, latent_std: per channel, of latents of training images, measured when training ends.
        dpssl: recipe, metrics and code statistics of the run that made the checkpoint.
    """

    model_type = "dpssl_vq"

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        encoder_block_out_channels: list[int] | None = None,
        decoder_block_out_channels: list[int] | None = None,
        encoder_layers_per_block: int = 1,
        decoder_layers_per_block: int | None = None,
        norm_num_groups: int = 8,
        mid_block_attention: bool = True,
        latent_channels: int = 4,
        quantizer: str = "vq",
        num_codes: int = 256,
        codebook_decay: float = 0.99,
        revival_threshold: float = 0.03,
        commitment_weight: float = 0.25,
        reconstruction_loss: str = "l2",
        decoder_dropout: float = 0.0,
        encoder_frozen: bool = False,
        encoder_sha256: dict[str, str] | None = None,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        dpssl: dict | None = None,
        **kwargs,
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.encoder_block_out_channels = list(encoder_block_out_channels or (32, 64))
        self.decoder_block_out_channels = list(decoder_block_out_channels or self.encoder_block_out_channels)
        self.encoder_layers_per_block = encoder_layers_per_block
        self.decoder_layers_per_block = decoder_layers_per_block or encoder_layers_per_block
        self.norm_num_groups = norm_num_groups
        self.mid_block_attention = mid_block_attention
        self.latent_channels = latent_channels
        self.quantizer = quantizer
        self.num_codes = num_codes
        self.codebook_decay = codebook_decay
        self.revival_threshold = revival_threshold
        self.commitment_weight = commitment_weight
        self.reconstruction_loss = reconstruction_loss
        self.decoder_dropout = decoder_dropout
        self.encoder_frozen = encoder_frozen
        self.encoder_sha256 = encoder_sha256
        self.latent_mean = latent_mean
        self.latent_std = latent_std
        self.dpssl = dpssl or {}
        self._check()
        super().__init__(**kwargs)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.downsampling_factor

    def _check(self) -> None:
        for name, allowed in (("quantizer", ("vq", "none")), ("reconstruction_loss", ("l2", "l1"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        for name in (*_COUNTS, "decoder_layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        encoder, decoder = self.encoder_block_out_channels, self.decoder_block_out_channels
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder need the same number of levels, got widths {encoder} and {decoder}.")
        uneven = [width for width in encoder + decoder if width % self.norm_num_groups]
        if uneven:
            raise ValueError(f"norm_num_groups={self.norm_num_groups} must divide every width, not {uneven}.")
        if self.image_size % self.downsampling_factor:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of the downsampling factor "
                f"{self.downsampling_factor} (from {len(encoder)} levels)."
            )
        if not 0 <= self.decoder_dropout < 1:
            raise ValueError(f"decoder_dropout lies in [0, 1), got {self.decoder_dropout}.")


@dataclass
class VQEncoderOutput(ModelOutput):
    """latents: (B, C, h, w), before quantisation; codes: (B, h, w) int64, None without a quantiser."""

    latents: Tensor | None = None
    codes: Tensor | None = None


@dataclass
class VQDecoderOutput(ModelOutput):
    """pixel_values: (B, num_channels, H, W), about [-1, 1], not clamped."""

    pixel_values: Tensor | None = None


@dataclass
class VQAutoencoderOutput(ModelOutput):
    """loss = recon + commitment_weight * commit (scalars); pixel_values: reconstruction (B, C, H, W).

    perplexity: exp of the entropy of this batch's code usage, in [1, num_codes].
    """

    loss: Tensor | None = None
    recon: Tensor | None = None
    commit: Tensor | None = None
    perplexity: Tensor | None = None
    pixel_values: Tensor | None = None
    latents: Tensor | None = None
    codes: Tensor | None = None


class VQAutoencoder(PreTrainedModel):
    """Encoder, 1x1 convolution, vector quantiser, 1x1 convolution, decoder; images in [-1, 1]."""

    config_class = VQConfig
    base_model_prefix = "vq_autoencoder"
    main_input_name = "pixel_values"
    _keep_in_fp32_modules_strict = ["quantizer"]
    accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation steps

    def __init__(self, config: VQConfig):
        super().__init__(config)
        self.encoder = Encoder(
            in_channels=config.num_channels,
            out_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(config.encoder_block_out_channels),
            block_out_channels=tuple(config.encoder_block_out_channels),
            layers_per_block=config.encoder_layers_per_block,
            norm_num_groups=config.norm_num_groups,
            double_z=False,
            mid_block_add_attention=config.mid_block_attention,
        )
        self.quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.quantizer = None
        if config.quantizer == "vq":
            options = {"decay": config.codebook_decay, "revival_threshold": config.revival_threshold}
            self.quantizer = VectorQuantizer(config.num_codes, config.latent_channels, **options)
        self._build_decoder()
        self.post_init()

    def _build_decoder(self) -> None:
        config = self.config
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(
            in_channels=config.latent_channels,
            out_channels=config.num_channels,
            up_block_types=("UpDecoderBlock2D",) * len(config.decoder_block_out_channels),
            block_out_channels=tuple(config.decoder_block_out_channels),
            layers_per_block=config.decoder_layers_per_block,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=config.mid_block_attention,
        )
        for module in self.decoder.modules():
            if isinstance(module, ResnetBlock2D):
                module.dropout.p = config.decoder_dropout

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: every block keeps the initialisation of the library it comes from."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> VQAutoencoder:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As `PreTrainedModel.save_pretrained`; records the encoder's hashes, or checks those of a frozen one."""
        if self.config.encoder_frozen and self.dtype == torch.float32:
            self.check_encoder_unchanged()
        elif self.dtype == torch.float32:
            self.config.encoder_sha256 = self.hash_encoder()
        super().save_pretrained(save_directory, **kwargs)

    def train(self, mode: bool = True) -> VQAutoencoder:
        """As `nn.Module.train`; a frozen encoder stays in eval mode and without gradient, also after loading."""
        super().train(mode)
        if self.config.encoder_frozen:
            for name in FROZEN_MODULES:
                if (module := getattr(self, name)) is not None:
                    module.eval().requires_grad_(False)
        return self

    def encode(self, pixel_values: Tensor) -> VQEncoderOutput:
        """Latents (B, C, h, w) before quantisation and codes (B, h, w) of images (B, num_channels, H, W) in [-1, 1]."""
        latents = self._latents(pixel_values)
        codes = None if self.quantizer is None else self.quantize(latents).codes
        return VQEncoderOutput(latents=latents, codes=codes)

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Nearest codes of latents (B, C, h, w); ValueError for a model without quantiser."""
        if self.quantizer is None:
            raise ValueError("this autoencoder has no quantiser (config.quantizer is 'none'); decode the latents.")
        return self.quantizer(latents)

    def decode(self, latents: Tensor) -> VQDecoderOutput:
        """Images of latents or quantised latents (B, C, h, w); nothing is quantised here."""
        hidden = self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))
        return VQDecoderOutput(pixel_values=self.decoder(hidden))

    def decode_codes(self, codes: Tensor) -> VQDecoderOutput:
        """Images of codes (B, h, w); IndexError on an id outside the codebook."""
        if self.quantizer is None:
            raise ValueError("this autoencoder has no quantiser (config.quantizer is 'none'), so it has no codes.")
        return self.decode(self.quantizer.lookup(codes))

    def forward(self, pixel_values: Tensor, **kwargs) -> VQAutoencoderOutput:
        """Reconstruct images (B, num_channels, H, W) in [-1, 1]; `loss` makes transformers.Trainer work as is.

        Further keyword arguments (labels and the like, which a data collator may pass) are not used.
        """
        latents = self._latents(pixel_values)
        quantized, codes, perplexity = latents, None, None
        commit = latents.new_zeros((), dtype=torch.float32)
        if self.quantizer is not None:
            output = self.quantizer(latents)
            quantized, codes = output.quantized, output.codes
            commit, perplexity = output.commitment, output.perplexity
        reconstruction = self.decode(quantized).pixel_values
        distance = F.mse_loss if self.config.reconstruction_loss == "l2" else F.l1_loss
        recon = distance(reconstruction.float(), pixel_values.float())
        loss = recon + self.config.commitment_weight * commit
        return VQAutoencoderOutput(loss, recon, commit, perplexity, reconstruction, latents, codes)

    def _latents(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be (B, {self.config.num_channels}, H, W), got {tuple(pixel_values.shape)}."
            )
        if any(side % self.config.downsampling_factor for side in pixel_values.shape[2:]):
            raise ValueError(
                f"height and width must be multiples of {self.config.downsampling_factor}, "
                f"got {tuple(pixel_values.shape[2:])}: resize or pad the images."
            )
        return self.quant_conv(self.encoder(pixel_values.to(self.quant_conv.weight.dtype)))

    def freeze_encoder(self) -> dict[str, str]:
        """Freeze encoder, quant_conv and codebook; returns the hashes that `config.encoder_sha256` now holds."""
        self.config.encoder_frozen = True
        self.config.encoder_sha256 = self.hash_encoder()
        self.train(self.training)
        return self.config.encoder_sha256

    def check_encoder_unchanged(self) -> None:
        """Raise RuntimeError naming every frozen tensor whose hash is no longer `config.encoder_sha256`'s."""
        expected, found = self.config.encoder_sha256 or {}, self.hash_encoder()
        changed = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if changed:
            raise RuntimeError(f"{len(changed)} frozen tensors have changed since stage 1: {changed[:5]}.")

    def replace_decoder(self, block_out_channels: list[int], layers_per_block: int, dropout: float = 0.0) -> None:
        """Put a freshly initialised decoder (and post_quant_conv) in place of the present one."""
        config = copy.copy(self.config)
        config.decoder_block_out_channels = list(block_out_channels)
        config.decoder_layers_per_block = layers_per_block
        config.decoder_dropout = dropout
        config._check()
        self.config = config
        reference = self.quant_conv.weight
        self._build_decoder()
        self.post_quant_conv.to(reference.device, reference.dtype)
        self.decoder.to(reference.device, reference.dtype).train(self.training)

    def hash_encoder(self) -> dict[str, str]:
        """SHA-256 of every tensor of encoder, quant_conv and codebook, by name."""
        state = self.state_dict()
        return tensor_sha256({name: t for name, t in state.items() if name.split(".")[0] in FROZEN_MODULES})

    def fingerprint(self) -> str:
        """One hash of everything that decides the latents; a generator stores that of its autoencoder.

        In lower precision than float32 it is that of the weights as they were saved.
        """
        stored = self.config.encoder_sha256
        return combined_sha256(stored if stored and self.dtype != torch.float32 else self.hash_encoder())

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
        mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (self.config.latent_mean, self.config.latent_std))
        return mean, std
