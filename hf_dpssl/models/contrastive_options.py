"""What a contrastive method may be made of: the allowed values, and their checks, for configs, kernels and flags.

No library is imported here: command lines read their choices without waiting for one.
"""

import math

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
