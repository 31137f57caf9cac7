"""hf-dpssl report: numbers and a page for autoencoders side by side, and its parts on planted latents."""

import json

import numpy as np
import pytest
import torch
from cases import for_each
from PIL import Image
from tiny_checkpoints import encoder_model

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.complexity_curve import Budget, generator_complexity
from hf_dpssl.autoencoder.forecast import firsts, read_forecast
from hf_dpssl.autoencoder.measures import (
    PARTS,
    Pictures,
    code_histograms,
    generation_quality,
    generator_capacity,
    held_out_sources,
    measure_autoencoder,
    principal_components,
)
from hf_dpssl.cli.commands import main
from hf_dpssl.cli.report import unique_names
from hf_dpssl.embedding.feature_extractors import FeatureExtractor

SMALL = {"image_size": 16, "encoder_block_out_channels": [8, 16], "norm_num_groups": 4, "mid_block_attention": False}


def make(**options) -> VQAutoencoder:
    torch.manual_seed(0)
    return VQAutoencoder(VQConfig(**SMALL | {"num_codes": 16} | options)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two untrained autoencoders: with codes, and with Gaussian latents."""
    root = tmp_path_factory.mktemp("autoencoders")
    for name, options in {"codes": {}, "gaussian": {"quantizer": "kl"}}.items():
        make(**options).save_pretrained(root / name)
    return root


def test_report_of_two_autoencoders_writes_every_part_and_a_page(folders, tmp_path, capsys):
    parts = [part for part in PARTS if part != "prior"]
    sizes = ["--images", "120", "--lipschitz_images", "8", "--distance_images", "30"]
    sources = [str(folders / name) for name in ("codes", "gaussian")]
    assert main(["report", *sources, *sizes, "--parts", *parts, "--output_dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    codes, gaussian = report["metrics"]["codes"], report["metrics"]["gaussian"]
    shared = {
        "psnr",
        "ssim",
        "latent_linear_top1",
        "latent_knn_top1",
        "effective_rank",
        "trustworthiness",
        "continuity",
    }
    shared |= {"lipschitz_encoder", "lipschitz_product", "log_ratio_sd_encoder", "gromov_wasserstein"}
    assert shared <= codes.keys() & gaussian.keys()
    assert "code_perplexity" in codes and "histogram_knn_top1" in codes and "code_perplexity" not in gaussian
    assert report["autoencoders"]["codes"]["fingerprint"] == make().fingerprint()
    assert report["samples"] == {"train": 120, "evaluation": 120}
    assert (tmp_path / "report.png").stat().st_size > 20_000
    printed = capsys.readouterr().out
    assert "codes" in printed
    forecast = report["forecast"]
    assert read_forecast().items() <= forecast.items()
    assert forecast["first"] == firsts(
        read_forecast(), {name: {"metrics": row, "about": {}} for name, row in report["metrics"].items()}
    )
    assert "\n".join(forecast["says"]) in printed and "these measures foretell a generator" in forecast["says"][0]


@pytest.mark.extended
def test_same_report_twice_is_the_same_and_printed_as_json(folders, tmp_path, capsys):
    flags = ["--images", "60", "--lipschitz_images", "4", "--parts", "reconstruction", "lipschitz", "collapse"]
    for run in ("a", "b"):
        main(["report", str(folders / "codes"), *flags, "--output_dir", str(tmp_path / run), "--json"])
        printed = json.loads(capsys.readouterr().out)
    first, second = (json.loads((tmp_path / run / "report.json").read_text())["metrics"] for run in "ab")
    assert first == second == printed


def test_latents_that_are_the_classes_are_fully_informative_and_constant_ones_are_not():
    labels = torch.arange(40) % 4
    pixels = torch.zeros(40, 3, 16, 16)
    pixels[torch.arange(40), 0, labels * 4] = 1.0  # a bright row, its place the class
    pictures = Pictures(pixels + 1e-3 * torch.randn(40, 3, 16, 16), labels)
    metrics, _ = measure_autoencoder(make(quantizer="none"), pictures, pictures, parts=("informativeness",))
    assert metrics["latent_linear_top1"] == 100


@pytest.mark.extended
def test_slow_parts_measure_images_of_every_class_of_a_sorted_set():
    """Half of the images are black, the rest noise: the first few have no distance, and nothing to keep."""
    black, noise = -torch.ones(30, 3, 16, 16), torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sorted_set = Pictures(torch.cat([black, noise]), torch.arange(60) // 30)
    rows = sorted_set.random_rows(20, seed=0)
    assert sorted_set.labels[rows].bincount().tolist() == [10, 10]
    found, _ = measure_autoencoder(make(), sorted_set, sorted_set, parts=("distances",), distance_images=20)
    assert found["gromov_wasserstein"] > 0


def test_code_histograms_equal_the_loop():
    codes = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [0, 3]]])
    assert code_histograms(codes, 4).tolist() == [[0.25, 0.75, 0, 0], [0.25, 0, 0.5, 0.25]]


def test_principal_components_have_falling_variance_and_unit_total():
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    found = principal_components(points, 3)
    variance = found.var(0, correction=0)
    assert variance.diff().max() < 0 and float(variance.sum()) == pytest.approx(1, rel=1e-5)


def test_names_are_the_shortest_ends_that_differ():
    assert unique_names(["a/x/autoencoder", "a/y/autoencoder"]) == ["x/autoencoder", "y/autoencoder"]
    with pytest.raises(ValueError, match="given twice"):
        unique_names(["a/x", "a/x"])


@for_each(
    "flags, message",
    [
        (["./nowhere"], "nowhere"),
        (["FOLDER", "--names", "a", "b"], "--names needs 1"),
        (["FOLDER", "--images", "1"], "at least 2"),
        (["FOLDER", "--dataset", "no-such-set"], "no-such-set"),
        (["FOLDER", "--extractor", "no/such/encoder"], "no/such/encoder"),
    ],
)
def test_user_errors_are_said_without_a_traceback(flags, message, folders, tmp_path, capsys):
    flags = [str(folders / "codes") if flag == "FOLDER" else flag for flag in flags]
    assert main(["report", *flags, "--output_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def write_pictures(folder, value, count=12):
    """An image folder with noise around a grey value, half of it held out."""
    random = np.random.default_rng(value)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            pixels = (value + random.integers(0, 40, (16, 16, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{number}.png")


@pytest.mark.extended
def test_five_pictures_are_reported_and_evaluated_as_far_as_they_allow(folders, tmp_path, capsys):
    random = np.random.default_rng(0)
    for number in range(5):  # one of each class
        (tmp_path / "five" / f"class {number}").mkdir(parents=True)
        pixels = random.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "five" / f"class {number}" / "picture.png")
    data = ["--dataset", str(tmp_path / "five")]
    parts = ["--parts", "reconstruction", "informativeness", "collapse", "lipschitz", "distances"]
    flags = [*data, *parts, "--output_dir", str(tmp_path / "out"), "--json"]
    assert main(["report", str(folders / "codes"), *flags]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["samples"] == {"train": 4, "evaluation": 1}
    assert {"psnr", "ssim", "code_usage"} <= report["metrics"]["codes"].keys()
    printed, said = capsys.readouterr()
    assert json.loads(printed) == report["metrics"]
    assert all(f"not measured: {name} (" in said for name in ("effective rank", "trustworthiness", "distances"))
    encoder_model().encoder.save_pretrained(tmp_path / "encoder")
    assert main(["evaluate", str(tmp_path / "encoder"), *data, "--protocol", "knn", "linear", "--knn_k", "3"]) == 0
    said = "".join(capsys.readouterr())
    assert "knn_top1" in said and "linear_probe was not measured: no class has two rows" in said


def test_generated_images_are_judged_by_each_source_of_a_union(tmp_path):
    for name, value in {"dark": 20, "bright": 180}.items():
        write_pictures(tmp_path / name, value)
    union = f"{tmp_path}/dark+{tmp_path}/bright"
    sources = held_out_sources(union, 16, 100)
    assert {name: len(pictures) for name, pictures in sources.items()} == {"dark": 12, "bright": 12}
    extractor = FeatureExtractor("colours", lambda x: x.float().mean((2, 3)), weights={}, resize="none", device="cpu")
    shape = {"image_size": 16, "num_channels": 3}
    found = generation_quality(sources["dark"], 12, union, extractor, **shape, limit=100, seed=0)
    assert found["gfid_colours_dark"] < 1e-6 < found["gfid_colours"] < found["gfid_colours_bright"]


@pytest.mark.extended
def test_capacity_of_generators_is_that_of_standardised_latents_and_small_pictures():
    random = torch.Generator().manual_seed(0)
    train, test = (torch.randn(200, 1, 32, 32, generator=random).clamp(-1, 1) for _ in range(2))
    latents = [3 + 2 * torch.nn.functional.avg_pool2d(pixels, 16) for pixels in (train, test)]
    options = dict(widths=(2, 4), critics=1, budget=Budget(generator_steps=4, critic_steps=4, batch_size=32))
    pictures = [Pictures(pixels, torch.zeros(200)) for pixels in (train, test)]
    metrics, curves = generator_capacity(*pictures, *latents, seed=5, **options)
    small = [pixels.unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5)) for pixels in (train, test)]
    mean, deviation = latents[0].flatten(1).mean(0), latents[0].flatten(1).std(0)
    drawn, fresh = ((part.flatten(1) - mean) / deviation for part in latents)
    expected = generator_complexity(drawn, *small, held_out_latents=fresh, seed=5, **options)
    for width in (2, 4):
        assert metrics[f"complexity_w{width}_encoded"] == pytest.approx(expected[f"complexity_w{width}"], abs=1e-4)
    assert curves["generator_widths"] == [2, 4]
    assert curves["generator_gaussian"] == [metrics[f"complexity_w{width}_gaussian"] for width in (2, 4)]
