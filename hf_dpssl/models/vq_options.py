"""What a VQ autoencoder may be made of: the allowed values and the published layouts.

No library is imported here: command lines read their choices without waiting for one.
"""

CHOICES = {
    "quantizer": ("vq", "kl", "none"),
    "reconstruction_loss": ("l2", "l1"),
    "code_distance": ("l2", "cosine"),
    "codebook_update": ("ema", "gradient"),
    "quantizer_gradient": ("straight_through", "rotation"),
    "decoder_dropout_kind": ("element", "channel", "depth", "noise", "mask"),
}
# f: pixels per latent cell and side. f16 is the first stage of taming's configs/faceshq_vqgan.yaml (Esser et al. 2021),
# f4 and f8 are vq-f4 and vq-f8 of latent diffusion (Rombach et al. 2022); f2, for small images, is ours.
_PUBLISHED = {
    "norm_num_groups": 32,
    "encoder_layers_per_block": 2,
    "mid_block_attention": True,
    "attention_levels": [],
    "reconstruction_loss": "l1",
}
PRESETS = {
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
