"""Starting a contrastive run from an earlier one: its encoder, or encoder and head, and what is then held fixed.

The stages of t-SimCNE (Böhm, Berens & Kobak, ICLR 2023) are made of these: a head of which only the
last layer is new, and training of that layer alone.
"""

from __future__ import annotations

import os

from torch import nn

from ..models.modeling_contrastive import ContrastiveEncoder
from .modeling_pretraining import MoCoForPreTraining, SimCLRForPreTraining


def start_from_encoder_(
    model: SimCLRForPreTraining | MoCoForPreTraining, encoder: ContrastiveEncoder, flag: str = "--init_encoder"
) -> None:
    """Copy the weights of a trained encoder into the backbone, and of MoCo into both; ValueError when they differ."""
    if encoder.config.stem != model.config.stem:  # two of the small-image stems have weights of equal shape
        raise ValueError(f"{flag} has the stem {encoder.config.stem!r}, the run asks for {model.config.stem!r}.")
    if encoder.config.vae_fingerprint != model.config.vae_fingerprint:
        held, wanted = (
            f"latents of the autoencoder {print_[:12]}" if print_ else "pictures"
            for print_ in (encoder.config.vae_fingerprint, model.config.vae_fingerprint)
        )
        raise ValueError(
            f"{flag} holds an encoder of {held}, the run trains one of {wanted}: give the same --autoencoder."
        )
    held, wanted = encoder.config.latent_statistics, model.config.latent_statistics
    if held and wanted and held != wanted:
        raise ValueError(
            f"{flag} holds an encoder of latents that were normalised by another latent_mean and latent_std than those "
            "of the run's autoencoder: give the same --autoencoder."
        )
    for backbone in [model.encoder, *([model.key_encoder] if isinstance(model, MoCoForPreTraining) else [])]:
        try:
            backbone.load_state_dict(encoder.state_dict())
        except RuntimeError as error:
            given = encoder.config
            wanted = model.config
            raise ValueError(
                f"{flag} holds {given.architecture} {given.model_args}, the run asks for {wanted.architecture} "
                f"{wanted.model_args}: pass its --architecture and --model_args."
            ) from error


def start_from_pretraining_(model: SimCLRForPreTraining | MoCoForPreTraining, folder: str | os.PathLike) -> None:
    """Copy encoder and head of an earlier run (of MoCo into both branches), the last layer where its width is the same.

    Otherwise the last layer is drawn anew, its weights from N(0, 1): a new 2-D map is spread out from its
    first step, as in t-SimCNE.

    Args:
        model: of the new run.
        folder: encoder folder or Hub id with a subfolder `pretraining`.

    Raises:
        ValueError: backbone or head differ in more than the last layer.
    """
    given = SimCLRForPreTraining.from_pretrained(folder, subfolder="pretraining")
    start_from_encoder_(model, given.encoder, "--init_pretraining")
    ours, last = last_layer(model)
    theirs, _ = last_layer(given)
    fits = given.config.projection_dim == model.config.projection_dim
    pairs = list(zip(model.head, given.head, strict=False))[: None if fits else ours]
    try:
        if ours != theirs or any(type(own) is not type(other) for own, other in pairs):
            raise RuntimeError("other layers")
        for own, other in pairs:
            own.load_state_dict(other.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"the head in {folder} differs from the run's in more than its last layer: pass its "
            "--projection_hidden_dim, --projection_layers and --projection_batch_norm."
        ) from error
    if not fits:
        nn.init.normal_(last.weight)
    if isinstance(model, MoCoForPreTraining):
        model.key_head.load_state_dict(model.head.state_dict())


def last_layer(model: SimCLRForPreTraining | MoCoForPreTraining) -> tuple[int, nn.Linear]:
    """Place in the head, and module, of its last linear layer."""
    return [(place, layer) for place, layer in enumerate(model.head) if isinstance(layer, nn.Linear)][-1]


def freeze_all_but_last_layer_(model: SimCLRForPreTraining | MoCoForPreTraining) -> None:
    """Only the head's last linear layer learns; all before it, of MoCo in both branches, is put into eval mode.

    So no statistics move and nothing is dropped; `model.train()` would undo it.
    """
    place, last = last_layer(model)
    model.requires_grad_(False)
    last.requires_grad_(True)
    branches = [(model.encoder, model.head)]
    if isinstance(model, MoCoForPreTraining):
        branches.append((model.key_encoder, model.key_head))
    for encoder, head in branches:
        for module in [encoder, *list(head)[:place]]:
            module.eval()
