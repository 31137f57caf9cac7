"""Latent generation: a DiT denoises latents of a VQAutoencoder, which are snapped to codes and decoded.

Unlike diffusers' DiTPipeline it takes any number of classes or none, ids or names (kept by save and
load), uses the null class of the transformer at hand, and the latent statistics of the autoencoder.
Folders of DiTPipeline load too; `export_stock` writes one.

Source: Peebles and Xie 2023 (DiT); Ho and Salimans 2022 (classifier-free guidance); Meng et al. 2022 (from pictures);
Geng et al. 2025 (mean flow).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..autoencoder import latent_codec
from ..models.call_arguments import Generators, read_generator
from ..models.modeling_vq import VQAutoencoder  # noqa: F401  a saved pipeline is loaded with the modules that are imported
from . import stock_dit
from .dit_modulation import Predictor
from .guidance import Guidance
from .interval_channel import latent_channels, takes_interval, with_interval
from .per_image_noise import PerImageInputs, initial_noise, noise_path, step_generators
from .pipeline_classes import ClassConditionalPipeline, joined
from .scheduler_steps import (
    PREDICTION_TYPES,
    SchedulerSteps,
    fitting_scheduler,
    keep_noise_schedule_,
    noise_schedule_of,
    prediction_type_of,
)

Label = int | str | None


def switch_off_label_dropout_(transformer: nn.Module) -> None:
    """Stop diffusers' DiT from dropping labels by itself, which it does anew in every block; the null row stays."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def check_latents(transformer: DiTTransformer2DModel, vae: latent_codec.Autoencoder) -> None:
    """ValueError unless an autoencoder has latents of the transformer's channels and side."""
    config = transformer.config
    theirs = (latent_codec.latent_channels(vae), getattr(vae.config, "latent_size", config.sample_size))
    ours = (latent_channels(transformer), config.sample_size)
    if theirs != ours:
        raise ValueError(
            f"the autoencoder has latents of {theirs[0]} channels and side {theirs[1]}, the transformer takes "
            f"{ours[0]} channels and side {ours[1]}: they do not belong together."
        )


class VQDiTPipeline(ClassConditionalPipeline):
    """Class-conditional or unconditional images from a `DiTTransformer2DModel` and an autoencoder.

    `pipe.precompute_modulations = False` calls the transformer as it is; by default what depends on timestep and class
    alone is computed for all steps at once, which changes images by rounding only (`dit_modulation`).

    Args:
        transformer: its last label row is the null class.
        vae: the autoencoder whose latents it was trained on: VQAutoencoder, or one of diffusers' for images
            (AutoencoderKL, VQModel, AutoencoderTiny, ...).
        scheduler: any diffusers scheduler for the transformer's prediction type.
        id2label: {class id: name}; {} for a model without classes; None numbers the transformer's classes.
        vae_fingerprint: `vae.fingerprint()` at training time.
        prediction_type: "flow", "epsilon", "v_prediction", "sample" or, of a transformer that takes an interval
            (`interval_channel`), "mean_flow", which needs few steps or one; None: that of scheduler and transformer.
        noise_schedule: `num_train_timesteps` and betas that the transformer was trained with; None: the scheduler's.
        latent_statistics: by what its latents were normalised then (`latent_codec.statistics`); None: with a
            fingerprint, those of `vae`.

    Raises:
        ValueError: when the autoencoder is not the one the transformer was trained on or has other latents, the names
            are not one per class, or the scheduler is for another prediction type.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents", "prediction")
    precompute_modulations = True

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: latent_codec.Autoencoder,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        vae_fingerprint: str | None = None,
        prediction_type: str | None = None,
        noise_schedule: dict | None = None,
        latent_statistics: dict | None = None,
    ):
        super().__init__()
        mean_flow = takes_interval(transformer)
        if prediction_type is None:
            prediction_type = "mean_flow" if mean_flow else prediction_type_of(scheduler)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {prediction_type!r}.")
        if mean_flow != (prediction_type == "mean_flow"):
            channels = (transformer.config.in_channels, transformer.config.out_channels)
            raise ValueError(
                "a transformer of mean flow takes one channel more than it gives, and no other does; this one has "
                f"{channels[0]} and {channels[1]}, with prediction_type {prediction_type!r}."
            )
        classes = transformer.config.num_embeds_ada_norm
        if id2label is None and classes > 1:
            id2label = {class_id: f"class {class_id}" for class_id in range(classes)}
        exported = classes == stock_dit.STOCK_CLASSES  # its rows beyond the names are copies of the null row
        if id2label and len(id2label) != classes and not (exported and len(id2label) < classes):
            raise ValueError(f"the transformer has {classes} classes, but id2label names {len(id2label)}.")
        check_latents(transformer, vae)
        switch_off_label_dropout_(transformer)
        modules = dict(transformer=transformer, scheduler=scheduler)
        if vae_fingerprint is not None:
            latent_statistics = latent_statistics or latent_codec.statistics(vae)
        self._register(id2label, vae, vae_fingerprint, "transformer", latent_statistics, **modules)
        noise_schedule = noise_schedule or noise_schedule_of(scheduler)
        keep_noise_schedule_(scheduler)
        self.register_to_config(
            prediction_type=prediction_type, noise_schedule=noise_schedule, latent_statistics=latent_statistics
        )
        self._interrupt = False

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.transformer.config.num_embeds_ada_norm

    @property
    def learned_variance(self) -> bool:
        """Whether the transformer predicts a variance beside the noise."""
        return self.transformer.config.out_channels == 2 * self.transformer.config.in_channels

    @property
    def guidance_scale(self) -> float:
        """Of the run that goes on, or of the last one; a callback may set `pipe._guidance_scale`, at most 1 is none."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback: no step follows; images not yet begun are left out."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the run that goes on, or of the last one."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | list | Tensor = None,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
        num_images: int | None = None,
        latents: Tensor | None = None,
        quantize: bool = True,
        return_dict: bool = True,
        *,
        num_images_per_label: int = 1,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        batch_size: int | None = None,
        image: latent_codec.Pictures | None = None,
        mask_image: latent_codec.Pictures | None = None,
        strength: float | None = None,
        timesteps: list | None = None,
        sigmas: list | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one image per id or name; None draws without class. A tuple (a, b, share) in the list is a
                class between two, (1 - share) of a and share of b, where None is no class.
            guidance_scale: 1 is no guidance; larger values trade diversity for class fidelity.
            num_inference_steps: denoising steps, at least 1.
            generator: one for all images, or a list of one per image; with a list, each image's
                noise does not depend on the others. Integers are seeds.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent"
                (N, C, h, w), normalised.
            num_images: number of images without class; 1 by default.
            latents: initial noise (N, C, h, w), standard normal, instead of drawing it.
            quantize: snap the latents to their nearest codes before decoding.
            return_dict: False gives a tuple.
            num_images_per_label: images of each label, one after the other.
            guidance_interval: (low, high), shares of the timesteps (0 = image, 1 = noise) between which guidance acts;
                the other steps cost half.
            guidance_rescale: in [0, 1], see `Guidance`.
            batch_size: images at once; None is all. Images do not depend on it.
            image: start from this picture (or one per image), noised, instead of from noise: PIL, an array
                (H, W, C) or tensor (C, H, W) in [0, 1], of the autoencoder's size.
            mask_image: paint anew only where it is white; the other pixels stay those of `image`.
            strength: in (0, 1], share of the steps that is run on `image`; 0.8 by default, 1 with a mask.
            timesteps, sigmas: noise levels instead of `num_inference_steps`, where the scheduler takes them.
            callback_on_step_end: called as (pipe, step, timestep, tensors) after each step of each batch; "latents"
                in the dict it returns replaces them, and `pipe._guidance_scale`, where it sets that, guides from then
                on.
            callback_on_step_end_tensor_inputs: "latents" and/or "prediction".

        Returns:
            ImagePipelineOutput with `images`.

        Raises:
            ValueError: an unknown class or output type, guidance below 1, no steps, a scheduler of another prediction
                type, a wrong number of generators, or pictures, masks or latents of a wrong shape, mode or range.
        """
        check_latents(self.transformer, self.vae)
        held = self.config
        self._check_fingerprint(self.vae, held.vae_fingerprint, "transformer", held.latent_statistics)
        guided = class_labels is not None
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale)
        labels, others, weights = self._class_rows(class_labels, num_images, num_images_per_label, self.null_class)
        self._check_request(labels, class_labels, num_images, guidance_scale, generator, output_type, "latent")
        self._check_counts(num_inference_steps=num_inference_steps, batch_size=batch_size)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback can be given {self._callback_tensor_inputs}, got {sorted(unknown)}.")
        strength = self._strength(image, mask_image, strength)
        if self.config.prediction_type == "mean_flow" and timesteps is None and sigmas is None:
            # The scheduler's own two levels are 1 and 0.001, of which the second is no step.
            sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        trained_with = (self.config.prediction_type, self.config.noise_schedule)
        scheduler = fitting_scheduler(self.scheduler, *trained_with, self.learned_variance)
        scheduler = copy.deepcopy(scheduler)  # its state is this call's, also where several threads share the pipeline
        pictures, mask, cells = self._pictures_given(image, mask_image, len(labels))
        generator = read_generator(generator, len(labels))
        device = self._execution_device
        config = self.transformer.config
        shape = (len(labels), latent_channels(self.transformer), config.sample_size, config.sample_size)
        noise = initial_noise(shape, generator, latents, device)
        generators = step_generators(generator, len(labels))
        images = PerImageInputs(noise, labels, others, weights, generators, pictures, mask, cells)

        self._interrupt = False
        finished = []
        for start in range(0, len(labels), batch_size or len(labels)):
            part = images.rows(start, start + (batch_size or len(labels)))
            tokens = (config.sample_size // config.patch_size) ** 2
            steps = SchedulerSteps(scheduler, num_inference_steps, device, strength, timesteps, sigmas, tokens)
            callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            finished.append(
                self._finish(self._denoise(part, steps, guidance, guided, callback), part, quantize, output_type)
            )
            if self._interrupt:
                break
        self.maybe_free_model_hooks()
        images = joined(finished)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def interpolate(
        self,
        start: Label,
        end: Label,
        num_images: int = 8,
        *,
        generator: Generators = None,
        latents: tuple[Tensor, Tensor] | None = None,
        **options,
    ) -> ImagePipelineOutput | tuple:
        """Images between two classes and between two noises, both ends included.

        Args:
            start, end: ids or names; None is no class.
            num_images: at least 2.
            generator: two, whose noises are joined by an arc (seeds are fine); or one: the same noise for all images.
            latents: the two noises (C, h, w) themselves.
            options: as for a call, but for class_labels, num_images and num_images_per_label.

        Raises:
            ValueError: fewer than two images, or as a call.
        """
        self._check_counts(num_images=num_images)
        config = self.transformer.config
        shape = (latent_channels(self.transformer), config.sample_size, config.sample_size)
        noise = noise_path(shape, num_images, generator, latents, self._execution_device)
        steps = [torch.Generator().manual_seed(0) for _ in range(num_images)]  # the same noise in the steps of all
        options |= {"latents": noise, "generator": steps}
        return self(**self._class_path(start, end, num_images), **options)

    def export_stock(self, folder: str | os.PathLike) -> None:
        """Write a folder that diffusers alone loads as `DiTPipeline`, with the same images.

        Raises:
            ValueError: naming every reason why the stock classes cannot express this model.
        """
        stock_dit.export_dit_pipeline(self, folder)

    @staticmethod
    def _strength(image, mask_image, strength: float | None) -> float | None:
        if image is None:
            if mask_image is not None or strength is not None:
                raise ValueError("mask_image and strength are for a given image; without one leave them out.")
            return None
        if strength is None:
            return 0.8 if mask_image is None else 1.0
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1] (1 = from noise alone), got {strength}.")
        return strength

    def _pictures_given(self, image, mask_image, count: int) -> tuple[Tensor | None, ...]:
        """Pictures, mask and latent mask, `count` rows each or None."""
        if image is None:
            return None, None, None
        factor = latent_codec.downsampling_factor(self.vae)
        side = self.transformer.config.sample_size * factor
        channels = getattr(self.vae.config, "num_channels", None) or self.vae.config.in_channels
        given = [latent_codec.read_pictures(image, channels, side)]
        given += latent_codec.read_mask(mask_image, side, factor) if mask_image is not None else ()
        for name, tensor in zip(("image", "mask_image", "mask_image"), given, strict=False):
            if len(tensor) not in (1, count):
                raise ValueError(f"{name} must be one picture or one for each of {count} images, got {len(tensor)}.")
        device = self._execution_device
        given = [tensor.expand(count, *tensor.shape[1:]).to(device) for tensor in given]
        return (*given, None, None)[:3]

    def _denoise(
        self, images: PerImageInputs, steps: SchedulerSteps, guidance: Guidance, guided: bool, callback: tuple
    ) -> Tensor:
        """Latents (B, C, h, w) after all steps."""
        noise = images.noise
        channels = images.noise.shape[1]
        if images.pictures is None:
            latents = steps.start(noise)
        else:
            images.known = latent_codec.encode(self.vae, images.pictures * 2 - 1)
            latents = steps.noised(images.known, noise, 0)
        acts = any(guidance.acts_at(steps.noise_share(step)) for step in range(len(steps)))
        blend = None if images.others is None else (images.others, images.weights)
        null_class = self.null_class if guided and (acts or callback[0] is not None) else None
        mean_flow = self.config.prediction_type == "mean_flow"
        times = steps.timesteps / steps.scheduler.config.num_train_timesteps if mean_flow else steps.timesteps
        predict = Predictor(self.transformer, times, images.labels, blend, null_class, self.precompute_modulations)
        self._num_timesteps = len(steps)
        self._guidance_scale = guidance.scale
        for step in self.progress_bar(range(len(steps))):
            if self._interrupt:
                break
            acts = guided and guidance.acts_at(steps.noise_share(step))
            shown = steps.model_input(latents, step)
            if mean_flow:
                shown = with_interval(shown, steps.noise_share(step) - steps.noise_share(step + 1))
            prediction, without = predict(shown, step, acts)
            if without is not None:
                prediction = guidance.combine(prediction, without, channels)
            latents = steps.step(prediction, step, latents, images.generators)
            if images.cells is not None:
                latents = torch.where(images.cells > 0, latents, steps.noised(images.known, noise, step + 1))
            if callback[0] is not None:
                tensors = {"latents": latents, "prediction": prediction}
                self._guidance_scale = guidance.scale
                changed = callback[0](self, step, steps.timesteps[step], {name: tensors[name] for name in callback[1]})
                latents = (changed or {}).get("latents", latents)
                guidance = replace(guidance, scale=max(1.0, self._guidance_scale))
        return latents

    def _finish(self, latents: Tensor, images: PerImageInputs, quantize: bool, output_type: str):
        if output_type == "latent":
            return latents
        pixel_values = latent_codec.decode(self.vae, latents, quantize)
        if images.mask is not None:
            kept = (images.pictures * 2 - 1).to(pixel_values.dtype)
            pixel_values = torch.where(images.mask > 0, pixel_values, kept)
        return self._pictures(pixel_values, output_type)
