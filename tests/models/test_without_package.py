"""Checkpoints load where hf_dpssl cannot be imported, with bit-equal outputs."""

import pytest
import torch
from foreign_processes import run_foreign
from launches import Launched
from safetensors.torch import save_file
from tiny_encoders import RESNET, encoder_folder

from hf_dpssl import ContrastiveEncoder, VQAutoencoder, VQConfig
from hf_dpssl.convert.autoencoder_importers import convert_autoencoder
from hf_dpssl.data.decoding import decode_image, to_square_tensor
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.views import normalize


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, fork_server):
    """The demo's encoder and autoencoder, trained for three steps, an autoencoder on a frozen encoder's features, and
    pictures and our own outputs beside them."""
    folder = tmp_path_factory.mktemp("foreign")
    steps = ["--output_dir", str(folder), "--max_train_steps", "3", "--batch_size", "32"]
    Launched(fork_server, "contrastive", steps, 1, folder / "log").wait()
    stages = ["--output_dir", str(folder), "--stage_1_steps", "3", "--stage_2_steps", "3"]
    Launched(fork_server, "dae_vq", stages, 1, folder / "log").wait()
    encoder_folder(folder / "frozen", "resnet18", RESNET, "small_image")
    VQConfig.register_for_auto_class()
    VQAutoencoder.register_for_auto_class("AutoModel")
    on_features = convert_autoencoder(folder / "frozen")
    on_features.save_pretrained(folder / "on_features")
    data = load_images("digits")
    pictures = [decode_image(data.evaluation[row]["image"]) for row in range(4)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    images = torch.stack([to_square_tensor(picture, 16) for picture in pictures])
    half = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
    with torch.no_grad():
        pixel_values = normalize(images.float() / 255, half, half)
        encoder = ContrastiveEncoder.from_pretrained(folder / "encoder").eval()
        autoencoder = VQAutoencoder.from_pretrained(folder / "autoencoder").eval()
        outputs = {
            "pixel_values": pixel_values,
            "features": encoder(pixel_values).pooler_output,
            "codes": autoencoder.encode(pixel_values).codes,
            "reconstructions": autoencoder(pixel_values).pixel_values,
            "larger": (larger := torch.rand(2, 3, 32, 32)),
            "of_features": on_features(larger).pixel_values,
        }
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / "ours.safetensors")
    return folder


STOCK = """
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
import timm
ours = load_file("ours.safetensors")
pictures = [Image.open(f"{i}.png") for i in range(4)]
processor = AutoImageProcessor.from_pretrained("encoder")
pixel_values = processor(pictures, return_tensors="pt").pixel_values
model = AutoModel.from_pretrained("encoder").eval()
with torch.no_grad():
    features = model(pixel_values).pooler_output
    stock_timm = timm.create_model("local-dir:encoder", pretrained=True).eval()(pixel_values)
piped = pipeline("image-feature-extraction", model="encoder", image_processor="encoder", pool=True)
from_pipeline = torch.tensor([piped(picture)[0] for picture in pictures])

classifier = AutoModelForImageClassification.from_pretrained("encoder", num_labels=7)
optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
labels = torch.tensor([0, 1, 2, 6])
losses = []
for _ in range(2):
    loss = classifier(pixel_values, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
stock = {
    "class": type(model).__name__,
    "pixels": torch.equal(pixel_values, ours["pixel_values"]),
    "features": torch.equal(features, ours["features"]),
    "timm": torch.equal(stock_timm, ours["features"]),
    "pipeline": (from_pipeline - ours["features"]).abs().max().item(),
    "logits": list(classifier(pixel_values).logits.shape),
    "losses": losses,
}
"""
REMOTE_CODE = """
autoencoder = AutoModel.from_pretrained("autoencoder", trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained("encoder", trust_remote_code=True).eval()
on_features = AutoModel.from_pretrained("on_features", trust_remote_code=True, local_files_only=True)
with torch.no_grad():
    encoded = autoencoder.encode(ours["pixel_values"])
    reconstructions = autoencoder(ours["pixel_values"]).pixel_values
    features = encoder(ours["pixel_values"]).pooler_output
    of_features = on_features(ours["larger"]).pixel_values
remote_code = {
    "classes": [type(model).__name__ for model in (autoencoder, encoder, on_features)],
    "codes": torch.equal(encoded.codes, ours["codes"]),
    "reconstructions": torch.equal(reconstructions, ours["reconstructions"]),
    "features": torch.equal(features, ours["features"]),
    "of_features": torch.equal(of_features, ours["of_features"]),
}
print(json.dumps({"stock": stock, "remote_code": remote_code}))
"""


@pytest.fixture(scope="module")
def foreign(checkpoints, tmp_path_factory):
    """What a process without hf_dpssl found, with an empty cache of remote code."""
    home = str(tmp_path_factory.mktemp("home"))
    return run_foreign(f"import os\nos.environ['HF_HOME'] = {home!r}\n" + STOCK + REMOTE_CODE, checkpoints)


def test_encoder_loads_with_stock_transformers_and_timm_bit_equal(foreign):
    found = foreign["stock"]
    assert found["class"] == "TimmWrapperModel"
    assert found["pixels"] and found["features"] and found["timm"]
    assert found["pipeline"] < 1e-5  # one picture at a time
    assert found["logits"] == [4, 7] and found["losses"][1] < found["losses"][0]


def test_encoder_and_both_kinds_of_autoencoder_load_with_trust_remote_code_bit_equal(foreign):
    found = foreign["remote_code"]
    assert found["classes"] == ["VQAutoencoder", "ContrastiveEncoder", "VQAutoencoder"]
    assert found["codes"] and found["reconstructions"] and found["features"] and found["of_features"]
