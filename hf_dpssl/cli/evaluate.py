"""The subcommand `hf-dpssl evaluate`: measure an encoder, an autoencoder or a generator in a folder or on the Hub."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..embedding.choices import BAD_IMAGES, KINDS, PROTOCOLS
from ..evaluation.choices import CLASSIFIERS, METRICS, SOLVERS, WEIGHTINGS
from ..runs.console import one_line, printable
from .dg_suite import add_dg_flags, main_of_dg, refuse_dg_flags
from .parsing import command_parser, parse_command
from .transfer_suite import FINETUNE, add_suite_flags, main_of_suite, refuse_suite_flags

if TYPE_CHECKING:
    from ..embedding.evaluation_entries import Measured

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_ENCODERS, _AUTOENCODERS, _PIPELINES = ("encoder",), ("autoencoder",), ("dit", "drift", "token")
_GENERATORS = (*_PIPELINES, "gan")
_GROUPS = {
    _ENCODERS: "encoders",
    (*_AUTOENCODERS, *_GENERATORS): "autoencoders and generators",
    _GENERATORS: "generators",
    _PIPELINES: "pipelines",
}
_SUITES = {"transfer": main_of_suite, "dg": main_of_dg}
_INDIFFERENT = ("batch_size", "num_processes", "samples_dir", "extractor", "classifier", "dataset", "seed")


class _Flag(NamedTuple):
    kinds: tuple[str, ...]
    name: str
    default: object
    help: str
    how: dict


def _flag(kinds: tuple[str, ...], name: str, default: object, help: str, **how) -> _Flag:
    return _Flag(kinds, name, default, help, how)


_FLAGS = [
    _flag(
        _ENCODERS, "protocol", ["knn", "linear", "geometry", "views"],
        "what is measured: knn, linear, few_shot: accuracy on held-out images, percent, needs classes; geometry: "
        "uniformity and effective rank of their features; views: alignment of two random views; finetune: of the "
        "whole encoder, with --suite only, which has knn, linear and this one",
        nargs="+", choices=(*PROTOCOLS, FINETUNE),
    ),
    _flag(_ENCODERS, "features", "features", "of the backbone, or after the head", choices=KINDS),
    _flag(_ENCODERS, "on_bad_image", "error", "unreadable pictures", choices=BAD_IMAGES),
    _flag(_ENCODERS, "knn_k", [20], "neighbours; several give a key each", type=int, nargs="+"),
    _flag(_ENCODERS, "knn_metric", "cosine", "of the neighbours", choices=METRICS),
    _flag(_ENCODERS, "knn_weighting", "uniform", "votes of the neighbours", choices=WEIGHTINGS),
    _flag(_ENCODERS, "knn_temperature", 0.07, "of exponential votes", type=float),
    _flag(_ENCODERS, "linear_solver", "logistic", "of the linear probe", choices=SOLVERS),
    _flag(_ENCODERS, "shots", [1, 5, 10], "examples per class of few_shot", type=int, nargs="+"),
    _flag(_ENCODERS, "trials", 20, "draws of these examples", type=int),
    _flag(_ENCODERS, "few_shot_classifier", "centroid", "of few_shot", choices=CLASSIFIERS),
    _flag(
        (*_AUTOENCODERS, *_GENERATORS), "extractor", None,
        "of the Frechet distance: inception, resnet56-cifar10, timm:NAME, or an encoder's folder or Hub id",
    ),
    _flag(
        _GENERATORS, "classifier", None,
        "of inception score and class consistency: inception, resnet56-cifar10 or timm:NAME, of the same classes",
    ),
    _flag(_GENERATORS, "num_images", 1000, "images drawn", type=int),
    _flag(
        _GENERATORS, "reference", "evaluation", "images compared with: held-out or training",
        choices=["evaluation", "train"],
    ),
    _flag(_PIPELINES, "num_processes", 1, "that draw, on this machine", type=int),
    _flag(_PIPELINES, "samples_dir", None, "folder where the drawn images stay; a killed run goes on with them"),
    _flag(_PIPELINES, "guidance_scale", None, "1: no guidance; the pipeline's own by default", type=float),
    _flag(_PIPELINES, "num_inference_steps", None, "denoising steps", type=int),
    _flag(_PIPELINES, "temperature", None, "of a token model", type=float),
    _flag(_PIPELINES, "top_k", None, "of a token model", type=int),
    _flag(_PIPELINES, "top_p", None, "of a token model", type=float),
]  # fmt: skip


class _Checkpoint(NamedTuple):
    source: str  # as it was given
    folder: Path
    kind: str
    repo_id: str | None
    revision: str | None


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = command_parser(
        "evaluate",
        "Measure a checkpoint. Encoders (ours, timm's, transformers'): kNN, linear probe, few-shot, "
        "effective rank, uniformity, alignment. Autoencoders (ours, diffusers' VQModel and AutoencoderKL): PSNR, SSIM, "
        "rFID; hf-dpssl report measures more. Generators (VQDiTPipeline, VQDriftPipeline, VQTokenPipeline, "
        "diffusers' DiTPipeline, VAEGAN): FID, inception score, class consistency. The numbers, with a fingerprint of "
        "all that decides them, go into the list 'evaluations' of the folder's results.json.",
    )
    add = parser.add_argument
    add("checkpoint", help="folder or Hub id (id@revision)")
    add("--dataset", default="digits", help="table name, Hub id, folder or parquet file")
    add("--dataset_revision", help="branch, tag or commit of a Hub data set")
    add("--image_column", help="column of pictures; found by its type when not given")
    add("--label_column", help="column of classes; found by its type when not given")
    add("--evaluation_images", type=int, help="so many real images of a split, drawn at random (default: all)")
    add("--batch_size", type=int, default=64, help="images at once")
    add("--seed", type=int, default=0, help="of splits and draws")
    add("--output", help="JSON file for the numbers, in place of the folder's results.json")
    add("--push", action="store_true", help="put the numbers into results.json and the card of the Hub id, one commit")
    add("--create_pr", action="store_true", help="with --push: open a pull request instead of changing the branch")
    add("--json", action="store_true", help="print the results as JSON")
    add(
        "--suite",
        choices=_SUITES,
        help="transfer: nine data sets in one table, in place of --dataset; dg: each domain of --dataset (folders "
        "DOMAIN/CLASS/image) held out once, by ten algorithms on frozen features",
    )
    add_suite_flags(parser)
    add_dg_flags(parser)
    groups = {kinds: parser.add_argument_group(f"only for {name}") for kinds, name in _GROUPS.items()}
    for flag in _FLAGS:
        default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
        text = flag.help if default is None else f"{flag.help} (default: {default})"
        groups[flag.kinds].add_argument(f"--{flag.name}", default=argparse.SUPPRESS, help=text, **flag.how)
    return parser


def main(argv: list[str]) -> int:
    """`hf-dpssl evaluate`: returns the exit status; errors are for `errors.reported`."""
    flags = parser()
    given = vars(parse_command(flags, argv))
    if (suite := given.pop("suite")) is not None:
        return _SUITES[suite](given, {name: flags.get_default(name) for name in given})
    refuse_suite_flags(given)
    refuse_dg_flags(given)
    output, push, create_pr, as_json = (given.pop(name) for name in ("output", "push", "create_pr", "json"))
    from ..embedding.evaluation_entries import append_entry

    if create_pr and not push:
        raise ValueError("--create_pr is for --push: give both.")
    checkpoint = _find(given.pop("checkpoint"))
    if push and checkpoint.repo_id is None:
        raise ValueError(f"--push is for a Hub id; hf-dpssl push publishes the folder {checkpoint.source}.")
    entry = _measure(checkpoint, given)
    path = Path(output) if output else None if checkpoint.repo_id else checkpoint.folder / "results.json"
    if path is not None:
        append_entry(path, entry)
    print(json.dumps(entry, indent=2) if as_json else printable(_summary(entry, path)))
    if push:
        commit = _push(checkpoint, entry, create_pr=create_pr)
        print(f"{checkpoint.repo_id}: {commit}", file=sys.stderr if as_json else sys.stdout)
    return 0


def _find(source: str) -> _Checkpoint:
    """Where the checkpoint is and of what kind; of a Hub id only the config is downloaded.

    Raises:
        ValueError or OSError: there is none, it cannot be read, or it is of a kind that is not measured.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if Path(source).exists():
        return _Checkpoint(source, Path(source), _kind(Path(source)), None, None)
    if not _HUB_ID.fullmatch(source):
        raise ValueError(f"{source!r} is neither a folder nor a Hub id (ORG/NAME or ORG/NAME@REVISION).")
    repo_id, _, revision = source.partition("@")
    for name in ("model_index.json", "config.json"):
        try:
            folder = Path(hf_hub_download(repo_id, name, revision=revision or None)).parent
            return _Checkpoint(source, folder, _kind(folder), repo_id, revision or None)
        except EntryNotFoundError as error:
            if name == "model_index.json":
                continue
            offline = isinstance(error, LocalEntryNotFoundError)
            what = "is not in the cache, and the Hub cannot be reached" if offline else f"holds no model (no {name})"
            raise ValueError(f"{source} {what}.") from error
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:  # the client's many kinds
            raise OSError(
                f"cannot read {source} from the Hub ({type(error).__name__}: {one_line(error)}). Is the name right? A "
                "private repository needs `hf auth login` or HF_TOKEN."
            ) from error
    raise AssertionError("unreachable")


def _kind(folder: Path) -> str:
    from ..hub.replay import checkpoint_kind

    kind = checkpoint_kind(folder)
    if kind != "other":
        return kind
    index = folder / "model_index.json"
    content = json.loads((index if index.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    if "_class_name" in content:
        raise ValueError(
            f"{folder.name} holds a {content['_class_name']}, which is not measured: give an image encoder, "
            "VQAutoencoder, VQModel, AutoencoderKL, VQDiTPipeline, VQDriftPipeline, VQTokenPipeline, DiTPipeline or "
            "VAEGAN."
        )
    return "encoder"


def _measure(checkpoint: _Checkpoint, given: dict) -> dict:
    kind = checkpoint.kind
    for flag in _FLAGS:
        if flag.name in given and kind not in flag.kinds:
            raise ValueError(
                f"--{flag.name} is for {_GROUPS[flag.kinds]}, and {checkpoint.source} is of kind {kind!r}: leave "
                "it out."
            )
    options = {flag.name: flag.default for flag in _FLAGS if kind in flag.kinds} | given
    least = {"evaluation_images": 1 if kind == "encoder" else 2, "batch_size": 1, "num_images": 2, "seed": 0}
    for name, number in least.items():
        if (value := options.get(name)) is not None and value < number:
            raise ValueError(f"--{name} must be at least {number}, got {value}.")
    args = argparse.Namespace(**options)
    folder = checkpoint.folder
    if checkpoint.repo_id and kind in ("autoencoder", "gan"):
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.bin"]
        folder = Path(snapshot_download(checkpoint.repo_id, revision=folder.name, allow_patterns=patterns))
    measured = _measured(checkpoint, folder, args)
    decide = {name: value for name, value in options.items() if name not in _INDIFFERENT}
    from ..embedding.evaluation_entries import evaluation_entry

    return evaluation_entry(kind, measured, dataset=args.dataset, seed=args.seed, options=decide)


def _measured(checkpoint: _Checkpoint, folder: Path, args: argparse.Namespace) -> Measured:
    """By the room that knows this kind of checkpoint."""
    from ..embedding.embedder import best_device
    from ..models.matrix_products import allow_tf32

    allow_tf32(best_device())
    if checkpoint.kind == "encoder":
        from ..embedding.encoder_evaluation import measure_encoder

        return measure_encoder(checkpoint.source, args)
    if checkpoint.kind == "autoencoder":
        from ..autoencoder.autoencoder_evaluation import measure_autoencoder_files

        return measure_autoencoder_files(folder, args)
    from ..generation.generator_evaluation import measure_generator

    return measure_generator(checkpoint.source, folder, checkpoint.kind, args)


def _summary(entry: dict, path: Path | None) -> str:
    width = max(28, *(len(name) + 2 for name in entry["metrics"]))
    lines = [f"{name:<{width}}{value:.4g}" for name, value in entry["metrics"].items()]
    lines += [f"note: {note}" for note in entry["notes"]]
    lines.append(f"{entry['kind']} on {entry['dataset']}, fingerprint {entry['fingerprint']['sha256'][:16]}")
    if path is not None:
        lines.append(f"written to {path}")
        if path.name == "results.json" and (path.parent / "README.md").is_file():
            lines.append(f"hf-dpssl card {path.parent} puts it into the card.")
    return "\n".join(lines)


def _push(checkpoint: _Checkpoint, entry: dict, *, create_pr: bool) -> str:
    """One commit with the entry in results.json, the card's model-index and .eval_results/; returns its address."""
    from ..embedding.evaluation_entries import with_entry
    from ..hub.card_data import evaluation_results
    from ..hub.card_merge import add_results
    from ..hub.eval_files import eval_files
    from ..hub.publishing import Target

    target = Target(checkpoint.repo_id, revision=checkpoint.revision, create_pr=create_pr)
    try:
        results = json.loads(target.read("results.json") or b"{}")
    except ValueError as error:
        raise ValueError(f"results.json of {checkpoint.repo_id} is no JSON ({error}): mend it there first.") from None
    card = (target.read("README.md") or b"").decode("utf-8")
    title, found = checkpoint.repo_id.partition("/")[2], evaluation_results(entry)
    contents = {
        "results.json": (json.dumps(with_entry(results, entry), indent=2) + "\n").encode(),
        "README.md": add_results(card, title, found).encode(),
    }
    contents |= {name: text.encode() for name, text in eval_files(found, target.read).items()}
    made = target.commit(contents, f"Evaluation on {entry['dataset']}")
    return made.pull_request or made.url
