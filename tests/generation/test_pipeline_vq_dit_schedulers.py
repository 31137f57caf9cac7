"""Every diffusers scheduler that fits: it reaches the only image of a point-mass model, whatever the batch."""

import math
from typing import ClassVar

import pytest
import torch
from cases import for_each
from diffusers import DiTTransformer2DModel, schedulers
from tiny_pipelines import NAMES, generator, make_dit

from hf_dpssl import VQDiTPipeline
from hf_dpssl.generation.scheduler_steps import prediction_type_of
from hf_dpssl.latent_training.diffusion import make_scheduler

ON_TIMESTEPS = """DDIM DDIMParallel DDPM DDPMParallel PNDM DEISMultistep DPMSolverMultistep DPMSolverSinglestep
EulerDiscrete EulerAncestralDiscrete
HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete UniPCMultistep SASolver LCM TCD
""".split()
FLOW = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM LTXEulerAncestralRF".split()
WITH_FLOW_SIGMAS = "DPMSolverMultistep DPMSolverSinglestep DEISMultistep UniPCMultistep SASolver".split()
EVERY_CLASS = [("epsilon", name) for name in ON_TIMESTEPS] + [("flow", name) for name in FLOW]
EVERY_CLASS += [("flow_prediction", name) for name in WITH_FLOW_SIGMAS]
# With and without noise in a step, a history of predictions, several calls a step, levels that are no timesteps.
KINDS_OF_STEPS = [
    *(("epsilon", name) for name in ("DDPM", "PNDM", "DPMSolverMultistep", "KDPM2AncestralDiscrete", "LCM")),
    *(("flow", name) for name in ("FlowMatchHeunDiscrete", "LTXEulerAncestralRF")),
    ("flow_prediction", "SASolver"),
]
# PNDM, LTXEulerAncestralRF and SASolver on flow sigmas take none.
WITH_PICTURES = [
    *(("epsilon", name) for name in ("DDIM", "DPMSolverSinglestep", "HeunDiscrete", "KDPM2Discrete", "SASolver")),
    *(("flow", name) for name in ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")),
    ("flow_prediction", "UniPCMultistep"),
]
# These two end at the last noise level above 0 in diffusers, 1 / steps: some noise stays.
STOP_EARLY = [("flow_prediction", "DEISMultistep"), ("flow_prediction", "SASolver")]
AUTOENCODER = make_dit().vae
SAVED = {kind: make_dit(objective=kind).scheduler.config for kind in ("epsilon", "v_prediction")}


def make_one(kind: str, name: str):
    """A scheduler of diffusers for this kind of prediction, on the noise levels that ours are trained on."""
    cls = getattr(schedulers, f"{name}Scheduler", None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}Scheduler")
    if kind == "flow":
        return cls()
    options = {"num_train_timesteps": 1000}
    if kind == "flow_prediction":
        return cls(**options, prediction_type=kind, use_flow_sigmas=True, flow_shift=1.0)
    return cls.from_config(SAVED[kind])


class PointMass(DiTTransformer2DModel):
    """The exact prediction for a data set of one image, `target`, in closed form; writes down what it is shown."""

    def prepare(self, target: torch.Tensor, kind: str):
        self.target, self.kind, self.shown = target, kind, []
        self.alphas = make_scheduler("epsilon").alphas_cumprod
        return self

    def levels(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and s of a * image + s * noise."""
        time = timestep.float()[:, None, None, None]
        if self.kind.startswith("flow"):
            return 1 - time / 1000, time / 1000
        below, above = time.floor().long().clamp(0, 999), time.ceil().long().clamp(0, 999)
        sigmas = ((1 - self.alphas) / self.alphas).sqrt()
        sigma = torch.lerp(sigmas[below], sigmas[above], time - time.floor())
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    def forward(self, hidden_states, timestep=None, class_labels=None, **options):
        a, s = self.levels(timestep)
        self.shown.append((hidden_states, timestep))
        noise = (hidden_states - a * self.target) / s.clamp(min=1e-6)
        kinds = {"epsilon": noise, "v_prediction": a * noise - s * self.target}
        found = kinds.get(self.kind, noise - self.target)
        if self.config.out_channels != self.config.in_channels:
            found = torch.cat([found, torch.zeros_like(found)], dim=1)
        return type("Output", (), {"sample": found})


def point_mass_pipeline(kind: str, scheduler, out_channels: int = 4) -> VQDiTPipeline:
    transformer = PointMass(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=3,
        out_channels=out_channels,
    )  # fmt: skip
    target = torch.randn(1, 4, 8, 8, generator=generator(9))
    pipeline = VQDiTPipeline(transformer.prepare(target, kind).eval(), AUTOENCODER, scheduler, dict(enumerate(NAMES)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents_of(pipeline, labels, **options):
    options = {
        "num_inference_steps": 12,
        "output_type": "latent",
        "generator": generator(),
        "guidance_scale": 2.0,
    } | options
    return pipeline(labels, **options).images


@pytest.mark.filterwarnings("ignore")
@for_each("kind, name", [*EVERY_CLASS, *[("v_prediction", name) for name in ("DDIM", "PNDM", "DPMSolverMultistep")]])
def test_every_fitting_scheduler_reaches_the_only_image_of_a_point_mass(kind, name):
    pipeline = point_mass_pipeline(kind, make_one(kind, name))
    found = latents_of(pipeline, [0, 1])
    atol = 5 / 12 if (kind, name) in STOP_EARLY else 0.07
    torch.testing.assert_close(found, pipeline.transformer.target.expand(2, -1, -1, -1), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def network():
    return make_dit()


@pytest.mark.filterwarnings("ignore")
@for_each("kind, name", KINDS_OF_STEPS)
def test_image_does_not_depend_on_its_batch_nor_on_micro_batches(network, kind, name):
    pipeline = VQDiTPipeline(network.transformer, network.vae, make_one(kind, name), dict(enumerate(NAMES)))
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 2.0}
    together = latents_of(pipeline, [0, 1, 2], generator=[5, 6, 7], **options)
    alone = latents_of(pipeline, [1], generator=[6], **options)
    scale = float(together.abs().max())
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-4 * max(1, scale))
    one_generator = latents_of(pipeline, [0, 1, 2], **options)
    in_parts = latents_of(pipeline, [0, 1, 2], batch_size=2, **options)
    torch.testing.assert_close(one_generator, in_parts, rtol=0, atol=1e-4 * max(1, float(one_generator.abs().max())))


class NoiseOnly(schedulers.DDPMScheduler):
    """DDPM whose steps see 0 in place of latents and predictions, so that only their noise is left; keeps it."""

    drawn: ClassVar[list] = []  # of the class: a call works on a copy of the scheduler

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        zeros = torch.zeros_like(sample)
        after = super().step(zeros, timestep, zeros, generator=generator, return_dict=return_dict)
        self.drawn.append(after[0])
        return after


def test_noise_of_an_image_is_bit_identical_in_every_batch_also_in_stochastic_steps(network):
    def noises(labels, generators):
        scheduler = NoiseOnly.from_config(make_scheduler("epsilon").config)
        NoiseOnly.drawn.clear()
        pipeline = VQDiTPipeline(network.transformer, network.vae, scheduler, dict(enumerate(NAMES)))
        pipeline.set_progress_bar_config(disable=True)
        latents_of(pipeline, labels, generator=generators, num_inference_steps=4)
        return torch.stack(NoiseOnly.drawn)

    together, alone = noises([0, 1, 2], [5, 6, 7]), noises([1], [6])
    assert together.std() > 0 and torch.equal(together[:, 1:2], alone)


@pytest.mark.filterwarnings("ignore")
@for_each("kind, name", WITH_PICTURES)
def test_pictures_start_at_their_noise_level_and_known_cells_follow_it(kind, name):
    pipeline = point_mass_pipeline(kind, make_one(kind, name))
    picture, mask = torch.rand(3, 16, 16, generator=generator(1)), torch.zeros(16, 16)
    mask[:, :8] = 1
    with torch.no_grad():
        known = pipeline.vae.normalize_latents(pipeline.vae.encode_latents(picture[None] * 2 - 1))
    noise = torch.randn(1, 4, 8, 8, generator=generator(2))
    latents_of(pipeline, [0], latents=noise, image=picture, strength=0.5, guidance_scale=1.0)
    first, timestep = pipeline.transformer.shown[0]
    a, s = pipeline.transformer.levels(timestep)
    assert float(timestep[0]) < 900
    torch.testing.assert_close(first, a * known + s * noise, rtol=0, atol=5e-3)
    pipeline.transformer.shown = []
    found = latents_of(pipeline, [0], latents=noise, image=picture, mask_image=mask, guidance_scale=1.0)
    torch.testing.assert_close(found[..., 4:], known[..., 4:])
    if not name.startswith("KDPM2"):  # between its two halves of a step it holds another state
        for shown, timestep in pipeline.transformer.shown:
            a, s = pipeline.transformer.levels(timestep)
            torch.testing.assert_close(shown[..., 4:], (a * known + s * noise)[..., 4:], rtol=0, atol=5e-3)


@for_each("name", ["DDPM", "DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "SASolver"])
@pytest.mark.filterwarnings("ignore")
def test_learned_variance_is_used_by_ddpm_and_cut_off_for_other_schedulers(name):
    learned = make_scheduler("epsilon", learned_variance=True)
    scheduler = getattr(schedulers, f"{name}Scheduler").from_config(learned.config)
    pipeline = point_mass_pipeline("epsilon", scheduler, out_channels=8)
    assert pipeline.learned_variance
    found = latents_of(pipeline, [0, 1])
    torch.testing.assert_close(found, pipeline.transformer.target.expand(2, -1, -1, -1), rtol=0, atol=0.05)


class Varied(PointMass):
    """A point mass whose variance output is the constant `v`."""

    def forward(self, hidden_states, **options):
        output = super().forward(hidden_states, **options)
        output.sample[:, 4:] = self.v
        return output


def test_learned_variance_of_ddpm_lies_between_the_two_bounds_as_published(network):
    """Nichol and Dhariwal 2021, equation 15: log variance = w log beta + (1 - w) log beta_tilde, w = (v + 1) / 2."""
    first = {}
    for v in (-1.0, 0.0, 1.0):
        scheduler = make_scheduler("epsilon", learned_variance=True)
        pipeline = point_mass_pipeline("epsilon", scheduler, out_channels=8)
        pipeline.transformer.__class__, pipeline.transformer.v, trace = Varied, v, []
        latents_of(pipeline, [0], callback_on_step_end=lambda *args, trace=trace: trace.append(args[3]["latents"]))
        first[v] = trace[0]
    scheduler.set_timesteps(12)
    now, after = (int(t) for t in scheduler.timesteps[:2])
    alphas = scheduler.alphas_cumprod.double()
    beta = 1 - alphas[now] / alphas[after]
    beta_tilde = beta * (1 - alphas[after]) / (1 - alphas[now])
    source = generator()
    noise = [torch.randn(1, 4, 8, 8, generator=source) for _ in range(2)][1]  # after that of the start
    for v in (0.0, 1.0):
        deviation = (((v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()) / 2).exp()
        expected = float(deviation - beta_tilde.sqrt()) * noise
        torch.testing.assert_close(first[v] - first[-1.0], expected, rtol=0, atol=1e-5)


def published_loop(pipeline, timesteps: list[int], noise: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Ancestral sampling of a spaced chain by the formulas: no noise where the index, not the timestep, is 0."""
    alphas_bar = pipeline.scheduler.alphas_cumprod.double()[torch.tensor(timesteps)]
    before = torch.cat([alphas_bar[1:], torch.ones(1, dtype=torch.float64)])
    x = noise.double()
    for i, (bar, bar_before) in enumerate(zip(alphas_bar, before, strict=True)):
        labels = torch.tensor([1])
        output = pipeline.transformer(x.float(), timestep=torch.tensor([timesteps[i]]), class_labels=labels).sample
        epsilon, v = output.double().chunk(2, dim=1)
        beta = 1 - bar / bar_before
        image = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        x = (beta * bar_before.sqrt() * image + (1 - bar_before) * (1 - beta).sqrt() * x) / (1 - bar)
        if i + 1 < len(timesteps):
            beta_tilde = beta * (1 - bar_before) / (1 - bar)
            log_variance = (v + 1) / 2 * beta.log() + (1 - v) / 2 * beta_tilde.log()
            x = x + (log_variance / 2).exp() * torch.randn(noise.shape, generator=source)
    return x


@torch.no_grad()
def test_sampling_with_learned_variance_equals_the_published_loop_whose_last_step_is_the_mean():
    for spacing, last in (("trailing", 99), ("leading", 0), ("linspace", 0)):
        pipeline = make_dit(objective="epsilon", learned_variance=True)
        pipeline.scheduler = schedulers.DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        source = generator()
        noise = torch.randn(1, 4, 8, 8, generator=source)
        found = latents_of(pipeline, [1], num_inference_steps=10, guidance_scale=1.0)
        pipeline.scheduler.set_timesteps(10)
        timesteps = pipeline.scheduler.timesteps.tolist()
        assert len(timesteps) == 10 and timesteps[-1] == last
        expected = published_loop(pipeline, timesteps, noise, source)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


REFUSED = [
    "EDMEuler",
    "EDMDPMSolverMultistep",
    "CMStochasticIterative",
    "VQDiffusion",
    "RePaint",
    "CogVideoXDPM",
    "IPNDM",
]


@for_each("name", REFUSED)
def test_schedulers_of_another_kind_are_refused(name):
    cls = getattr(schedulers, f"{name}Scheduler")
    scheduler = cls(num_vec_classes=4) if name == "VQDiffusion" else cls()
    with pytest.raises(ValueError, match="does not fit a latent DiT"):
        prediction_type_of(scheduler)


@for_each("trained, given", [("flow", "epsilon"), ("epsilon", "v_prediction"), ("epsilon", "flow")])
def test_a_scheduler_of_the_wrong_prediction_type_is_refused_naming_both(trained, given):
    pipeline = make_dit(objective=trained)
    pipeline.scheduler = make_scheduler(given)
    with pytest.raises(ValueError, match=f"predicts '{trained}', but .* expects '{given}'"):
        pipeline([0], num_inference_steps=1)


def test_a_scheduler_that_wants_a_variance_is_refused_where_none_is_predicted():
    pipeline = make_dit(objective="epsilon")
    pipeline.scheduler = make_scheduler("epsilon", learned_variance=True)
    with pytest.raises(ValueError, match="variance_type='learned_range'.*take variance_type='fixed_small'"):
        pipeline([0], num_inference_steps=1)


def test_dynamic_shifting_follows_the_image_s_tokens_or_is_refused_in_a_sentence():
    """Esser et al. 2024, equation 23, as Flux applies it: noise level s becomes e^mu / (e^mu + 1/s - 1)."""
    pipeline = point_mass_pipeline("flow", schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    found = latents_of(pipeline, [0], num_inference_steps=4, guidance_scale=1.0)
    torch.testing.assert_close(found, pipeline.transformer.target, rtol=0, atol=1e-3)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)  # 8 x 8 latents in patches of 2: 16 tokens
    levels = torch.linspace(1, 1 / 1000, 4, dtype=torch.float64)
    expected = 1000 * math.exp(mu) / (math.exp(mu) + 1 / levels - 1)
    shown = torch.stack([timestep[0] for _, timestep in pipeline.transformer.shown]).double()
    torch.testing.assert_close(shown, expected, rtol=1e-4, atol=0)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
    pipeline = point_mass_pipeline("flow_prediction", schedulers.UniPCMultistepScheduler(**flow))
    with pytest.raises(ValueError, match="does not say how its dynamic shift grows.*use_dynamic_shifting=False"):
        latents_of(pipeline, [0])


def test_from_config_keeps_the_noise_schedule_and_another_one_is_refused():
    pipeline = make_dit(objective="epsilon")
    kept = schedulers.HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    torch.testing.assert_close(kept.alphas_cumprod, pipeline.scheduler.alphas_cumprod, rtol=0, atol=1e-6)
    pipeline.scheduler = schedulers.HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="beta_end=0.012, the transformer was trained with beta_start=0.0001"):
        pipeline([0], num_inference_steps=1)
