"""An interactive page of 2-D maps: one HTML file with all points and thumbnails in it, which needs no network.

A point under the pointer shows its picture, class and name; classes are switched in the legend; wheel and
drag zoom and move; several maps of the same pictures are switched by buttons.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..runs.atomic_files import atomic_file

_LARGEST_THUMBNAIL = 48  # pixels; smaller pictures stay as they are
_LOSSLESS_PIXELS = 2_000_000  # sprite sheets up to this size are PNG, larger ones JPEG


def write_map_page(
    path: str | os.PathLike,
    maps: dict[str, np.ndarray],
    images: Tensor,
    *,
    names: list[str],
    labels: list[int],
    class_names: list[str],
    held_out: list[bool],
    title: str,
    marked: int | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        maps: title -> points (N, 2), finite; the last one is shown first.
        images: uint8 (N, 3, S, S).
        names: N texts, a file name or row each.
        labels: N classes, -1 without one.
        class_names: of the classes 0, 1, ...
        held_out: N flags.
        title: of the page.
        marked: point that has a ring around it.

    Raises:
        ValueError: no points, a point that is not finite, or parts of different lengths.
    """
    count = len(images)
    lengths = [len(part) for part in (names, labels, held_out, *maps.values())]
    if count == 0 or not maps or set(lengths) != {count}:
        raise ValueError(f"a page needs as many points, names, labels and flags as its {count} images, got {lengths}.")
    if not all(np.isfinite(points).all() for points in maps.values()):
        raise ValueError("a map has points that are not finite numbers: the training diverged.")
    sprite, side, columns = sprite_sheet(images)
    content = {
        "maps": [{"title": name, "points": _compact(points)} for name, points in maps.items()],
        "names": names,
        "labels": list(map(int, labels)),
        "classes": class_names,
        "heldOut": [int(flag) for flag in held_out],
        "side": side,
        "columns": columns,
        "marked": -1 if marked is None else marked,
    }
    # "<" could end the script element, and may come from a file name.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"__TITLE__": html.escape(title), "__SPRITE__": sprite, "__DATA__": data}
    page = re.sub("|".join(parts), lambda found: parts[found[0]], _PAGE)  # at once: a title may hold another's mark
    with atomic_file(path) as file:
        file.write(page)


def _compact(points: np.ndarray) -> list[float]:
    """x0, y0, x1, y1, ... scaled to [0, 10000], which is finer than a screen at 5-fold zoom."""
    points = np.asarray(points, dtype=np.float64)
    low = points.min(0)
    extent = max(float((points.max(0) - low).max()), 1e-12)
    return np.rint((points - low) * (10_000 / extent)).astype(int).reshape(-1).tolist()


def sprite_sheet(images: Tensor) -> tuple[str, int, int]:
    """(data URL of all thumbnails row by row, their side, thumbnails in a row)."""
    if images.shape[-1] > _LARGEST_THUMBNAIL:
        parts = [F.interpolate(part.float(), _LARGEST_THUMBNAIL, mode="area") for part in images.split(256)]
        images = torch.cat(parts).round().to(torch.uint8)
    count, _, side, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    sheet = np.zeros((math.ceil(count / columns) * side, columns * side, 3), np.uint8)
    for i, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
        top = i // columns * side
        left = i % columns * side
        sheet[top : top + side, left : left + side] = picture
    kind = "png" if sheet.shape[0] * sheet.shape[1] <= _LOSSLESS_PIXELS else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, kind, **({"quality": 85} if kind == "jpeg" else {"compress_level": 3}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", side, columns


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>__TITLE__</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 25%, Canvas); }
body { margin: 0; height: 100vh; display: flex; flex-direction: column; background: Canvas; color: CanvasText;
  font: 14px/1.4 system-ui, sans-serif; }
header, #legend { display: flex; flex-wrap: wrap; gap: 6px 10px; align-items: center; padding: 8px 12px; }
h1 { font-size: 16px; margin: 0 8px 0 0; }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 6px;
  padding: 2px 9px; cursor: pointer; }
button[aria-pressed="true"] { border-color: CanvasText; }
#legend { max-height: 22vh; overflow: auto; flex-shrink: 0; }
#legend button[aria-pressed="false"] { opacity: 0.4; }
#legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
#plot { position: relative; flex: 1; min-height: 200px; border-top: 1px solid var(--line); overflow: hidden; }
#plot > canvas { position: absolute; inset: 0; width: 100%; height: 100%; touch-action: pan-y pinch-zoom;
  cursor: crosshair; }
#tip { position: absolute; display: none; pointer-events: none; background: Canvas; border: 1px solid var(--line);
  border-radius: 8px; padding: 8px; max-width: 260px; overflow-wrap: anywhere; box-shadow: 0 2px 10px #0005; }
#tip canvas { display: block; width: 112px; height: 112px; margin-bottom: 6px; }
#tip b, #tip span { display: block; }
</style>
</head>
<body>
<header><h1>__TITLE__</h1><span id="maps"></span>
<label><input type="checkbox" id="only"> held-out images only</label>
<button id="reset">whole map</button></header>
<div id="plot"><canvas role="img" aria-label="scatter plot of the pictures"></canvas>
<div id="tip"><canvas width="112" height="112"></canvas><b></b><span></span></div></div>
<div id="legend"></div>
<img id="sprite" alt="" hidden src="__SPRITE__">
<script type="application/json" id="data">__DATA__</script>
<script>
"use strict";
const find = selector => document.querySelector(selector);
const data = JSON.parse(find("#data").textContent), count = data.labels.length;
const canvas = find("#plot > canvas"), pen = canvas.getContext("2d"), tip = find("#tip"), thumb = find("#tip canvas");
const ten = ["#3b82c4", "#f08a24", "#35a35a", "#d9484a", "#9069c0", "#a0705c", "#dd6fb5", "#868e96", "#b0a81e",
  "#1fb0c3"];
const colour = label => label < 0 ? "#868e96" : data.classes.length <= 10 ? ten[label]
  : "hsl(" + (label * 137.508 % 360).toFixed(1) + " 62% " + (44 + 14 * (label % 2)) + "%)";
const hidden = new Set();
let current = data.maps.length - 1, zoom = 1, centre = [5000, 5000], hovered = -1, drag = null;

function fit() {
  const points = data.maps[current].points;
  let right = 0, top = 0;
  for (let i = 0; i < count; i++) {
    right = Math.max(right, points[2 * i]);
    top = Math.max(top, points[2 * i + 1]);
  }
  zoom = 1; centre = [right / 2, top / 2];
  return [right, top];
}
const extents = data.maps.map((map, i) => { current = i; return fit(); });

function scale() {
  const [right, top] = extents[current];
  return zoom * 0.94 * Math.min(canvas.clientWidth / Math.max(right, 1), canvas.clientHeight / Math.max(top, 1));
}
function placer() {
  const points = data.maps[current].points, s = scale();
  const left = canvas.clientWidth / 2 - centre[0] * s, bottom = canvas.clientHeight / 2 + centre[1] * s;
  return i => [left + points[2 * i] * s, bottom - points[2 * i + 1] * s];
}
function shown() {
  const only = find("#only").checked, chosen = [];
  for (let i = 0; i < count; i++) if (!hidden.has(data.labels[i]) && (data.heldOut[i] || !only)) chosen.push(i);
  return chosen;
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  const size = Math.max(1.4, Math.min(4, 160 / Math.sqrt(count))) * Math.sqrt(zoom);
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.globalAlpha = 0.8;
  const byClass = new Map(), place = placer();
  for (const i of shown()) {
    if (!byClass.has(data.labels[i])) byClass.set(data.labels[i], []);
    byClass.get(data.labels[i]).push(i);
  }
  for (const [label, members] of byClass) {
    pen.fillStyle = colour(label);
    pen.beginPath();
    for (const i of members) {
      const [x, y] = place(i);
      pen.moveTo(x + size, y);
      pen.arc(x, y, size, 0, 2 * Math.PI);
    }
    pen.fill();
  }
  pen.globalAlpha = 1;
  for (const i of [data.marked, hovered]) {
    if (i < 0) continue;
    const [x, y] = place(i);
    pen.strokeStyle = getComputedStyle(document.body).color;
    pen.lineWidth = i === data.marked ? 3 : 2;
    pen.beginPath();
    pen.arc(x, y, size + (i === data.marked ? 6 : 3), 0, 2 * Math.PI);
    pen.stroke();
  }
}
function nearest(x, y) {
  const place = placer();
  let best = -1, closest = 14 * 14;
  for (const i of shown()) {
    const [px, py] = place(i), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < closest) { closest = distance; best = i; }
  }
  return best;
}
function show(i, x, y) {
  tip.style.display = i < 0 ? "none" : "block";
  if (i < 0) return;
  const side = data.side, ink = thumb.getContext("2d");
  ink.imageSmoothingEnabled = false;
  ink.clearRect(0, 0, thumb.width, thumb.height);
  ink.drawImage(find("#sprite"), i % data.columns * side, Math.floor(i / data.columns) * side, side, side,
    0, 0, thumb.width, thumb.height);
  find("#tip b").textContent = data.labels[i] < 0 ? "no class" : data.classes[data.labels[i]];
  find("#tip b").style.color = colour(data.labels[i]);
  find("#tip span").textContent = data.names[i] + (data.heldOut[i] ? " (held out)" : "");
  tip.style.left = Math.max(0, Math.min(x + 16, canvas.clientWidth - tip.offsetWidth)) + "px";
  tip.style.top = Math.max(0, Math.min(y + 16, canvas.clientHeight - tip.offsetHeight)) + "px";
}
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}
canvas.addEventListener("pointerdown", event => {
  drag = {from: at(event), centre: centre.slice()};
  canvas.setPointerCapture(event.pointerId);
});
canvas.addEventListener("pointerup", () => { drag = null; });
canvas.addEventListener("pointercancel", () => { drag = null; hovered = -1; show(-1); draw(); });  // the page scrolls
canvas.addEventListener("pointermove", event => {
  const [x, y] = at(event);
  if (drag && Math.hypot(x - drag.from[0], y - drag.from[1]) > 3) {
    const s = scale();
    centre = [drag.centre[0] - (x - drag.from[0]) / s, drag.centre[1] + (y - drag.from[1]) / s];
    hovered = -1;
  } else hovered = nearest(x, y);
  show(hovered, x, y);
  draw();
});
canvas.addEventListener("pointerleave", () => { hovered = -1; show(-1); draw(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const [x, y] = at(event), before = scale();
  zoom = Math.max(0.5, Math.min(200, zoom * Math.exp(-event.deltaY / 400)));
  const shift = 1 / before - 1 / scale();
  centre[0] += (x - canvas.clientWidth / 2) * shift;
  centre[1] -= (y - canvas.clientHeight / 2) * shift;
  draw();
}, {passive: false});
function button(parent, text, pressed, click) {
  const made = document.createElement("button");
  made.append(text);
  made.setAttribute("aria-pressed", pressed);
  made.addEventListener("click", () => { click(made); draw(); });
  parent.append(made, " ");
  return made;
}
data.maps.forEach((map, i) => button(find("#maps"), map.title, i === current, made => {
  current = i;
  fit();
  for (const other of find("#maps").children) other.setAttribute("aria-pressed", other === made);
}));
const used = new Set(data.labels);
data.classes.forEach((name, label) => {
  if (!used.has(label)) return;
  const made = button(find("#legend"), name, true, () => {
    if (!hidden.delete(label)) hidden.add(label);
    made.setAttribute("aria-pressed", !hidden.has(label));
  });
  const dot = document.createElement("i");
  dot.style.background = colour(label);
  made.prepend(dot);
});
find("#only").addEventListener("change", draw);
find("#only").parentElement.hidden = data.heldOut.every((flag, i) => flag || i === data.marked);
find("#reset").addEventListener("click", () => { fit(); draw(); });
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
</script>
</body>
</html>
"""
