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
from hf_dpssl.pages.picture_stream import (
    EVERY,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_STEPS,
    NONE,
    PictureRequest,
    class_choices,
    read_request,
    snippet,
    stream_pictures,
    unread,
)
from hf_dpssl.pages.space_page import CACHE, gr, main, on_gpu, readable_errors, switched
from hf_dpssl.runs.lineage import well_formed

KINDS = {"dit": VQDiTPipeline, "one step": VQDriftPipeline, "token transformer": VQTokenPipeline}
TITLES = {
    "dit": "diffusion transformer (DiT)",
    "one step": "one-step generator",
    "token transformer": "token transformer",
}
UNITS = {"dit": ("step", "steps"), "one step": ("pass", "passes"), "token transformer": ("code", "codes")}
SLIDERS = {  # of the pipelines, and what is said of them
    "guidance": "1: none; more: clearer",
    "steps": None,
    "temperature": "0: the likeliest codes, whatever the seed",
    "top_k": "0: all codes",
}
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
        self.pipelines = {}
        for name, source in self.sources.items():
            with well_formed(source):
                pipeline = KINDS[name].from_pretrained(**source_arguments(source))
            self.pipelines[name] = pipeline.to(best_device())
        self.frames = on_gpu(self._frames)  # all else needs no GPU, and has to be where the page is

    def _frames(self, name: str, request: PictureRequest) -> Iterator[tuple]:
        yield from stream_pictures(self.pipelines[name], request, frame_seconds=FRAME_SECONDS)

    def class_choices(self, name: str) -> list[str]:
        """What can be asked of a model."""
        return class_choices(self.pipelines[name].class_names)


def asked_for(models: Models, name: str, label: str, number, seed, guidance, steps, temperature, top_k):
    """The controls as a PictureRequest; ValueError for a value that cannot be."""
    options = dict(guidance=float(guidance), steps=int(steps), temperature=float(temperature), top_k=int(top_k))
    return read_request(models.pipelines[name].class_names, label, number, seed, **options)


def draw(models: Models, name: str, *controls) -> Iterator[tuple]:
    """(pictures as HTML, state of the run as HTML, file, snippet) as the run goes on."""
    request = asked_for(models, name, *controls)
    code = snippet(KINDS[name], models.sources[name], request)
    unit, units = UNITS[name]
    start = time.monotonic()
    for done, total, pictures in models.frames(name, request):
        finished = done > total
        side = 90 if request.number > 4 else 160
        state = (
            f"{len(pictures)} pictures in {time.monotonic() - start:.1f} s" if finished else f"{unit} {done} of {total}"
        )
        bar = progress_bar(min(done, total), total, f"{units} done")
        grid = picture_grid(pictures, request.captions, side=side, download="picture" if finished else None)
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


def control_states(models: Models, name: str, label: str, temperature: float) -> dict[str, dict]:
    """Choices, value and switch of the classes and the sliders, by name, of a model and what is asked of it."""
    choices = models.class_choices(name)
    label = label if label in choices else choices[0]
    reasons = unread(KINDS[name], label != NONE, temperature)
    no_class = None if len(choices) > 1 else "this model was trained without classes"
    states = {"class": dict(choices=choices, value=label) | switched(None, no_class)}
    return states | {slider: switched(info, reasons.get(slider)) for slider, info in SLIDERS.items()}


def fit_controls(models: Models, name: str, label: str, temperature: float) -> tuple:
    """Classes of the model, and off what changes nothing in its pictures."""
    classes, *sliders = control_states(models, name, label, temperature).values()
    return gr.Dropdown(**classes), *(gr.Slider(**state) for state in sliders)


def begun() -> tuple:
    """While a run goes on it can be stopped, and there is no file of it yet."""
    return gr.Button(interactive=True), gr.DownloadButton(interactive=False)


def ended():
    """There is nothing to stop."""
    return gr.Button(interactive=False)


def build(models: Models | None = None) -> gr.Blocks:
    """The page."""
    models = models or Models()
    first = next(iter(models.pipelines))
    choices = models.class_choices(first)
    state_of = control_states(models, first, EVERY, 1.0)
    with gr.Blocks(title="Image generator", analytics_enabled=False, fill_width=True, delete_cache=CACHE) as page:
        gr.Markdown(INTRODUCTION, elem_classes="heading")
        gr.HTML(about_models(models.sources), js_on_load=None, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                names = [(TITLES[name], name) for name in models.pipelines]
                model = gr.Radio(names, value=first, label="model", visible=len(names) > 1)
                label = gr.Dropdown(label="class", **state_of["class"])
                number = gr.Slider(1, MAX_IMAGES, 10, step=1, label="pictures")
                seed = gr.Number(0, label="seed of the first", precision=0, minimum=0, maximum=2**32 - 1)
                guidance = gr.Slider(1, MAX_GUIDANCE, 2, step=0.1, label="guidance", **state_of["guidance"])
                steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="steps", **state_of["steps"])
                tokens = "token transformer" in models.pipelines  # nothing else reads the next two
                temperature = gr.Slider(
                    0, 2, 1, step=0.05, label="temperature", visible=tokens, **state_of["temperature"]
                )
                top_k = gr.Slider(0, 200, 0, step=1, label="top k", visible=tokens, **state_of["top_k"])
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=120)
                    stop = gr.Button("Stop", min_width=120, interactive=False)
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

        quietly = dict(api_visibility="private", show_progress="hidden", queue=False)
        starts = [go.click, seed.submit]
        gr.on(starts, begun, None, [stop, file], **quietly)  # the file there may be is of an earlier run
        running = gr.on(
            starts, call, controls, [grid, state, file, code],
            api_name="draw", concurrency_limit=1, concurrency_id="models", show_progress="hidden",
        )  # fmt: skip
        running.then(ended, None, stop, **quietly)
        go.click(None, js=SHOW_RESULTS)
        stop.click(ended, None, stop, cancels=[running], **quietly)
        gr.on(
            [model.change, label.change, temperature.change], partial(fit_controls, models),
            [model, label, temperature], [label, guidance, steps, temperature, top_k],
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
