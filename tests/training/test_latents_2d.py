"""The two-dimensional picture of D^G: what is drawn, and that the files appear and repeat."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "evidence"))
import latents_2d  # noqa: E402

STORED = Path(latents_2d.__file__).parent


def test_data_and_mixture_have_five_modes_of_equal_weight():
    random = torch.Generator().manual_seed(0)
    turns = torch.arange(5) * 2 * torch.pi / 5
    pentagon = 2 * torch.stack([-turns.sin(), turns.cos()], 1)
    square = 1.4 * torch.tensor([[0, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]])
    for source, middles, width in ((latents_2d.five_modes, pentagon, 0.15), (latents_2d.mixture, square, 0.25)):
        points = source(5000, random)
        nearest = torch.cdist(points, middles).argmin(1)
        assert bool(((nearest.bincount() - 1000).abs() < 150).all())
        spread = torch.stack([points[nearest == mode].std(0) for mode in range(5)])
        assert bool((spread - width).abs().max() < 0.03)


@pytest.mark.extended
def test_encoder_keeps_the_modes_apart_and_is_the_same_in_every_process():
    given, again = latents_2d.sources(0), latents_2d.sources(0)
    random = torch.Generator().manual_seed(0)
    latents = given["drawn"]["encoded"](1000, random)
    torch.testing.assert_close(latents, again["drawn"]["encoded"](1000, random.manual_seed(0)), rtol=0, atol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(2), atol=0.15, rtol=0)
    assert not torch.equal(given["train"], given["test"])


@pytest.mark.slow
def test_page_writes_picture_and_numbers(tmp_path):
    folder = tmp_path / "page"
    latents_2d.main(f"--widths 3 2 --steps 5 --critic_steps 5 --workers 1 --output_dir {folder}".split())
    results = json.loads((folder / "latents_2d.json").read_text())
    for name in latents_2d.LATENTS:
        found = results["metrics"][name]
        assert list(found)[:3] == ["complexity", "complexity_w2", "complexity_w3"]
        assert found["complexity_w3"] == pytest.approx(sum(found["critics_w3"]) / 3)
    assert results["budget"]["generator_steps"] == 5 and results["metrics"]["data_against_data"] < 0.01
    assert Image.open(folder / "latents_2d.png").width > 500


def test_stored_results_say_that_encoded_latents_need_the_smaller_generator():
    metrics = json.loads((STORED / "results" / "latents_2d.json").read_text())["metrics"]
    for width in (4, 8):
        values = [metrics[name][f"complexity_w{width}"] for name in ("encoded", "mixture", "gaussian")]
        assert values == sorted(values)
    assert (STORED / "latents_2d.png").stat().st_size < 50_000
