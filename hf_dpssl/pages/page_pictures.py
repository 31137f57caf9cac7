"""Maps, curves and small pictures as HTML that follows a page's colours, in light and dark, without scripts."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

SIDE = 400  # of a map, in its own units
# One per class, of at least 3:1 contrast on white and on dark grey.
COLOURS = [
    "#2f7fd0",
    "#d9730d",
    "#2a9850",
    "#dc4446",
    "#8b63c9",
    "#9c6b57",
    "#d052a8",
    "#768089",
    "#a08a00",
    "#0b97a8",
]


def map_svg(points: Tensor, labels: Sequence[int], glyphs: Sequence[str], description: str) -> str:
    """A map as SVG: each point is the glyph of its class, in the colour of its class.

    Args:
        points: (n, 2), finite; the map is scaled to them, with the same scale both ways.
        labels: n classes.
        glyphs: a character or so per class.
        description: read out by screen readers.
    """
    low = points.amin(0)
    high = points.amax(0)
    scale = (SIDE - 30) / max(float((high - low).max()), 1e-9)
    places = ((points - (low + high) / 2) * scale + SIDE / 2).tolist()
    groups: dict[int, list[str]] = {}
    for (x, y), label in zip(places, labels, strict=True):
        text = f'<text x="{x:.0f}" y="{SIDE - y:.0f}">{html.escape(glyphs[label])}</text>'
        groups.setdefault(label, []).append(text)
    drawn = "".join(
        f'<g fill="{COLOURS[label % len(COLOURS)]}">{"".join(texts)}</g>' for label, texts in sorted(groups.items())
    )
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{html.escape(description)}" '
        'style="width:100%;display:block" font-size="13" font-weight="600" text-anchor="middle" '
        f'dominant-baseline="central">{drawn}</svg>'
    )


def curves_svg(curves: dict[str, Sequence[float]], description: str, height: int = 60) -> str:
    """Curves over steps as one small SVG with a common scale; name -> values, of which few are drawn."""
    values = [value for curve in curves.values() for value in curve]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    longest = max(max(map(len, curves.values()), default=1) - 1, 1)
    lines = []
    for i, curve in enumerate(curves.values()):
        stride = max(1, len(curve) // 100)
        places = [
            f"{300 * step / longest:.1f},{height - 3 - (height - 6) * (curve[step] - low) / max(high - low, 1e-9):.1f}"
            for step in range(0, len(curve), stride)
        ]
        dash = ' stroke-dasharray="4 3"' if i else ""
        lines.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{COLOURS[i]}"{dash} '
            'vector-effect="non-scaling-stroke"/>'
        )
    return (
        f'<svg viewBox="0 0 300 {height}" role="img" aria-label="{html.escape(description)}" stroke-width="2" '
        f'preserveAspectRatio="none" style="width:100%;height:{height}px;display:block">{"".join(lines)}</svg>'
    )


def data_url(picture: Image.Image) -> str:
    """The picture as PNG within an address."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of (N, 3 or 1, H, W) in [-1, 1], clamped."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels.expand(-1, 3, -1, -1)]


def picture_grid(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    side: int = 96,
    download: str | None = None,
    alternatives: Sequence[str] | None = None,
) -> str:
    """Pictures side by side with a caption each; they wrap on narrow screens, and pixels stay sharp.

    Args:
        pictures: N of any size.
        captions: N texts below them.
        side: width of each, in pixels of the page.
        download: where given, a click on picture i saves it as `{download}-{i}.png`.
        alternatives: N texts for screen readers; default: the captions.
    """
    figures = []
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        address = data_url(picture)
        text = html.escape(caption)
        spoken = html.escape(alternatives[i]) if alternatives else text
        image = f'<img src="{address}" alt="{spoken}" style="width:{side}px">'
        if download is not None:
            name = html.escape(f"{download}-{i}.png")
            image = f'<a href="{address}" download="{name}" title="save {name}">{image}</a>'
        figures.append(f'<figure style="width:{side}px">{image}<figcaption>{text}</figcaption></figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def progress_bar(done: int, total: int, name: str) -> str:
    """A bar that screen readers read as `done` of `total`; its look is in the page's style sheet."""
    return (
        f'<div class="progress" role="progressbar" aria-label="{html.escape(name)}" aria-valuemin="0" '
        f'aria-valuemax="{total}" aria-valuenow="{done}"><div style="width:{100 * done / total:.0f}%"></div></div>'
    )
