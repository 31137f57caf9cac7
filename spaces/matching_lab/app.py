"""Matching lab: similarities P in many dimensions are matched by similarities Q in two, while you watch.

hf-dpssl space matching_lab      # or: python app.py
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_dpssl import matching
from hf_dpssl.pages.live_map import DATA, SIMILARITIES, LiveMap, MapSettings, class_gap, map_data
from hf_dpssl.pages.page_pictures import curves_svg, map_svg
from hf_dpssl.pages.space_page import CACHE, gr, main, readable_errors, switched

POINTS = 256
STEPS = 4  # of both maps, in an update
LAST_STEP = 400  # where a run pauses by itself
SECONDS = 0.1  # between updates
PRESETS = {
    "t-SNE": MapSettings(),
    "SNE": MapSettings(kernel="gaussian", normalization="anchor"),
    "t-SimCLR on pairs": MapSettings("pairs", dof=5.0, temperature=2.0),
    "supervised, Student-t": MapSettings("classes", normalization="anchor"),
    "Jensen-Shannon": MapSettings(divergence="jensen_shannon"),
    "SimCLR on pairs": MapSettings("pairs", kernel="cosine", normalization="anchor", temperature=0.5),
}
TITLES = {"cosine": "cosine", "gaussian": "Gaussian", "student_t": "Student-t"}
P_CHOICES = [("near neighbours", "neighbours"), ("same class", "classes"), ("pairs (two views)", "pairs")]
assert {value for _, value in P_CHOICES} == set(SIMILARITIES)
D_CHOICES = [
    ("KL", "kl"), ("reverse KL", "reverse_kl"), ("Jensen-Shannon", "jensen_shannon"), ("alpha", "alpha"),
    ("chi-square", "chi_square"),
]  # fmt: skip
INTRODUCTION = """# Matching lab

Both maps see the **same P** of 256 points: who is similar in many dimensions. Each moves its points until their
similarities **Q** in two dimensions fit. The left map measures Q with a **Gaussian** (SNE), the right one with **the
kernel you choose**. Far fewer points fit around a point in a plane than in 64 dimensions: under the Gaussian they crowd
together, the heavy tail of **Student-t** makes room. That is what turns SNE into t-SNE, and SimCLR into t-SimCLR.

**Class gap**: how many times as far as the nearest point of its own class the nearest point of another class is, in the
median over all points. 1 is a map on which classes cannot be told apart; more is more room between them.
"""


class Session:
    """The two maps of one visitor: SNE's Gaussian, and the kernel chosen."""

    def __init__(self, data: str, seed: int):
        points, self.labels = map_data(data, POINTS)
        self.maps = [LiveMap(points, self.labels, seed=seed) for _ in range(2)]

    def advance(self, settings: MapSettings, steps: int) -> None:
        """Move both maps."""
        for one, kernel in zip(self.maps, ("gaussian", settings.kernel), strict=True):
            one.advance(replace(settings, kernel=kernel), steps)

    def draw(self, settings: MapSettings) -> tuple[str, str, str]:
        """Left map, right map and the line of numbers, as HTML."""
        names = ["Gaussian", TITLES[settings.kernel]]
        names[1] += f", dof {settings.dof:g}" if settings.kernel == "student_t" else ""
        drawn, gaps = [], []
        for one, kernel, name in zip(self.maps, ("gaussian", settings.kernel), names, strict=True):
            gaps.append(class_gap(one.places(kernel), self.labels))
            places = one.places(kernel)
            svg = map_svg(places, self.labels.tolist(), "0123456789", f"map under a {name} kernel, gap {gaps[-1]:.1f}")
            drawn.append(f'<h3>{name}</h3>{svg}<p class="gap">class gap <b>{gaps[-1]:.1f}</b></p>')
        losses = {"Gaussian": self.maps[0].losses, "yours": self.maps[1].losses}
        last = [f"{losses[name][-1]:.3f}" if losses[name] else "-" for name in losses]
        curve = curves_svg(losses, f"divergence over steps; now {last[0]} under the Gaussian, {last[1]} in your map")
        steps = len(self.maps[1].losses)
        text = f"step <b>{steps}</b> · divergence <b>{last[0]}</b> Gaussian (solid), <b>{last[1]}</b> yours (dashed)"
        return drawn[0], drawn[1], f'<p class="gap">{text}</p>{curve}'


def restart(data: str, seed: float, *settings) -> tuple:
    """A new pair of maps, running."""
    session = Session(data, int(seed))
    return session, *session.draw(MapSettings(*settings)), gr.Timer(active=True), gr.Button("Pause")


def update(session: Session | None, *settings) -> tuple:
    """Some steps with the settings of now; a run pauses by itself, and when the numbers overflow."""
    paused = (gr.Timer(active=False), gr.Button("Go on"))
    if session is None:
        return (gr.skip(),) * 5
    settings = MapSettings(*settings)
    try:
        session.advance(settings, STEPS)
    except ValueError as error:
        gr.Warning(str(error), title="Paused")
        return *session.draw(settings), *paused
    done = len(session.maps[1].losses) % LAST_STEP == 0
    return *session.draw(settings), *(paused if done else (gr.skip(), gr.skip()))


def toggle(label: str) -> tuple:
    """Pause or go on."""
    running = label == "Pause"
    return gr.Timer(active=not running), gr.Button("Go on" if running else "Pause")


def apply_preset(name: str) -> list:
    """The controls of a named loss."""
    settings = PRESETS[name]
    return [getattr(settings, field) for field in MapSettings.__dataclass_fields__]


def sliders(similarities: str, kernel: str, divergence: str) -> dict[str, dict]:
    """Switch of the sliders that not every choice reads, by name."""
    controls = {  # what is said of it, whether it is read, and what it is for
        "perplexity": ("neighbours of a point", similarities == "neighbours", "near neighbours"),
        "dof": ("few: heavy tail", kernel == "student_t", "the Student-t kernel"),
        "alpha": (None, divergence == "alpha", "the divergence alpha"),
    }
    return {name: switched(info, None if read else f"only for {use}") for name, (info, read, use) in controls.items()}


def show_what_counts(similarities: str, kernel: str, divergence: str) -> tuple:
    """Only the sliders that the choice reads can be moved."""
    return tuple(gr.Slider(**state) for state in sliders(similarities, kernel, divergence).values())


def build() -> gr.Blocks:
    """The page."""
    first = Session("digits", 0).draw(MapSettings())
    state_of = sliders("neighbours", "student_t", "kl")
    with gr.Blocks(title="Matching lab", analytics_enabled=False, fill_width=True, delete_cache=CACHE) as page:
        gr.Markdown(INTRODUCTION, elem_classes="heading")
        session, timer = gr.State(None, time_to_live=3600), gr.Timer(SECONDS, active=False)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_classes="maps"):
                    left = gr.HTML(first[0], js_on_load=None, elem_classes="map", min_width=140)
                    right = gr.HTML(first[1], js_on_load=None, elem_classes="map", min_width=140)
                with gr.Row():
                    pause = gr.Button("Pause", variant="primary", min_width=120)
                    again = gr.Button("Start again", min_width=120)
                numbers = gr.HTML(first[2], js_on_load=None, elem_classes="numbers")
            with gr.Column(scale=1, min_width=300):
                preset = gr.Dropdown(list(PRESETS), value="t-SNE", label="A known loss", info="sets what is below")
                similarities = gr.Radio(P_CHOICES, value="neighbours", label="P: who belongs together")
                perplexity = gr.Slider(3, 80, 20, step=1, label="perplexity", **state_of["perplexity"])
                kernels = [(TITLES[name], name) for name in matching.KERNELS]
                kernel = gr.Radio(kernels, value="student_t", label="Q: kernel of your map")
                dof = gr.Slider(0.2, 20, 1, step=0.2, label="degrees of freedom", **state_of["dof"])
                divergence = gr.Dropdown(D_CHOICES, value="kl", label="divergence")
                with gr.Accordion("more", open=False):
                    normalization = gr.Radio(["joint", "anchor"], value="joint", label="normalisation of P and Q")
                    temperature = gr.Slider(0.1, 10, 1, step=0.1, label="temperature", info="divides distances")
                    alpha = gr.Slider(0.1, 2, 0.5, step=0.1, label="order of the alpha divergence", **state_of["alpha"])
                    data = gr.Dropdown(list(DATA), value="digits", label="data")
                    seed = gr.Number(0, label="random seed", precision=0, minimum=0, maximum=2**31)
        controls = [similarities, perplexity, kernel, normalization, temperature, dof, divergence, alpha]
        shown = [left, right, numbers, timer, pause]
        start = dict(fn=readable_errors(restart), inputs=[data, seed, *controls], outputs=[session, *shown])
        gr.on([page.load, again.click, data.change, seed.submit], **start, api_name="restart", show_progress="hidden")
        timer.tick(update, [session, *controls], shown, api_name="update", show_progress="hidden", trigger_mode="once")
        pause.click(toggle, pause, [timer, pause], api_name="toggle", show_progress="hidden")
        preset.input(apply_preset, preset, controls, api_name="preset", show_progress="hidden").then(
            **start, api_visibility="private", show_progress="hidden"
        )
        gr.on(
            [similarities.change, kernel.change, divergence.change], show_what_counts,
            [similarities, kernel, divergence], [perplexity, dof, alpha],
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
    return page


CSS = """
.map, .numbers { padding: 0 !important; }
.map h3 { margin: 0 0 4px; font-size: 15px; font-weight: 600; }
.map svg { background: var(--background-fill-secondary); border-radius: 10px; }
.gap { margin: 4px 0 0; font-variant-numeric: tabular-nums; }
@media (max-width: 700px) {
  .map text { font-size: 21px; } .map h3 { font-size: 14px; } .maps { gap: 10px !important; }
}
"""

if __name__ == "__main__":
    torch.set_num_threads(1)  # matrices of 256 rows: more threads take longer
    main(build, CSS)
