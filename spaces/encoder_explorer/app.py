"""Encoder explorer: nearest neighbours of a picture and its place on a map, in the eyes of two encoders.

hf-dpssl space encoder_explorer      # on the demo's encoders, or: DPSSL_ENCODER=org/t-moco-v2 python app.py
"""

from __future__ import annotations

import html
import os

try:
    import spaces  # noqa: F401  of ZeroGPU: before anything asks torch for a GPU
except ImportError:
    pass

from hf_dpssl.pages.demo_outputs import about_models, example_pictures, find_models
from hf_dpssl.pages.neighbour_views import EncoderView, PictureBank
from hf_dpssl.pages.page_pictures import picture_grid
from hf_dpssl.pages.space_page import CACHE, gr, main, on_gpu, picture_upload, readable_errors
from hf_dpssl.pages.uploads import FORMATS, MAX_BYTES, MAX_PIXELS, read_upload

MAX_NEIGHBOURS = 20
INTRODUCTION = f"""# Encoder explorer

An encoder turns a picture into a vector; what it was taught to keep near decides the **neighbours**. Drop a picture or
take an example: see who stands near it in the eyes of each encoder, and find it, ringed, on the **map** (hover shows
pictures; wheel and drag zoom and move; the legend hides classes). {", ".join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB
and {MAX_PIXELS // 10**6} megapixels.
"""


class Models:
    """The encoders that were found and their views of the pictures; computed once."""

    def __init__(self):
        self.sources = find_models("encoder", "second encoder")
        self.bank = PictureBank(os.environ.get("DPSSL_DATASET") or "digits")
        self.views = {name: EncoderView(source, self.bank) for name, source in self.sources.items()}

    @property
    def note(self) -> str:
        """What is missing, for the page."""
        return "*Only one encoder was found, so there is nothing to compare it with.*" if len(self.views) == 1 else ""

    def title(self, name: str) -> str:
        """A heading."""
        folder = self.sources[name].rstrip("/").split("/")[-1]
        return f"{folder}, {self.views[name].embedder.dimension} features"


def frame(page: str, title: str) -> str:
    """A page of its own within this one."""
    return f'<iframe class="map" title="{html.escape(title)}" srcdoc="{html.escape(page)}"></iframe>'


def maps(models: Models, picture=None) -> list[str]:
    """The map of each encoder, as HTML."""
    return [
        f"<h3>{html.escape(models.title(name))}</h3>"
        + frame(view.map_page(picture, "Map"), f"interactive map of {name} by {view.map_name}")
        for name, view in models.views.items()
    ]


def explore(models: Models, path: str | None, count: float) -> list[str]:
    """Neighbours, then maps, of each encoder, as HTML."""
    if not path:
        raise ValueError("Choose a picture first.")
    if not 1 <= count <= min(MAX_NEIGHBOURS, len(models.bank)):
        raise ValueError(f"The number of neighbours must lie in 1 to {min(MAX_NEIGHBOURS, len(models.bank))}.")
    picture, parts = read_upload(path), []
    for view in models.views.values():
        indices, similarities = view.neighbours(picture, int(count))
        captions = [f"{models.bank.name(i)} · {s:.2f}" for i, s in zip(indices, similarities, strict=True)]
        spoken = [f"neighbour {n + 1}: {caption}" for n, caption in enumerate(captions)]
        grid = picture_grid([models.bank.pictures[i] for i in indices], captions, side=64, alternatives=spoken)
        parts.append(f"<h4>nearest neighbours, with cosine</h4>{grid}")
    return parts + maps(models, picture)


def build(models: Models | None = None) -> gr.Blocks:
    """The page."""
    models = models or Models()
    examples = example_pictures(8)

    @on_gpu
    @readable_errors
    def call(path, count):
        return explore(models, path, count)

    with gr.Blocks(title="Encoder explorer", analytics_enabled=False, fill_width=True, delete_cache=CACHE) as page:
        gr.Markdown(INTRODUCTION + models.note, elem_classes="heading")
        gr.HTML(about_models(models.sources), js_on_load=None, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                picture = picture_upload(examples[0], "picture", "the picture to look for")
                count = gr.Slider(1, MAX_NEIGHBOURS, 10, step=1, label="neighbours")
                go = gr.Button("Find neighbours", variant="primary")
            with gr.Column(scale=3, min_width=320), gr.Row():
                columns = []
                for drawn in maps(models):
                    with gr.Column(min_width=300):
                        place = gr.HTML(drawn, js_on_load=None)
                        columns.append((gr.HTML("<h4>nearest neighbours</h4>Press Find.", js_on_load=None), place))
        outputs = [column[0] for column in columns] + [column[1] for column in columns]
        go.click(
            call, [picture, count], outputs, api_name="explore", concurrency_limit=2, concurrency_id="models",
            show_progress="minimal",
        )  # fmt: skip
        gr.Examples(
            [[path, 10] for path in examples], [picture, count], outputs, call, cache_examples=True, cache_mode="lazy",
            visible_columns=[0], label="Examples (kept after their first use)",
        )  # fmt: skip
    return page


CSS = """
h3, h4 { margin: 0 0 6px; font-size: 15px; font-weight: 600; }
iframe.map { width: 100%; height: 460px; border: 1px solid var(--border-color-primary); border-radius: 10px;
  color-scheme: light; }
.dark iframe.map { color-scheme: dark; }
"""

if __name__ == "__main__":
    main(build, CSS)
