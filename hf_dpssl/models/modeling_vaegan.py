"""VAEGAN and DCGAN: one generator, with an encoder or without, and the density that its latents are drawn from.

Source: Radford et al. 2016 (DCGAN), Larsen et al. 2016 (VAEGAN). Group norm stands for DCGAN's batch norm: an image
then does not depend on its batch, and averaged weights need no statistics of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .call_arguments import Generators, check_pixel_values, read_generator
from .choices import GAN_DENSITIES, GAN_LATENTS
from .complete_weights import draw_after_meta_, load_complete
from .latent_density import LatentDensity


class VAEGANConfig(PretrainedConfig):
    """Architecture of a `VAEGAN` and where its latents come from.

    Args:
        image_size: height and width in pixels, a power of two of at least 8.
        num_channels: image channels.
        width: channels of the layer before the image; doubled at each halving of the sides, at most 8 times.
        latent_dim: of the latents.
        latent: "noise" (DCGAN), "simclr" (DCGAN on features of a frozen encoder), "vae" (VAEGAN) or "dae" (DAE-VAEGAN).
        features: of "simclr": "features" (of the backbone) or "embeddings" (of the projector), which are standardised.
        dropout: of whole channels in the generator's hidden layers; weakens a stage-1 generator.
        density, components, bank_size: of `LatentDensity`, what `generate` samples.
        dpssl: recipe and metrics of the run that made the checkpoint.
    """

    model_type = "dpssl_vaegan"

    def __init__(
        self,
        image_size: int = 32,
        num_channels: int = 3,
        width: int = 32,
        latent_dim: int = 128,
        latent: str = "noise",
        features: str | None = None,
        dropout: float = 0.0,
        density: str = "prior",
        components: int = 1,
        bank_size: int = 0,
        dpssl: dict | None = None,
        **kwargs,
    ):
        for name, value, allowed in (("latent", latent, GAN_LATENTS), ("density", density, GAN_DENSITIES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"image_size must be a power of two of at least 8, got {image_size}.")
        if min(num_channels, latent_dim) < 1 or width < 8 or width % 8 or not 0 <= dropout < 1:
            raise ValueError(
                f"num_channels and latent_dim must be positive, width a multiple of 8, dropout in [0, 1); got "
                f"{num_channels}, {latent_dim}, {width}, {dropout}."
            )
        self.image_size = image_size
        self.num_channels = num_channels
        self.width = width
        self.latent_dim = latent_dim
        self.latent = latent
        self.features = features
        self.dropout = dropout
        self.density = density
        self.components = components
        self.bank_size = bank_size
        self.dpssl = dpssl or {}
        super().__init__(**kwargs)

    @property
    def has_encoder(self) -> bool:
        """Whether the model encodes images itself."""
        return self.latent in ("vae", "dae")


@dataclass
class VAEGANOutput(ModelOutput):
    """Images (B, C, H, W) in [-1, 1]: reconstructions, and `generated` of latents; mean, log_variance (B, latent_dim).

    kl: nats per image against the standard normal, mean over images. recon: mean absolute error of the pixel values.
    """

    pixel_values: Tensor | None = None
    generated: Tensor | None = None
    mean: Tensor | None = None
    log_variance: Tensor | None = None
    kl: Tensor | None = None
    recon: Tensor | None = None


def _normal_(module: nn.Module) -> nn.Module:
    nn.init.normal_(module.weight, 0.0, 0.02)  # DCGAN's
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class Generator(nn.Sequential):
    """Latents (B, latent_dim) -> images (B, num_channels, S, S) in [-1, 1]."""

    def __init__(self, config: VAEGANConfig):
        levels = int(math.log2(config.image_size)) - 2
        widths = [config.width * min(8, 2**level) for level in reversed(range(levels))]
        layers: list[nn.Module] = [
            nn.Unflatten(1, (config.latent_dim, 1, 1)),
            _normal_(nn.ConvTranspose2d(config.latent_dim, widths[0], 4, bias=False)),
        ]
        for level, width in enumerate(widths):
            layers += [nn.GroupNorm(8, width), nn.ReLU()]
            layers += [nn.Dropout2d(config.dropout)] if config.dropout else []
            last = level == levels - 1
            following = config.num_channels if last else widths[level + 1]
            layers.append(_normal_(nn.ConvTranspose2d(width, following, 4, 2, 1, bias=last)))
        super().__init__(*layers, nn.Tanh())


class ImageEncoder(nn.Sequential):
    """Images (B, num_channels, S, S) -> mean and log variance, side by side (B, 2 latent_dim)."""

    def __init__(self, config: VAEGANConfig):
        levels = int(math.log2(config.image_size)) - 2
        layers: list[nn.Module] = []
        channels = config.num_channels
        for level in range(levels):
            width = config.width * min(8, 2**level)
            layers.append(_normal_(nn.Conv2d(channels, width, 4, 2, 1, bias=level == 0)))
            layers += [nn.GroupNorm(8, width)] if level else []
            layers.append(nn.LeakyReLU(0.2))
            channels = width
        super().__init__(*layers, _normal_(nn.Conv2d(channels, 2 * config.latent_dim, 4)), nn.Flatten())


class VAEGAN(PreTrainedModel):
    """Generator, density of its latents and, for the latents "vae" and "dae", an encoder; images in [-1, 1].

    Attentions and hidden states are not given out, and checkpoints that lack weights are refused.
    """

    config_class = VAEGANConfig
    base_model_prefix = "vaegan"
    main_input_name = "pixel_values"
    _no_split_modules = ["LatentDensity"]

    def __init__(self, config: VAEGANConfig):
        super().__init__(config)
        self.encoder = ImageEncoder(config) if config.has_encoder else None  # drawn first: the same with any generator
        self.generator = Generator(config)
        if config.latent == "simclr":  # by which the encoder's features were standardised
            self.register_buffer("feature_mean", torch.zeros(config.latent_dim))
            self.register_buffer("feature_std", torch.ones(config.latent_dim))
        options = {"components": config.components, "bank_size": config.bank_size}
        self.density = LatentDensity(config.density, config.latent_dim, **options)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the constructor has drawn the weights."""

    def get_input_embeddings(self) -> None:
        """None: images have no embeddings. By this quantisers and adapters know that there is nothing to leave out."""

    def init_weights(self) -> None:
        """As `PreTrainedModel.init_weights`; a model built on the meta device gets what the constructor draws."""
        draw_after_meta_(self)
        super().init_weights()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> VAEGAN:
        """As `PreTrainedModel.from_pretrained`; ValueError when the checkpoint lacks weights of the model."""
        return load_complete(super().from_pretrained, *args, **kwargs)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, latent_dim) of images (B, C, S, S) in [-1, 1].

        Raises:
            ValueError: another shape, values that are not finite or outside [-1, 1], or a model without encoder.
        """
        check_pixel_values(pixel_values)
        return self._moments(pixel_values)

    def _moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if self.encoder is None:
            raise ValueError(f"a {config.latent!r} model has no encoder: its latents are drawn, or another model's.")
        expected = (config.num_channels, config.image_size, config.image_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(f"images must be (B, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}.")
        mean, log_variance = self.encoder(pixel_values.to(self.dtype)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def standardize(self, features: Tensor) -> Tensor:
        """Latents (B, latent_dim) of the encoder's features (B, latent_dim); ValueError for another kind of model."""
        if self.config.latent != "simclr":
            raise ValueError(f"a {self.config.latent!r} model does not take another encoder's features.")
        return (features - self.feature_mean) / self.feature_std

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, S, S) in [-1, 1] of latents (B, latent_dim)."""
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_dim:
            raise ValueError(f"latents must be (B, {self.config.latent_dim}), got {tuple(latents.shape)}.")
        return self.generator(latents.to(self.dtype))

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, noise: Tensor | None = None, latents: Tensor | None = None
    ) -> VAEGANOutput:
        """Encode and decode images, decode latents, or both, in one call as wrapped models need it.

        Args:
            pixel_values: (B, C, S, S) in [-1, 1], of a model with an encoder; None: latents only.
            noise: (B, latent_dim) by which the images' latents are drawn; None: their mean.
            latents: (B', latent_dim), decoded to `generated`.

        return_dict=False gives a tuple of what is not None.
        """
        generated = None if latents is None else self.decode(latents)
        if pixel_values is None:
            return VAEGANOutput(generated=generated)
        mean, log_variance = self._moments(pixel_values)
        images = self.decode(mean if noise is None else mean + (log_variance / 2).exp() * noise)
        mu = mean.float()
        log_v = log_variance.float()
        kl = 0.5 * (mu.pow(2) + log_v.exp() - 1 - log_v).sum(1).mean()
        return VAEGANOutput(images, generated, mean, log_variance, kl, F.l1_loss(images.float(), pixel_values.float()))

    @torch.no_grad()
    def generate(
        self,
        num_images: int | None = None,
        generator: Generators = None,
        *,
        latents: Tensor | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Images (N, C, S, S) in [-1, 1] of latents drawn from the model's density, or of given ones.

        The same generator gives the same images whatever `batch_size`: all latents are drawn first.

        Args:
            num_images: at least 1; with `latents` their number, or None.
            generator: of the latents, on the CPU, or a seed; a list of one per image; None: torch's global one.
            latents: (N, latent_dim), in place of drawn ones.
            batch_size: images decoded at once.

        Raises:
            ValueError: neither or two different numbers of images, another one of generators, or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if latents is None:
            if num_images is None:
                raise ValueError("generate needs num_images, or latents.")
            generator = read_generator(generator, num_images)
            if isinstance(generator, list):
                latents = torch.cat([self.density.sample(1, one) for one in generator])
            else:
                latents = self.density.sample(num_images, generator)
        elif num_images not in (None, len(latents)):
            raise ValueError(f"num_images is {num_images}, but there are {len(latents)} latents: leave one out.")
        latents = latents.to(self.device, self.dtype)
        return torch.cat([self.decode(part) for part in latents.split(batch_size)])


if __name__.startswith("hf_dpssl."):  # not in the copy beside published weights
    from .registration import register

    register(VAEGANConfig, VAEGAN)
