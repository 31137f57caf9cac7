"""Perceptual distance against the formula of LPIPS in loops, and against torchmetrics' on the same features."""

import pytest
import torch
from tiny_encoders import MEAN, STD, encoder_folder

from hf_dpssl import ContrastiveEncoder
from hf_dpssl.autoencoder.perceptual import PerceptualDistance, load_perceptual
from hf_dpssl.data.views import normalize


class TwoStages(torch.nn.Module):
    """A toy network with timm's `forward_intermediates`."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(channels, 5, 3), torch.nn.Conv2d(5, 7, 3, 2)

    def forward_intermediates(self, x, intermediates_only=True):
        first = self.first(x).tanh()
        return [first, self.second(first).tanh()]


def make(**options) -> PerceptualDistance:
    torch.manual_seed(0)
    return PerceptualDistance(TwoStages(), [0.4, 0.5, 0.6], [0.2, 0.3, 0.2], **options)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 3, 10, 10, generator=generator) * 2 - 1 for _ in range(2))
    return first, second


def test_distance_equals_the_loop_over_images_stages_and_positions():
    distance = make()
    stages = []
    for images in pair():
        x = ((images + 1) / 2 - distance.mean) / distance.std
        stages.append(distance.timm_model.forward_intermediates(x))
    expected = 0.0
    for first, second in zip(*stages, strict=True):
        count, _, height, width = first.shape
        for image in range(count):
            for y in range(height):
                for x in range(width):
                    a, b = first[image, :, y, x].double(), second[image, :, y, x].double()
                    expected += float((a / a.norm() - b / b.norm()).pow(2).sum()) / (count * height * width)
    assert float(distance(*pair())) == pytest.approx(expected, rel=1e-5)


def test_normalisation_of_features_equals_torchmetrics():
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    distance = make()
    x = ((pair()[0] + 1) / 2 - distance.mean) / distance.std
    for ours, raw in zip(distance.features(pair()[0]), distance.timm_model.forward_intermediates(x), strict=True):
        torch.testing.assert_close(ours, lpips._normalize_tensor(raw), rtol=1e-5, atol=1e-6)


def test_equal_images_are_at_distance_zero_and_only_reconstructions_get_a_gradient():
    distance, (images, other) = make().train(), pair()
    assert float(distance(images, images)) == 0
    other.requires_grad_()
    distance(images, other).backward()
    assert float(other.grad.abs().sum()) > 0
    assert not distance.timm_model.training and all(p.grad is None for p in distance.parameters())


def test_grey_images_are_repeated_and_other_channels_refused():
    distance, (images, other) = make(), pair()
    grey = [x[:, :1] for x in (images, other)]
    torch.testing.assert_close(distance(*grey), distance(*(x.expand(-1, 3, -1, -1) for x in grey)))
    with pytest.raises(ValueError, match="1 or 3"):
        distance(images[:, :2], other[:, :2])


def test_images_are_resized_only_for_encoders_that_take_one_size():
    assert make().features(pair()[0])[0].shape[-1] == 8
    assert make(size=20).features(pair()[0])[0].shape[-1] == 18


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_tiny_patch16_224", {"img_size": 48, "depth": 2, "embed_dim": 24}), ("resnet10t", {})],
)
def test_timm_models_by_name_take_images_of_any_size(name, options, monkeypatch):
    import timm

    create = timm.create_model
    model = create(name, pretrained=False, **options)
    monkeypatch.setattr(timm, "create_model", lambda found, pretrained: {name: model}[found])
    distance = load_perceptual(f"timm:{name}")
    assert distance.size == (48 if options else None)
    images, other = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    assert float(distance(images, other)) > float(distance(images, images)) == 0
    monkeypatch.undo()
    with pytest.raises(ValueError, match="offline, name a folder"):
        load_perceptual("timm:no_such_model")


def test_any_encoder_folder_of_ours_is_a_perceptual_distance(tmp_path):
    from hf_dpssl import ContrastiveConfig, ContrastiveEncoder

    torch.manual_seed(0)
    config = ContrastiveConfig("resnet10t", {"channels": [8, 16, 16, 24], "stem_width": 8})
    ContrastiveEncoder(config).save_pretrained(tmp_path)
    distance = load_perceptual(str(tmp_path))
    images, other = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    assert float(distance(images, other)) > float(distance(images, images)) == 0


def test_images_are_normalised_as_the_encoder_itself_normalises_them(tmp_path):
    """A folder of ours holds its mean and std in config.json; timm's model keeps those of its architecture."""
    encoder_folder(tmp_path, "resnet10t", {"channels": [8, 16, 16, 24], "stem_width": 8})
    distance = load_perceptual(str(tmp_path))
    images = pair()[0]
    pixel_values = normalize((images + 1) / 2, torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1))
    stages = ContrastiveEncoder.from_pretrained(tmp_path).timm_model.forward_intermediates(
        pixel_values, intermediates_only=True
    )
    for ours, raw in zip(distance.features(images), stages, strict=True):
        torch.testing.assert_close(ours, torch.nn.functional.normalize(raw), rtol=1e-4, atol=1e-5)


def test_models_without_intermediate_features_are_refused():
    with pytest.raises(ValueError, match="forward_intermediates"):
        PerceptualDistance(torch.nn.Identity(), [0.5] * 3, [0.5] * 3)


def test_lpips_without_its_weights_says_how_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for scheme in ("http", "https"):  # nobody listens there
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="name a frozen encoder instead"):
        load_perceptual("lpips")
