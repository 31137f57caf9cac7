"""training/dae_vq.py: arms, losses, taken-over autoencoders, and what stops a run."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import dae_vq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_encoders import encoder_folder

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.arguments import VQArguments
from hf_dpssl.autoencoder.choices import ARMS
from hf_dpssl.models.choices import VQ_PRESETS
from hf_dpssl.runs.recipe import parse, save_recipe

SMALL = ["--encoder_channels", 8, 16, "--decoder_channels", 8, 16, "--auxiliary_channels", 8, 8, "--norm_num_groups", 4]
CONVNEXT = {"patch_size": 1, "depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}
COMMON = [*SMALL, "--stage_1_steps", 4, "--stage_2_steps", 4, "--batch_size", 16, "--num_codes", 32]
COMMON += ["--validation_steps", 1, "--validation_images", 32, "--evaluation_images", 100]


def run(run_script, folder, *flags):
    """Results, weights and output of one run."""
    output = run_script("dae_vq", [*COMMON, *flags, "--output_dir", folder])
    target = folder / "autoencoder"
    return json.loads((target / "results.json").read_text()), load_file(target / "model.safetensors"), output


@pytest.mark.extended
def test_arms_of_one_seed_start_from_the_same_encoder_and_record_their_stages(run_script, tmp_path):
    flags = ["--learning_rate", 0, "--codebook_decay", 0.999999]
    found = {}
    for arm in ("joint", "weak_width"):
        results, weights, _ = run(run_script, tmp_path / arm, *flags, "--arm", arm)
        found[arm] = {name: t for name, t in weights.items() if name.startswith(("encoder.", "quant_conv."))}
        assert results["arm"] == arm
        assert results["stages"] == ({"joint": 4, "decoder": 4} if arm == "joint" else {"stage-1": 4, "stage-2": 4})
    assert all(torch.equal(found["joint"][name], found["weak_width"][name]) for name in found["joint"])


@pytest.mark.extended
def test_vqgan_on_grey_images_logs_its_terms_and_its_plateau(run_script, tmp_path):
    terms = ["--adversarial", "hinge", "--adversarial_start", 1, "--discriminator_width", 8, "--logging_steps", 1]
    flags = ["--arm", "joint", "--budget", "flops", "--num_channels", 1, "--code_distance", "cosine"]
    results, weights, output = run(run_script, tmp_path, *terms, *flags)
    assert weights["encoder.conv_in.weight"].shape[1] == 1
    assert 4 < results["stages"]["joint"] < 8
    assert len(results["validation_psnr"]) == results["stages"]["joint"]
    assert set(results["plateau"]["joint"]) == {"gain_in_last_fifth", "converged"}
    card = (tmp_path / "autoencoder" / "README.md").read_text()
    assert "| codes never used | " in card and "hinge" in card


def test_gaussian_latents_train_decoupled_and_stay_frozen(run_script, tmp_path):
    results, _, _ = run(
        run_script, tmp_path, "--quantizer", "kl", "--arm", "weak_dropout", "--auxiliary_dropout_kind", "depth"
    )
    model = VQAutoencoder.from_pretrained(tmp_path / "autoencoder")
    assert model.quantizer is None and model.config.encoder_frozen and "code_usage" not in results["metrics"]
    model.check_encoder_unchanged()


@pytest.mark.extended
def test_decoder_of_a_taken_over_autoencoder_never_ends_below_its_start(run_script, tmp_path):
    first, _, _ = run(run_script, tmp_path / "first", "--arm", "joint", "--budget", "total")
    source = tmp_path / "first" / "autoencoder"
    ruinous = ["--init_from", source, "--learning_rate", 0.5, "--max_grad_norm", 0]
    second, weights, _ = run(run_script, tmp_path / "second", *ruinous)
    assert second["metrics"]["psnr"] >= first["metrics"]["psnr"] - 1e-6
    kept = second["kept_decoder"]
    assert kept["psnr_kept"] == kept["psnr_at_start"] and kept["step_kept"] == 0
    assert f"{kept['psnr_kept']:.4g} dB of the decoder" in (tmp_path / "second/autoencoder/README.md").read_text()
    before = load_file(source / "model.safetensors")
    kept = [name for name in before if name.startswith(("encoder.", "quant_conv.", "quantizer."))]
    assert len(kept) > 10 and all(torch.equal(weights[name], before[name]) for name in kept)
    fresh, weights, _ = run(run_script, tmp_path / "fresh", "--init_from", source, "--init_decoder", "fresh")
    assert not torch.equal(weights["decoder.conv_in.weight"], before["decoder.conv_in.weight"])
    assert torch.equal(weights["quantizer.codebook"], before["quantizer.codebook"])


def taken_over(source, *flags):
    """Arguments and model of dae_vq.py with --init_from, and what the recipe that it stores makes of them."""
    args = parse(VQArguments, ["--init_from", str(source), *map(str, flags)], "")
    torch.manual_seed(args.seed)
    model, stages = dae_vq.make_model(args, SimpleNamespace(image_size=16))
    if stages[0].decoder == "fresh":
        model.replace_decoder(args.decoder_channels, args.layers_per_block)
    return args, model


def test_flags_about_a_taken_over_encoder_are_honoured_or_refused_and_the_recipe_says_what_is(tmp_path):
    encoder_folder(tmp_path / "encoder", "convnext_atto", CONVNEXT, size=16)
    torch.manual_seed(0)
    layout = {"image_size": 16, "encoder_block_out_channels": [8, 16], "norm_num_groups": 4, "num_codes": 8}
    VQAutoencoder(VQConfig(**layout, quantizer="kl", mid_block_attention=False)).save_pretrained(tmp_path / "kl")
    wide = ["--decoder_channels", 8, 16, 24, 32, "--layers_per_block", 2]
    honoured = [
        ("encoder", [], ["none", [32, 64, 128, 128], 1]),
        ("encoder", ["--quantizer", "vq", "--num_codes", 6, *wide], ["vq", [8, 16, 24, 32], 2]),
        ("encoder", ["--init_decoder", "fresh"], ["none", [32, 64, 128, 128], 1]),
        ("encoder", ["--quantizer", "vq", "--init_decoder", "fresh", *wide], ["vq", [8, 16, 24, 32], 2]),
        ("kl", [], ["kl", [8, 16], 1]),
        ("kl", ["--num_codes", 8, "--quantizer", "kl"], ["kl", [8, 16], 1]),
        ("kl", ["--init_decoder", "fresh", "--decoder_channels", 16, 8], ["kl", [16, 8], 1]),
    ]
    for name, flags, wanted in honoured:
        args, model = taken_over(tmp_path / name, *flags)
        config = model.config
        assert [config.quantizer, config.decoder_block_out_channels, config.decoder_layers_per_block] == wanted, flags
        assert [args.quantizer, args.decoder_channels, args.layers_per_block] == wanted, flags
        assert args.num_codes == config.num_codes and args.train_codebook_in_stage_2 == (wanted[0] == "vq")
        save_recipe(args, tmp_path / "recipe.yaml")
        again, same = taken_over(tmp_path / name, "--recipe", tmp_path / "recipe.yaml")
        assert again == args and same.config.to_dict() == config.to_dict(), flags
    for name, flags, message in [
        ("encoder", ["--num_codes", 6], "--num_codes 6 is of a codebook, .*: add --quantizer vq"),
        ("encoder", ["--encoder_channels", 8, 8, 8, 8], "--encoder_channels 8 8 8 8: the encoder is that of"),
        ("encoder", ["--latent_channels", 8], "latent_channels=16 follows from encoder, got latent_channels=8"),
        ("kl", ["--quantizer", "vq"], "quantizer=kl follows from kl, got quantizer=vq"),
        ("kl", ["--decoder_channels", 16, 8], r"decoder_block_out_channels=\[8, 16\] follows from kl"),
        ("kl", ["--preset", "f2"], "norm_num_groups=4.* follows from kl"),
    ]:
        with pytest.raises(ValueError, match=message):
            taken_over(tmp_path / name, *flags)


def test_a_codebook_for_an_encoders_features_starts_at_their_centres_and_learns(run_script, tmp_path):
    encoder_folder(tmp_path / "encoder", "convnext_atto", CONVNEXT, size=16)
    flags = ["--init_from", tmp_path / "encoder", "--quantizer", "vq", "--num_codes", 16, "--stage_2_steps", 1]
    flags += ["--norm_num_groups", 4, "--decoder_channels", 8, 8, 8, 8, "--batch_size", 16, "--evaluation_images", 100]
    run_script("dae_vq", [*flags, "--validation_images", 32, "--image_size", 16, "--output_dir", tmp_path / "run"])
    model = VQAutoencoder.from_pretrained(tmp_path / "run" / "autoencoder")
    assert model.quantizer.is_initialized and model.config.codebook_frozen is False
    assert model.quantizer.usage()["code_usage"] > 50
    model.check_encoder_unchanged()


@pytest.mark.extended
def test_diffusers_model_is_taken_over_by_its_folder(run_script, tmp_path):
    from diffusers import VQModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    widths = {"block_out_channels": (8, 16), "latent_channels": 4, "num_vq_embeddings": 32, "norm_num_groups": 4}
    VQModel(**blocks, **widths).save_pretrained(tmp_path / "theirs")
    results, _, _ = run(run_script, tmp_path / "ours", "--init_from", tmp_path / "theirs")
    assert results["stages"] == {"decoder": 4}
    assert VQAutoencoder.from_pretrained(tmp_path / "ours" / "autoencoder").config.encoder_frozen


def test_loss_that_is_not_finite_stops_the_run_with_step_and_images_and_keeps_the_last_checkpoint(run_script, tmp_path):
    flags = ["--learning_rate", 1e30, "--warmup_steps", 0, "--max_grad_norm", 0, "--stage_1_steps", 40]
    flags += ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+, images \[\d+"):
        run(run_script, tmp_path, *flags)
    kept = sorted((tmp_path / "checkpoints" / "autoencoder" / "joint").glob("step-*"))
    state = torch.load(kept[-1] / "state.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values() if tensor.is_floating_point())
    assert not (tmp_path / "autoencoder").exists()


def test_two_processes_train_the_vqgan_of_one(run_script, launch, tmp_path):
    """Two steps of both sides; the autoencoder's first is without the adversarial term."""
    terms = ["--adversarial", "hinge", "--adversarial_start", 0, "--discriminator_warmup", 1]
    terms += ["--arm", "joint", "--budget", "total"]
    terms += ["--discriminator_width", 8, "--r1_weight", 0.1, "--warmup_steps", 0, "--lr_scheduler", "constant"]
    terms += ["--stage_1_steps", 1, "--stage_2_steps", 1, "--revival_threshold", 0]
    two = ["--batch_size", 8, "--num_processes", 2, "--output_dir", tmp_path / "two"]
    launched = launch("dae_vq", [*COMMON, *terms, *two], 2)
    run_script("dae_vq", [*COMMON, *terms, "--batch_size", 16, "--output_dir", tmp_path / "one"])
    launched.wait()
    last = "checkpoints/autoencoder/joint/step-00000002/state.pt"
    states = [torch.load(tmp_path / run / last, weights_only=True) for run in ("one", "two")]
    for part in ("model", "discriminator"):
        one, two = (torch.cat([t.flatten().double() for t in state[part].values()]) for state in states)
        # Adam takes the sign of a gradient that is 0 but for rounding: a few entries go the other way.
        differences = (one - two).abs()
        assert float(differences.quantile(0.99)) < 1e-5 and float(differences.max()) <= 4 * 2e-3 + 1e-5


def test_flags_that_do_not_fit_are_refused(refusal, tmp_path):
    for flags, message in [
        (["--image_size", 15], "multiple of the downsampling factor"),
        (["--image_size", 1], "multiple of the downsampling factor"),
        (["--arm", "separate"], "invalid choice"),
        (["--num_codes", 1437 * 64 + 1], "larger than the data"),
        (["--adversarial", "hinge", "--adversarial_weight", -1], "must not be negative"),
        (["--init_from", "/no/where"], "/no/where"),
        (["--perceptual", "/no/where"], "/no/where"),
    ]:
        assert message in refusal("dae_vq", [*COMMON, *flags, "--output_dir", tmp_path, "--overwrite"]), flags


@pytest.mark.extended
def test_resolved_recipe_runs_again_and_a_codebook_that_goes_on_learning_is_named_in_the_config(run_script, tmp_path):
    flags = ["--arm", "weak_width", "--attention_levels", 1, "--train_codebook_in_stage_2", "True"]
    run(run_script, tmp_path / "a", *flags)
    folder = tmp_path / "a" / "autoencoder"
    config = VQAutoencoder.from_pretrained(folder).config
    assert config.attention_levels == [1] and config.encoder_frozen and config.codebook_frozen is False
    run_script("dae_vq", ["--recipe", folder / "recipe.yaml", "--output_dir", tmp_path / "b"])
    first, second = (load_file(tmp_path / run / "autoencoder" / "model.safetensors") for run in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_preset_is_resolved_in_the_recipe():
    args = VQArguments(preset="f8")
    config = VQConfig.preset("f8")
    assert args.preset is None and args.encoder_channels == config.encoder_block_out_channels
    assert yaml.safe_load(yaml.safe_dump(asdict(args)))["attention_levels"] == config.attention_levels


def test_every_preset_starts_with_every_arm_and_its_resolved_recipe_is_the_same_run(tmp_path):
    for preset, arm in itertools.product(VQ_PRESETS, ARMS):
        args = VQArguments(preset=preset, arm=arm)
        with torch.device("meta"):
            model, _ = dae_vq.make_model(args, SimpleNamespace(image_size=32))
        assert model.config.encoder_block_out_channels == VQ_PRESETS[preset]["encoder_block_out_channels"], arm
        save_recipe(args, tmp_path / "recipe.yaml")
        assert parse(VQArguments, ["--recipe", str(tmp_path / "recipe.yaml")], "") == args, (preset, arm)
