"""Latent generation: a DiT denoises latents of a VQAutoencoder, which are snapped to codes and decoded.

Unlike diffusers' DiTPipeline it takes any number of classes or none, ids or names (kept by save and
load), uses the null class of the transformer at hand, and the latent statistics of the autoencoder.

Source: Peebles and Xie 2023 (DiT); Ho and Salimans 2022 (classifier-free guidance).
"""

from __future__ import annotations

import inspect

import torch
from diffusers import DiTTransformer2DModel, ImagePipelineOutput, SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from .modeling_vq import VQAutoencoder
from .pipeline_classes import ClassConditionalPipeline


def switch_off_label_dropout_(transformer: nn.Module) -> None:
    """Stop diffusers' DiT from dropping labels by itself, which it does anew in every block; the null row stays."""
    for module in transformer.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


class VQDiTPipeline(ClassConditionalPipeline):
    """Class-conditional or unconditional images from a `DiTTransformer2DModel` and a `VQAutoencoder`.

    Args:
        transformer: its last label row is the null class.
        vae: the autoencoder whose latents it was trained on.
        scheduler: any diffusers scheduler for the transformer's prediction type.
        id2label: {class id: name}; {} or None for a model without classes.
        vae_fingerprint: `vae.fingerprint()` at training time.

    Raises:
        ValueError: when the autoencoder is not the one the transformer was trained on.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: VQAutoencoder,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        vae_fingerprint: str | None = None,
    ):
        super().__init__()
        switch_off_label_dropout_(transformer)
        modules = dict(transformer=transformer, scheduler=scheduler)
        self._register(id2label, vae, vae_fingerprint, "transformer", **modules)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.transformer.config.num_embeds_ada_norm

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        num_images: int | None = None,
        latents: Tensor | None = None,
        quantize: bool = True,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one image per id or name; None draws without class.
            guidance_scale: 1 is no guidance; larger values trade diversity for class fidelity.
            num_inference_steps: denoising steps, at least 1.
            generator: one for all images, or a list of one per image; with a list, each image's
                noise does not depend on the others.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent"
                (N, C, h, w), normalised.
            num_images: number of images without class; 1 by default.
            latents: initial noise (N, C, h, w) instead of drawing it.
            quantize: snap the latents to their nearest codes before decoding.
            return_dict: False gives a tuple.

        Returns:
            ImagePipelineOutput with `images`.

        Raises:
            ValueError: an unknown class or output type, guidance below 1, no steps, or a wrong number
                of generators or shape of latents.
        """
        ids = [self.null_class] * (num_images or 1) if class_labels is None else self.class_ids(class_labels)
        self._check_request(ids, class_labels, num_images, guidance_scale, generator, output_type, "latent")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        device, config = self._execution_device, self.transformer.config
        shape = (len(ids), config.in_channels, config.sample_size, config.sample_size)
        latents = self._initial_noise(shape, generator, latents, device)
        guided = guidance_scale > 1 and class_labels is not None
        labels = torch.tensor(ids, device=device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.null_class)])

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = torch.cat([latents, latents]) if guided else latents
            if hasattr(self.scheduler, "scale_model_input"):
                model_input = self.scheduler.scale_model_input(model_input, timestep)
            prediction = self.transformer(
                model_input.to(self.transformer.dtype),
                timestep=timestep.expand(len(model_input)),
                class_labels=labels,
            ).sample
            if guided:
                with_class, without = prediction.chunk(2)
                prediction = without + guidance_scale * (with_class - without)
            latents = self.scheduler.step(prediction, timestep, latents, **step_options).prev_sample

        images = latents if output_type == "latent" else self._decode(latents, quantize, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _initial_noise(self, shape: tuple, generator, latents: Tensor | None, device: torch.device) -> Tensor:
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, self.transformer.dtype)

    def _decode(self, latents: Tensor, quantize: bool, output_type: str):
        latents = self.vae.denormalize_latents(latents)
        if quantize and self.vae.quantizer is not None:
            latents = self.vae.quantize(latents).quantized
        return self._pictures(self.vae.decode(latents).pixel_values, output_type)
