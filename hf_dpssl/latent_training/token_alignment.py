"""Alignment of a transformer's tokens with the features of a frozen contrastive encoder, which speeds up its training.

    aligned = TokenAlignedTransformer(transformer, block=4, features=encoder_features.dimension)
    sample, projected = aligned(noised, timestep=timesteps, class_labels=labels)
    loss = loss + 0.5 * token_alignment_loss(projected, encoder_features(images))

Source: Yu et al. 2024 (REPA), equation 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ..data.image_table import ImageTable
from ..models.modeling_contrastive import ContrastiveEncoder, check_sees_pictures, input_settings


class TokenAlignedTransformer(nn.Module):
    """A transformer, and a projector of the tokens after one of its blocks: three linear layers with SiLU.

    Args:
        transformer: stays as it is; only it is kept after training.
        block: after which tokens are taken, from 1.
        features: dimension D of the encoder's features.
        width: of the projector; 2048 in the paper.

    Raises:
        ValueError: a block that the transformer has not.
    """

    def __init__(self, transformer: DiTTransformer2DModel, *, block: int, features: int, width: int = 2048):
        super().__init__()
        if not 1 <= block <= len(transformer.transformer_blocks):
            raise ValueError(f"block lies in [1, {len(transformer.transformer_blocks)}], got {block}.")
        self.transformer = transformer
        self.projector = nn.Sequential(
            nn.Linear(transformer.inner_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, features),
        )
        self._tokens: Tensor | None = None
        self._recording = False  # a checkpointed block runs again in the backward pass
        transformer.transformer_blocks[block - 1].register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._recording:
            self._tokens = output

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction (B, C, h, w) and projected tokens (B, T, D) of latents (B, C, h, w)."""
        self._recording = True
        sample = self.transformer(latents, timestep=timestep, class_labels=class_labels).sample
        self._recording = False
        tokens = self._tokens
        self._tokens = None
        return sample, self.projector(tokens)


def default_block(num_layers: int) -> int:
    """A third of the depth, at most 8: 4 of 12 blocks, and 8 of 24 or 28, as in the paper."""
    return max(1, min(8, num_layers // 3))


class SpatialFeatures:
    """A frozen encoder as a function of images; its features of each place, on the transformer's grid of tokens.

    Args:
        encoder: is moved to `device`, set to eval mode and frozen.
        side: tokens per side of the transformer.
        device: where it runs.

    Attributes:
        dimension: D.

    Raises:
        ValueError: an encoder of latents.
    """

    def __init__(self, encoder: ContrastiveEncoder, side: int, device: torch.device | str = "cpu"):
        check_sees_pictures(encoder.config, "the encoder that tokens are aligned with")
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.side = side
        settings = input_settings(encoder)
        self.size = tuple(settings["input_size"][1:])
        self.mean = torch.tensor(settings["mean"], device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(settings["std"], device=device).view(1, -1, 1, 1)
        self.prefix_tokens = getattr(encoder.timm_model, "num_prefix_tokens", 0)
        self.dimension = self(torch.zeros(1, 3, *self.size, dtype=torch.uint8, device=device)).shape[-1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """float32 (B, side^2, D), row by row, of uint8 images (B, 3, H, W)."""
        pixels = images.float() / 255
        if tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        hidden = self.encoder((pixels - self.mean) / self.std).last_hidden_state.float()
        if hidden.ndim == 3:  # tokens (B, prefix + T, D)
            hidden = hidden[:, self.prefix_tokens :]
            side = int(hidden.shape[1] ** 0.5)
            hidden = hidden.transpose(1, 2).unflatten(2, (side, side))
        elif hidden.shape[1] != self.encoder.num_features:  # (B, H, W, D)
            hidden = hidden.permute(0, 3, 1, 2)
        if hidden.shape[2] != self.side:
            hidden = F.interpolate(hidden, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False)
        return hidden.flatten(2).transpose(1, 2)


def token_alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine similarity of (B, T, D) and (B, T, D): in [-1, 1], -1 when all point the same way.

    Raises:
        ValueError: of shapes that differ.
    """
    if projected.shape != features.shape:
        raise ValueError(f"projected tokens {tuple(projected.shape)} and features {tuple(features.shape)} differ.")
    return -F.cosine_similarity(projected.float(), features, dim=-1).mean()


class LatentsWithImages(torch.utils.data.Dataset):
    """Cached latents with their images uint8 (B, 3, S, S) under "images", mirrored where the latents are.

    Args:
        latents: table of `latent_cache`. images: table of the same training images.

    Raises:
        ValueError: tables of other lengths, as when unreadable images were left out of one.
    """

    def __init__(self, latents: torch.utils.data.Dataset, images: ImageTable):
        if len(latents) != len(images):
            raise ValueError(
                f"{len(latents)} latents cannot be matched with {len(images)} images: repair or remove those that "
                "cannot be read, or leave out the alignment."
            )
        self.latents = latents
        self.images = images

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, items: list[tuple[int, int]]) -> dict:
        batch = self.latents.__getitems__(items)
        images = self.images.__getitems__(items)["images"]
        if "mirrored" in batch:
            images = torch.where(batch["mirrored"].view(-1, 1, 1, 1), images.flip(-1), images)
        return batch | {"images": images}
