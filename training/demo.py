"""The whole chain on scikit-learn's digits, on a CPU, in minutes: autoencoders, generators, encoders, judged.

    make demo          # or: hf-dpssl demo --output_dir outputs/demo

Writes autoencoder/, drift/ (one-step generator), dit/ and encoder/ (complete checkpoint folders), comparison/ (what
they are compared with), samples.png (one-step generator left, DiT right), reconstructions.png, map.png and
report.json; prints a short table. Every figure is on the 360 held-out images; a missed target is printed as missed.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import demo_parser, find_recipe, parse_demo

if __name__ == "__main__":
    parse_demo(demo_parser(__doc__))  # help and wrong flags end here, before the libraries are imported

import contrastive
import dae_dit
import dae_drift
import dae_vq
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.multiprocessing.spawn import ProcessException

from hf_dpssl import SimCLRForPreTraining, VQAutoencoder, VQDiTPipeline, VQDriftPipeline
from hf_dpssl.data import keyed_random, load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.evaluation import class_consistency, copies, diversity, frechet_distance_of_features, knn, psnr
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.lineage import read_json
from hf_dpssl.runs.plots import plot_map, save_grid
from hf_dpssl.runs.results import write_results

IMAGE_SIZE = 16
NUM_SAMPLES = 300
FEATURES = 9  # layers of the classifier before it flattens
OUTPUTS = ("encoder", "autoencoder", "drift", "dit", "comparison", "checkpoints", "latents", "logs")  # folders
FILES = ("samples.png", "reconstructions.png", "map.png", "report.json", "encoders.log")
MARK = ".made-by-demo"
KNN = {"k": 20, "metric": "euclidean"}
ENCODER_2D = "comparison/encoder-2d"
ONE_STEP = ["--architecture", "mlp", "--num_layers", "3", "--width", "256", "--learning_rate", "3e-3"]
AUTOENCODERS: dict[str, tuple[str, list[str]]] = {  # name in the report: name of the run, and its flags
    "joint": ("autoencoder", []),
    "dae": ("comparison/dae", ["--arm", "dae"]),  # of equal steps in both stages
}
GENERATORS = {  # name in the report: folder, its pipeline, and how it is called
    "one_step": ("drift", VQDriftPipeline, {}),
    "one_step_dae": ("comparison/dae-drift", VQDriftPipeline, {}),
    "dit": ("dit", VQDiTPipeline, {"num_inference_steps": 25, "guidance_scale": 1.0}),
    "dit_guided": ("dit", VQDiTPipeline, {"num_inference_steps": 25, "guidance_scale": 2.0}),
}


def main(argv: list[str] | None = None) -> Path:
    """Run the demo; returns the folder with report.json."""
    args = parse_demo(demo_parser(__doc__), argv)
    folder = Path(args.output_dir)
    steps, watch = read_steps(args.recipe), Stopwatch()
    claim(folder)
    base = ["--output_dir", str(folder), "--seed", str(args.seed), "--checkpointing_steps", "100000"]

    images = load_splits()
    with watch("autoencoder"):
        joint = train_autoencoder(base, steps, "joint")
        judge_autoencoders({"joint": joint}, images, folder / "reconstructions.png")
        say(f"{folder}/reconstructions.png: held-out digits, and below them what the autoencoder makes of them")
    with encoders_beside(base, steps, folder / "encoders.log") as wait:
        with watch("one-step generator"):
            train_one_step(base, steps, joint, "drift")
        with watch("latent DiT"):
            dae_dit.main([*base, "--autoencoder", str(joint), "--max_train_steps", str(steps["dit"])])
        with watch("DAE and its one-step generator"):
            dae = train_autoencoder(base, steps, "dae")
            train_one_step(base, steps, dae, "comparison/dae-drift")
            report = judge_autoencoders({"joint": joint, "dae": dae}, images, folder / "reconstructions.png")
        with watch("encoders, beside the others"):
            wait()
            encoders = {32: folder / "encoder", 2: folder / ENCODER_2D}
            report |= judge_encoders(encoders, images, folder / "map.png")
    with watch("samples"):
        report |= judge_samples(folder, images, steps, args.seed)
        for name in ("drift", "dit"):
            state_in_card(folder / name, report)
    shutil.rmtree(folder / "checkpoints")

    targets = check_targets(report)
    samples = {"train": len(images["train"]), "held_out": len(images["held_out"]), "generated": NUM_SAMPLES}
    timing = {"seconds": watch.seconds | {"total": round(sum(watch.seconds.values()), 1)}}
    write_results(
        folder / "report.json", report | timing, dataset="digits", seed=args.seed, samples=samples,
        targets=targets, knn=KNN, recipe=steps,
    )  # fmt: skip
    print_table(report, targets, watch.seconds, folder)
    return folder


def claim(folder: Path) -> None:
    """Remove what an earlier demo left, and mark the folder as a demo's.

    Raises:
        FileExistsError: folders or files of those names that no demo made.
    """
    existing = [folder / name for name in OUTPUTS + FILES if (folder / name).exists()]
    if existing and not (folder / MARK).exists():
        raise FileExistsError(
            f"{existing[0]} is there and was made by no demo (there is no {MARK} in {folder}): choose another "
            "--output_dir."
        )
    for path in existing:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def read_steps(recipe: str) -> dict:
    """Numbers of steps and epochs of the demo, from a recipe file; ValueError unless it has them all and no others."""
    import yaml

    steps, wanted = (yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")) for name in (recipe, "demo"))
    if not isinstance(steps, dict) or steps.keys() != wanted.keys():
        raise ValueError(f"recipe {recipe!r} of the demo must have exactly the numbers {', '.join(wanted)}.")
    return steps


class Stopwatch:
    """`with watch("name")`: seconds of each part."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str):
        """The block that follows is the step of that name."""
        self.name, self.start = name, time.perf_counter()
        say(f"\n== {name}")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.seconds[self.name] = round(time.perf_counter() - self.start, 1)


def load_splits() -> dict[str, Tensor]:
    """Images (N, 3, 16, 16) in [0, 1] and classes of both splits, plain and randomly shifted and rotated."""
    data, images = load_images("digits"), {}
    for name, split, offset in (("train", data.train, 0), ("held_out", data.evaluation, 100_000)):
        table = ImageTable(data, split, IMAGE_SIZE)
        table.preload(2**30, show_progress=False)
        images[name], images[f"{name}_classes"] = table.images / 255, table.labels
        images[f"{name}_moved"] = shift_and_rotate(images[name], torch.arange(len(table)) + offset)
    return images


def shift_and_rotate(images: Tensor, sample_ids: Tensor, seed: int = 1, shift: float = 2, angle: float = 20) -> Tensor:
    """Images (N, C, H, W) moved by up to `shift` pixels each way and `angle` degrees, zeros outside."""
    draws = 2 * keyed_random.uniform(sample_ids, 3, seed=seed, stream="shift and rotate") - 1
    turn = draws[:, 0] * math.radians(angle)
    offset = draws[:, 1:] * 2 * shift / images.shape[-1]
    rows = [
        torch.stack([turn.cos(), -turn.sin(), offset[:, 0]], dim=1),
        torch.stack([turn.sin(), turn.cos(), offset[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@contextmanager
def encoders_beside(base: list[str], steps: dict, log: Path) -> Iterator[Callable[[], None]]:
    """Train the encoders in a process of its own while the block runs, each with half of the threads.

    Small networks do not keep several cores busy: two processes of one thread are faster than one of two.

    Args:
        base, steps: as of `train_encoders`.
        log: file of what that process prints.

    Yields:
        A function that waits for the encoders; RuntimeError, with the last line of the log, where they failed.
    """
    threads = torch.get_num_threads()
    half = max(1, threads // 2)
    say(f"the encoders are trained meanwhile, in a process of their own: {log}")
    context = spawn(_encoders_process, (base, steps, half, str(log)), nprocs=1, join=False, daemon=True)

    def wait() -> None:
        try:
            while not context.join():
                pass
        except ProcessException as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(f"the encoders' process failed: {reason} See {log}.") from error

    torch.set_num_threads(half)
    try:
        yield wait
    finally:
        torch.set_num_threads(threads)
        for process in context.processes:
            process.terminate()


def _encoders_process(_: int, base: list[str], steps: dict, threads: int, log: str) -> None:
    with open(log, "w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(threads)
    train_encoders(base, steps)


def train_encoders(base: list[str], steps: dict) -> dict[int, Path]:
    """t-SimCLR with 32-d and 2-d embeddings: {dimension: folder}. The map starts from the 32-d run, as in t-SimCNE."""
    base = [*base, "--channels_last", "True"]
    space = contrastive.main([*base, "--num_train_epochs", str(steps["encoder_32d_epochs"])])
    options = ["--projection_dim", "2", "--dof", "1", "--feature_norm", "none", "--temperature", "0.5"]
    options += [
        "--name",
        ENCODER_2D,
        "--num_train_epochs",
        str(steps["encoder_2d_epochs"]),
        "--init_encoder",
        str(space),
    ]
    return {32: space, 2: contrastive.main([*base, *options])}


@torch.no_grad()
def judge_encoders(folders: dict[int, Path], images: dict[str, Tensor], picture: Path) -> dict:
    """kNN accuracy of embeddings, PCA, the untrained encoder and raw pixels; writes the 2-d map."""

    def accuracy(represent, moved: bool) -> float:
        suffix = "_moved" if moved else ""
        bank, query = represent(images[f"train{suffix}"], images[f"held_out{suffix}"])
        return knn(bank, images["train_classes"], query, images["held_out_classes"], **KNN)["knn_top1"]

    def both(represent) -> dict[str, float]:
        return {"plain": accuracy(represent, False), "moved": accuracy(represent, True)}

    def with_model(model):
        return lambda *parts: [model((part - 0.5) / 0.5).embeddings for part in parts]

    def with_pca(dimension: int):
        def represent(bank, query):
            pca = PCA(dimension, random_state=0).fit(bank.flatten(1).numpy())
            return [torch.from_numpy(pca.transform(part.flatten(1).numpy())) for part in (bank, query)]

        return represent

    report = {"knn_raw_pixels": both(lambda *parts: [part.flatten(1) for part in parts])}
    for dimension, folder in folders.items():
        trained = SimCLRForPreTraining.from_pretrained(folder / "pretraining").eval()
        torch.manual_seed(0)
        untrained = SimCLRForPreTraining(trained.config).eval()
        entries = {"t_simclr": with_model(trained), "pca": with_pca(dimension), "untrained": with_model(untrained)}
        report[f"knn_{dimension}d"] = {name: both(represent) for name, represent in entries.items()}
        if dimension == 2:
            classes, maps = images["held_out_classes"].numpy(), {}
            for title, name in (("PCA", "pca"), ("t-SimCLR", "t_simclr")):
                _, points = entries[name](images["train"], images["held_out"])
                score = report["knn_2d"][name]["plain"]
                maps[f"{title}, held-out digits in 2-d\nkNN accuracy {score:.1f} %"] = (points.numpy(), classes)
            plot_map(maps, [str(digit) for digit in range(10)], picture)
    return report


def train_autoencoder(base: list[str], steps: dict, name: str) -> Path:
    """One of AUTOENCODERS; returns its folder."""
    run_name, flags = AUTOENCODERS[name]
    stages = ["--stage_1_steps", str(steps["stage_1"]), "--stage_2_steps", str(steps["stage_2"])]
    return dae_vq.main([*base, *stages, "--name", run_name, *flags])


def train_one_step(base: list[str], steps: dict, autoencoder: Path, name: str) -> Path:
    """A one-step generator in the latents of an autoencoder; returns its folder."""
    options = ["--autoencoder", str(autoencoder), "--name", name, "--max_train_steps", str(steps["drift"])]
    return dae_drift.main([*base, *ONE_STEP, *options])


@torch.no_grad()
def judge_autoencoders(folders: dict[str, Path], images: dict[str, Tensor], picture: Path) -> dict:
    """PSNR of every run and code statistics of the first; writes originals and reconstructions, a row each."""
    held_out = images["held_out"] * 2 - 1
    report, rows = {"reconstruction_psnr": {}}, [held_out[:10]]
    for name, folder in folders.items():
        autoencoder = VQAutoencoder.from_pretrained(folder).eval()
        reconstructions = autoencoder(held_out).pixel_values.clamp(-1, 1)
        report["reconstruction_psnr"][name] = psnr(held_out, reconstructions, value_range=2.0)["psnr"]
        rows.append(reconstructions[:10])
        if name == "joint":
            metrics = autoencoder.config.dpssl["metrics"]
            report |= {key: metrics[key] for key in ("code_usage", "code_perplexity", "dead_codes")}
    save_grid(torch.cat(rows), picture, columns=10, min_side=64)
    return report


def classifier_of(side: int, classes: int) -> nn.Sequential:
    """An untrained convolutional classifier of images (N, 3, side, side) in [0, 1]; side is divisible by 4."""
    layers: list[nn.Module] = []  # the first FEATURES: convolutions
    for channels_in, channels, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [nn.Conv2d(channels_in, channels, 3, stride, 1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * (side // 4) ** 2, classes))


def train_classifier(images: dict[str, Tensor], epochs: int) -> nn.Sequential:
    """A classifier of real images, "train" and "train_classes", which are slightly moved in each epoch."""
    torch.manual_seed(0)
    classifier = classifier_of(images["train"].shape[-1], int(images["train_classes"].max()) + 1)
    train, classes = images["train"], images["train_classes"]
    batches = len(train) // 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        order = keyed_random.permutation(len(train), seed=0, epoch=epoch)
        for rows in order[: batches * 64].view(batches, 64):
            moved = shift_and_rotate(train[rows], rows + 10_000 * epoch, seed=2, shift=1, angle=10)
            optimizer.zero_grad()
            F.cross_entropy(classifier(moved), classes[rows]).backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


@torch.no_grad()
def judge_samples(folder: Path, images: dict[str, Tensor], steps: dict, seed: int) -> dict:
    """What each of GENERATORS draws, its first 300 samples of the seed; writes some of them side by side.

    Of each: passes of the network for an image, seconds of training and of sampling, class consistency, copies,
    diversity, and the Frechet distance to the held-out digits in the classifier's last features.
    """
    with torch.enable_grad():
        classifier = train_classifier(images, steps["classifier_epochs"])
    held_out, classes = images["held_out"], images["held_out_classes"]
    ids = torch.arange(NUM_SAMPLES) % 10

    def consistency(pictures: Tensor, wanted: Tensor) -> float:
        return class_consistency(classifier(pictures), wanted)["class_consistency"]

    def distance(pictures: Tensor) -> float:
        seen = [classifier[:FEATURES](part).mean((2, 3)) for part in (pictures, held_out)]
        return frechet_distance_of_features(*seen)

    table, drawn = {}, {}
    for name, (place, pipeline_class, options) in GENERATORS.items():
        pipeline = pipeline_class.from_pretrained(folder / place)
        pipeline.set_progress_bar_config(disable=True)
        start = time.perf_counter()
        pictures = pipeline(ids.tolist(), generator=seed, output_type="pt", **options).images
        passes = options.get("num_inference_steps", 1) * (2 if options.get("guidance_scale", 1) > 1 else 1)
        table[name] = {
            "passes": passes,
            "training_seconds": read_json(folder / place / "results.json")["training"]["seconds"],
            "sampling_seconds": round(time.perf_counter() - start, 3),
            "class_consistency": consistency(pictures, ids),
            "copies": copies(pictures, images["train"], held_out)["copies"],
            "diversity": diversity(pictures, ids, held_out, classes)["diversity"],
            "frechet_distance": distance(pictures),
        }
        drawn[name] = pictures.unflatten(0, (-1, 10)).transpose(0, 1)[:, :10]  # (classes, 10, 3, H, W)
    gap = torch.ones_like(drawn["dit"][:, :1])
    side_by_side = torch.cat([drawn["one_step"], gap, drawn["dit"]], 1).flatten(0, 1)
    save_grid(side_by_side * 2 - 1, folder / "samples.png", columns=21, min_side=32)
    vae = VQAutoencoder.from_pretrained(folder / "autoencoder").eval()
    reconstructed = (vae(held_out * 2 - 1).pixel_values / 2 + 0.5).clamp(0, 1)
    return {
        "generators": table,
        "classifier_accuracy": consistency(held_out, classes),
        "class_consistency_ceiling": consistency(reconstructed, classes),
        "frechet_distance_of_real": distance(images["train"][:NUM_SAMPLES]),
    }


def state_in_card(generator: Path, report: dict) -> None:
    """Put the figures of a generator's samples, as report.json has them, into its results and card."""
    results = read_json(generator / "results.json")
    for name, (place, _, _) in GENERATORS.items():
        if place == generator.name:
            suffix = "_guided" if name.endswith("guided") else ""
            for measure in ("class_consistency", "copies", "diversity"):
                results["metrics"][measure + suffix] = report["generators"][name][measure]
    results["samples"] |= {"generated": NUM_SAMPLES, "reference": len(load_images("digits").train)}
    write_json(generator / "results.json", results)
    write_card(generator)


def check_targets(report: dict) -> dict[str, dict]:
    """Each target of the demo with the value reached and whether it was met."""
    plane, space = report["knn_2d"], report["knn_32d"]
    one, many = report["generators"]["one_step"], report["generators"]["dit"]
    limits = [
        ("knn_2d t-SimCLR above PCA, plain digits", plane["t_simclr"]["plain"], ">", plane["pca"]["plain"]),
        ("knn_2d t-SimCLR above PCA, moved digits", plane["t_simclr"]["moved"], ">", plane["pca"]["moved"]),
        ("knn_32d above raw pixels, moved digits", space["t_simclr"]["moved"], ">", report["knn_raw_pixels"]["moved"]),
        ("code_usage, percent", report["code_usage"], ">=", 60.0),
        ("code_perplexity", report["code_perplexity"], ">=", 64.0),
        ("classifier_accuracy, percent", report["classifier_accuracy"], ">=", 98.0),
        ("one step: class_consistency, percent", one["class_consistency"], ">=", 95.0),
        ("one step: copies, percent", one["copies"], "<=", 5.0),
        ("one step: diversity, of real", one["diversity"], ">=", 0.8),
        ("one step: frechet_distance, at most the DiT's", one["frechet_distance"], "<=", many["frechet_distance"]),
    ]
    compare = {">": float.__gt__, ">=": float.__ge__, "<=": float.__le__}
    return {
        name: {"value": value, "target": f"{sign} {limit:.4g}", "met": compare[sign](float(value), float(limit))}
        for name, value, sign, limit in limits
    }


def print_table(report: dict, targets: dict[str, dict], seconds: dict[str, float], folder: Path) -> None:
    """The report in short."""
    say("\n== report, on held-out digits")
    for name, entry in targets.items():
        say(f"{'ok    ' if entry['met'] else 'MISSED'} {name:<45} {entry['value']:>7.2f}   target {entry['target']}")
    for name, row in report["generators"].items():
        figures = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
        say(f"{name}: {figures}")
    decibels = ", ".join(f"{name} {value:.1f}" for name, value in report["reconstruction_psnr"].items())
    say(f"reconstruction PSNR in dB: {decibels}")
    say(f"seconds: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}")
    say(f"see {folder}/samples.png, reconstructions.png, map.png, report.json")


if __name__ == "__main__":
    sys.exit(reported("demo.py", main))
