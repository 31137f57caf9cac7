"""The folders that lie beside the package in a checkout and inside it in a wheel: training, model_cards, spaces."""

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def shipped_folder(name: str) -> Path:
    """The folder `training`, `model_cards` or `spaces`: packed in the wheel, or the checkout's."""
    packed = _PACKAGE / f"_{name}"
    return packed if packed.exists() else _PACKAGE.parent / name
