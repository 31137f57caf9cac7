"""The table "DCGAN with different latents" in small: what the generator starts from, on cifar10-jpeg at 32 px.

    export DPSSL_DATA=folder                              # with cifar10-jpeg-train.parquet and -test.parquet
    python training/evidence/gan_latents.py --stage tune    # discriminator, penalty and learning rate
    python training/evidence/gan_latents.py --stage train   # four latents, judged on test images
    python training/evidence/gan_latents.py --stage report  # results/gan_latents.json and gan_latents.png

A killed study goes on where it stopped, and several processes share the work.

Protocol: 20,000 images of the training split are trained on, 2,000 others are the validation images of `tune`, and the
test images are read by `train` alone. Generator, discriminator, steps, order of images and optimiser are the same for
all latents; dae has half as many steps before, against its weak generator. The discriminator's norm, penalty and
learning rate are chosen by the Frechet distance of the noise latent, so in favour of the baseline. The SimCLR latent
and the self-supervised extractor are encoders of different losses, widths and seeds, trained on the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from runs import alone, claimed

from hf_dpssl.data import keyed_random, load_images
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.results import write_results

sys.path.insert(0, str(Path(__file__).parent.parent))  # the training scripts

TRAIN_IMAGES, VALIDATION_IMAGES = 20_000, 2_000
ENCODERS = {
    "latent": "--kernel cosine --normalization anchor --feature_norm l2 --temperature 0.3 --seed 100",
    "extractor": "--kernel student_t --normalization joint --feature_norm none --temperature 2 --seed 101",
}
WIDTHS = {"latent": [12, 24, 48, 96], "extractor": [16, 32, 64, 128]}
LATENTS = {
    "noise": "noise (DCGAN)",
    "simclr": "SimCLR features, frozen",
    "vae": "VAEGAN",
    "dae": "DAE-VAEGAN",
}
STEPS, STAGE_1_STEPS = 2_500, 1_250
SHARED = (
    f"--recipe gan-cifar10-jpeg --seed 0 --warmup_steps 50 --max_train_steps {STEPS} --stage_1_steps {STAGE_1_STEPS}"
)
# {"encoder": steps in which it learns, "in all"}; SimCLR's encoder was trained before, on its own loss.
BUDGETS = dict.fromkeys(("noise", "simclr"), {"encoder": 0, "in all": STEPS})
BUDGETS |= {
    "vae": {"encoder": STEPS, "in all": STEPS},
    "dae": {"encoder": STAGE_1_STEPS, "in all": STAGE_1_STEPS + STEPS},
}
TUNED = [
    dict(discriminator_norm=norm, learning_rate=rate, r1_weight=r1)
    for norm, rate, r1 in (("none", 1e-3, 1), ("none", 1e-3, 10), ("none", 2e-3, 1), ("group", 1e-3, 10))
]
TUNING = "--latent noise --max_train_steps 1000 --num_generated 2000 --extractor resnet56-cifar10"
CLASSIFIER = "cifar10-resnet56.safetensors"
FID = "fid_resnet56-cifar10"


def prepare(folder: Path) -> dict[str, Path]:
    """{"tune" or "train": folder of the parquet files of cifar10-jpeg with validation or test images}."""
    folders = {name: folder / f"data-{name}" for name in ("tune", "train")}
    with alone(folder / "data"):
        if not all((path / "cifar10-jpeg-test.parquet").exists() for path in folders.values()):
            data = load_images("cifar10-jpeg")
            rows = keyed_random.permutation(len(data.train), seed=0, epoch=0).tolist()
            training = data.train.select(rows[:TRAIN_IMAGES])
            held_out = {"tune": data.train.select(rows[TRAIN_IMAGES : TRAIN_IMAGES + VALIDATION_IMAGES])}
            held_out["train"] = data.evaluation
            source = Path(os.environ["DPSSL_DATA"]).absolute()
            weights = [file for file in (source / CLASSIFIER, source.parent / "weights" / CLASSIFIER) if file.exists()]
            for name, path in folders.items():
                path.mkdir(exist_ok=True)
                for file in weights[:1]:  # the extractor looks for them in the folder of the data
                    (path / CLASSIFIER).unlink(missing_ok=True)
                    (path / CLASSIFIER).symlink_to(file)
                for split, images in (("train", training), ("test", held_out[name])):
                    file = path / f"cifar10-jpeg-{split}.parquet"
                    images.to_parquet(file.with_suffix(".unfinished"))
                    file.with_suffix(".unfinished").rename(file)
    return folders


def train_encoders(folder: Path) -> None:
    """The encoder whose features are a latent, and the one that judges, trained once."""
    import contrastive

    for name, flags in ENCODERS.items():
        with alone(folder / name):
            if not (folder / name / "config.json").exists():
                model_args = json.dumps({"channels": WIDTHS[name], "stem_width": 12, "output_stride": 8})
                run = ["--dataset", "cifar10-jpeg", "--name", name, "--model_args", model_args, "--batch_size", "256"]
                run += ["--num_train_epochs", "8", "--overwrite", "True", "--output_dir", str(folder)]
                contrastive.main([*run, *flags.split()])


def tune(setting: dict, folder: Path) -> dict:
    """Results of a short run of the noise latent on validation images."""
    import dae_gan

    name = "-".join(f"{key}-{value}" for key, value in setting.items())
    flags = [part for key, value in setting.items() for part in (f"--{key}", str(value))]
    target = dae_gan.main([*SHARED.split(), *TUNING.split(), *flags, "--output_dir", str(folder / "tune" / name),
                           "--resume_from_checkpoint", "latest"])  # fmt: skip
    return {"setting": setting} | json.loads((target / "results.json").read_text(encoding="utf-8"))


def chosen(folder: Path) -> dict:
    """The setting of the smallest Frechet distance on validation images."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("tune-*.json"))]
    if len(found) < len(TUNED):
        raise FileNotFoundError(f"{folder} holds {len(found)} of {len(TUNED)} tuning runs: run --stage tune first.")
    return min(found, key=lambda entry: entry["metrics"][FID])["setting"]


def train(latent: str, folder: Path) -> dict:
    """Results of a latent with the chosen setting, on test images."""
    import dae_gan

    flags = [part for key, value in chosen(folder).items() for part in (f"--{key}", str(value))]
    more = ["--latent", latent, "--extractor", "resnet56-cifar10", str(folder / "extractor")]
    more += ["--encoder", str(folder / "latent"), "--output_dir", str(folder / latent)]
    target = dae_gan.main([*SHARED.split(), *flags, *more, "--resume_from_checkpoint", "latest"])
    return json.loads((target / "results.json").read_text(encoding="utf-8"))


def write_report(folder: Path) -> None:
    """results/gan_latents.json beside this file, and the first images of each latent side by side."""
    rows = {name: json.loads((folder / f"train-{name}.json").read_text(encoding="utf-8")) for name in LATENTS}
    ceiling = {
        key.removeprefix("ceiling_"): value
        for key, value in rows["noise"]["metrics"].items()
        if key.startswith("ceiling_")
    }
    table = {"real training images": {"training density": ceiling}}
    for name, row in rows.items():
        own = {key: value for key, value in row["metrics"].items() if not key.startswith("ceiling_")}
        table[LATENTS[name]] = {row["sampled_from"]: own} | row["densities"]
    tuning = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("tune-*.json"))]
    settings = {
        "chosen": chosen(folder),
        "tuning": [entry["setting"] | {FID: entry["metrics"][FID]} for entry in tuning],
        "commands": {name: row["command"] for name, row in rows.items()},
        "quality": rows["noise"]["quality"],
    }
    here = Path(__file__).parent
    samples = rows["noise"]["samples"] | {"validation": VALIDATION_IMAGES}
    write_results(here / "results" / "gan_latents.json", table, dataset="cifar10-jpeg", seed=0, samples=samples,
                  settings=settings)  # fmt: skip
    sheet = side_by_side({title: folder / name / "gan" / "samples.png" for name, title in LATENTS.items()})
    # 128 colours keep the file small.
    sheet.quantize(128, dither=Image.Dither.NONE).save(here / "gan_latents.png", optimize=True)


def side_by_side(pictures: dict[str, Path], rows: int = 5, columns: int = 8) -> Image.Image:
    """The first images of each grid under its title."""
    grids = {title: Image.open(path).convert("RGB") for title, path in pictures.items()}
    cell = next(iter(grids.values())).width // 10
    size = (columns * cell, rows * cell)
    sheet = Image.new("RGB", ((size[0] + 12) * len(grids), size[1] + 18), "white")
    for place, (title, grid) in enumerate(grids.items()):
        sheet.paste(grid.crop((0, 0, *size)), (place * (size[0] + 12), 18))
        ImageDraw.Draw(sheet).text((place * (size[0] + 12), 2), title, fill="black")
    return sheet


def main(argv: list[str] | None = None) -> None:
    """Run a stage of the study with command-line arguments `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["tune", "train", "report"], required=True)
    parser.add_argument("--runs", type=Path, default=Path("outputs/gan_latents"), help="folder of the runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    folder = args.runs.absolute()
    if args.stage == "report":
        write_report(folder)
        return
    os.environ["DPSSL_DATA"] = str(prepare(folder)[args.stage])
    if args.stage == "train":
        train_encoders(folder)
    stage = tune if args.stage == "tune" else train
    for number, work in enumerate(TUNED if args.stage == "tune" else LATENTS):
        path = folder / f"{args.stage}-{number if args.stage == 'tune' else work}.json"
        with claimed(path) as free:
            if free:
                write_json(path, stage(work, folder))
                print(path.name, flush=True)


if __name__ == "__main__":
    main()
