"""Configuration of the VQ autoencoder: architecture, quantiser, losses, and what training measured."""

from __future__ import annotations

from transformers import PretrainedConfig

from .choices import VQ_CHOICES, VQ_PRESETS, VQ_TRANSFORMS

_COUNTS = [
    "image_size",
    "num_channels",
    "latent_channels",
    "num_codes",
    "norm_num_groups",
    "encoder_layers_per_block",
]
MAX_LAYERS = 100  # per block: of more, as a damaged file may ask for, none has been seen


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
        encoder_out_channels: channels that the encoder gives and the decoder takes, mapped to and from the latents' by
            1x1 convolutions; None = latent_channels.
        attention_levels: levels, 0 = full resolution, whose blocks hold self-attention, in encoder and decoder.
        quantizer: "vq", "kl" (a Gaussian per cell, as AutoencoderKL), or "none" for a plain autoencoder.
        num_codes: size of the codebook.
        code_distance: "l2", or "cosine": latents and codes on the unit sphere.
        codebook_update: "ema" (running means) or "gradient" (the codebook term of van den Oord et al. 2017).
        quantizer_gradient: "straight_through" or "rotation" (Fifty et al. 2024).
        entropy_weight, entropy_temperature: of the entropy term of the quantiser; weight 0 leaves it out.
        kl_weight: weight of the KL term of quantizer "kl", which is summed over an image's latents and divided by the
            number of its pixel values, as the mean reconstruction error is.
        codebook_decay: share kept of the codebook's running statistics.
        revival_threshold: codes used below this share of the mean restart.
        commitment_weight: weight of the commitment term (0.25 in van den Oord et al. 2017).
        reconstruction_loss: "l2" or "l1".
        equivariance_weight: weight of the equivariance term, which wants turned or halved latents to be decoded as the
            images turned or halved (EQ-VAE; SE, its scales alone); while the encoder learns. 0 leaves it out.
        equivariance_transforms: of "rotations" (by 90, 180 and 270 degrees) and "scales" (means of 2 x 2 cells, for
            latents of even sides); the images of a batch take turns. None = both.
        decoder_dropout: share of what a weakened (stage-1) decoder loses in training, in [0, 1).
        decoder_dropout_kind: of what: "element" (single activations), "channel" (whole channels) or "depth" (whole
            residual branches of an image, stochastic depth) in the residual blocks; "noise" (so many parts of the
            decoder's input are normal noise) or "mask" (positions of its input).
        encoder_frozen: encoder and quant_conv take no gradient and no update, nor does the codebook.
        codebook_frozen: False: with a frozen encoder the codebook nevertheless goes on learning.
        backbone: entry of `backbone_encoder.complete_backbone`: a timm model whose spatial features are the latents, in
            place of the convolutional encoder; `encoder_block_out_channels` is then the decoder's and means nothing.
        encoder_sha256: hash of every tensor of encoder, quant_conv and codebook; in decoupled training
            taken before stage 2 and checked after it.
        encoder_rounded_sha256: of encoder and quant_conv as half precision rounds them, by which a model that was cast,
            saved and loaded in whatever precision is known to be the same.
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
        encoder_out_channels: int | None = None,
        attention_levels: list[int] | None = None,
        quantizer: str = "vq",
        num_codes: int = 256,
        codebook_decay: float = 0.99,
        revival_threshold: float = 0.03,
        code_distance: str = "l2",
        codebook_update: str = "ema",
        quantizer_gradient: str = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
        commitment_weight: float = 0.25,
        kl_weight: float = 1e-6,
        reconstruction_loss: str = "l2",
        equivariance_weight: float = 0.0,
        equivariance_transforms: list[str] | None = None,
        decoder_dropout: float = 0.0,
        decoder_dropout_kind: str = "element",
        encoder_frozen: bool = False,
        codebook_frozen: bool = True,
        backbone: dict | None = None,
        encoder_sha256: dict[str, str] | None = None,
        encoder_rounded_sha256: list[str] | None = None,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
        dpssl: dict | None = None,
        **kwargs,
    ):
        self.image_size = image_size
        self.num_channels = num_channels
        self.encoder_block_out_channels = list(encoder_block_out_channels or (32, 64))
        self.decoder_block_out_channels = list(decoder_block_out_channels or self.encoder_block_out_channels)
        if backbone is not None:
            self.encoder_block_out_channels = list(self.decoder_block_out_channels)
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
        self.equivariance_weight = equivariance_weight
        self.equivariance_transforms = list(
            VQ_TRANSFORMS if equivariance_transforms is None else equivariance_transforms
        )
        self.decoder_dropout = decoder_dropout
        self.encoder_frozen = encoder_frozen
        self.encoder_out_channels = encoder_out_channels or latent_channels
        self.code_distance = code_distance
        self.codebook_update = codebook_update
        self.quantizer_gradient = quantizer_gradient
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.kl_weight = kl_weight
        self.decoder_dropout_kind = decoder_dropout_kind
        self.codebook_frozen = codebook_frozen
        self.backbone = backbone
        self.attention_levels = sorted(attention_levels or [])
        self.encoder_sha256 = encoder_sha256
        self.encoder_rounded_sha256 = encoder_rounded_sha256
        self.latent_mean = latent_mean
        self.latent_std = latent_std
        self.dpssl = dpssl or {}
        self._check()
        super().__init__(**kwargs)

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent cell along one side."""
        if self.backbone is not None:
            return self.backbone["reduction"]
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.image_size // self.downsampling_factor

    @classmethod
    def preset(cls, name: str, **overrides) -> VQConfig:
        """A layout by its downsampling factor, "f2" to "f16" (all but f2 published); `overrides` replace its fields.

        `image_size=32` makes a small-image model of the same layout, `quantizer="kl"` one with Gaussian latents.
        """
        if name not in VQ_PRESETS:
            raise ValueError(f"preset must be one of {sorted(VQ_PRESETS)}, got {name!r}.")
        return cls(**(VQ_PRESETS[name] | overrides))

    def _check_backbone(self) -> None:
        lacking = [name for name in ("architecture", "channels", "reduction") if not self.backbone.get(name)]
        if lacking:
            raise ValueError(
                f"backbone lacks {lacking}: give what backbone_encoder.complete_backbone(backbone, image_size) returns."
            )
        if self.quantizer == "kl":
            raise ValueError("a backbone gives features and no variances: its quantizer is 'vq' or 'none', not 'kl'.")
        if self.latent_channels != self.backbone["channels"]:
            raise ValueError(
                f"the latents are the backbone's features as they are: latent_channels={self.latent_channels} must be "
                f"{self.backbone['channels']}."
            )

    def _check_numbers(self) -> None:
        for name in (*_COUNTS, "decoder_layers_per_block", "encoder_out_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("encoder_layers_per_block", "decoder_layers_per_block"):
            if getattr(self, name) > MAX_LAYERS:
                raise ValueError(f"{name} must be at most {MAX_LAYERS}, got {getattr(self, name)}.")
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name) or [0] * self.latent_channels
            if len(values) != self.latent_channels or not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"{name} must hold {self.latent_channels} numbers, one a channel, got {values}.")

    def _check(self) -> None:
        for name, allowed in VQ_CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        self._check_numbers()
        if self.backbone is not None:
            self._check_backbone()
        encoder = self.encoder_block_out_channels
        decoder = self.decoder_block_out_channels
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder need the same number of levels, got widths {encoder} and {decoder}.")
        uneven = [width for width in encoder + decoder if width % self.norm_num_groups]
        if uneven:
            raise ValueError(f"norm_num_groups={self.norm_num_groups} must divide every width, not {uneven}.")
        if self.image_size < self.downsampling_factor or self.image_size % self.downsampling_factor:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of the downsampling factor "
                f"{self.downsampling_factor} (from {len(encoder)} levels)."
            )
        if 2 ** (len(decoder) - 1) != self.downsampling_factor:
            raise ValueError(
                f"the decoder's {len(decoder)} levels give back a factor of {2 ** (len(decoder) - 1)}, but a latent "
                f"cell is {self.downsampling_factor} pixels wide: give widths for as many levels."
            )
        if any(not 0 <= level < len(encoder) for level in self.attention_levels):
            raise ValueError(f"attention_levels lie in [0, {len(encoder) - 1}], got {self.attention_levels}.")
        weights = (self.entropy_weight, self.kl_weight, self.commitment_weight, self.equivariance_weight)
        if min(weights) < 0 or self.entropy_temperature <= 0:
            raise ValueError(
                "entropy_weight, kl_weight, commitment_weight and equivariance_weight must not be negative, "
                "entropy_temperature > 0."
            )
        chosen = self.equivariance_transforms
        if not chosen or not set(chosen) <= set(VQ_TRANSFORMS) or len(set(chosen)) < len(chosen):
            raise ValueError(f"equivariance_transforms are one or more of {VQ_TRANSFORMS}, each once, got {chosen}.")
        if self.equivariance_weight and "scales" in chosen and self.latent_size % 2:
            raise ValueError(
                f"equivariance_transforms 'scales' halves the latents, whose side {self.latent_size} is odd: take "
                "'rotations', or another image_size."
            )
        if not 0 <= self.decoder_dropout < 1:
            raise ValueError(f"decoder_dropout lies in [0, 1), got {self.decoder_dropout}.")
