"""Where the Spaces take their models from, a Hub id in an environment variable or the demo's folder; and examples."""

from __future__ import annotations

import functools
import html
import os
import tempfile
from pathlib import Path

MODELS = {  # name -> environment variable, folder within the demo's outputs
    "encoder": ("DPSSL_ENCODER", "encoder"),
    "second encoder": ("DPSSL_ENCODER_2", "comparison/encoder-2d"),
    "joint": ("DPSSL_JOINT", "autoencoder"),
    "dae": ("DPSSL_DAE", "comparison/dae"),
    "joint generator": ("DPSSL_JOINT_GENERATOR", "drift"),
    "dae generator": ("DPSSL_DAE_GENERATOR", "comparison/dae-drift"),
    "dit": ("DPSSL_DIT", "dit"),
    "one step": ("DPSSL_DRIFT", "drift"),
    "token transformer": ("DPSSL_TOKENS", "ar"),
}


def demo_folder() -> Path:
    """The folder of the demo's outputs: DPSSL_DEMO, or outputs/demo."""
    return Path(os.environ.get("DPSSL_DEMO") or "outputs/demo")


def present_models(*names: str) -> dict[str, str]:
    """{name: Hub id or folder} of those models of MODELS that there are."""
    found = {}
    for name in names:
        variable, place = MODELS[name]
        folder = demo_folder() / place
        if given := os.environ.get(variable):
            found[name] = given
        elif folder.is_dir():
            found[name] = str(folder)
    return found


def find_models(*names: str) -> dict[str, str]:
    """As `present_models`, at least one.

    Raises:
        FileNotFoundError: when there is none of them; the message says how to get some.
    """
    found = present_models(*names)
    if not found:
        variables = " or ".join(MODELS[name][0] for name in names)
        raise FileNotFoundError(
            f"no model ({', '.join(names)}) in {demo_folder()}: run `hf-dpssl demo`, name its folder in DPSSL_DEMO, "
            f"or a Hub id in {variables}."
        )
    return found


def about_models(sources: dict[str, str]) -> str:
    """What each of these models is, on what it was trained and for how long, as HTML; a folder by its name alone."""
    from ..runs.lineage import read_json, small_files  # imports torch, which the command line's help does without
    from ..runs.redaction import without_folders

    lines = []
    for name, source in sources.items():
        is_folder = Path(source).is_dir()
        folder = Path(source) if is_folder else small_files(source)
        results = (read_json(folder / "results.json") or {}) if folder else {}
        dataset, training = results.get("dataset"), results.get("training")
        seconds = training.get("seconds") if isinstance(training, dict) else None
        parts = [Path(source).name if is_folder else source]
        parts.append(f"trained on {without_folders(str(dataset))}" if dataset else "training data not recorded")
        parts.append(f"for {seconds / 60:.1f} min" if isinstance(seconds, int | float) else "time not recorded")
        lines.append(f"<li><b>{html.escape(name)}</b>: {html.escape(', '.join(parts))}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def shown_source(source: str | os.PathLike) -> str:
    """A source as visitors may see it: of a folder by its whole path, which is the server's, only the last part."""
    return f"path/to/{Path(source).name}" if Path(source).is_absolute() else str(source)


def source_arguments(source: str) -> dict[str, str]:
    """`from_pretrained(**...)` of a folder, a Hub id, or `id@revision`."""
    if Path(source).exists() or "@" not in source:
        return {"pretrained_model_name_or_path": source}
    name, _, revision = source.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision}


def example_pictures(count: int) -> list[str]:
    """Paths of the first `count` handwritten digits of scikit-learn as PNG, in a folder that goes with the process."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(_temporary_folder().name)
    paths = []
    for i, image in enumerate(load_digits().images[:count]):
        paths.append(str(folder / f"digit-{i}.png"))
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(paths[-1])
    return paths


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="digits-", ignore_cleanup_errors=True)
