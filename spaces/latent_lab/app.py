"""Latent lab: one picture through a decoupled (DAE) and a joint autoencoder; errors, codes, and what lies between two.

hf-dpssl space latent_lab      # on the demo's models, or: DPSSL_DAE=org/dae DPSSL_JOINT=org/joint python app.py
"""

from __future__ import annotations

try:
    import spaces  # noqa: F401  of ZeroGPU: before anything asks torch for a GPU
except ImportError:
    pass

from hf_dpssl import VQAutoencoder
from hf_dpssl.embedding.embedder import best_device
from hf_dpssl.pages.demo_outputs import about_models, example_pictures, find_models, source_arguments
from hf_dpssl.pages.latent_views import LARGEST_ERROR, cross_fade, morph, view
from hf_dpssl.pages.page_pictures import picture_grid
from hf_dpssl.pages.space_page import CACHE, gr, main, on_gpu, picture_upload, readable_errors
from hf_dpssl.pages.uploads import FORMATS, MAX_BYTES, MAX_PIXELS, read_upload

TITLES = {
    "dae": "decoupled (DAE): the encoder learnt against a weak decoder, then the decoder",
    "joint": "joint: encoder and decoder learnt together",
}
WAYS = {"dae": "through the decoupled latents", "joint": "through the joint latents"}
STEPS = 7  # pictures of a morph
LEGEND = f"Errors: black is none, bright yellow {LARGEST_ERROR:.0%} of the range or more. Like codes have like colours."
INTRODUCTION = f"""# Latent lab

An autoencoder with a codebook writes a picture as a small map of **codes** and reads it back. Compare what two ways of
training keep: errors, codes, and what lies **between** two pictures, where a generator will have to work. Pictures are
cropped to a square; {", ".join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB and {MAX_PIXELS // 10**6} megapixels.
"""


class Models:
    """The autoencoders that were found, by name; loaded once."""

    def __init__(self):
        self.sources = find_models(*TITLES)
        self.autoencoders = {
            name: VQAutoencoder.from_pretrained(**source_arguments(source)).eval().to(best_device())
            for name, source in self.sources.items()
        }

    @property
    def note(self) -> str:
        """What is missing, for the page."""
        missing = [name for name in TITLES if name not in self.sources]
        return f"*Only one autoencoder was found; {missing[0]} is missing.*" if missing else ""


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
                quantize = gr.Checkbox(True, label="snap to codes on the way")
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
    return page


CSS = """
section { margin-bottom: 14px; }
.way .pictures { display: grid; grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 6px; }
.way figure, .way img { width: 100% !important; }
section h3 { margin: 0 0 6px; font-size: 15px; font-weight: 600; }
"""

if __name__ == "__main__":
    main(build, CSS)
