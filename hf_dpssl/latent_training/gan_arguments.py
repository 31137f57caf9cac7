"""Arguments of training/dae_gan.py: latent, networks, losses and judgement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..autoencoder.adversarial_settings import AdversarialSettings
from ..autoencoder.choices import ADVERSARIAL_NAMES
from ..embedding.choices import KINDS
from ..models.choices import DISCRIMINATOR_NORMS, GAN_DENSITIES, GAN_LATENTS
from ..runs.flags import option
from .validation_arguments import ValidationArguments

if TYPE_CHECKING:
    from ..autoencoder.adversarial_term import AdversarialTerm


@dataclass
class GANArguments(ValidationArguments):
    """Latent, architecture and losses; the defaults are a DAE-VAEGAN of the embedded digits."""

    name: str = option("gan", "subfolder of output_dir for the finished model", group="run")
    latent: str = option(
        "dae",
        "what the generator starts from: noise (DCGAN), features of a frozen encoder (simclr), an encoder trained "
        "jointly (vae: VAEGAN), or one trained against a weak generator and frozen (dae: DAE-VAEGAN)",
        choices=GAN_LATENTS,
        group="model",
    )
    encoder: str | None = option(None, "of --latent simclr: folder or Hub id of an encoder")
    features: str = option("features", "of --latent simclr: after the backbone or after the head", choices=KINDS)
    sample_from: str | None = option(
        None,
        "density of the latents of samples; default: prior, and full with --latent simclr",
        choices=GAN_DENSITIES,
    )
    components: int = option(10, "of --sample_from mixture")
    width: int = option(16, "channels of the generator's last hidden layer")
    latent_dim: int = option(32, "dimension of the latents; with --latent simclr the features'")
    compile: bool = option(False, "compile generator and encoder with torch.compile")
    max_train_steps: int = option(500, "steps of the generator, in every variant", group="optimiser")
    stage_1_steps: int = option(150, "of --latent dae: steps of the encoder against the weak generator, before")
    stage_1_dropout: float = option(0.1, "of --latent dae: channel dropout of the weak generator")
    adversarial: str = option("non_saturating", "losses of both sides", choices=ADVERSARIAL_NAMES)
    reconstruction: str = option(
        "pixels",
        "what reconstructions are compared in (vae, dae): pixels, by the mean absolute error, or the discriminator's "
        "last features, by the mean squared one, as in the paper of the VAEGAN",
        choices=["pixels", "discriminator"],
    )
    reconstruction_weight: float = option(10.0, "of the reconstruction error (vae, dae)")
    kl_weight: float = option(1e-3, "of the KL of the latents, per image in nats (vae, dae)")
    r1_weight: float = option(10.0, "of the gradient penalty at real images; without it the discriminator wins")
    r1_interval: int = option(4, "steps from one gradient penalty to the next, weighted so many times more")
    discriminator_width: int = option(16, "channels of the discriminator's first layer")
    discriminator_norm: str = option("group", "after its inner convolutions", choices=DISCRIMINATOR_NORMS)
    learning_rate: float = option(2e-3, "of both sides")
    lr_scheduler: str = option("constant", "learning-rate schedule of diffusers.optimization.get_scheduler")
    ema_decay: float = option(0.99, "share of the old averaged generator kept at each step")
    evaluation_images: int = option(
        10_000, "at most so many images of each split, drawn at random, evaluate and measure", group="evaluation"
    )
    num_generated: int = option(500, "images that are judged", group="evaluation")
    compare_densities: bool = option(False, "judge images of all other densities of the latents too")
    extractor: list[str] = option([], "of the judgement: resnet56-cifar10, inception, or an encoder's folder or id")
    validation_extractor: str | None = option(
        None, "extractor of a validation's FID against held-out images: as --extractor"
    )

    # What else GenerationMonitor asks of arguments: a GAN has no classes.
    validation_classifier = best_metric = None
    grid_images_per_class = 10

    def __post_init__(self):
        super().__post_init__()
        if self.latent == "simclr" and not self.encoder:
            raise ValueError("--latent simclr needs --encoder: the folder or Hub id of a trained encoder.")
        if self.latent == "simclr" and self.streaming:
            raise ValueError("--latent simclr looks features up by row, which a stream has not: leave out --streaming.")
        if self.latent == "noise" and self.sample_from not in (None, "prior"):
            raise ValueError(f"--latent noise is sampled from the prior, not from {self.sample_from!r}.")
        if self.latent == "simclr" and self.sample_from == "prior":
            raise ValueError("features of an encoder have no prior: --sample_from diagonal, full, mixture or held_out.")
        for name in ("max_train_steps", "stage_1_steps", "num_generated"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        self._adversarial_settings()

    @property
    def density(self) -> str:
        """What samples are drawn from."""
        return self.sample_from or ("full" if self.latent == "simclr" else "prior")

    @property
    def other_densities(self) -> list[str]:
        """The densities of --compare_densities."""
        if not self.compare_densities or self.latent == "noise":
            return []
        unfit = {self.density} | ({"prior"} if self.latent == "simclr" else set())
        return [kind for kind in GAN_DENSITIES if kind not in unfit]

    def term(self) -> AdversarialTerm:
        """The adversarial term; it is the generator's own loss, so it has weight 1 from the first step on."""
        from ..autoencoder.adversarial_term import AdversarialTerm

        return AdversarialTerm(**asdict(self._adversarial_settings()))

    def _adversarial_settings(self) -> AdversarialSettings:
        weights = {"r1_weight": self.r1_weight, "r1_interval": self.r1_interval}
        return AdversarialSettings(self.adversarial, weight=1.0, **weights)
