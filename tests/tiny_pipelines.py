"""Image pipelines of three classes for pictures of 16 px, tiny and untrained, that are far from uniform."""

from __future__ import annotations

import torch

from hf_dpssl import VQAutoencoder, VQConfig, VQDiTPipeline, VQDriftPipeline, VQTokenPipeline
from hf_dpssl.generation.pipeline_vq_token import make_language_model
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer

NAMES = ["cat", "dog", "horse"]
CODES, TOKENS = 16, 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_dit(names=NAMES, seed: int = 0, objective: str = "flow", learned_variance: bool = False) -> VQDiTPipeline:
    torch.manual_seed(seed)
    config = VQConfig(
        image_size=16, encoder_block_out_channels=[8, 8], norm_num_groups=4, num_codes=16, mid_block_attention=False
    )
    vae = VQAutoencoder(config).eval()
    vae.config.latent_mean, vae.config.latent_std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]
    transformer = make_transformer(
        num_layers=2, width=32, num_heads=2, patch_size=2, latent_channels=4, latent_size=8, num_classes=len(names),
        learned_variance=learned_variance,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    for block in transformer.transformer_blocks:
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.2)
    scheduler = make_scheduler(objective, learned_variance)
    pipeline = VQDiTPipeline(transformer, vae, scheduler, dict(enumerate(names)), vae.fingerprint())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_dit(pipeline, labels, **options):
    options = {"num_inference_steps": 4, "output_type": "pt", "generator": generator()} | options
    return pipeline(labels, **options).images


def make_vae(seed: int = 0, **options) -> VQAutoencoder:
    torch.manual_seed(seed)
    small = dict(image_size=16, encoder_block_out_channels=[8, 8, 8], norm_num_groups=4, mid_block_attention=False)
    return VQAutoencoder(VQConfig(**(small | {"num_codes": CODES} | options))).eval()


def make_token_model(names=NAMES, architecture="gpt2", **options):
    torch.manual_seed(3)
    sizes = dict(num_layers=2, width=32, num_heads=2, num_codes=CODES, num_classes=len(names), num_tokens=TOKENS)
    model = make_language_model(architecture, **(sizes | options)).eval()
    for parameter in model.parameters():  # far from uniform, else wrong scores would give the right codes
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_drift() -> VQDriftPipeline:
    """The transformer of `make_dit` as a one-step generator."""
    made = make_dit()
    return VQDriftPipeline(made.transformer, made.vae, dict(enumerate(NAMES)), made.vae.fingerprint())


def make_tokens(names=NAMES, **options) -> VQTokenPipeline:
    vae = make_vae()
    return VQTokenPipeline(make_token_model(names, **options), vae, dict(enumerate(names)), vae.fingerprint())


def make_exportable(quantizer: str = "vq", objective: str = "epsilon", scheduler=None, **config) -> VQDiTPipeline:
    """Three classes, scalar latent scale, per-channel shift."""
    torch.manual_seed(1)
    settings = dict(
        image_size=16, encoder_block_out_channels=[8, 16], norm_num_groups=4, num_codes=16, quantizer=quantizer,
        attention_levels=[1], latent_mean=[0.3, -0.2, 0.1, 0.5], latent_std=[1.7] * 4,
    )  # fmt: skip
    vae = VQAutoencoder(VQConfig(**settings | config)).eval()
    if vae.quantizer is not None:
        torch.nn.init.normal_(vae.quantizer.codebook, std=2.0)
    size = dict(num_layers=2, width=32, num_heads=2, patch_size=2, latent_channels=4, latent_size=8)
    transformer = make_transformer(**size, num_classes=3)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    scheduler = scheduler or make_scheduler(objective)
    pipeline = VQDiTPipeline(transformer.eval(), vae, scheduler, dict(enumerate(NAMES)), vae.fingerprint())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
