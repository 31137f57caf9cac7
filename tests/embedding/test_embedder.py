"""Any image encoder as a function of pictures: equal to calling it by hand, and refused where that has no meaning."""

import numpy as np
import pytest
import torch
from cases import for_each
from pictures import noise
from PIL import Image
from tiny_encoders import INPUT, grey_encoder, save_ours
from transformers import (
    AutoImageProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from hf_dpssl import MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.embedding.embedder import ImageEmbedder

PICTURES = [Image.fromarray(noise(seed, *shape)) for seed, shape in enumerate([(16, 16), (20, 30), (48, 24)])]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_IMAGES = {"image_size": 16, "patch_size": 8}


def by_hand(size: int, mean, std) -> torch.Tensor:
    """Shorter side to `size`, centre crop, normalised: one picture after the other."""
    rows = []
    for picture in PICTURES:
        scale = size / min(picture.size)
        wide, high = (max(size, round(side * scale)) for side in picture.size)
        left, top = (wide - size) // 2, (high - size) // 2
        resized = picture.resize((wide, high), Image.Resampling.BICUBIC) if picture.size != (size, size) else picture
        square = resized.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
        rows.append((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    return torch.stack(rows)


@for_each("model_class", [SimCLRForPreTraining, MoCoForPreTraining])
@for_each("stem", ["timm", "small_image"])
def test_our_encoder_and_head_equal_the_model_called_by_hand(model_class, stem, tmp_path):
    plain = {"architecture": "resnet18", "model_args": None} if stem == "small_image" else {}
    model = save_ours(tmp_path, model_class, stem=stem, **plain)
    with torch.no_grad():
        expected = model(by_hand(16, INPUT["mean"], INPUT["std"]))
    for kind in ("features", "embeddings"):
        embedder = ImageEmbedder(tmp_path, kind=kind, device="cpu")
        found = embedder.embed_pictures(PICTURES)
        assert found.shape == (3, embedder.dimension) and found.dtype == torch.float32
        torch.testing.assert_close(found, expected[kind], rtol=0, atol=2e-6)


def test_fingerprint_follows_weights_and_input_but_not_the_place(tmp_path):
    prints = []
    for name, changes in (("a", {}), ("b", {}), ("c", {"pretrained_cfg": INPUT | {"mean": [0.5, 0.5, 0.5]}})):
        save_ours(tmp_path / name, **changes)
        prints.append(ImageEmbedder(tmp_path / name, device="cpu").fingerprint)
    model = save_ours(tmp_path / "d")
    with torch.no_grad():
        model.encoder.timm_model.conv1[0].weight[0, 0, 0, 0] += 1e-3
    model.encoder.save_pretrained(tmp_path / "d")
    prints.append(ImageEmbedder(tmp_path / "d", device="cpu").fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3


@for_each("name", ["vit classifier", "tokens", "resnet", "clip"])
def test_stock_encoder_equals_the_model_called_by_hand(name, tmp_path):
    torch.manual_seed(0)
    if name == "vit classifier":
        model = ViTForImageClassification(ViTConfig(**SMALL, **SMALL_IMAGES))
    elif name == "tokens":
        model = ViTMSNModel(ViTMSNConfig(**SMALL, **SMALL_IMAGES))
    elif name == "resnet":
        model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    else:
        vision = SMALL | SMALL_IMAGES | {"projection_dim": 4}
        text = SMALL | {"vocab_size": 20, "max_position_embeddings": 8, "projection_dim": 4}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    model.eval().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path)(PICTURES, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if name == "vit classifier":  # the checkpoint has no pooler: the first token, as the classifier takes it
            expected = model.vit(pixel_values).last_hidden_state[:, 0]
        elif name == "tokens":  # it has no pooler
            expected = model(pixel_values).last_hidden_state.mean(1)
        elif name == "resnet":
            expected = model(pixel_values).last_hidden_state.mean((2, 3))
        else:
            output = model.get_image_features(pixel_values=pixel_values)
            expected = getattr(output, "pooler_output", output)
    found = ImageEmbedder(tmp_path, device="cpu").embed_pictures(PICTURES)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_want_of_memory_is_not_called_an_encoder_that_does_not_fit(tmp_path, monkeypatch):
    def call(embedder, pixel_values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    save_ours(tmp_path)
    monkeypatch.setattr(ImageEmbedder, "__call__", call)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        ImageEmbedder(tmp_path, device="cpu")


@for_each("name", ["resnet18", "resnet18.a1_in1k", "timm:resnet18"])
def test_a_name_of_timm_is_told_from_a_hub_id(name, monkeypatch):
    """The id is that which timm itself would load."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as refused:
        ImageEmbedder(name)
    plain = name.removeprefix("timm:")
    assert f"weights are 'timm/resnet18.a1_in1k' of the Hub; random ones are 'untrained:{plain}'" in str(refused.value)
    assert ImageEmbedder(f"untrained:{plain}").dimension == 512


def test_what_cannot_embed_pictures_is_refused_with_the_reason(tmp_path):
    ViTMAEModel(ViTMAEConfig(**SMALL, **SMALL_IMAGES)).save_pretrained(tmp_path / "masked")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "masked")
    BertModel(BertConfig(**SMALL, vocab_size=20)).save_pretrained(tmp_path / "text")
    ViTImageProcessor().save_pretrained(tmp_path / "text")
    save_ours(tmp_path / "ours")
    grey_encoder(tmp_path / "grey")
    for path in (tmp_path / "ours" / "pretraining").iterdir():
        path.unlink()
    for encoder, kind, message in [
        ("masked", "features", "other numbers for the same picture each time"),
        ("text", "features", "takes input_ids, not images"),
        ("ours", "embeddings", "no folder pretraining/ with a head: use --features features"),
        ("ours", "logits", "must be one of"),
        ("grey", "features", r"pixel_values \(8, 3, 16, 16\) .* Use an encoder of three channels"),
        ("nowhere", "features", "nowhere"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageEmbedder(tmp_path / encoder, kind=kind, device="cpu")
