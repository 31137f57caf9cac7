"""`hf-dpssl rehearse`: what scripts keep on a GPU equals closed forms, what it prints, and what recipes state."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
from cases import for_each
from forked_processes import run_forked

from hf_dpssl.cli.commands import main
from hf_dpssl.cli.rehearse import REHEARSED
from hf_dpssl.runs.recipe import find_recipe

EVIDENCE = Path(__file__).parents[2] / "training" / "evidence"
EIGHT = ["--accelerate_config", "gpu_8_bf16"]
RECIPES = {
    "ar-faceshq": ["dae_ar", *EIGHT],
    "dit-b2-imagenet": ["dae_dit", *EIGHT],
    "dit-xl2-imagenet": ["dae_dit", *EIGHT],
    "gan-cifar10-jpeg": ["dae_gan"],
    "moco-v2-resnet50-imagenet": ["contrastive", *EIGHT],
    "simclr-resnet50-cifar10": ["contrastive"],
    "t-moco-v2-dof5-resnet50-imagenet": ["contrastive", *EIGHT],
    "t-moco-v2-resnet50-imagenet": ["contrastive", *EIGHT],
    "t-simclr-resnet50-cifar10": ["contrastive"],
    "vq-dae-f16-faceshq": ["dae_vq", *EIGHT],
    "vq-dae-f8-imagenet": ["dae_vq", *EIGHT],
    "vq-gan-f16-faceshq": ["dae_vq", *EIGHT],
}


def memory(*argv: str) -> dict:
    """{stage: figures} of a command line, without the waits."""
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    asked = rehearse.parsed(list(argv))
    process = rehearse.process_of(asked)
    return {name: rehearse.memory_of(asked, i, process) for i, name in enumerate(rehearse.stage_names(asked))}


def size(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _as_closed_forms():
    from hf_dpssl.latent_training.diffusion import make_transformer

    transformer = make_transformer(
        num_layers=3, width=64, num_heads=2, patch_size=2, latent_channels=4, latent_size=8, num_classes=10
    )
    flags = "dae_dit --num_layers 3 --width 64 --num_heads 2 --output_dir missing".split()
    figures = memory(*flags)[""]
    number, scalars = size(transformer), 4 * len(list(transformer.parameters()))  # AdamW counts steps of each
    assert figures["parameters"] == number
    parts = figures["bytes"]
    assert parts["parameters"] == parts["gradients"] == parts["averages"] == 4 * number
    assert parts["optimizer"] == 8 * number + scalars
    assert parts["total"] == sum(value for name, value in parts.items() if name != "total")
    shared = memory(*flags, "--accelerate_config", "fsdp_8_bf16")[""]["bytes"]
    assert shared["parameters"] == shared["averages"] == -(-4 * number // 8)
    _times_as_closed_forms(flags, figures)
    alone = memory(*flags, "--mixed_precision", "bf16")
    assert memory(*flags, *EIGHT) == alone  # gradients are views of the buckets that are exchanged


def _times_as_closed_forms(flags, figures):
    import rehearse
    from dit_operations import multiplications
    from run_times import times_of

    from hf_dpssl.latent_training.dit_sizes import DiTSize

    shape = dict(latent_size=8, in_channels=4, out_channels=4)
    passes = multiplications(DiTSize(3, 64, 2, 2), **shape, embedders=4)
    batch = rehearse.parsed(flags).args.batch_size
    assert figures["operations"] == pytest.approx(6 * passes * batch, rel=0.03)
    times = times_of(rehearse.parsed(flags), 4, {"": figures})
    assert times["step"][""]["A100"]["0.2"] == pytest.approx(figures["operations"] / (312e12 * 0.2))
    steps = rehearse.parsed(flags).args.max_train_steps
    assert times["run"]["H100"]["0.4"] == pytest.approx(steps * figures["operations"] / (989e12 * 0.4))
    assert times["start"]["images"] == 1437 and times["start"]["bytes"] == 1437 * 4 * 8 * 8 * 4
    alone = times_of(rehearse.parsed(flags), 1, {"": figures})["start"]["seconds"]["A100"]["0.2"]
    assert times["start"]["seconds"]["A100"]["0.2"] == pytest.approx(alone / 4)
    more = times_of(rehearse.parsed([*flags, "--flip_cache", "true"]), 4, {"": figures})["start"]
    assert more["bytes"] == 2 * times["start"]["bytes"] and more["images"] == 2874
    codes = times_of(rehearse.parsed(["dae_ar", *ELSEWHERE]), 1, {"": figures})
    assert codes["start"]["bytes"] == 1437 * 2 * 8 * 8 and "end" not in codes


def _of_mean_flow():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    flags = ["dae_dit", "--mixed_precision", "bf16", "--gradient_checkpointing", "true", *ELSEWHERE]
    flags += [
        "--batch_size",
        "256",
    ]  # at which the network's activations outweigh what the optimiser needs for a moment
    flow, mean_flow = (memory(*flags, "--objective", name)[""] for name in ("flow", "mean_flow"))
    args = rehearse.parsed(flags).args
    assert mean_flow["parameters"] - flow["parameters"] == args.width * args.patch_size**2  # of the interval's channel
    # With checkpoints the peak is that of the pass that differentiates, whose attention keeps its weights.
    assert 1.2 < mean_flow["bytes"]["activations"] / flow["bytes"]["activations"] < 2
    assert not rehearse.waits_of(rehearse.parsed([*flags, "--objective", "mean_flow"]), 0)


def _of_an_encoder():
    sys.path.insert(0, str(EVIDENCE))
    import rehearsed_steps
    from rehearse import parsed

    flags = "contrastive --negatives queue --normalization anchor --queue_size 512 --optimizer sgd".split()
    _, step = next(rehearsed_steps.contrastive_steps(parsed(flags).args, "meta"))
    model = step.learning[0]
    learn = sum(parameter.numel() for parameter in model.trainable_parameters())
    everything = sum(tensor.nbytes for tensor in model.state_dict().values())
    parts = memory(*flags)[""]["bytes"]
    assert parts["parameters"] == parts["gradients"] == parts["optimizer"] == 4 * learn and parts["averages"] == 0
    assert parts["others"] == everything - 4 * learn


def _of_a_gan():
    from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
    from hf_dpssl.models.modeling_vaegan import VAEGAN, VAEGANConfig

    model = VAEGAN(VAEGANConfig(image_size=16, width=16, latent_dim=32, latent="dae"))
    discriminator = PatchDiscriminator(PatchDiscriminatorConfig(image_size=16, width=16))
    stages = memory("dae_gan", *ELSEWHERE)
    learn = {"stage-1": size(model), "generator": size(model.generator)}
    for stage, figures in stages.items():
        number, parts = learn[stage] + size(discriminator), figures["bytes"]
        assert figures["parameters"] == number and parts["parameters"] == parts["gradients"] == 4 * number
        assert parts["averages"] == 4 * size(model.generator)
        frozen = 4 * (size(model) - learn[stage])
        assert parts["others"] == frozen + sum(buffer.nbytes for buffer in model.buffers())
    held_out = "--sample_from held_out --evaluation_images 300".split()
    banks = memory("dae_gan", *held_out, *ELSEWHERE)["generator"]["bytes"]["others"]
    assert banks - stages["generator"]["bytes"]["others"] == 4 * 300 * 32


def _batches_and_checkpoints():
    def activations(script, *flags):
        return max(stage["bytes"]["activations"] for stage in memory(script, *flags, *ELSEWHERE).values())

    for script, sizes in {"dae_dit": (64, 128, 256), "dae_gan": (64, 128, 256), "dae_vq": (16, 32, 64)}.items():
        small, middle, large = (activations(script, "--batch_size", str(count)) for count in sizes)
        assert large - middle == pytest.approx(2 * (middle - small), rel=0.02) and small < middle, script
    deep = ["--num_layers", "12"]
    for script, deeper in {"contrastive": [], "dae_dit": deep, "dae_ar": deep, "dae_vq": []}.items():
        plain, again = (activations(script, *deeper, "--gradient_checkpointing", flag) for flag in ("false", "true"))
        assert again < 0.9 * plain, (script, plain, again)


ELSEWHERE = ["--output_dir", "missing"]


def _printed():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    for script in REHEARSED:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert rehearse.main([script, *ELSEWHERE, "--mixed_precision", "bf16", "--json"]) == 0
        found = json.loads(out.getvalue())
        assert found["fits"] and found["processes"] == 1 and found["mixed_precision"] == "bf16"
        assert found["total"] == max(stage["bytes"]["total"] for stage in found["stages"].values())
        assert set(found["waits"]) == set(found["stages"])
        said = rehearse.text_of(found)
        assert re.search(r"(joint|stage-1|generator|a step) +[\d.]+ ms \([\d.]+ ms\)", said), said
        assert ("GB on disk" in said) == (script in ("dae_ar", "dae_dit", "dae_drift"))
        assert "fits into 80 GiB" in said and "waits for the GPU in a step" in said, script


def _within_a_share(*argv: str, recipe: str):
    stated = re.search(r"([\d.]+) GB per GPU", find_recipe(recipe).read_text(encoding="utf-8"))
    assert stated, f"{recipe} states no memory"
    total = max(stage["bytes"]["total"] for stage in memory(*argv).values())
    assert total / 1e9 == pytest.approx(float(stated.group(1)), rel=0.15)


def test_parameters_optimiser_and_averages_of_a_transformer_equal_closed_forms(rehearse):
    rehearse(_as_closed_forms)


@pytest.mark.extended
def test_mean_flow_takes_the_memory_of_its_forward_derivatives_and_waits_for_nothing(rehearse):
    rehearse(_of_mean_flow)


@pytest.mark.extended
def test_weights_queue_and_momentum_branch_of_an_encoder_equal_closed_forms(rehearse):
    rehearse(_of_an_encoder)


@pytest.mark.extended
def test_both_sides_and_averages_of_a_gan_equal_closed_forms_in_each_stage(rehearse):
    rehearse(_of_a_gan)


@pytest.mark.extended
def test_activations_of_scripts_grow_with_the_batch_and_shrink_with_checkpoints(rehearse):
    rehearse(_batches_and_checkpoints)


@pytest.mark.extended
def test_every_script_is_rehearsed_at_its_defaults(rehearse):
    rehearse(_printed)


@pytest.mark.slow
@for_each("recipe", RECIPES)
def test_recipes_state_the_memory_of_a_step_at_full_size(recipe, rehearse):
    from functools import partial

    script, *flags = RECIPES[recipe]
    rehearse(partial(_within_a_share, script, "--recipe", recipe, *flags, recipe=recipe))


def test_every_recipe_of_a_rehearsed_script_is_rehearsed():
    folder = EVIDENCE.parent / "recipes"
    others = {"demo", "digits", "domains-colored-mnist", "domains-pacs-resnet50", "map-cifar10"}
    assert {path.stem for path in folder.glob("*.yaml")} - others == set(RECIPES)


@pytest.mark.extended
def test_the_command_prints_and_a_run_that_does_not_fit_is_told(capfd):
    small = ["--num_layers", "1", "--batch_size", "4"]
    assert main(["rehearse", "dae_dit", *small, *ELSEWHERE, "--memory", "0.001"]) == 0
    assert "does NOT fit into 0.001 GiB" in capfd.readouterr().out


def both_ways(*words: str) -> list[tuple]:
    """What the module and the command print, and their statuses."""
    commands = ["hf_dpssl.runs.rehearsal"], ["hf_dpssl.cli", "rehearse"]
    found = [run_forked(["-m", *command, *words]) for command in commands]
    return [(process.returncode, process.stdout, process.stderr) for process in found]


def test_the_module_is_the_command():
    for words in ((), ("dae_dit", "--memory", "0")):
        module, command = both_ways(*words)
        assert module == command and "rehearse" in module[1] + module[2], words
        assert module[0] == 2, words


@pytest.mark.extended
def test_the_module_prints_what_the_command_does():
    module, command = both_ways("dae_dit", "--num_layers", "1", "--batch_size", "4", *ELSEWHERE)
    assert module == command and module[0] == 0 and "waits for the GPU in a step" in module[1]


def test_what_cannot_be_rehearsed_is_one_line(capfd):
    cases = {
        "map": "map is not rehearsed; these are: contrastive, dae_ar, dae_dit, dae_drift, dae_gan, dae_vq.",
        "dae_dit --memory 0": "--memory must be positive",
        "dae_dit --accelerate_config nowhere": "no accelerate config 'nowhere'",
    }
    for line, reason in cases.items():
        assert main(["rehearse", *line.split()]) == 2, line
        said = capfd.readouterr().err
        assert reason in said and len(said.splitlines()) == 1, said
    for line in ("nonsense", "dae_dit --learning_rat 1", "dae_dit --num_layers 0x", "--memory"):
        with pytest.raises(SystemExit) as ended:
            main(["rehearse", *line.split()])
        assert ended.value.code == 2, line


def test_waits_are_listed_with_their_lines(rehearse):
    rehearse(_listed_waits)


def _listed_waits():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    waits = rehearse.waits_of(rehearse.parsed(["dae_vq", *ELSEWHERE]), 0)
    assert [line.split(":")[0] for line in waits] == ["hf_dpssl/models/quantizer.py"]


def test_waits_are_counted_in_the_precision_of_the_run(rehearse):
    rehearse(_waits_in_bfloat16)


def _waits_in_bfloat16():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse
    import torch

    def waits_for_bfloat16(module, inputs, output):
        if torch.is_tensor(output) and output.dtype == torch.bfloat16:
            float(output.sum())

    hook = torch.nn.modules.module.register_module_forward_hook(waits_for_bfloat16)
    for more, waits in (([], False), (["--mixed_precision", "bf16"], True), (EIGHT, True)):
        asked = rehearse.parsed(["dae_dit", *more, *ELSEWHERE])
        assert bool(rehearse.waits_of(asked, 0)) == waits, more
    hook.remove()


@pytest.mark.extended
def test_moco_waits_as_often_as_with_the_full_queue_that_it_has_for_most_of_a_run(rehearse):
    rehearse(_waits_of_moco)


def _waits_of_moco():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    for kernel, expected in ((["--kernel", "cosine", "--temperature", "0.2"], 0), ([], 1)):
        asked = rehearse.parsed(["contrastive", "--negatives", "queue", *kernel, *ELSEWHERE])
        assert len(rehearse.waits_of(asked, 0)) == expected, kernel


@pytest.mark.extended
def test_a_gan_waits_for_nothing_on_any_latent(rehearse):
    rehearse(_waits_of_gans)


def _waits_of_gans():
    sys.path.insert(0, str(EVIDENCE))
    import rehearse

    encoder = ["--encoder", "untrained:test_resnet.r160_in1k"]
    for latent, stages, more in (("noise", 1, []), ("simclr", 1, encoder), ("vae", 1, []), ("dae", 2, [])):
        asked = rehearse.parsed(["dae_gan", "--latent", latent, *more, *ELSEWHERE])
        assert len(rehearse.stage_names(asked)) == stages
        assert not [line for number in range(stages) for line in rehearse.waits_of(asked, number)], latent
