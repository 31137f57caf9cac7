"""Whether a device computes what the CPU does: losses, views, models, whole training steps and pipelines, all tiny.

The error of a check is |found - CPU| / |CPU| over all numbers of a result (Euclidean norms), the largest of its
results; codes are compared as the share that differs. `TOLERANCES` says what is allowed: float32 without TF32 against
the CPU's float32, and bfloat16 (autocast; of losses the inputs) against it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import tiny_encoders
import tiny_pipelines
import torch
from torch import Tensor
from training_steps import CASES, batch

from hf_dpssl import VAEGAN, LatentMLP, PatchDiscriminator, PatchDiscriminatorConfig, VAEGANConfig
from hf_dpssl.contrastive import losses, matching
from hf_dpssl.contrastive.drifting import drift_loss
from hf_dpssl.contrastive.isotropy import lejepa, random_directions, sigreg
from hf_dpssl.data.views import MODES, PRESETS, TwoViews
from hf_dpssl.models.modeling_contrastive import ContrastiveEncoder

# A training step passes through batch norms of few images, forwards and backwards, and a rounding grows on its way.
TOLERANCES = {
    "fp32": {"loss": 1e-5, "view": 1e-5, "model": 1e-5, "step": 1e-4, "pipeline": 1e-5},
    "bf16": {"loss": 2e-2, "model": 5e-2, "step": 5e-1, "pipeline": 5e-2},
}
WITHOUT_A_DRAW = [name for name in CASES if not name.startswith(("dae_ar", "dae_gan noise")) and name != "dae_vq kl"]
Check = Callable[[torch.device, bool], list[Tensor]]  # (device, bfloat16) -> results


class Case(NamedTuple):
    """A check, its kind of `TOLERANCES`, and whether bfloat16 says anything about it."""

    what: str
    kind: str
    check: Check
    rounded: bool = True


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products and convolutions inside are not rounded to TF32."""
    if device.type != "cuda":
        yield
        return
    modern = hasattr(torch.backends.cudnn, "conv")
    name = "fp32_precision" if modern else "allow_tf32"
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv if modern else torch.backends.cudnn]
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, "ieee" if modern else False)
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def precision(device: torch.device, rounded: bool):
    """Context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if rounded else nullcontext()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for all devices."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_check(loss: Callable[..., Tensor]) -> Check:
    """Value and gradients of a loss of two views (48, 16) that are near each other."""

    def check(device: torch.device, rounded: bool) -> list[Tensor]:
        first = normal(48, 16)
        views = [first, first + 0.5 * normal(48, 16, seed=1)]
        leaves = [view.to(device, torch.bfloat16 if rounded else torch.float32).requires_grad_() for view in views]
        value = loss(*leaves)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return check


def loss_cases() -> Iterator[Case]:
    """Every loss, with every kernel and normalisation."""
    t_kernel = {"kernel": "student_t", "temperature": 5.0, "dof": 5.0}
    labels = torch.arange(48) % 6
    # P is of fixed points: it is no part of what is differentiated.
    p = {name: matching.gaussian_similarities(normal(48, 16), 8.0, normalization=name) for name in ("anchor", "joint")}

    def of_student(points: Tensor, normalization: str) -> Tensor:
        options = {"kernel": "student_t", "temperature": 4.0, "dof": 3.0}
        return matching.q_similarities(points, normalization=normalization, **options)

    found: dict[str, Callable[..., Tensor]] = {
        "info_nce": lambda x, y: losses.info_nce(x, y, temperature=0.5),
        "info_nce, weights": lambda x, y: losses.info_nce(x, y, temperature=0.5, weights=(labels + 1).to(x.device)),
        "t_simclr joint": lambda x, y: losses.t_simclr(x, y, temperature=8.0, dof=5.0),
        "t_simclr anchor": lambda x, y: losses.t_simclr(x, y, temperature=8.0, dof=5.0, normalization="anchor"),
        "t_simclr Gaussian": lambda x, y: losses.t_simclr(x, y, temperature=8.0, dof=float("inf")),
        "moco": lambda x, y: losses.moco(x, y, y.detach(), temperature=0.2),
        "t-moco": lambda x, y: losses.moco(x, y, y.detach(), **t_kernel),
        "clip": lambda x, y: losses.clip(x, y, temperature=0.5),
        "t-clip": lambda x, y: losses.clip(x, y, **t_kernel),
        "sup_con": lambda x, y: losses.sup_con(x, labels.to(x.device), temperature=0.5),
        "sne": lambda x, y: losses.sne(p["anchor"], y, temperature=4.0),
        "t_sne": lambda x, y: losses.t_sne(p["joint"], y),
        "alignment": lambda x, y: losses.alignment(x, y),
        "uniformity": lambda x, y: losses.uniformity(y),
        "matching joint": lambda x, y: matching.match(p["joint"].to(y.device), of_student(y, "joint")),
        "matching anchor": lambda x, y: matching.match(
            p["anchor"].to(y.device), of_student(y, "anchor"), "jensen_shannon", smoothing=0.1
        ),
        "lejepa": lambda x, y: lejepa(x, y, random_directions(32, 16, step=0), weight=0.1),
        "sigreg": lambda x, y: sigreg(y, random_directions(32, 16, step=0)),
        "drift_loss": lambda x, y: drift_loss(x.view(4, 12, 16), y.detach().view(4, 12, 16)).loss,
    }
    return (Case(name, "loss", loss_check(loss)) for name, loss in found.items())


def view_cases() -> Iterator[Case]:
    """Both views of every preset, in both modes."""

    def check_of(augmentation, mode: str) -> Check:
        def check(device: torch.device, rounded: bool) -> list[Tensor]:
            images = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
            views = TwoViews(augmentation, [0.5] * 3, [0.2] * 3, 0, mode=mode)
            return list(views(images.to(device), torch.arange(16, device=device), 0))

        return check

    for name, augmentation in PRESETS.items():
        for mode in MODES:
            yield Case(f"views {name}, {mode}", "view", check_of(augmentation, mode), rounded=False)


def model_cases() -> Iterator[Case]:
    """Every class of model, in evaluation mode."""

    def check_of(make: Callable[[], torch.nn.Module], results: Callable[..., list[Tensor]]) -> Check:
        def check(device: torch.device, rounded: bool) -> list[Tensor]:
            torch.manual_seed(0)
            model = make().eval().to(device)
            with torch.no_grad(), precision(device, rounded):
                return results(model, device)

        return check

    def pictures(device, side: int = 16):
        return normal(4, 3, side, side).clamp(-1, 1).to(device)

    def encoder(model, device):
        output = model(pictures(device), return_dict=True)
        return [output.last_hidden_state, output.pooler_output]

    def autoencoder(model, device):
        output = model.encode(pictures(device))
        decoded = model.decode(normal(4, 4, 4, 4).to(device)).pixel_values
        codes = [] if output.codes is None else [output.codes]
        return [output.latents, decoded, *codes]

    def language_model(model, device):
        return [model(input_ids=(torch.arange(32) % 16).view(2, 16).to(device), use_cache=False).logits]

    def transformer(model, device):
        labels = torch.arange(2, device=device)
        noised = normal(2, 4, 8, 8).to(device)
        return [model(noised, timestep=torch.tensor([3.0, 700.0], device=device), class_labels=labels).sample]

    def vaegan(model, device):
        return [*model.encode(pictures(device)), model(latents=normal(4, 8).to(device)).generated]

    def logits(model, device):
        return [model(pictures(device)).logits]

    small = VAEGANConfig(image_size=16, width=8, latent_dim=8, latent="dae")
    patches = PatchDiscriminatorConfig(image_size=16, width=8, num_layers=1)
    dense = dict(in_channels=4, sample_size=8, num_layers=2, width=32, num_embeds_ada_norm=3)
    makers = {f"encoder {name}": (partial(make_encoder, name), encoder) for name in tiny_encoders.BACKBONES}
    for quantizer in ("vq", "kl", "none"):
        makers[f"autoencoder {quantizer}"] = partial(tiny_pipelines.make_vae, quantizer=quantizer), autoencoder
    makers["VAEGAN"] = partial(VAEGAN, small), vaegan
    makers["PatchDiscriminator"] = partial(PatchDiscriminator, patches), logits
    makers["DiT"] = make_transformer, transformer
    makers["DiT learned variance"] = partial(make_transformer, objective="epsilon", learned_variance=True), transformer
    makers["LatentMLP"] = partial(LatentMLP, **dense), transformer
    for name in ("gpt2", "llama"):
        makers[f"language model {name}"] = partial(tiny_pipelines.make_token_model, architecture=name), language_model
    for name, (make, results) in makers.items():
        # In bfloat16 a latent between two codes may take either.
        yield Case(name, "model", check_of(make, results), rounded=name != "autoencoder vq")


def make_encoder(backbone: str) -> ContrastiveEncoder:
    """A tiny one of this kind of backbone."""
    return ContrastiveEncoder(tiny_encoders.config(backbone))


def make_transformer(**options) -> torch.nn.Module:
    """A tiny DiT."""
    return tiny_pipelines.make_dit(**options).transformer


def step_cases() -> Iterator[Case]:
    """Gradients of a training step of every script, views and noise included; those that draw are left out."""

    def check_of(name: str) -> Check:
        def check(device: torch.device, rounded: bool) -> list[Tensor]:
            torch.manual_seed(0)
            modules, prepare, step = CASES[name]()
            for module in modules:
                module.to(device)
            quantizer = getattr(modules[0], "quantizer", None)
            if quantizer is not None:
                quantizer.is_initialized.fill_(1)  # k-means would draw
            prepare()
            with precision(device, rounded):
                step({key: value.to(device) for key, value in batch().items()})
            gradients = [part.grad.flatten() for part in modules[0].parameters() if part.grad is not None]
            return [torch.cat(gradients)]

        return check

    # In bfloat16 an adversary's gradients of few pixels are mostly rounding; domains.py rounds its featurizer alone.
    in_float32 = [name for name in WITHOUT_A_DRAW if "adv" in name or name.startswith("domains")]
    return (Case(f"step of {name}", "step", check_of(name), name not in in_float32) for name in WITHOUT_A_DRAW)


def pipeline_cases() -> Iterator[Case]:
    """Pictures of every pipeline from given noise, or its most probable codes."""

    def check_of(make: Callable, **options) -> Check:
        def check(device: torch.device, rounded: bool) -> list[Tensor]:
            pipeline = make().to(device)
            pipeline.set_progress_bar_config(disable=True)
            with precision(device, rounded):
                return [pipeline([0, 1, 2], output_type="pt", **options).images]

        return check

    noise = {"latents": normal(3, 4, 8, 8), "quantize": False}
    yield Case("VQDiTPipeline", "pipeline", check_of(tiny_pipelines.make_dit, num_inference_steps=4, **noise))
    yield Case("VQDriftPipeline", "pipeline", check_of(tiny_pipelines.make_drift, **noise))
    # In bfloat16 other codes may be the most probable ones.
    yield Case("VQTokenPipeline", "pipeline", check_of(tiny_pipelines.make_tokens, temperature=0), rounded=False)


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of the results; ValueError where they are not alike, infinite for one not finite."""
    errors = []
    for result, reference in zip(found, expected, strict=True):
        if result.shape != reference.shape:
            raise ValueError(f"shape {tuple(result.shape)} instead of {tuple(reference.shape)}")
        if not reference.is_floating_point():
            errors.append(float((result.cpu() != reference).double().mean()))
            continue
        result, reference = result.detach().cpu().double(), reference.detach().double()
        error = float((result - reference).norm() / reference.norm().clamp_min(1e-30))
        errors.append(error if result.isfinite().all() else float("inf"))
    return max(errors)


def row_of(case: Case, device: torch.device, rounded: bool) -> dict:
    """One line of the results; an error that is raised is one of its own."""
    name = "bf16" if rounded else "fp32"
    row = {"what": case.what, "precision": name, "tolerance": TOLERANCES[name][case.kind]}
    try:
        torch.manual_seed(1)
        expected = case.check(torch.device("cpu"), False)
        torch.manual_seed(2)  # what draws from a global generator, which devices do not share, is found on a CPU too
        with exact_float32(device):
            found = case.check(device, rounded)
        error = error_of(found, expected)
    except TimeoutError:  # of the whole part
        raise
    except Exception as problem:
        return row | {"passed": False, "error": f"{type(problem).__name__}: {problem}"[:500]}
    return row | {"passed": error <= row["tolerance"], "error": error}


def measure(device: torch.device, scale: float) -> Iterator[dict]:
    """{"passed", "checks", "failed", "rows"} after every kind of checks; all are tiny at any scale."""
    rows: list[dict] = []
    for cases in (loss_cases(), view_cases(), model_cases(), step_cases(), pipeline_cases()):
        for case in cases:
            rows += [row_of(case, device, rounded) for rounded in ([False, True] if case.rounded else [False])]
        failed = [row["what"] for row in rows if not row["passed"]]
        yield {"passed": not failed, "checks": len(rows), "failed": failed, "rows": rows}
