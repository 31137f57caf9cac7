"""Extractors by name: published accuracies, the library's own features, channels, fingerprints, and what is missing."""

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_dpssl import ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.data.batches import evaluation_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.embedding.feature_extractors import CifarResNet, load_extractor, timm_extractor
from hf_dpssl.evaluation import image_quality


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """Images in [-1, 1] of 8-bit values."""
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    """DPSSL_DATA beside a folder `weights` with a random resnet20."""
    torch.manual_seed(0)
    model = CifarResNet(20)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    (tmp_path / "data").mkdir(), (tmp_path / "weights").mkdir()
    save_file(model.state_dict(), tmp_path / "weights" / "cifar10-resnet20.safetensors")
    monkeypatch.setenv("DPSSL_DATA", str(tmp_path / "data"))
    return tmp_path


def by_formula(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Features of resnet20 from tensors by name, as the paper describes the network."""

    def conv_bn(name: str, number: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        x = F.conv2d(x, weights[f"{name}conv{number}.weight"], stride=stride, padding=1)
        bn = {key: weights[f"{name}bn{number}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
        scale = bn["weight"] / (bn["running_var"] + 1e-5).sqrt()
        return x * scale.view(1, -1, 1, 1) + (bn["bias"] - bn["running_mean"] * scale).view(1, -1, 1, 1)

    x = F.relu(conv_bn("", "1", x))
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(3):
            name, stride = f"layer{stage}.{block}.", 2 if stage > 1 and block == 0 else 1
            y = conv_bn(name, "2", F.relu(conv_bn(name, "1", x, stride)))
            shortcut = torch.zeros_like(y)
            first = (width - x.shape[1]) // 2
            shortcut[:, first : first + x.shape[1]] = x[:, :, ::stride, ::stride]
            x = F.relu(y + shortcut)
    return x.mean((2, 3))


def test_cifar_resnet_is_the_network_of_the_paper(cifar_folder):
    extractor = load_extractor("resnet20-cifar10", device="cpu")
    weights = load_file(cifar_folder / "weights" / "cifar10-resnet20.safetensors")
    batch = images(4, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = by_formula(weights, ((batch + 1) / 2 - mean) / std)
    torch.testing.assert_close(extractor.features(batch), expected, rtol=1e-4, atol=1e-5)
    logits = expected @ weights["linear.weight"].T + weights["linear.bias"]
    torch.testing.assert_close(extractor.logits(batch), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.head(expected), logits, rtol=1e-4, atol=1e-5)
    assert extractor.name == "resnet20-cifar10" and extractor.features(images(2, 3, 16, 16)).shape == (2, 64)
    assert sum(p.numel() for p in CifarResNet(56).parameters()) == 853_018  # 0.85 M in the paper's table 6


@pytest.mark.extended
def test_published_resnet56_reaches_its_accuracy_on_jpeg_images(data_folder):
    try:
        extractor = load_extractor("resnet56-cifar10", device="cpu")
    except ValueError as error:
        pytest.skip(str(error))
    data = load_images("cifar10-jpeg-small")
    rows = data.evaluation.select(range(600))
    table = ImageTable(data, rows, 32)
    hits = [
        (extractor.logits(batch["images"] / 127.5 - 1).argmax(1) == batch["labels"])
        for batch in evaluation_batches(table, 200)
    ]
    assert 0.78 < float(torch.cat(hits).float().mean()) < 0.89


def test_grey_images_are_repeated_and_other_channels_refused(cifar_folder):
    extractor = load_extractor("resnet20-cifar10")
    grey = images(2, 1, 32, 32)
    assert torch.equal(extractor.features(grey), extractor.features(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"'resnet20-cifar10' takes images of 3 channels, got 4"):
        extractor.features(images(2, 4, 32, 32))
    with pytest.raises(ValueError, match="finite"):
        extractor.features(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match=r"float \(B, C, H, W\)"):
        extractor.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_images_count_as_they_would_be_saved(cifar_folder):
    extractor = load_extractor("resnet20-cifar10")
    exact = images(2, 3, 32, 32)
    noise = 0.9 / 255 * (2 * torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) - 1)
    assert torch.equal(extractor.features(exact + noise), extractor.features(exact))


def test_fingerprint_depends_on_weights_and_resize(cifar_folder):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=0)
    first = timm_extractor(model, "a").fingerprint
    assert timm_extractor(model, "b").fingerprint == first
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    model.default_cfg["input_size"] = (3, 64, 64)
    assert timm_extractor(model, "a").fingerprint != first
    before = load_extractor("resnet20-cifar10").fingerprint
    path = cifar_folder / "weights" / "cifar10-resnet20.safetensors"
    weights = load_file(path)
    weights["linear.bias"][0] += 1
    save_file(weights, path)
    assert load_extractor("resnet20-cifar10").fingerprint != before


def test_timm_models_give_their_own_features_and_logits():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=7).eval()
    extractor = timm_extractor(model, "timm:resnet18", device="cpu")
    batch = images(2, 3, 224, 224)
    mean, std = (torch.tensor(model.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    pixel_values = ((batch + 1) / 2 - mean) / std
    with torch.no_grad():
        torch.testing.assert_close(extractor.logits(batch), model(pixel_values), rtol=1e-3, atol=1e-4)
        pooled = model.forward_features(pixel_values).mean((2, 3))
    torch.testing.assert_close(extractor.features(batch), pooled, rtol=1e-3, atol=1e-4)
    assert extractor.name == "timm-resnet18" and extractor.features(images(2, 1, 40, 30)).shape == (2, 512)


def test_grey_extractors_refuse_colour():
    extractor = timm_extractor(timm.create_model("resnet18", in_chans=1, num_classes=0), "grey")
    assert extractor.num_channels == 1 and extractor.head is None and extractor.logits is None
    with pytest.raises(ValueError, match="takes images of 1 channels, got 3"):
        extractor.features(images(1, 3, 32, 32))


@pytest.mark.parametrize("stem", ["timm", "small_image"])
def test_our_encoders_see_what_the_embedder_sees(tmp_path, stem):
    torch.manual_seed(0)
    settings = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config = ContrastiveConfig("resnet18", stem=stem, pretrained_cfg=settings | {"crop_pct": 1.0})
    folder = tmp_path / "t-simclr tiny"
    ContrastiveEncoder(config).eval().save_pretrained(folder)
    extractor = load_extractor(str(folder), device="cpu")
    batch = images(3, 3, 48, 48)
    arrays = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = ImageEmbedder(str(folder), device="cpu").embed_pictures([Image.fromarray(array) for array in arrays])
    torch.testing.assert_close(extractor.features(batch), expected, rtol=1e-5, atol=1e-6)
    found = image_quality(batch, images(4, 3, 48, 48, seed=1), extractor, measures=("kid", "inception_score"))
    assert set(found) == {"kid_t-simclr-tiny", "kid_std_t-simclr-tiny"}


@pytest.mark.extended
def test_inception_is_torch_fidelitys_with_plain_keys(tmp_path, monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            return None

    torch.manual_seed(0)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({}, tmp_path / "empty.pth")
    untrained = Untrained("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=tmp_path / "empty.pth")
    name = library.URL_INCEPTION_V3.rsplit("/", 1)[1]
    torch.save(untrained.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extractor = load_extractor("inception", device="cpu")
    batch = images(4, 3, 64, 64)
    features, logits = untrained(((batch + 1) * 127.5).round().to(torch.uint8))
    torch.testing.assert_close(extractor.features(batch), features)
    torch.testing.assert_close(extractor.logits(batch), logits, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="4 images for features of 2048"):
        found = image_quality(batch, images(5, 3, 64, 64, seed=1), extractor, k=2)
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "inception_score"} <= set(found)


def test_what_cannot_be_had_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):  # nobody listens there
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("DPSSL_DATA", raising=False)
    with pytest.raises(ValueError, match="cifar10-resnet56.safetensors.*DPSSL_DATA is not set"):
        load_extractor("resnet56-cifar10")
    monkeypatch.setenv("DPSSL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="neither .*cifar10-resnet56.safetensors nor .*weights"):
        load_extractor("resnet56-cifar10")
    with pytest.raises(ValueError, match="cannot load 'timm:no_such_model'"):
        load_extractor("timm:no_such_model")
    with pytest.raises(ValueError, match="holds no image processor"):
        load_extractor(str(tmp_path))
    pytest.importorskip("torch_fidelity")
    with pytest.raises(ValueError, match="the weights of 'inception' cannot be had.*checkpoints"):
        load_extractor("inception")
