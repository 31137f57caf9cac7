"""The subcommand `hf-dpssl report`: what autoencoders' latents are worth, side by side, as JSON and a page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..autoencoder.choices import GENERATOR, PARTS
from ..runs.console import printable, say
from .parsing import command_parser, parse_command

if TYPE_CHECKING:
    from ..embedding.feature_extractors import FeatureExtractor
    from ..models.modeling_vq import VQAutoencoder


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "report",
        "Measure what the latent of an autoencoder is worth: reconstruction, informativeness, nats per "
        "image, collapse, Lipschitz constants at a fixed scale of the latent, distances between spaces. Several "
        "autoencoders are compared, and it is said how far such measures foretell what a generator makes of a latent.",
    )
    parser.add_argument("autoencoders", nargs="+", help="folders or Hub ids of autoencoders")
    parser.add_argument("--names", nargs="+", help="how they are called on the page; default: their folders")
    parser.add_argument(
        "--dataset", default="digits", help="digits, cifar10 ..., Hub id, folder, parquet file, or a union a+b"
    )
    parser.add_argument("--image_column", help="column of pictures; found by its type when not given")
    parser.add_argument("--label_column", help="column of classes; found by its type when not given")
    parser.add_argument(
        "--extractor", help="of Frechet distances: inception, resnet56-cifar10, an encoder or timm:NAME"
    )
    parser.add_argument(
        "--parts", nargs="+", default=list(PARTS), choices=[*PARTS, GENERATOR],
        help=f"what is measured; {GENERATOR} trains generators of growing width, minutes per autoencoder",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=5000, help="at most so many of each split, drawn at random")
    parser.add_argument("--lipschitz_images", type=int, default=128, help="of which local constants are taken")
    parser.add_argument("--distance_images", type=int, default=200, help="of which distances of spaces are taken")
    parser.add_argument("--seed", type=int, default=0, help="of probes, starts and subsets")
    parser.add_argument("--output_dir", default="outputs/report", help="folder of report.json and report.png")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl report`: returns the exit status; raises as `measure`."""
    args = parse_command(parser(), argv)
    from ..autoencoder.forecast import firsts, forecast_lines, read_forecast
    from ..autoencoder.report_page import draw_page
    from ..runs.atomic_files import atomic_file
    from ..runs.results import write_results

    entries, samples = measure(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        name: value for name, value in vars(args).items() if name not in ("output_dir", "dataset", "seed", "json")
    }
    metrics = {name: entry["metrics"] for name, entry in entries.items()}
    about = {name: entry["about"] for name, entry in entries.items()}
    more = {"dataset": args.dataset, "seed": args.seed, "samples": samples, "options": options, "autoencoders": about}
    forecast = read_forecast()
    lines = forecast_lines(forecast, entries)
    more["forecast"] = {"says": lines, "first": firsts(forecast, entries)} | forecast
    write_results(folder / "report.json", metrics, **more)
    with atomic_file(folder / "report.png", "wb") as file:
        draw_page(
            entries, file, title=f"{', '.join(entries)} on {args.dataset}, {samples['evaluation']} held-out images"
        )
    if args.json:
        print(json.dumps(metrics, indent=2))
        return 0
    names = dict.fromkeys(name for entry in metrics.values() for name in entry)
    width = max(len(name) for name in names) + 2
    print(printable(" " * width + "".join(f"{name[:16]:>18}" for name in metrics)))
    for name in names:
        values = (f"{entry[name]:.4g}" if name in entry else "" for entry in metrics.values())
        print(f"{name:<{width}}" + "".join(f"{value:>18}" for value in values))
    print(printable("\n".join(["", *lines])))
    say(f"written to {folder / 'report.json'} and {folder / 'report.png'}")
    return 0


def measure(args: argparse.Namespace) -> tuple[dict[str, dict], dict[str, int]]:
    """{name: {"metrics", "curves", "about"}} of each autoencoder, and how many images there were."""
    from tqdm.auto import tqdm

    from ..autoencoder.measures import load_pictures, measure_autoencoder
    from ..embedding.feature_extractors import load_extractor
    from ..evaluation import quality_fingerprint
    from ..models.modeling_vq import VQAutoencoder
    from ..runs.lineage import well_formed

    if args.images < 2:
        raise ValueError(f"--images must be at least 2, got {args.images}.")
    names = args.names or unique_names(args.autoencoders)
    if len(names) != len(args.autoencoders) or len(set(names)) != len(names):
        raise ValueError(f"--names needs {len(args.autoencoders)} different names, got {names}.")
    extractor = load_extractor(args.extractor) if args.extractor else None
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    entries, samples = {}, {}
    for name, source in zip(names, tqdm(args.autoencoders, "autoencoders", leave=False), strict=True):
        try:
            with well_formed(source):
                model = VQAutoencoder.from_pretrained(source).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load the autoencoder {source!r}: {error}") from error
        shape = {"num_channels": model.config.num_channels}
        pictures = load_pictures(args.dataset, model.config.image_size, args.images, seed=args.seed, **shape, **columns)
        train, test = pictures["train"], pictures["evaluation"]
        samples = {"train": len(train.labels), "evaluation": len(test.labels)}
        metrics, curves = measure_autoencoder(
            model, train, test, extractor=extractor, parts=tuple(args.parts), seed=args.seed,
            lipschitz_images=args.lipschitz_images, distance_images=args.distance_images,
        )  # fmt: skip
        if "informativeness" in args.parts and not (train.labelled and test.labelled):
            reason = f"not every image of {args.dataset} has a class"
            print(f"not measured: informativeness of {name} ({reason})", file=sys.stderr)
        if extractor is not None and "+" in args.dataset:
            metrics |= per_source(model, args, extractor, columns)
        about = {"source": source, "fingerprint": model.fingerprint()}
        if extractor is not None:
            about["quality"] = quality_fingerprint(
                extractor, reference=f"{args.dataset} held-out", num_real=len(test.labels),
                num_generated=len(test.labels), seed=args.seed,
            )  # fmt: skip
        entries[name] = {"metrics": metrics, "curves": curves, "about": about}
    return entries, samples


def per_source(
    model: VQAutoencoder, args: argparse.Namespace, extractor: FeatureExtractor, columns: dict
) -> dict[str, float]:
    """Reconstruction FID of each part of a union a+b on its own held-out images: {"rfid_<extractor>_<part>"}."""
    from ..autoencoder.measures import encode_and_decode, held_out_sources
    from ..embedding.feature_extractors import features_of
    from ..evaluation import image_quality

    metrics = {}
    options = columns | {"num_channels": model.config.num_channels}
    for part, pictures in held_out_sources(args.dataset, model.config.image_size, args.images, **options).items():
        features = [
            features_of(extractor, images) for images in (pictures, encode_and_decode(model, pictures).reconstructions)
        ]
        found = image_quality(*features, extractor, measures=("fid",), prefix="r", seed=args.seed)
        metrics |= {f"{name}_{part}": value for name, value in found.items()}
    return metrics


def unique_names(sources: list[str]) -> list[str]:
    """The last folders of the paths, or as many more as tell them apart."""
    parts = [Path(source).parts for source in sources]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same autoencoder is given twice: {sources}.")
