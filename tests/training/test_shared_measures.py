"""What scripts measure at their end is shared by their processes, and is what one process finds."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import contrastive
import dae_gan
import dae_vq
import pytest
import torch
from launches import forget_accelerator

from hf_dpssl import VAEGAN, VQAutoencoder
from hf_dpssl.autoencoder.arguments import VQArguments
from hf_dpssl.data.batches import ImageSource, load_images_for
from hf_dpssl.embedding.feature_extractors import FeatureExtractor
from hf_dpssl.latent_training.gan_arguments import GANArguments
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments
from hf_dpssl.runs.training_loop import start_accelerator

COMMON = {"evaluation_images": 101, "batch_size": 8}  # the last of which one of two processes does not have
ENCODER = {"model_args": '{"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}', "projection_dim": 8}
VQ = {"encoder_channels": [8, 8], "decoder_channels": [8, 8], "norm_num_groups": 4, "num_codes": 16}
GAN = {"latent": "vae", "sample_from": "mixture", "components": 2, "width": 8, "latent_dim": 8, "num_generated": 25}
GAN |= {"compare_densities": True}


def extractor(seen: list) -> FeatureExtractor:
    """Random features, which notes how many images it was given and the precision it computed in."""
    weight = torch.randn(3 * 16 * 16, 6, generator=torch.Generator().manual_seed(0)) / 100

    def features(images: torch.Tensor) -> torch.Tensor:
        found = (images.float().flatten(1) / 255 - 0.5) @ weight
        seen.append((len(images), found.dtype))
        return found

    return FeatureExtractor("random", features, weights={"weight": weight}, resize="none")


def started(kind, folder, **flags):
    """Arguments, accelerator and images of a run of a script."""
    args = kind(output_dir=str(folder), **COMMON | flags)
    accelerator = start_accelerator(args)
    data = load_images_for(args)
    source = ImageSource.from_arguments(data, args, accelerator, 16)
    source.training_table(together=True)
    source.evaluation_table(together=True)
    return args, accelerator, source


def watch(module, seen: list) -> None:
    """Note how many images a module's output is of, and its precision."""
    module.register_forward_hook(lambda module, given, output: seen.append((len(output), output.dtype)))


def ends_of_scripts(folder: str, precision: str = "no") -> dict[str, torch.Tensor]:
    """Save a model of each script; by script, how many images this process decoded or embedded at most."""
    rank = 0
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group stands already
    seen = {name: [] for name in ("contrastive", "dae_vq", "dae_gan", "judge")}
    flags = {"mixed_precision": precision}

    args, accelerator, source = started(ContrastiveArguments, folder, **ENCODER, **flags)
    torch.manual_seed(0)
    model = contrastive.make_model(args, 16, *source.data.entry.statistics)
    torch.manual_seed(rank)  # each process has its own running statistics, as in training
    model.train()(*torch.randn(2, 16, 3, 16, 16))
    watch(model.encoder.timm_model.conv1, seen["contrastive"])
    loop = SimpleNamespace(accelerator=accelerator, step=1, history=[], seconds=1.0)
    contrastive.save(model.eval(), args, source, loop, Path(folder, "encoder"), None)

    args, accelerator, source = started(VQArguments, folder, **VQ, **flags)
    torch.manual_seed(0)
    model, stages = dae_vq.make_model(args, source)
    model.quantizer.codebook.copy_(torch.randn(16, 4) / 4)
    model.quantizer.is_initialized.fill_(True)
    watch(model.decoder.conv_out, seen["dae_vq"])
    dae_vq.save(model.eval(), args, source, stages, [], Path(folder, "autoencoder"), accelerator)

    args, accelerator, source = started(GANArguments, folder, **GAN, **flags)
    torch.manual_seed(0)
    model = VAEGAN(dae_gan.model_config(args, 16, None, source.evaluation_table()))
    watch([m for m in model.generator.modules() if isinstance(m, torch.nn.ConvTranspose2d)][-1], seen["dae_gan"])
    judges = [extractor(seen["judge"])]
    dae_gan.save(model.eval(), args, source, None, [], Path(folder, "gan"), {}, judges, accelerator)
    kept = {name: str(sorted({dtype for _, dtype in notes}, key=str)) for name, notes in seen.items()}
    Path(folder, f"precisions-{rank}.json").write_text(json.dumps(kept))
    return {name: torch.tensor([count for count, _ in notes]).sum() for name, notes in seen.items()}


@pytest.fixture
def alone(tmp_path):
    """ends_of_scripts in this process."""
    yield lambda name, **options: ends_of_scripts(str(tmp_path / name), **options)
    forget_accelerator()


def results_of(folder: Path) -> dict[str, dict]:
    found = {}
    for name in ("encoder", "autoencoder", "gan"):
        results = json.loads((folder / name / "results.json").read_text())
        assert "not_measured" not in results, results
        found[name] = results["metrics"]
        for kind, metrics in results.get("densities", {}).items():
            found[name] |= {f"{kind} {key}": value for key, value in metrics.items()}
    return found


def test_two_processes_share_the_images_and_find_the_measures_and_statistics_of_one(alone, run_in_two, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = run_in_two(ends_of_scripts, str(tmp_path / "two"))
    whole = alone("one")
    for name, count in whole.items():
        assert all(0.4 < float(part[name] / count) < 0.6 for part in both), (name, count, both)
    one, two = (results_of(tmp_path / name) for name in ("one", "two"))
    assert {"knn_top1", "uniformity_embeddings", "alignment_embeddings"} <= set(one["encoder"])
    assert {"psnr", "ssim", "code_usage"} <= set(one["autoencoder"])
    assert {"copies", "fid_random", "ceiling_fid_random", "held_out fid_random"} <= set(one["gan"])
    for name, metrics in one.items():
        assert two[name] == pytest.approx(metrics, rel=2e-4, abs=1e-5), name
    configs = [VQAutoencoder.from_pretrained(tmp_path / name / "autoencoder").config for name in ("one", "two")]
    for name in ("latent_mean", "latent_std"):
        assert getattr(configs[1], name) == pytest.approx(getattr(configs[0], name), rel=1e-5)
    densities = [VAEGAN.from_pretrained(tmp_path / name / "gan").density for name in ("one", "two")]
    for first, second in zip(*(density.state_dict().values() for density in densities), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


@pytest.mark.extended
def test_images_are_drawn_and_embedded_in_the_precision_of_the_run_and_judged_in_float32(alone, tmp_path):
    (tmp_path / "bf16").mkdir()
    alone("bf16", precision="bf16")
    found = json.loads((tmp_path / "bf16/precisions-0.json").read_text())
    assert found == {
        "contrastive": "[torch.bfloat16]",
        "dae_vq": "[torch.bfloat16]",
        "dae_gan": "[torch.bfloat16]",
        "judge": "[torch.float32]",
    }
