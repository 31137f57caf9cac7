"""One-step generation: a DiT turns noise into latents of a VQAutoencoder in one pass; they are snapped and decoded.

    latents = noise - transformer(noise, t = 1, class)

is what one Euler step makes of a rectified flow, so that a trained latent DiT is a start, and a new transformer, whose
output is 0, gives the noise itself: samples that have unit deviation and are driven by the noise from the first step of
training on. (Where the class outweighs the noise at the start, all samples of a class collapse on its mean.)

Source: Deng et al. 2026, arXiv 2602.04770 (one-step generator); Liu et al. 2022 (rectified flow).
"""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, ImagePipelineOutput
from torch import Tensor

from ..autoencoder import latent_codec
from ..models.call_arguments import Generators, read_generator
from ..models.modeling_vq import VQAutoencoder  # noqa: F401  a saved pipeline is loaded with the modules that are imported
from .dit_modulation import Predictor
from .latent_mlp import LatentMLP
from .per_image_noise import initial_noise, noise_path
from .pipeline_classes import ClassConditionalPipeline, joined
from .pipeline_vq_dit import Label, check_latents, switch_off_label_dropout_

NOISE_TIMESTEP = 1000.0  # of pure noise, as a flow's first Euler step has it


class VQDriftPipeline(ClassConditionalPipeline):
    """Class-conditional or unconditional images in one pass of a DiT or a LatentMLP, and an autoencoder's decoder.

    There are no steps and no guidance to choose: guidance is trained in (`dae_drift.py --guidance_scale`).

    Args:
        transformer: its last label row is the null class.
        vae: the autoencoder whose latents it was trained on: VQAutoencoder, or one of diffusers' for images
            (AutoencoderKL, VQModel, AutoencoderTiny, ...).
        id2label: {class id: name}; {} or None for a model without classes.
        vae_fingerprint: `vae.fingerprint()` at training time.
        latent_statistics: by what its latents were normalised then (`latent_codec.statistics`); None: with a
            fingerprint, those of `vae`.

    Raises:
        ValueError: when the autoencoder is not the one the transformer was trained on or has other latents, the names
            are not one per class, or the transformer predicts a variance too.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: DiTTransformer2DModel | LatentMLP,
        vae: latent_codec.Autoencoder,
        id2label: dict | None = None,
        vae_fingerprint: str | None = None,
        latent_statistics: dict | None = None,
    ):
        super().__init__()
        config = transformer.config
        if id2label and len(id2label) != config.num_embeds_ada_norm:
            raise ValueError(
                f"the transformer has {config.num_embeds_ada_norm} classes, but id2label names {len(id2label)}."
            )
        if config.get("out_channels") not in (None, config.in_channels):
            raise ValueError(
                f"the transformer gives {config.out_channels} channels for {config.in_channels} of the latents, as "
                "with a learned variance: a one-step generator gives as many as it takes."
            )
        check_latents(transformer, vae)
        switch_off_label_dropout_(transformer)
        if vae_fingerprint is not None:
            latent_statistics = latent_statistics or latent_codec.statistics(vae)
        self._register(id2label, vae, vae_fingerprint, "transformer", latent_statistics, transformer=transformer)
        self.register_to_config(latent_statistics=latent_statistics)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.transformer.config.num_embeds_ada_norm

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | list | Tensor = None,
        generator: Generators = None,
        output_type: str = "pil",
        num_images: int | None = None,
        latents: Tensor | None = None,
        quantize: bool = True,
        return_dict: bool = True,
        *,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            class_labels: one image per id or name; None draws without class. A tuple (a, b, share) in the list is a
                class between two, (1 - share) of a and share of b, where None is no class.
            generator: one for all images, or a list of one per image; with a list, each image's noise does not depend
                on the others. Integers are seeds.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], "pt" (N, 3, H, W) in [0, 1], or "latent" (N, C, h, w),
                normalised.
            num_images: number of images without class; 1 by default.
            latents: noise (N, C, h, w), standard normal, instead of drawing it.
            quantize: snap the latents to their nearest codes before decoding.
            return_dict: False gives a tuple.
            num_images_per_label: images of each label, one after the other.
            batch_size: images at once; None is all. Images do not depend on it.

        Returns:
            ImagePipelineOutput with `images`.

        Raises:
            ValueError: an unknown class or output type, a wrong number of generators, or latents of a wrong shape.
        """
        check_latents(self.transformer, self.vae)
        held = self.config
        self._check_fingerprint(self.vae, held.vae_fingerprint, "transformer", held.latent_statistics)
        labels, others, weights = self._class_rows(class_labels, num_images, num_images_per_label, self.null_class)
        self._check_request(labels, class_labels, num_images, 1.0, generator, output_type, "latent")
        self._check_counts(batch_size=batch_size)
        config = self.transformer.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        noise = initial_noise(shape, read_generator(generator, len(labels)), latents, self._execution_device)
        timesteps = noise.new_tensor([NOISE_TIMESTEP])
        finished = []
        for start in range(0, len(labels), batch_size or len(labels)):
            rows = slice(start, start + (batch_size or len(labels)))
            blend = None if others is None else (others[rows], weights[rows])
            predict = Predictor(self.transformer, timesteps, labels[rows], blend, None, precompute=False)
            sample = noise[rows] - predict(noise[rows], 0, False)[0]
            if output_type != "latent":
                sample = self._pictures(latent_codec.decode(self.vae, sample, quantize), output_type)
            finished.append(sample)
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
            options: as for a call, but for class_labels, num_images, num_images_per_label and generator.

        Raises:
            ValueError: fewer than two images, or as a call.
        """
        self._check_counts(num_images=num_images)
        config = self.transformer.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        noise = noise_path(shape, num_images, generator, latents, self._execution_device)
        return self(**self._class_path(start, end, num_images), latents=noise, **options)
