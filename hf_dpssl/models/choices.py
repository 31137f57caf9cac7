"""What the models may be made of, by kind: the allowed values, and their checks, for configs, kernels and flags.

No library is imported here: command lines read their choices without waiting for one.
"""

import math

# Contrastive methods and their backbones.
KERNELS = ("cosine", "student_t")
FIELD_KERNELS = ("exponential", "gaussian", "student_t")  # of one-step generation, and their scales in mean distances
FIELD_SCALES = {
    "exponential": (0.02, 0.05, 0.2),
    "gaussian": (0.03, 0.08, 0.3),  # as steep where distances are about 0.8
    "student_t": (0.002, 0.01, 0.05),
}
NORMALIZATIONS = ("joint", "anchor")  # one denominator for all pairs, or one per anchor
FEATURE_NORMS = ("l2", "batch", "none")
MOMENTUM_SCHEDULES = ("constant", "cosine")  # of the key encoder
BATCH_NORMS = ("local", "global", "split")
# First convolutions of published ResNets for images of about 32 px: 3x3, stride 1, no max-pooling.
SMALL_IMAGE_STEMS = {
    "small_image": {"padding": 1, "activation": True},  # t-SimCLR's code, and most others
    "small_image_padded": {"padding": 2, "activation": True},  # solo-learn on CIFAR: 34 x 34 from 32 x 32
    "small_image_linear": {"padding": 1, "activation": False},  # lightly's ResNetGenerator inside an nn.Sequential
}
STEMS = ("timm", *SMALL_IMAGE_STEMS)
DOF_RANGE = (0.1, 1000.0)  # learned dof stay inside; at 1000 the kernel is all but Gaussian

# The VQ autoencoder, and its published layouts.
VQ_CHOICES = {
    "quantizer": ("vq", "kl", "none"),
    "reconstruction_loss": ("l2", "l1"),
    "code_distance": ("l2", "cosine"),
    "codebook_update": ("ema", "gradient"),
    "quantizer_gradient": ("straight_through", "rotation"),
    "decoder_dropout_kind": ("element", "channel", "depth", "noise", "mask"),
}
VQ_TRANSFORMS = ("rotations", "scales")  # that a decoder is to commute with, with equivariance_weight
# f: pixels per latent cell and side. f16 is the first stage of taming's configs/faceshq_vqgan.yaml (Esser et al. 2021),
# f4 and f8 are vq-f4 and vq-f8 of latent diffusion (Rombach et al. 2022); f2, for small images, is ours.
_PUBLISHED = {
    "norm_num_groups": 32,
    "encoder_layers_per_block": 2,
    "mid_block_attention": True,
    "attention_levels": [],
    "reconstruction_loss": "l1",
}
VQ_PRESETS = {
    "f2": _PUBLISHED
    | {"encoder_block_out_channels": [64, 128], "latent_channels": 4, "num_codes": 1024, "image_size": 32},
    "f4": _PUBLISHED
    | {"encoder_block_out_channels": [128, 256, 512], "latent_channels": 3, "num_codes": 8192, "image_size": 256},
    "f8": _PUBLISHED
    | {
        "encoder_block_out_channels": [128, 256, 256, 512],
        "latent_channels": 4,
        "num_codes": 16384,
        "image_size": 256,
        "attention_levels": [3],
    },
    "f16": _PUBLISHED
    | {
        "encoder_block_out_channels": [128, 128, 256, 256, 512],
        "latent_channels": 256,
        "num_codes": 1024,
        "image_size": 256,
        "attention_levels": [4],
    },
}

# GANs.
GAN_LATENTS = ("noise", "simclr", "vae", "dae")
GAN_DENSITIES = ("prior", "diagonal", "full", "mixture", "held_out")  # that latents of samples are drawn from
DISCRIMINATOR_NORMS = ("group", "batch", "none")  # after the discriminator's inner convolutions


def check_share(share: float) -> None:
    """Raise ValueError unless a perplexity is a share in (0, 1)."""
    if not 0 < share < 1:
        raise ValueError(f"perplexity is a share of the candidates, in (0, 1), got {share}.")


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError unless it is "auto" or a positive finite number."""
    if temperature != "auto" and (isinstance(temperature, str) or not 0 < temperature < math.inf):
        raise ValueError(f'temperature must be positive and finite, or "auto", got {temperature!r}.')


def check_learnable_dof(dof: float) -> None:
    """Raise ValueError unless dof lies inside `DOF_RANGE`."""
    low, high = DOF_RANGE
    if not low < dof < high:
        raise ValueError(f"learned dof start inside {DOF_RANGE}, got {dof}.")


def check_batch_norm(batch_norm: str, num_splits: int) -> None:
    """ValueError unless batch_norm.set_batch_norm_ takes these."""
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {BATCH_NORMS}, got {batch_norm!r}.")
    if batch_norm == "split" and num_splits < 2:
        raise ValueError(f"batch_norm='split' needs batch_norm_splits of at least 2, got {num_splits}.")
    if batch_norm != "split" and num_splits != 1:
        raise ValueError(f"batch_norm_splits={num_splits} is read with batch_norm='split' only, not {batch_norm!r}.")
