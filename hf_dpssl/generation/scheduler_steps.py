"""diffusers' schedulers as the pipeline uses them: which fit a model, where a run starts, and single steps.

Source: the schedulers' own papers; Nichol and Dhariwal 2021 (learned variance); Meng et al. 2022 (pictures).
"""

from __future__ import annotations

import inspect

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor

PREDICTION_TYPES = ("flow", "epsilon", "v_prediction", "sample", "mean_flow")
_FLOW_CLASSES = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM", "LTXEulerAncestralRF")
_LEARNED = ("learned", "learned_range")
_NOISE_FIELDS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """What a model must predict for this scheduler: one of PREDICTION_TYPES.

    Raises:
        ValueError: a scheduler of another kind (discrete codes, EDM's continuous noise levels, other arguments).
    """
    name = type(scheduler).__name__
    config = scheduler.config
    if name.removesuffix("Scheduler") in _FLOW_CLASSES:
        return "flow"
    found = config.get("prediction_type")
    first = list(inspect.signature(scheduler.step).parameters)[:3]
    if first != ["model_output", "timestep", "sample"] or "sigma_data" in config:
        found = None
    if found == "flow_prediction" and config.get("use_flow_sigmas", False):
        return "flow"
    if found not in ("epsilon", "v_prediction", "sample") or config.get("use_flow_sigmas", False):
        raise ValueError(
            f"{name} (prediction_type={config.get('prediction_type')!r}, use_flow_sigmas="
            f"{config.get('use_flow_sigmas')!r}) does not fit a latent DiT: take one for epsilon, v_prediction or "
            "sample on timesteps, a FlowMatch...Scheduler, or a solver with prediction_type='flow_prediction' and "
            "use_flow_sigmas=True."
        )
    return found


def noise_schedule_of(scheduler: SchedulerMixin) -> dict:
    """The fields of a scheduler's config that say how much noise a timestep means."""
    flow = prediction_type_of(scheduler) == "flow"
    return {name: scheduler.config[name] for name in _NOISE_FIELDS[: 1 if flow else None] if name in scheduler.config}


def keep_noise_schedule_(scheduler: SchedulerMixin) -> None:
    """Make `OtherScheduler.from_config(scheduler.config)` take the noise schedule over.

    diffusers leaves out what the scheduler had by default, and the classes' defaults differ (beta_end 0.02 or 0.012).
    """
    defaults = scheduler.config.get("_use_default_values", ())
    scheduler.register_to_config(_use_default_values=[name for name in defaults if name not in _NOISE_FIELDS])


def fitting_scheduler(
    scheduler: SchedulerMixin, prediction_type: str, noise_schedule: dict, learned_variance: bool
) -> SchedulerMixin:
    """The scheduler, or where it would mistake a variance for latents a copy of it that expects none.

    Raises:
        ValueError: one for another prediction type or noise schedule, or that needs a variance which the model does
            not predict.
    """
    found = prediction_type_of(scheduler)
    name = type(scheduler).__name__
    if prediction_type == "mean_flow":
        if name != "FlowMatchEulerDiscreteScheduler" or scheduler.config.get("stochastic_sampling", False):
            raise ValueError(
                f"the transformer predicts mean velocities, along which FlowMatchEulerDiscreteScheduler steps exactly; "
                f"{name} (stochastic_sampling={scheduler.config.get('stochastic_sampling')}) expects those of a moment."
            )
    elif found != prediction_type:
        raise ValueError(
            f"the transformer predicts {prediction_type!r}, but {name} expects {found!r}: build the scheduler with "
            f"`{name}.from_config(pipe.scheduler.config)` of the pipeline as it was loaded, or take one for "
            f"{prediction_type!r}."
        )
    theirs = noise_schedule_of(scheduler)
    if wrong := {key: value for key, value in noise_schedule.items() if theirs.get(key, value) != value}:
        given = ", ".join(f"{key}={theirs[key]!r}" for key in wrong)
        wanted = ", ".join(f"{key}={value!r}" for key, value in wrong.items())
        raise ValueError(
            f"{name} has {given}, the transformer was trained with {wanted}: "
            f"`{name}.from_config(pipe.scheduler.config, {wanted})`."
        )
    if scheduler.config.get("variance_type") in _LEARNED:
        if not uses_variance(scheduler):
            # Solvers cut the first THREE channels out of the prediction; we cut the variance off ourselves.
            return type(scheduler).from_config(scheduler.config, variance_type=None)
        if not learned_variance:
            raise ValueError(
                f"{name} has variance_type={scheduler.config.variance_type!r}, but the transformer predicts no "
                "variance (out_channels is not 2 * in_channels): take variance_type='fixed_small'."
            )
    return scheduler


def uses_variance(scheduler: SchedulerMixin) -> bool:
    """Whether `step` takes the 2C channels of a model with learned variance."""
    kinds = ("DDPMScheduler", "DDPMParallelScheduler", "UnCLIPScheduler")
    return scheduler.config.get("variance_type") in _LEARNED and type(scheduler).__name__ in kinds


class SchedulerSteps:
    """The steps of one run.

    Args:
        scheduler: its state starts anew.
        num_steps: denoising steps, at least 1.
        device: of the timesteps.
        strength: in (0, 1], the share of the steps that is run, from a noised picture; None: all, from noise.
        timesteps, sigmas: given noise levels instead of `num_steps`, where the scheduler takes them.
        num_tokens: of an image in the transformer; with them a scheduler's dynamic shift grows.

    Raises:
        ValueError: no step is left, or the scheduler cannot do it.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        num_steps: int,
        device: torch.device,
        strength: float | None = None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        num_tokens: int = 256,
    ):
        self.num_tokens = num_tokens
        self.scheduler = scheduler
        first = 0
        given = {"timesteps": timesteps, "sigmas": sigmas}
        given = {name: value for name, value in given.items() if value is not None}
        self._set_timesteps(num_steps, device, given)
        if strength is not None:
            first = self._first_step(len(scheduler.timesteps), strength)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        self.timesteps = scheduler.timesteps[first:]
        self._step_arguments = inspect.signature(scheduler.step).parameters

    def __len__(self) -> int:
        return len(self.timesteps)

    def _set_timesteps(self, num_steps: int, device: torch.device, given: dict) -> None:
        allowed = inspect.signature(self.scheduler.set_timesteps).parameters
        name = type(self.scheduler).__name__
        if missing := [key for key in given if key not in allowed]:
            raise ValueError(f"{name} takes no {missing[0]}; give num_inference_steps, or another scheduler.")
        given = given or {"num_inference_steps": num_steps}
        config = self.scheduler.config
        if config.get("use_dynamic_shifting", False):
            if "mu" not in allowed or not {"base_shift", "max_shift"} <= set(config):
                raise ValueError(
                    f"{name} does not say how its dynamic shift grows with the image: set use_dynamic_shifting=False, "
                    "or take FlowMatchEulerDiscreteScheduler."
                )
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            given["mu"] = config.base_shift + slope * (self.num_tokens - config.base_image_seq_len)
        self.scheduler.set_timesteps(**given, device=device)

    def _first_step(self, calls: int, strength: float) -> int:
        scheduler = self.scheduler
        name = type(self.scheduler).__name__
        adds = hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")
        if name == "SASolverScheduler" and scheduler.config.use_flow_sigmas:
            adds = False  # its add_noise is that of epsilon models
        if name == "PNDMScheduler" or not adds:
            raise ValueError(
                f"{name} starts from noise only: for pictures take another scheduler, such as DDIM, a DPM-Solver or "
                "FlowMatchEulerDiscreteScheduler."
            )
        order = scheduler.order
        steps = -(-calls // order)
        kept = min(int(steps * strength + 1e-6), steps)
        if kept < 1:
            raise ValueError(
                f"strength {strength} of {steps} steps leaves none: take at least {1 / steps:.3g}, or more steps."
            )
        return (steps - kept) * order

    def noise_share(self, step: int) -> float:
        """Timestep where a step begins as a share of the training's: 0 = image, also after the last one, 1 = noise."""
        if step == len(self):
            return 0.0
        return float(self.timesteps[step]) / self.scheduler.config.num_train_timesteps

    def noised(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Latents at the noise level where `step` begins; those of the last step's end are without noise."""
        if step == len(self):
            return latents
        add = getattr(self.scheduler, "add_noise", None) or self._scale_noise
        return add(latents, noise, self.timesteps[step : step + 1].expand(len(latents))).to(latents.dtype)

    def _scale_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.scale_noise(latents, timesteps, noise)

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise at the first noise level."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        """What the transformer is shown; once per step, because schedulers count."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return latents
        return self.scheduler.scale_model_input(latents, self.timesteps[step])

    def step(self, prediction: Tensor, step: int, latents: Tensor, generator) -> Tensor:
        """Latents (B, C, h, w) after a step; `prediction` (B, C or 2C, h, w)."""
        if not uses_variance(self.scheduler):
            prediction = prediction[:, : latents.shape[1]]
        options = {"generator": generator} if "generator" in self._step_arguments else {}
        if "prev_timestep" in self._step_arguments and step + 1 < len(self):
            options["prev_timestep"] = self.timesteps[step + 1]
        after = self.scheduler.step(prediction, self.timesteps[step], latents, **options, return_dict=False)
        # DDPM adds noise at every timestep above 0, also in a chain's last step. The mean there is the predicted image.
        is_mean = step + 1 == len(self) and isinstance(self.scheduler, DDPMScheduler | DDPMParallelScheduler)
        return after[1 if is_mean else 0].to(latents.dtype)
