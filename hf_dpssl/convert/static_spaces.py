"""A checkpoint as a page that computes in the browser: a one-step generator, or an encoder and pictures it has seen.

Weights are rounded to as few bits as leave features, or 98 of 100 pictures, what they are: in the others a code that
was near a tie is another one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import CenterCrop, Normalize, Resize

from ..data.decoding import to_square_tensor
from ..data.subsets import random_rows
from ..embedding.embedder import Preprocessor
from ..embedding.embedding_job import EmbedJob, embed_images
from ..embedding.embeddings_table import EmbeddingsTable
from ..generation.pipeline_vq_drift import VQDriftPipeline
from ..hub.checkpoint_facts import facts_of
from ..models.modeling_contrastive import ContrastiveEncoder
from ..pages import browser_runtime
from ..pages.demo_outputs import find_models
from ..pages.map_page import sprite_sheet
from ..pages.packed_bytes import packed, rounded, smaller_onnx
from ..pages.page_pictures import data_url
from ..pages.static_page import write_static_page
from ..runs.atomic_files import atomic_folder
from ..runs.lineage import well_formed
from ..runs.written_folders import check_target, record_files
from . import onnx_exports
from .exports import described_kind, find_checkpoint

PAGES = {"image_generator": "drift", "encoder_explorer": "encoder"}  # Space: kind of its checkpoint
PICTURES = 1000  # of an index that are in the page, at most
EXAMPLES = 8
_EXAMPLE = 512  # pixels of the longer side of a picture that one may choose
_THUMBNAIL = 48
_MAX_WEIGHTS = 64 * 2**20  # bytes of an ONNX file that a page may have to hold as text
_WHOLE = 24  # significant bits of float32
_BITS = (11, 16, 20)  # that are tried; float16 has 11
_TRIED = 500  # pictures of a generator
_TURNED = 0.02  # share of them in which a code may be another one
_VECTOR_BITS = 9
_SAME = 1e-3  # of the largest number, at least 1
Outputs = dict[str, np.ndarray]


def write_static_space(
    name: str,
    output_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    *,
    embeddings: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a Space that needs no server, whole or not at all; returns the bytes of every file by path.

    Args:
        name: one of PAGES.
        output_dir: the folder; with `overwrite` it may hold an earlier one.
        source: folder or Hub id of a VQDriftPipeline or an encoder; default: that of the demo, or of `embeddings`.
        embeddings: encoder_explorer: folder that `hf-dpssl embed` wrote; default: DPSSL_DATASET, or the embedded
            digits, are embedded.
        overwrite: replace an earlier page.

    Raises:
        FileExistsError, FileNotFoundError: a folder that is in the way, or none.
        ValueError: a checkpoint of another kind, a preprocessing that the page does not know, or as `runtime_files`.
        ImportError: ONNX libraries are missing. OSError: the Hub or the npm registry cannot be read.
    """
    onnx_exports.check_libraries()
    target = Path(output_dir)
    form = f"static {name}"
    check_target(target, overwrite, f"page of hf-dpssl space {name} --static", [form])
    if name not in PAGES:
        raise ValueError(f"{name!r} has no page without a server: {' and '.join(PAGES)} have.")
    if embeddings is not None and name != "encoder_explorer":
        raise ValueError("--embeddings is of the page encoder_explorer: leave it out.")
    runtime = browser_runtime.runtime_files()
    with tempfile.TemporaryDirectory() as work:
        if name == "image_generator":
            page = _generator_page(source or find_models("one step")["one step"], Path(work))
        else:
            page = _encoder_page(source, embeddings, Path(work))
        facts, parts, about = page
        with atomic_folder(target) as temporary:
            write_static_page(temporary, name, runtime, facts, parts, about)
            return record_files(temporary, form)


def _checkpoint(source: str | os.PathLike, name: str) -> Path:
    folder = find_checkpoint(source)
    kind, described = described_kind(folder)
    if kind != PAGES[name]:
        raise ValueError(
            f"{source} is {described}, and the page {name} without a server runs "
            f"{'a one-step generator (hf-dpssl train dae_drift)' if PAGES[name] == 'drift' else 'an encoder of ours'}."
        )
    return folder


def _generator_page(source: str | os.PathLike, work: Path) -> tuple:
    folder = _checkpoint(source, "image_generator")
    with well_formed(source):
        pipeline = VQDriftPipeline.from_pretrained(folder, dtype=torch.float32)
    _, about = onnx_exports.write_generator(pipeline, work)
    null = about["no_class"]
    content = _content(work / "generator.onnx")
    facts = {
        "noise": about["noise"],
        "image": about["image"],
        "classes": pipeline.class_names,
        "noClass": null,
    }
    given = {
        "noise": np.random.default_rng(0).standard_normal((_TRIED, *about["noise"]), np.float32),
        "class_labels": np.arange(_TRIED) % (null + 1),
    }
    model, bits = _smaller(content, given, "images", _TURNED)
    return facts, {"model": model}, _about(source, folder, bits)


def _encoder_page(source: str | os.PathLike | None, embeddings: str | os.PathLike | None, work: Path) -> tuple:
    if embeddings is None:
        source = source or find_models("encoder")["encoder"]
        _preparation(Preprocessor(str(_checkpoint(source, "encoder_explorer"))), source)
        job = EmbedJob(str(source), os.environ.get("DPSSL_DATASET") or "digits", str(work / "embeddings"))
        table = embed_images(job)
    else:
        table = EmbeddingsTable(embeddings)
    if table.manifest["features"] != "features":
        raise ValueError(f"{table.folder} holds embeddings of a head: embed with --features features for a page.")
    source = source or table.manifest["encoder"]
    folder = _checkpoint(source, "encoder_explorer")
    table.embedder(str(source))  # is it the one?
    preparation = _preparation(Preprocessor(str(folder)), source)
    with well_formed(source):
        encoder = ContrastiveEncoder.from_pretrained(folder).eval().float()
    onnx_exports.write_encoder(encoder, work)
    given = {"pixel_values": np.random.default_rng(0).standard_normal((8, 3, *[preparation["size"]] * 2), np.float32)}
    model, bits = _smaller(_content(work / "encoder.onnx"), given, "features")
    chosen = np.asarray(random_rows(len(table), PICTURES, labels=table.labels))
    rest = np.setdiff1d(np.arange(len(table)), chosen)
    rest = rest if len(rest) >= EXAMPLES else chosen
    examples = rest[np.asarray(random_rows(len(rest), EXAMPLES, labels=table.labels[rest]))]
    shown = table.pictures(examples.tolist())
    for picture in shown:
        picture.thumbnail((_EXAMPLE, _EXAMPLE))  # smaller ones stay
    pictures = table.pictures(chosen.tolist())
    side = min(_THUMBNAIL, max(min(picture.size) for picture in pictures))
    sheet, side, columns = sprite_sheet(torch.stack([to_square_tensor(picture, side) for picture in pictures]))
    vectors = torch.nn.functional.normalize(table.embeddings[chosen], dim=1).numpy()
    facts = {
        "input": preparation,
        "dimension": vectors.shape[1],
        "captions": [_caption(table, index) for index in chosen.tolist()],
        "thumbnails": {"sheet": sheet, "side": side, "columns": columns},
        "examples": [
            {"picture": data_url(picture), "caption": _caption(table, index)}
            for index, picture in zip(examples.tolist(), shown, strict=True)
        ],
    }
    parts = {"model": model, "vectors": packed(rounded(vectors, _VECTOR_BITS).tobytes(), [(0, vectors.size)])}
    lines = _about(source, folder, bits)
    lines.append(
        f"neighbours: {len(chosen):,} of the {len(table):,} pictures of {Path(table.manifest['dataset']).name}"
    )
    return facts, parts, lines


def _caption(table: EmbeddingsTable, index: int) -> str:
    label = int(table.labels[index])
    return table.class_names[label] if label >= 0 else f"{table.splits[index]} {int(table.rows[index])}"


def _preparation(preprocessor: Preprocessor, source: str | os.PathLike) -> dict:
    """What the page has to do as the encoder's image processor: sizes, filter, mean and standard deviation."""
    settings = preprocessor.settings
    if preprocessor.small_image:
        size = settings["input_size"][-1]
        known = {"size": size, "resize": size, "rounds": True, "filter": "bicubic"}
        return known | {name: list(settings[name]) for name in ("mean", "std")}
    steps = [step for step in preprocessor.processor.val_transforms.transforms if "ToTensor" not in type(step).__name__]
    if [type(step) for step in steps] == [Resize, CenterCrop, Normalize]:
        resize, crop, normalize = steps
        size = {*crop.size}
        short = resize.size if isinstance(resize.size, int) else resize.size[0]
        fits = len(size) == 1 and short >= crop.size[0] and (isinstance(resize.size, int) or len(resize.size) == 1)
        filters = ("bilinear", "bicubic", "lanczos")
        if fits and resize.interpolation.value in filters and resize.max_size is None:
            known = {"size": size.pop(), "resize": short, "rounds": False, "filter": resize.interpolation.value}
            return known | {"mean": normalize.mean.tolist(), "std": normalize.std.tolist()}
    raise ValueError(
        f"{source} prepares pictures by {', '.join(map(str, steps))}, and a page resizes the shorter side (bilinear, "
        "bicubic or lanczos), crops a centred square and normalises."
    )


def _content(path: Path) -> bytes:
    """An ONNX file; ValueError when it is too large for a page."""
    if path.stat().st_size > _MAX_WEIGHTS or path.with_name(f"{path.name}.data").exists():
        raise ValueError(
            f"the network has more than {_MAX_WEIGHTS // 2**20} MiB, too large for a page that holds it as text: use "
            "a smaller model, or the page with a server (leave out --static)."
        )
    return path.read_bytes()


def _smaller(content: bytes, given: Outputs, output: str, turned: float = 0.0) -> tuple[str, int]:
    """A network packed with weights of as few bits as leave an output what it is, but for a share, and the bits."""
    expected = _run(content, given)[output]
    for bits in _BITS:
        smaller, ranges = smaller_onnx(content, bits)
        found = _run(smaller, given)[output]
        errors = np.abs(found - expected).reshape(len(found), -1).max(1)
        if (errors > _SAME * max(1.0, np.abs(expected).max())).mean() <= turned:
            return packed(smaller, ranges), bits
    return packed(*smaller_onnx(content, _WHOLE)), _WHOLE


def _run(content: bytes, given: Outputs) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def _about(source: str | os.PathLike, folder: Path, bits: int) -> list[str]:
    """Lines of text: what the model is, on what it was trained and for how long, as far as its files say."""
    facts = facts_of(folder)
    name = Path(source).name if Path(source).is_dir() else str(source)
    numbers = sum(facts["parameters"].values())
    what = facts["class"] or facts["kind"]
    kept = "float32" if bits == _WHOLE else f"rounded to {bits} significant bits"
    lines = [f"{name} ({what}): {numbers:,} numbers in its checkpoint, here {kept}"]
    licence = f" ({facts['licence_of_data']})" if facts["licence_of_data"] else ""
    data = f"trained on {facts['dataset']}{licence}" if facts["dataset"] else "training data not recorded"
    training = facts["training"] or {}
    seconds = training.get("seconds")
    device = f" on {training['processes']} {training['device']}" if {"processes", "device"} <= training.keys() else ""
    time = f"for {seconds / 60:.1f} min{device}" if isinstance(seconds, int | float) else "time not recorded"
    return [*lines, f"{data}, {time}"]
