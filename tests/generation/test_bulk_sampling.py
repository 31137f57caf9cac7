"""`hf-dpssl sample`: image i whatever batch and process, kill -9, layouts, what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from cases import for_each
from kills import die_at_rename
from PIL import Image
from tiny_pipelines import NAMES, make_dit, make_tokens

from hf_dpssl import VQDiTPipeline
from hf_dpssl.cli.commands import main
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.generation.bulk_sampling import SampleJob, _as_ids_or_names, draw_images, load_pipeline, sample_images
from hf_dpssl.runs.shipped_folders import shipped_folder

STEPS = {"num_inference_steps": 3}
COUNT = 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    make_dit().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("token")
    make_tokens().save_pretrained(path)
    return path


def pictures(folder: Path) -> dict[str, np.ndarray]:
    found = sorted((folder / "images").rglob("*.png"))
    return {str(path.relative_to(folder / "images")): np.asarray(Image.open(path)) for path in found}


def argv(pipeline, out, *more, count: int = COUNT) -> list[str]:
    base = [str(pipeline), "--output_dir", str(out), "--num_images", str(count), "--batch_size", "3"]
    return [*base, *map(str, more)]


STEP_FLAGS = ("--num_inference_steps", "3")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """The uninterrupted result of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(["sample", *argv(folder, out, *STEP_FLAGS)]) == 0
    return out


@for_each("kind", ["flow", "epsilon", "ancestral", "token"])
def test_image_depends_on_its_number_alone(kind):
    pipeline = make_tokens() if kind == "token" else make_dit(objective="flow" if kind == "flow" else "epsilon")
    if kind == "ancestral":  # draws noise at each step
        pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    options = {} if kind == "token" else STEPS | {"guidance_scale": 2.0}
    classes = [2, 0, 1, 1]

    def drawn(size):
        parts = [list(range(COUNT))[first : first + size] for first in range(0, COUNT, size)]
        return torch.cat([draw_images(pipeline, part, classes, seed=5, options=options) for part in parts])

    eights = drawn(8)
    assert (drawn(3) - eights).abs().max() <= 1e-4
    for number in (0, 11, 16):  # by the pipeline itself, one at a time
        generator = torch.Generator().manual_seed(derive_seed(5, "sample", number))
        label = classes[number % 4]
        alone = pipeline(label, generator=[generator], output_type="pt", **options).images
        assert (alone[0] - eights[number]).abs().max() <= 1e-4
    differences = (eights[:, None] - eights[None]).abs().flatten(2).amax(2) + torch.eye(COUNT)
    assert differences.min() > 1e-2  # else the comparisons above would show nothing
    other = draw_images(pipeline, [0], classes, seed=6, options=options)
    assert (other[0] - eights[0]).abs().max() > 1e-2


def test_pictures_are_what_the_pipeline_draws_and_classes_take_turns(folder, whole):
    found = pictures(whole)
    assert list(found) == [f"00000/{number:08d}.png" for number in range(COUNT)]
    pipeline = VQDiTPipeline.from_pretrained(folder)
    for number, picture in enumerate(found.values()):
        generator = [torch.Generator().manual_seed(derive_seed(0, "sample", number))]
        drawn = pipeline(number % 3, generator=generator, output_type="pil", **STEPS).images[0]
        assert np.abs(np.asarray(drawn).astype(int) - picture).max() <= 1
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["images"] == COUNT and manifest["images_of_class"] == {"0": 6, "1": 6, "2": 5}
    assert manifest["options"]["guidance_scale"] == 1.5 and manifest["options"]["num_inference_steps"] == 3
    assert manifest["versions"]["torch"] == torch.__version__.partition("+")[0] and manifest["class_names"] == NAMES
    assert not list(whole.rglob(".*"))


def _sample_in_child(arguments, environment, dies_at):
    os.environ.update(environment)
    if dies_at:
        die_at_rename(dies_at, "*/0*.png")
    torch.set_num_threads(1)
    os._exit(main(["sample", *arguments]))


def start(context, arguments, world=1, dies_at=None):
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world)} if world > 1 else {}
        processes.append(context.Process(target=_sample_in_child, args=(arguments, ranks, dies_at)))
        processes[-1].start()
    return processes


def assert_same_pictures(found, expected):
    assert list(found) == list(expected)
    for name, picture in found.items():  # 1e-4 may round to the next of 255 levels
        assert np.abs(picture.astype(int) - expected[name]).max() <= 1


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_run_goes_on_to_the_same_pictures_with_other_batches(world, fork_server, folder, whole, tmp_path):
    out = tmp_path / "out"
    processes = start(fork_server, argv(folder, out, *STEP_FLAGS, "--batch_size", 1), world, dies_at=5)
    for process in processes:
        process.join()
        assert process.exitcode == -9
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    assert len(kept) == 4 * world
    for process in start(fork_server, argv(folder, out, *STEP_FLAGS, "--batch_size", 5), world):
        process.join()
        assert process.exitcode == 0
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert_same_pictures(pictures(out), pictures(whole))
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (out, whole)]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"] and not list(out.rglob(".*"))


def launched(*launcher, arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "hf_dpssl.cli", "sample"]
    variables = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    variables.pop("TQDM_DISABLE", None)
    return subprocess.run([*command, *arguments], env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_accelerate_launch_and_num_processes_draw_the_pictures_of_one_process(folder, whole, tmp_path):
    config = ("--config_file", str(shipped_folder("training") / "accelerate" / "cpu_2_processes.yaml"))
    done = launched(*config, arguments=argv(folder, tmp_path / "two", *STEP_FLAGS))
    assert done.returncode == 0 and "drawing, 1 of 2 processes" in done.stderr, done.stderr
    assert_same_pictures(pictures(tmp_path / "two"), pictures(whole))
    # accelerate starts one process here without a word
    done = launched("--cpu", "--num_processes", "2", arguments=argv(folder, tmp_path / "one", *STEP_FLAGS))
    assert "accelerate was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "one").exists()
    assert main(["sample", *argv(folder, tmp_path / "own", *STEP_FLAGS, "--num_processes", 2)]) == 0
    assert_same_pictures(pictures(tmp_path / "own"), pictures(whole))


def test_finished_run_is_not_repeated(folder, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(["sample", *argv(folder, whole, *STEP_FLAGS)]) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert f"{COUNT} images" in capsys.readouterr().out
    assert main(["sample", *argv(folder, whole, *STEP_FLAGS, "--json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((whole / "manifest.json").read_text())


@pytest.mark.extended
def test_npz_holds_all_images_and_labels_as_its_readers_expect(token_folder, tmp_path):
    out = tmp_path / "npz"
    assert (
        main(["sample", *argv(token_folder, out, "--format", "npz", "--class_labels", "horse", "0", "--top_k", "4")])
        == 0
    )
    packed = np.load(out / "samples.npz")
    images, labels = packed["arr_0"], packed["arr_1"]
    assert images.shape == (COUNT, 16, 16, 3) and images.dtype == np.uint8
    assert labels.tolist() == [2, 0] * 8 + [2] and labels.dtype == np.int64
    drawn = draw_images(make_tokens(), list(range(COUNT)), [2, 0], seed=0, options={"top_k": 4})
    assert np.abs(images.astype(int) - (drawn * 255).round().permute(0, 2, 3, 1).numpy()).max() <= 1
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "plan.json", "samples.npz"]
    main(["sample", *argv(token_folder, tmp_path / "none", "--format", "npz", "--unconditional")])
    assert np.load(tmp_path / "none" / "samples.npz").files == ["arr_0"]


def test_folders_by_class_are_read_back_as_a_labelled_data_set(folder, tmp_path):
    main(["sample", *argv(folder, tmp_path / "out", *STEP_FLAGS, "--layout", "by_class")])
    assert {name.split("/")[0] for name in pictures(tmp_path / "out")} == set(NAMES)
    data = load_images(str(tmp_path / "out" / "images"))
    assert data.class_names == NAMES and len(data.train) + len(data.evaluation or ()) == COUNT
    unsafe = tmp_path / "unsafe"
    make_dit(names=["a/b", "b"]).save_pretrained(unsafe)
    main(["sample", *argv(unsafe, tmp_path / "by_id", *STEP_FLAGS, "--layout", "by_class", count=4)])
    assert list(pictures(tmp_path / "by_id")) == [f"0000{i % 2}/{i:08d}.png" for i in (0, 2, 1, 3)]


def test_model_without_classes_and_folders_of_few_pictures(tmp_path):
    make_dit(names=[]).save_pretrained(tmp_path / "pipeline")
    main(["sample", *argv(tmp_path / "pipeline", tmp_path / "out", *STEP_FLAGS, "--images_per_folder", 2, count=5)])
    assert list(pictures(tmp_path / "out"))[-2:] == ["00001/00000003.png", "00002/00000004.png"]
    main(["sample", *argv(tmp_path / "pipeline", tmp_path / "flat", *STEP_FLAGS, "--images_per_folder", 0, count=2)])
    assert list(pictures(tmp_path / "flat")) == ["00000000.png", "00000001.png"]


def test_folder_of_diffusers_own_pipeline_gives_its_own_images(tmp_path):
    torch.manual_seed(0)
    sizes = dict(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, in_channels=4, out_channels=8
    )
    blocks = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    stock = diffusers.DiTPipeline(
        diffusers.DiTTransformer2DModel(**sizes).eval(),
        diffusers.AutoencoderKL(**blocks, **kinds).eval(),
        diffusers.DDIMScheduler(),
    )
    stock.save_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    assert (
        main(
            ["sample", *argv(tmp_path / "stock", tmp_path / "out", *STEP_FLAGS, "--class_labels", "999", "7", count=4)]
        )
        == 0
    )
    for number, picture in enumerate(pictures(tmp_path / "out").values()):
        generator = [torch.Generator().manual_seed(derive_seed(0, "sample", number))]
        drawn = stock([(999, 7)[number % 2]], guidance_scale=1.5, generator=generator, **STEPS).images[0]
        assert np.abs(picture.astype(int) - np.asarray(drawn)).max() <= 1


def test_scheduler_and_precision_are_those_asked_for(tmp_path):
    make_dit(objective="epsilon").save_pretrained(tmp_path / "pipeline")
    job = SampleJob(
        str(tmp_path / "pipeline"),
        str(tmp_path / "out"),
        num_images=2,
        scheduler="EulerDiscrete",
        scheduler_config={"timestep_spacing": "leading"},
        dtype="bfloat16",
        options=dict(STEPS),
    )
    pipeline = load_pipeline(job, torch.device("cpu"))
    assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler and pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.scheduler.config.timestep_spacing == "leading"
    assert sample_images(job)["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert len(pictures(tmp_path / "out")) == 2


def test_folder_of_another_pipeline_or_of_other_options_is_not_mixed(folder, whole, tmp_path, capsys):
    make_dit(seed=1).save_pretrained(tmp_path / "other")
    cases = [
        (argv(tmp_path / "other", whole, *STEP_FLAGS), r"begun with weights \w{12}, not \w{12}"),
        (argv(folder, whole, *STEP_FLAGS, "--seed", 1), "seed 0, not 1"),
        (argv(folder, whole, *STEP_FLAGS, "--guidance_scale", 3), "options guidance_scale 1.5, not 3.0"),
        (argv(folder, whole, *STEP_FLAGS, "--scheduler_config", '{"shift": 3.0}'), "scheduler shift 1.0, not 3.0"),
        (argv(folder, whole, *STEP_FLAGS, count=9), f"num_images {COUNT}, not 9"),
        (argv(folder, whole, *STEP_FLAGS, "--class_labels", "cat"), r"class_ids \[0, 1, 2\], not \[0\]"),
    ]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    for arguments, message in cases:
        assert main(["sample", *arguments]) == 2
        assert re.search(message, capsys.readouterr().err)
    plan = json.loads((whole / "plan.json").read_text())
    (tmp_path / "old").mkdir(), plan["versions"].update(torch="1.0")
    (tmp_path / "old" / "plan.json").write_text(json.dumps(plan))
    assert main(["sample", *argv(folder, tmp_path / "old", *STEP_FLAGS)]) == 2
    assert "versions torch 1.0, not" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert main(["sample", *argv(folder, tmp_path / "old", *STEP_FLAGS, "--overwrite", count=2)]) == 0


def test_numbers_of_a_call_are_names_or_ids_and_never_a_mixture():
    pipeline = make_dit([str(number) for number in range(1, 13)])
    labels = {("0", "1", "2"): [0, 1, 2], ("1", "2", "3"): [0, 1, 2], ("12",): [11], (12 - 1, "12"): [11, 11]}
    for given, expected in labels.items():
        assert pipeline.class_ids(_as_ids_or_names(list(given), pipeline)) == expected
    with pytest.raises(ValueError, match="mix names and ids: '12' is a name and no id, '0' is no name"):
        _as_ids_or_names(["0", "12"], pipeline)


def test_bad_input_says_which_value_and_what_is_allowed(folder, token_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "notes.txt").write_text("mine")
    out = tmp_path / "out"
    cases = [
        (argv(folder, out, "--class_labels", "hors"), "known are for example ['horse']"),
        (argv(folder, out, "--class_labels", "3"), "class ids lie in [0, 2], got 3"),
        (argv(folder, out, "--num_inference_steps", "0"), "num_inference_steps must be at least 1, got 0"),
        (argv(folder, out, "--guidance_scale", "0.5"), "guidance_scale must be at least 1"),
        (argv(folder, out, "--scheduler", "DDMI"), "DDIMScheduler'"),
        (argv(folder, out, "--scheduler_config", '{"shfit": 1}'), "does not take ['shfit']"),
        (argv(folder, out, "--temperature", "1"), "a VQDiTPipeline does not take ['temperature']"),
        (argv(token_folder, out, "--scheduler", "DDIM"), "a VQTokenPipeline has no scheduler"),
        (argv(folder, out, "--seed", "-1"), "seed must be at least 0, got -1"),
        (argv(folder, out, "--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (argv(folder, out, "--unconditional", "--class_labels", "cat"), "contradict"),
        (argv(folder, out, "--layout", "by_class", "--format", "npz"), "layout by_class is for pictures"),
        (argv(folder, tmp_path / "full"), "is not empty and holds no drawn images"),
        (argv(folder, out, "--num_processes", "0"), "num_processes=0"),
        (argv(tmp_path, out), "holds no pipeline (model_index.json)"),
    ]
    for arguments, message in cases:
        assert main(["sample", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
    assert not out.exists() and (tmp_path / "full" / "notes.txt").exists()
    with pytest.raises(SystemExit):
        main(["sample", *argv(folder, out, "--scheduler_config", "[1]")])
    assert "invalid JSON object value" in capsys.readouterr().err


def test_images_are_drawn_in_bfloat16_by_default_where_a_gpu_computes_in_it(monkeypatch):
    assert SampleJob("pipeline", "folder").dtype == "float32"
    for supported, wanted in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=supported: has)
        assert SampleJob("pipeline", "folder").dtype == wanted
        assert SampleJob("pipeline", "folder", dtype="float16").dtype == "float16"
