"""A folder of drawn images: what it holds, whether a run may go on with it, and how it becomes whole.

    FOLDER/plan.json                         what is drawn by what; decides whether a run may go on
    FOLDER/images/00000/00000000.png         numbered, 1000 to a folder; or images/CLASS/00000000.png
    FOLDER/samples.npz                       instead of pictures: arr_0 (N, H, W, 3) uint8, arr_1 (N,) labels
    FOLDER/manifest.json                     the plan, counts, command, versions; written last

The layout of samples.npz is that of Dhariwal and Nichol 2021 (guided-diffusion), whose evaluation reads it.
bulk_sampling.py fills the folder.
"""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from ..runs.atomic_files import atomic_file, write_json
from ..runs.results import command_line, environment

# Entries of a plan that decide the files.
DECIDES = [
    "weights",
    "scheduler",
    "options",
    "seed",
    "class_ids",
    "num_images",
    "format",
    "layout",
    "images_per_folder",
    "dtype",
    "versions",
]
_CHANNELS = (1, 3, 4)  # of PNG


def check_folder(folder: Path, plan: dict) -> None:
    """ValueError when what is in the folder is not what this run would go on with."""
    path = folder / "plan.json"
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            if not path.exists():  # still: another process may have been first
                raise ValueError(f"{folder} is not empty and holds no drawn images: choose another folder for them.")
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    different = [difference for name in DECIDES for difference in _differences(name, then.get(name), plan[name])]
    if different:
        raise ValueError(
            f"{folder} was begun with {'; '.join(different)}: it cannot go on with that. Choose another folder, or "
            "discard what it holds with --overwrite."
        )


def _differences(name: str, then: object, now: object) -> list[str]:
    """What has changed, in words; of dicts entry by entry."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = sorted(then.keys() | now.keys())
        return [text for key in names for text in _differences(f"{name} {key}", then.get(key), now.get(key))]
    short = 12 if name == "weights" else 60
    return [] if then == now else [f"{name} {str(then)[:short]}, not {str(now)[:short]}"]


def claim(folder: Path, plan: dict) -> None:
    """Write the plan, or check that the one there is the same."""
    check_folder(folder, plan)
    if not (folder / "plan.json").exists():
        write_json(folder / "plan.json", plan)
        check_folder(folder, plan)  # another process may have written its own


def picture_path(folder: Path, plan: dict, number: int) -> Path:
    """Where image `number` is or belongs; for npz until it is packed."""
    pictures = folder / ("images" if plan["format"] == "png" else ".images")
    if plan["layout"] == "by_class":
        class_id = plan["class_ids"][number % len(plan["class_ids"])]
        pictures = pictures / _class_folders(tuple(plan["class_names"]))[class_id]
    elif plan["images_per_folder"]:
        pictures = pictures / f"{number // plan['images_per_folder']:05d}"
    return pictures / f"{number:08d}.png"


@functools.cache
def _class_folders(names: tuple[str, ...]) -> list[str]:
    """The classes' names where all can be names of folders, else their ids."""
    safe = all(name == name.strip(" .") and not set(name) & set('/\\:*?"<>|\0') and name for name in names)
    distinct = len({name.casefold() for name in names}) == len(names)
    return list(names) if safe and distinct else [f"{class_id:05d}" for class_id in range(len(names))]


def save_picture(path: Path, image: Tensor) -> None:
    """Write an image (C, H, W) in [0, 1] as 8-bit PNG."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    if pixels.shape[2] not in _CHANNELS:
        raise ValueError(f"images of {pixels.shape[2]} channels cannot be written; {_CHANNELS} can.")
    with atomic_file(path, "wb") as file:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")


def finish(folder: Path) -> None:
    """Write the manifest, and before it samples.npz where that was asked for, if every image is there."""
    if (folder / "manifest.json").exists() or not (folder / "plan.json").exists():
        return
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    paths = [picture_path(folder, plan, number) for number in range(plan["num_images"])]
    if not all(path.exists() for path in paths):
        return
    labels = None if plan["class_ids"] is None else np.resize(np.array(plan["class_ids"]), len(paths))  # in turn
    if plan["format"] == "npz":
        try:
            _pack(folder / "samples.npz", paths, labels)
        except FileNotFoundError:  # packed by another process, which has removed the pictures
            if (folder / "manifest.json").exists():
                return
            raise
    counts = Counter([] if labels is None else labels.tolist())
    images = {"images": len(paths), "images_of_class": {str(k): counts[k] for k in sorted(counts)}}
    made = {"command": command_line(), "environment": environment()}
    write_json(folder / "manifest.json", plan | images | made)
    if plan["format"] == "npz":
        shutil.rmtree(folder / ".images", ignore_errors=True)
    for leftover in folder.rglob(".*.tmp"):  # of killed processes
        leftover.unlink(missing_ok=True)


def _pack(target: Path, paths: list[Path], labels: np.ndarray | None) -> None:
    """All pictures as one npz file, one picture in memory at a time."""
    first = _pixels(paths[0])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *first.shape)}
    with atomic_file(target, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for path in tqdm(paths, "packing", unit="img"):
                array.write(_pixels(path).tobytes())
        if labels is not None:
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, labels.astype(np.int64))


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and run the same command again.") from error
