"""Finished checkpoint folders of every kind, tiny and untrained, with what a run leaves beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from hf_dpssl import (
    VAEGAN,
    ContrastiveConfig,
    MoCoForPreTraining,
    VAEGANConfig,
    VQAutoencoder,
    VQConfig,
    VQDiTPipeline,
    VQDriftPipeline,
    VQTokenPipeline,
)
from hf_dpssl.generation.pipeline_vq_token import make_language_model
from hf_dpssl.hub.card_merge import marked_card
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer
from hf_dpssl.runs.atomic_files import write_json

TOKENS, NAMES = 64, {0: "zero", 1: "one"}
KINDS = ("encoder", "autoencoder", "dit", "drift", "token", "gan")


def encoder_model() -> MoCoForPreTraining:
    """t-MoCo-v2 for pictures of 16 px."""
    torch.manual_seed(0)
    half = [0.5, 0.5, 0.5]
    pretrained_cfg = {
        "input_size": [3, 16, 16], "mean": half, "std": half,
        "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    method = {"normalization": "anchor", "feature_norm": "batch", "temperature": 5.0, "dof": 10.0}
    options = {"projection_dim": 4, "queue_size": 8} | method
    return MoCoForPreTraining(ContrastiveConfig("resnet10t", {"channels": [8, 8, 16, 16]}, pretrained_cfg, **options))


def autoencoder_model(seed: int = 0) -> VQAutoencoder:
    """16 codes, 8 x 8 of them in a picture of 16 px."""
    torch.manual_seed(seed)
    statistics = {"latent_mean": [0.0] * 4, "latent_std": [1.0] * 4}
    config = VQConfig(image_size=16, encoder_block_out_channels=[8, 16], norm_num_groups=4, num_codes=16, **statistics)
    return VQAutoencoder(config).eval()


def dit_pipeline() -> VQDiTPipeline:
    """Two classes, in the latents of `autoencoder_model`."""
    autoencoder = autoencoder_model()
    size = {"num_layers": 1, "width": 16, "num_heads": 2, "patch_size": 2, "latent_channels": 4, "latent_size": 8}
    transformer = make_transformer(**size, num_classes=2).eval()
    for parameter in transformer.parameters():  # as initialised it predicts 0, whatever its weights
        torch.nn.init.normal_(parameter, std=0.1)
    return VQDiTPipeline(transformer, autoencoder, make_scheduler("flow"), NAMES, autoencoder.fingerprint())


def drift_pipeline() -> VQDriftPipeline:
    """The transformer of `dit_pipeline` as a one-step generator."""
    made = dit_pipeline()
    return VQDriftPipeline(made.transformer, made.vae, NAMES, made.vae.fingerprint())


def token_pipeline() -> VQTokenPipeline:
    """Two classes, over the codes of `autoencoder_model`."""
    autoencoder = autoencoder_model()
    size = {"num_layers": 1, "width": 16, "num_heads": 2, "num_codes": 16, "num_classes": 2, "num_tokens": TOKENS}
    return VQTokenPipeline(make_language_model("gpt2", **size), autoencoder, NAMES, autoencoder.fingerprint())


def gan_model() -> VAEGAN:
    """A DAE-VAEGAN of 16 px."""
    torch.manual_seed(0)
    return VAEGAN(VAEGANConfig(image_size=16, width=8, latent_dim=4, latent="dae"))


def finish(folder: Path, kind: str) -> None:
    """Add what a run leaves beside the weights: results, recipe, card and a picture; and what is nobody's business."""
    write_json(folder / "results.json", {"metrics": {"knn_top1": 50.0}, "dataset": "digits", "seed": 0})
    (folder / "recipe.yaml").write_text("dataset: digits\nseed: 0\n")
    text = f"# A tiny {kind}\n\nNot trained."
    (folder / "README.md").write_text(marked_card({"tags": [kind]}, text))
    Image.new("RGB", (4, 4), "red").save(folder / "curves.png")
    private = "checkpoints/step-00000002/state.pt checkpoints/step-00000002/meta.json optimizer.pt train.log .token"
    for name in (*private.split(), "logs/events.json", ".cache/x.json", "__pycache__/x.py", "trainer_state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")


def save_checkpoints(folder: Path, kinds: tuple = KINDS) -> dict[str, Path]:
    """Folders by kind below `folder`."""
    for kind in kinds:
        if kind == "encoder":
            model = encoder_model()
            model.encoder.save_pretrained(folder / kind)
            model.save_pretrained(folder / kind / "pretraining")
        else:
            make = {"autoencoder": autoencoder_model, "dit": dit_pipeline, "drift": drift_pipeline}
            make |= {"token": token_pipeline, "gan": gan_model}
            make[kind]().save_pretrained(folder / kind)
        finish(folder / kind, kind)
    return {kind: folder / kind for kind in kinds}
