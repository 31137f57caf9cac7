"""Where the Spaces take their models from, a Hub id in an environment variable or the demo's folder; and examples."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

MODELS = {  # name -> environment variable, folder within the demo's outputs
    "encoder": ("DPSSL_ENCODER", "encoder"),
    "second encoder": ("DPSSL_ENCODER_2", "comparison/encoder-2d"),
    "dae": ("DPSSL_DAE", "autoencoder"),
    "joint": ("DPSSL_JOINT", "comparison/joint-total"),
    "dit": ("DPSSL_DIT", "dit"),
    "token transformer": ("DPSSL_TOKENS", "ar"),
}


def demo_folder() -> Path:
    """The folder of the demo's outputs: DPSSL_DEMO, or outputs/demo."""
    return Path(os.environ.get("DPSSL_DEMO") or "outputs/demo")


def find_models(*names: str) -> dict[str, str]:
    """{name: Hub id or folder} of those models of MODELS that there are.

    Raises:
        FileNotFoundError: when there is none of them; the message says how to get some.
    """
    found = {}
    for name in names:
        variable, place = MODELS[name]
        folder = demo_folder() / place
        if given := os.environ.get(variable):
            found[name] = given
        elif folder.is_dir():
            found[name] = str(folder)
    if not found:
        variables = " or ".join(MODELS[name][0] for name in names)
        raise FileNotFoundError(
            f"no model ({', '.join(names)}) in {demo_folder()}: run `hf-dpssl demo`, name its folder in DPSSL_DEMO, "
            f"or a Hub id in {variables}."
        )
    return found


def source_arguments(source: str) -> dict[str, str]:
    """`from_pretrained(**...)` of a folder, a Hub id, or `id@revision`."""
    if Path(source).exists() or "@" not in source:
        return {"pretrained_model_name_or_path": source}
    name, _, revision = source.partition("@")
    return {"pretrained_model_name_or_path": name, "revision": revision}


def example_pictures(count: int) -> list[str]:
    """Paths of the first `count` handwritten digits of scikit-learn as PNG, in a temporary folder."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(tempfile.mkdtemp(prefix="digits-"))
    paths = []
    for i, image in enumerate(load_digits().images[:count]):
        paths.append(str(folder / f"digit-{i}.png"))
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(paths[-1])
    return paths
