"""Image generator: pictures of a class by a latent DiT or a token transformer, seen while they are made.

hf-dpssl space image_generator      # on the demo's models, or: DPSSL_DIT=org/name python app.py
"""

from __future__ import annotations

import re
import tempfile
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

try:
    import spaces  # noqa: F401  of ZeroGPU: before anything asks torch for a GPU
except ImportError:
    pass

from hf_dpssl import VQDiTPipeline, VQDriftPipeline, VQTokenPipeline
from hf_dpssl.embedding.embedder import best_device
from hf_dpssl.pages.demo_outputs import about_models, find_models, source_arguments
from hf_dpssl.pages.page_pictures import picture_grid, progress_bar
from hf_dpssl.pages.picture_stream import MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, PictureRequest, snippet, stream_pictures
from hf_dpssl.pages.space_page import CACHE, gr, main, on_gpu, readable_errors

KINDS = {"dit": VQDiTPipeline, "one step": VQDriftPipeline, "token transformer": VQTokenPipeline}
TITLES = {
    "dit": "diffusion transformer (DiT)",
    "one step": "one-step generator",
    "token transformer": "token transformer",
}
UNITS = {"dit": ("step", "steps"), "one step": ("pass", "passes"), "token transformer": ("code", "codes")}
EVERY, NONE = "each class in turn", "no class"
FRAME_SECONDS = 0.08  # at least so long between two pictures of a run
INTRODUCTION = """# Image generator

A **diffusion transformer** starts from noise and clears all of a picture's latents step by step; a **token
transformer** writes its codes one after the other; a **one-step generator** draws in a single pass. All work in the
latents of an autoencoder. Choose a class and watch.
"""


class Models:
    """The pipelines that were found, by name; loaded once."""

    def __init__(self):
        self.sources = find_models(*KINDS)
        self.pipelines = {
            name: KINDS[name].from_pretrained(**source_arguments(source)).to(best_device())
            for name, source in self.sources.items()
        }
        self.frames = on_gpu(self._frames)  # all else needs no GPU, and has to be where the page is

    def _frames(self, name: str, request: PictureRequest) -> Iterator[tuple]:
        yield from stream_pictures(self.pipelines[name], request, frame_seconds=FRAME_SECONDS)

    def class_choices(self, name: str) -> list[str]:
        """What can be asked of a model."""
        names = self.pipelines[name].class_names
        return [*names, EVERY, NONE] if names else [NONE]


def read_request(models: Models, name: str, label: str, number, seed, guidance, steps, temperature, top_k):
    """The controls as a PictureRequest; ValueError for a value that cannot be."""
    if seed is None or number is None:
        raise ValueError("Give a number of pictures and a seed.")
    names, count = models.pipelines[name].class_names, int(number)
    labels: tuple[str, ...] = ()
    if label == EVERY and names:
        labels = tuple(names[i % len(names)] for i in range(min(count, MAX_IMAGES + 1)))
    elif label in names:
        labels = (label,) * min(count, MAX_IMAGES + 1)
    elif label != NONE:
        raise ValueError(f"This model has no class {label!r}: choose one of the list.")
    return PictureRequest(labels, count, int(seed), float(guidance), int(steps), float(temperature), int(top_k))


def draw(models: Models, name: str, *controls) -> Iterator[tuple]:
    """(pictures as HTML, state of the run as HTML, file, snippet) as the run goes on."""
    request = read_request(models, name, *controls)
    code = snippet(KINDS[name], models.sources[name], request)
    wanted = request.labels or (NONE,) * request.number
    captions = [f"{label}, seed {request.seed + i}" for i, label in enumerate(wanted)]
    unit, units = UNITS[name]
    start = time.monotonic()
    for done, total, pictures in models.frames(name, request):
        finished = done > total
        side = 90 if request.number > 4 else 160
        state = (
            f"{len(pictures)} pictures in {time.monotonic() - start:.1f} s" if finished else f"{unit} {done} of {total}"
        )
        bar = progress_bar(min(done, total), total, f"{units} done")
        grid = picture_grid(pictures, captions, side=side, download="picture" if finished else None)
        state = f'<p role="status">{state}</p>{bar}'
        if not finished:
            yield grid, state, gr.skip(), code
            continue
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the file before it asks for more
            yield grid, state, gr.DownloadButton(value=save(pictures, request, Path(folder)), interactive=True), code


def save(pictures: list, request: PictureRequest, folder: Path) -> str:
    """A zip of the pictures as PNG in the folder; returns its path."""
    path = folder / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, picture in enumerate(pictures):
            label = re.sub(r"\W+", "_", request.labels[i]) if request.labels else "no_class"
            with archive.open(f"{label}-{request.seed + i}.png", "w") as file:
                picture.save(file, "PNG")
    return str(path)


def fit_controls(models: Models, name: str, label: str) -> tuple:
    """Classes of the model, and only the sliders that it reads."""
    choices = models.class_choices(name)
    return (
        gr.Dropdown(choices=choices, value=label if label in choices else choices[0]),
        gr.Slider(visible=name != "one step"),
        gr.Slider(visible=name == "dit"),
        gr.Slider(visible=name == "token transformer"),
        gr.Slider(visible=name == "token transformer"),
    )


def build(models: Models | None = None) -> gr.Blocks:
    """The page."""
    models = models or Models()
    first = next(iter(models.pipelines))
    choices = models.class_choices(first)
    with gr.Blocks(title="Image generator", analytics_enabled=False, fill_width=True, delete_cache=CACHE) as page:
        gr.Markdown(INTRODUCTION, elem_classes="heading")
        gr.HTML(about_models(models.sources), js_on_load=None, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                names = [(TITLES[name], name) for name in models.pipelines]
                model = gr.Radio(names, value=first, label="model", visible=len(names) > 1)
                label = gr.Dropdown(choices, value=EVERY if EVERY in choices else choices[0], label="class")
                number = gr.Slider(1, MAX_IMAGES, 10, step=1, label="pictures")
                seed = gr.Number(0, label="seed of the first", precision=0, minimum=0, maximum=2**32 - 1)
                guided, tokens, info = first != "one step", first == "token transformer", "1: none; more: clearer"
                guidance = gr.Slider(1, MAX_GUIDANCE, 2, step=0.1, label="guidance", info=info, visible=guided)
                steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="steps", visible=first == "dit")
                temperature = gr.Slider(0, 2, 1, step=0.05, label="temperature", visible=tokens)
                top_k = gr.Slider(0, 200, 0, step=1, label="top k", info="0: all codes", visible=tokens)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120)
            with gr.Column(scale=2, min_width=320, elem_classes="results"):
                state = gr.HTML("<p>Press <b>Draw</b>.</p>", js_on_load=None, elem_classes="state")
                grid = gr.HTML(js_on_load=None, min_height=180)
                file = gr.DownloadButton("Download all as zip", interactive=False)
                code = gr.Code(language="python", label="Python that draws the same", wrap_lines=True, lines=8)
        controls = [model, label, number, seed, guidance, steps, temperature, top_k]
        examples = {f"four of {wanted}": [first, wanted, 4, i, 2, 25, 1, 0] for i, wanted in enumerate(choices[:3])}

        @readable_errors
        def call(*values):
            yield from draw(models, *values)

        def call_example(*values):
            for drawn, said, _, written in call(*values):  # gradio keeps no file of an example
                yield drawn, said, written

        running = gr.on(
            [go.click, seed.submit], call, controls, [grid, state, file, code],
            api_name="draw", concurrency_limit=1, concurrency_id="models", show_progress="hidden",
        )  # fmt: skip
        go.click(None, js=SHOW_RESULTS)
        stop.click(None, cancels=[running])
        model.input(
            partial(fit_controls, models), [model, label], [label, guidance, steps, temperature, top_k],
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        gr.Examples(
            list(examples.values()), controls, [grid, state, code], call_example, cache_examples=True,
            cache_mode="lazy", example_labels=list(examples), label="Examples (kept after their first use)",
        )  # fmt: skip
    return page


# On a narrow screen the results are below the controls.
SHOW_RESULTS = "() => document.querySelector('.results').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
CSS = """
.state p { margin: 0 0 4px; font-variant-numeric: tabular-nums; }
"""

if __name__ == "__main__":
    main(build, CSS)
