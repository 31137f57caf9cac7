"""Alignment with a frozen encoder: the features' places, the loss, and what is recorded under checkpointing."""

import pytest
import torch
from cases import for_each

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.latent_training.diffusion import make_transformer
from hf_dpssl.latent_training.token_alignment import (
    LatentsWithImages,
    SpatialFeatures,
    TokenAlignedTransformer,
    default_block,
    token_alignment_loss,
)

PICTURES = {"input_size": [3, 16, 16], "mean": [0.2, 0.4, 0.6], "std": [0.5, 0.4, 0.3], "interpolation": "bicubic"}
ENCODERS = {  # architecture, model_args, and the side of its features of 16 px
    "convnext": ("convnext_atto", {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}, 2),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 2, "reg_tokens": 1},
        4,
    ),
}


def encoder(name: str) -> ContrastiveEncoder:
    torch.manual_seed(0)
    architecture, model_args, _ = ENCODERS[name]
    return ContrastiveEncoder(ContrastiveConfig(architecture, model_args=model_args, pretrained_cfg=PICTURES))


def small_transformer():
    torch.manual_seed(1)
    transformer = make_transformer(
        num_layers=3, width=16, num_heads=2, patch_size=2, latent_channels=2, latent_size=8, num_classes=3
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_the_encoders_own_of_normalised_images(name):
    model, images = encoder(name), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = SpatialFeatures(model, side=ENCODERS[name][2])(images)
    mean, std = (torch.tensor(PICTURES[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    hidden = model.timm_model.forward_features((images / 255 - mean) / std).detach()
    expected = hidden[:, 2:] if name == "vit" else hidden.flatten(2).transpose(1, 2)  # class and register token
    torch.testing.assert_close(found, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@for_each("side", [2, 4, 8])
def test_places_of_the_features_are_those_of_the_tokens(side):
    features = SpatialFeatures(encoder("vit"), side)
    plain = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    bare = features.encoder.timm_model
    bare.blocks = torch.nn.Identity()  # each place then sees its own patch alone
    marked = plain.clone()
    marked[:, :, :4, 12:] = 255  # top right
    change = (features(marked) - features(plain)).norm(dim=-1).view(side, side)
    assert change.argmax() == side - 1
    assert float(change[side // 2 :].max()) < 0.3 * float(change.max())


def test_loss_is_minus_the_mean_cosine():
    projected, features = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind()
    expected = sum(
        -float(a @ b / (a.norm() * b.norm())) for a, b in zip(projected.view(-1, 5), features.view(-1, 5), strict=True)
    )
    assert float(token_alignment_loss(projected, features.float())) == pytest.approx(expected / 12, rel=1e-5)
    assert float(token_alignment_loss(features, features * 3)) == pytest.approx(-1)
    with pytest.raises(ValueError, match="differ"):
        token_alignment_loss(projected, features[:, :2])


@pytest.mark.parametrize("block", [1, 3])
def test_projected_tokens_are_those_after_the_block_and_checkpointing_changes_no_gradient(block):
    latents, timesteps, labels = torch.randn(2, 2, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([0, 3])
    gradients = []
    for checkpointing in (False, True):
        aligned = TokenAlignedTransformer(small_transformer(), block=block, features=6, width=8).train()
        if checkpointing:
            aligned.transformer.enable_gradient_checkpointing()
        torch.manual_seed(2)
        for parameter in aligned.projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        sample, projected = aligned(latents, timestep=timesteps, class_labels=labels)
        hidden = aligned.transformer.pos_embed(latents)
        for layer in aligned.transformer.transformer_blocks[:block]:
            hidden = layer(hidden, timestep=timesteps, class_labels=labels)
        torch.testing.assert_close(projected, aligned.projector(hidden))
        plain = aligned.transformer(latents, timestep=timesteps, class_labels=labels).sample
        torch.testing.assert_close(sample, plain)
        (sample.square().mean() + token_alignment_loss(projected, torch.ones_like(projected))).backward()
        gradients.append({name: parameter.grad for name, parameter in aligned.named_parameters()})
    learned = {name for name, gradient in gradients[0].items() if gradient is not None}
    assert learned == {name for name, gradient in gradients[1].items() if gradient is not None}
    for name in learned:
        torch.testing.assert_close(gradients[1][name], gradients[0][name])
    projector = [gradients[0][f"projector.{layer}.{part}"] for layer in (0, 2, 4) for part in ("weight", "bias")]
    assert all(float(gradient.abs().sum()) > 0 for gradient in projector)


def test_papers_blocks_are_the_defaults_and_others_are_refused():
    assert [default_block(depth) for depth in (2, 4, 12, 24, 28)] == [1, 1, 4, 8, 8]
    with pytest.raises(ValueError, match=r"block lies in \[1, 3\], got 4"):
        TokenAlignedTransformer(small_transformer(), block=4, features=6)


class Table(torch.utils.data.Dataset):
    """Rows whose values are their number."""

    def __init__(self, size: int, mirrored: bool = False):
        self.size, self.mirrored = size, mirrored

    def __len__(self):
        return self.size

    def __getitems__(self, items):
        rows = torch.tensor([row for _, row in items])
        ramp = torch.arange(3).view(1, 1, 1, 3) + rows.view(-1, 1, 1, 1)
        return {"images": ramp, "sample_ids": rows} | ({"mirrored": rows % 2 == 1} if self.mirrored else {})


def test_images_come_beside_their_latents_mirrored_where_these_are():
    batch = LatentsWithImages(Table(5, mirrored=True), Table(5)).__getitems__([(0, 3), (0, 2)])
    assert batch["images"].flatten(1).tolist() == [[5, 4, 3], [2, 3, 4]] and batch["sample_ids"].tolist() == [3, 2]
    with pytest.raises(ValueError, match="5 latents cannot be matched with 4 images"):
        LatentsWithImages(Table(5), Table(4))
