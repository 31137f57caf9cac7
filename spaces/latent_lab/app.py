"""Latent lab: one picture through a decoupled (DAE) and a joint autoencoder, and what generators draw in both latents.

hf-dpssl space latent_lab      # on the demo's models, or: DPSSL_DAE=org/dae DPSSL_JOINT=org/joint python app.py
"""

from __future__ import annotations

import html
import os
import shlex
from functools import partial
from pathlib import Path

try:
    import spaces  # noqa: F401  of ZeroGPU: before anything asks torch for a GPU
except ImportError:
    pass

from hf_dpssl import VQAutoencoder, VQDiTPipeline, VQDriftPipeline, VQTokenPipeline
from hf_dpssl.autoencoder.latent_codec import fingerprint, has_fingerprint, other_statistics
from hf_dpssl.embedding.embedder import best_device
from hf_dpssl.generation.bulk_sampling import open_pipeline
from hf_dpssl.pages.demo_outputs import (
    MODELS,
    about_models,
    demo_folder,
    example_pictures,
    find_models,
    present_models,
    shown_source,
    source_arguments,
)
from hf_dpssl.pages.latent_views import LARGEST_ERROR, cross_fade, morph, view
from hf_dpssl.pages.page_pictures import picture_grid
from hf_dpssl.pages.picture_stream import (
    EVERY,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_STEPS,
    NONE,
    class_choices,
    read_request,
    stream_pictures,
    unread,
)
from hf_dpssl.pages.space_page import CACHE, gr, main, on_gpu, picture_upload, readable_errors, switched
from hf_dpssl.pages.uploads import FORMATS, MAX_BYTES, MAX_PIXELS, read_upload
from hf_dpssl.runs.lineage import well_formed

TITLES = {
    "joint": "joint: encoder and decoder learnt together",
    "dae": "decoupled (DAE): the encoder learnt against a weak decoder, then the decoder",
}
WAYS = {"joint": "through the joint latents", "dae": "through the decoupled latents"}
GENERATORS = {name: f"{name} generator" for name in TITLES}
KINDS = {  # of generators: what they are, and the script that trains them
    VQDiTPipeline: ("a latent DiT", "dae_dit"),
    VQDriftPipeline: ("a one-step generator", "dae_drift"),
    VQTokenPipeline: ("a token transformer", "dae_ar"),
}
SLIDERS = {"guidance": "1: none; more: clearer", "steps": None}  # of the generators, and what is said of them
STEPS = 7  # pictures of a morph
LEGEND = f"Errors: black is none, bright yellow {LARGEST_ERROR:.0%} of the range or more. Like codes have like colours."
INTRODUCTION = f"""# Latent lab

An autoencoder with a codebook writes a picture as a small map of **codes** and reads it back. Two ways of training are
compared. Trained **jointly**, the decoder reads back more: its reconstructions are closer. The **decoupled** encoder
learns against a weak decoder, which costs decibels; it is meant for what comes next, a **generator** that learns to
draw new latents, though on pictures this small no gain is decided. So look at both: errors and codes of a picture,
what lies **between** two pictures, and what generators of the two latents **draw** from the same seeds. Pictures are
cropped to a square; {", ".join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB and {MAX_PIXELS // 10**6} megapixels.
"""
GENERATION = """## New pictures, from both latents

Each generator was trained on the latents of one of the two autoencoders, and draws pictures that never were. Both start
from the same seeds and are asked for the same classes; compare how clear and how varied the pictures are.
"""


class Models:
    """The autoencoders and generators that were found, both by the name of the autoencoder; loaded once.

    Raises:
        FileNotFoundError: no autoencoder.
        ValueError: a generator is named that was trained on the latents of another autoencoder.
    """

    def __init__(self):
        self.sources = find_models(*TITLES)
        self.autoencoders = {}
        for name, source in self.sources.items():
            with well_formed(source):
                autoencoder = VQAutoencoder.from_pretrained(**source_arguments(source)).eval()
            self.autoencoders[name] = autoencoder.to(best_device())
        self.generators = {}
        for name, autoencoder in self.autoencoders.items():
            for found, source in present_models(GENERATORS[name]).items():
                generator = open_pipeline(source).to(best_device())
                statistics = generator.config.get("latent_statistics")  # none of codes: nothing is normalised
                same = has_fingerprint(autoencoder, fingerprint(generator.vae))
                if same and not other_statistics(autoencoder, statistics):
                    self.generators[name] = generator
                    self.sources[found] = source
                elif os.environ.get(MODELS[found][0]):  # else it is one of the demo, which nobody has named
                    raise ValueError(
                        f"{source} was not trained on the latents of {self.sources[name]}, normalised by its "
                        "latent_mean and latent_std: name the two that belong together in "
                        f"{MODELS[name][0]} and {MODELS[found][0]}."
                    )

    @property
    def note(self) -> str:
        """What is missing, for the page."""
        missing = [name for name in TITLES if name not in self.autoencoders]
        return f"*Only one autoencoder was found; {missing[0]} is missing.*" if missing else ""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes that every generator knows, in the first one's order."""
        known = [generator.class_names for generator in self.generators.values()]
        return [name for name in known[0] if all(name in names for names in known)] if known else []

    def unread(self, field: str, label: str) -> str | None:
        """Why a field of the request changes nothing in any generator; None where it does in one."""
        if not self.generators:
            return "there is no generator"
        reasons = [unread(type(one), label != NONE).get(field) for one in self.generators.values()]
        return None if None in reasons else reasons[0]

    def training_command(self, name: str) -> str:
        """The command that trains the missing generator of an autoencoder, as the other one was where there is one."""
        demo, script = demo_folder(), "dae_drift"
        flags = {"autoencoder": Path(self.sources[name])}
        for other, generator in self.generators.items():
            script = KINDS[type(generator)][1]
            recipe = Path(self.sources[GENERATORS[other]], "recipe.yaml")
            flags |= {"recipe": recipe} if recipe.is_file() else {}
        command = ["hf-dpssl", "train", script]
        for flag, place in flags.items():
            inside = place.is_relative_to(demo)
            shown = Path(shown_source(demo), place.relative_to(demo)) if inside else shown_source(place)
            command += [f"--{flag}", str(shown)]
        command += ["--output_dir", shown_source(demo), "--name", MODELS[GENERATORS[name]][1]]
        return shlex.join(command)


def compare(models: Models, path: str | None) -> str:
    """Each autoencoder's view of a picture, as HTML."""
    if not path:
        raise ValueError("Choose a picture first.")
    picture, parts = read_upload(path), []
    for name, autoencoder in models.autoencoders.items():
        seen = view(picture, autoencoder)
        pictures = [seen.original, seen.reconstruction, seen.errors]
        captions = ["picture", f"reconstruction, {seen.psnr:.1f} dB", "errors"]
        spoken = ["the picture", f"its reconstruction, PSNR {seen.psnr:.1f} decibels", "errors: bright is wrong"]
        if seen.codes is not None:
            pictures.append(seen.codes)
            captions.append(f"codes: {seen.different_codes} different in {seen.cells} cells")
            spoken.append(f"map of codes, {seen.different_codes} different ones in {seen.cells} cells")
        grid = picture_grid(pictures, captions, side=140, alternatives=spoken)
        parts.append(f"<section><h3>{TITLES[name]}</h3>{grid}</section>")
    return "".join(parts)


def between(models: Models, first: str | None, second: str | None, quantize: bool) -> str:
    """The way from one picture to another in each latent space and in pixels, as HTML."""
    if not first or not second:
        raise ValueError("A morph needs two pictures: choose the second one, too.")
    pictures, parts = [read_upload(first), read_upload(second)], []
    captions = [f"{i / (STEPS - 1):.0%}" for i in range(STEPS)]
    for name, autoencoder in models.autoencoders.items():
        grid = picture_grid(morph(*pictures, autoencoder, STEPS, quantize=quantize), captions, side=80)
        parts.append(f"<section><h3>{WAYS[name]}</h3>{grid}</section>")
    grid = picture_grid(cross_fade(*pictures, next(iter(models.autoencoders.values())), STEPS), captions, side=80)
    return "".join(parts) + f"<section><h3>through pixels, for comparison</h3>{grid}</section>"


def missing_generators(models: Models) -> str:
    """What to train for the generators that there are not, as HTML; empty where none is missing."""
    parts = []
    for name in TITLES:
        if name in models.generators:
            continue
        if name not in models.autoencoders:
            parts.append(f"<section><h3>{TITLES[name]}</h3><p>There is no such autoencoder here.</p></section>")
            continue
        command = html.escape(models.training_command(name))
        parts.append(
            f"<section><h3>{TITLES[name]}</h3><p>No generator was given for these latents. Train one, and start the "
            f"page again:</p><pre>{command}</pre><p>One from elsewhere, a DiT, a one-step generator or a token "
            f"transformer, is named in <code>{MODELS[GENERATORS[name]][0]}</code>.</p></section>"
        )
    return "".join(parts)


def generate(models: Models, label: str, number, seed, guidance, steps) -> str:
    """What each generator draws of the same classes and seeds, as HTML."""
    sliders = dict(guidance=float(guidance), steps=int(steps))
    request = read_request(models.class_names, label, number, seed, **sliders)
    parts = []
    for name, generator in models.generators.items():
        *_, (_, _, pictures) = stream_pictures(generator, request, frame_seconds=float("inf"))
        grid = picture_grid(pictures, request.captions, side=80)
        parts.append(f"<section><h3>{TITLES[name]}; drawn by {KINDS[type(generator)][0]}</h3>{grid}</section>")
    return "".join(parts) + missing_generators(models)


def snapping(models: Models) -> dict:
    """Value and switch of the snapping to codes."""
    without = [name for name, autoencoder in models.autoencoders.items() if autoencoder.quantizer is None]
    nowhere = "no autoencoder here has a codebook" if len(without) == len(models.autoencoders) else None
    return {"value": not nowhere} | switched(f"{without[0]} has no codebook" if without else None, nowhere)


def fit_controls(models: Models, label: str) -> tuple:
    """The sliders that a choice of class leaves something to do."""
    return tuple(gr.Slider(**switched(info, models.unread(name, label))) for name, info in SLIDERS.items())


def add_generation(models: Models, limits: dict) -> None:
    """The part of the page where both generators draw; `limits` are those of its events."""

    @on_gpu
    @readable_errors
    def call(*controls):
        return generate(models, *controls)

    choices = class_choices(models.class_names)
    chosen = EVERY if EVERY in choices else choices[0]
    nothing = None if models.generators else "there is no generator"
    no_class = None if models.class_names else "the generators have no class in common"
    state_of = {name: switched(info, models.unread(name, chosen)) for name, info in SLIDERS.items()}
    gr.Markdown(GENERATION, elem_classes="heading")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            label = gr.Dropdown(choices, value=chosen, label="class", **switched(None, nothing or no_class))
            number = gr.Slider(1, MAX_IMAGES, 10, step=1, label="pictures", **switched(None, nothing))
            seed = gr.Number(
                0, label="seed of the first", precision=0, minimum=0, maximum=2**32 - 1, **switched(None, nothing)
            )
            guidance = gr.Slider(1, MAX_GUIDANCE, 2, step=0.1, label="guidance", **state_of["guidance"])
            steps = gr.Slider(1, MAX_STEPS, 25, step=1, label="steps", **state_of["steps"])
            draw = gr.Button("Draw", variant="primary", interactive=not nothing)
        with gr.Column(scale=2, min_width=320):
            prompt = "" if nothing else "<p>Press <b>Draw</b>.</p>"
            samples = gr.HTML(prompt + missing_generators(models), js_on_load=None, elem_classes="samples")
    draw.click(call, [label, number, seed, guidance, steps], samples, api_name="draw", **limits)
    label.change(
        partial(fit_controls, models), label, [guidance, steps], api_visibility="private", show_progress="hidden"
    )


def build(models: Models | None = None) -> gr.Blocks:
    """The page."""
    models = models or Models()
    examples = example_pictures(6)

    @on_gpu
    @readable_errors
    def call_compare(path):
        return compare(models, path)

    @on_gpu
    @readable_errors
    def call_between(first, second, quantize):
        return between(models, first, second, quantize)

    with gr.Blocks(title="Latent lab", analytics_enabled=False, fill_width=True, delete_cache=CACHE) as page:
        gr.Markdown(INTRODUCTION + models.note, elem_classes="heading")
        gr.HTML(about_models(models.sources), js_on_load=None, elem_classes="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                first = picture_upload(examples[0], "picture", "the picture to encode")
                second = picture_upload(examples[1], "second picture", "the picture to morph to")
                quantize = gr.Checkbox(label="snap to codes on the way", **snapping(models))
                with gr.Row():
                    look = gr.Button("Compare", variant="primary", min_width=120)
                    walk = gr.Button("Morph", min_width=120)
            with gr.Column(scale=2, min_width=320):
                views = gr.HTML("<p>Press <b>Compare</b>.</p>", js_on_load=None)
                gr.Markdown(LEGEND, elem_classes="heading")
                way = gr.HTML("<p>Press <b>Morph</b>.</p>", js_on_load=None, elem_classes="way")
        limits = dict(concurrency_limit=2, concurrency_id="models", show_progress="minimal")
        look.click(call_compare, first, views, api_name="compare", **limits)
        walk.click(call_between, [first, second, quantize], way, api_name="morph", **limits)
        gr.Examples(
            [[path] for path in examples], first, views, call_compare, cache_examples=True, cache_mode="lazy",
            label="Examples (kept after their first use)",
        )  # fmt: skip
        add_generation(models, limits)
    return page


CSS = """
section { margin-bottom: 14px; }
.way .pictures { display: grid; grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 6px; }
.way figure, .way img { width: 100% !important; }
section pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; padding: 8px;
  border: 1px solid var(--border-color-primary); border-radius: 6px; }
section h3 { margin: 0 0 6px; font-size: 15px; font-weight: 600; }
"""

if __name__ == "__main__":
    main(build, CSS)
