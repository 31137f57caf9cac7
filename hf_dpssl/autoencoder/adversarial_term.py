"""An adversarial term beside a reconstruction loss: when it starts, how strong it is, and a guard for reconstructions.

Source: Esser et al. 2021 (start step, adaptive weight); discriminator and generator see the same batch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from .adversarial_losses import ADVERSARIAL_LOSSES, adaptive_weight, r1_penalty_of_logits
from .adversarial_settings import AdversarialSettings

logger = logging.getLogger(__name__)


class AdversarialTerm(AdversarialSettings):
    """The losses of both sides under the settings."""

    def discriminator_loss(self, discriminator: nn.Module, real: Tensor, fake: Tensor, step: int = 0) -> Tensor:
        """Loss of the discriminator on one batch at optimiser step `step`.

        Both halves pass through it in one forward; at a step with the penalty each in its own, and that of the real
        images serves loss and penalty.
        """
        loss = ADVERSARIAL_LOSSES[self.loss][0]
        if not self.r1_weight or (step - self.start) % self.r1_interval:
            logits = discriminator(torch.cat([real, fake.detach()])).logits.float()
            real_logits, fake_logits = logits.tensor_split([len(real)])
            return loss(real_logits, fake_logits)
        real = real.detach().requires_grad_(True)
        real_logits = discriminator(real).logits.float()
        fake_logits = discriminator(fake.detach()).logits.float()
        penalty = r1_penalty_of_logits(real_logits, real)
        return loss(real_logits, fake_logits) + self.r1_weight * self.r1_interval * penalty

    def value(self, discriminator: nn.Module, fake: Tensor) -> Tensor:
        """The generator's loss alone, unweighted; the discriminator (not wrapped) takes no gradient from it."""
        discriminator.requires_grad_(False)
        loss = ADVERSARIAL_LOSSES[self.loss][1](discriminator(fake).logits.float())
        discriminator.requires_grad_(True)
        return loss

    def value_and_feature_error(self, discriminator: nn.Module, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """`value`, and the mean squared error of the discriminator's last features (Larsen et al. 2016, equation 8).

        Args:
            discriminator: a `PatchDiscriminator`, not wrapped.
            fake: (B + N, C, H, W), reconstructions of `real` first.
            real: (B, C, H, W).
        """
        discriminator.requires_grad_(False)
        with torch.no_grad():
            wanted = discriminator(real).hidden
        found = discriminator(fake)
        discriminator.requires_grad_(True)
        error = F.mse_loss(found.hidden[: len(real)].float(), wanted.float())
        return ADVERSARIAL_LOSSES[self.loss][1](found.logits.float()), error

    def generator_loss(
        self, discriminator: nn.Module, fake: Tensor, reconstruction_loss: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(term, its unweighted value, adaptive weight); the discriminator takes no gradient from it.

        Args:
            discriminator: not wrapped for several processes.
            fake: reconstructions (B, C, H, W) with their graph.
            reconstruction_loss: what the adaptive weight compares with.
            last_layer: the decoder's last weight.
        """
        adversarial = self.value(discriminator, fake)
        factor = adaptive_weight(reconstruction_loss, adversarial, last_layer, cap=self.cap)
        return self.weight * factor * adversarial, adversarial.detach(), factor


class ReconstructionGuard:
    """Lowers the adversarial weight when reconstructions get worse than they were when the term started.

    Args:
        factor: by which the error on the fixed validation images may grow, > 1; 0 switches the guard off.
        share: by which the weight is multiplied then.
    """

    def __init__(self, factor: float = 1.5, share: float = 0.5):
        if factor != 0 and factor <= 1 or not 0 <= share < 1:
            raise ValueError(f"factor must be above 1 (or 0: off) and share in [0, 1), got {factor} and {share}.")
        self.factor = factor
        self.share = share
        self.scale = 1.0
        self.reference = None
        self.interventions: list[int] = []

    def check(self, error: float, step: int, started: bool) -> bool:
        """Take a validation error; True, with a warning, when the weight was lowered."""
        if not started:
            self.reference = error
        elif self.reference is None:
            self.reference = error
        elif self.factor and error > self.factor * self.reference:
            self.scale *= self.share
            self.interventions.append(step)
            logger.warning(
                "step %d: the reconstruction error of the validation images is %.3g, more than %.2f times the %.3g "
                "before the adversarial term started; its weight is lowered to %.3g of what was asked for.",
                step, error, self.factor, self.reference, self.scale,
            )  # fmt: skip
            return True
        return False

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"scale": self.scale, "reference": self.reference, "interventions": list(self.interventions)}

    def load_state_dict(self, state: dict) -> None:
        """From a checkpoint."""
        self.scale = state["scale"]
        self.reference = state["reference"]
        self.interventions = list(state["interventions"])


@dataclass
class Adversary:
    """A discriminator in training beside an autoencoder or generator.

    Args:
        term: settings.
        bare, discriminator: the module, and as `accelerator.prepare` wrapped it.
        optimizer, scheduler: the discriminator's.
        guard: of the reconstructions.
    """

    term: AdversarialTerm
    bare: nn.Module
    discriminator: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    guard: ReconstructionGuard

    def kept(self) -> dict[str, object]:
        """What belongs into a checkpoint, by name."""
        names = {"discriminator": self.discriminator, "discriminator_optimizer": self.optimizer}
        return names | {"discriminator_scheduler": self.scheduler, "guard": self.guard}

    def wrapped(self) -> tuple[nn.Module]:
        """For `accelerator.accumulate`, which takes all models of a step at once: every call counts a batch."""
        return (self.discriminator,)

    def trains(self, step: int) -> bool:
        """Whether the discriminator learns at optimiser step `step`, counted from 0."""
        return self.term.trains_discriminator(step)

    def reaches_generator(self, step: int) -> bool:
        """Whether the generator's loss holds the term at optimiser step `step`."""
        return self.term.reaches_generator(step)

    def generator_term(self, fake: Tensor, target: Tensor, last_layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The guarded term, and {"adv_g", "adv_weight"} for the log; arguments as `AdversarialTerm.generator_loss`."""
        term, value, factor = self.term.generator_loss(self.bare, fake, target, last_layer)
        return self.guard.scale * term, {"adv_g": value, "adv_weight": self.guard.scale * self.term.weight * factor}

    def step(self, accelerator: Accelerator, real: Tensor, fake: Tensor, step: int = 0) -> Tensor:
        """Backward and optimiser step of the discriminator within `accelerator.accumulate`; returns its loss.

        Args:
            real, fake: images (B, C, H, W), (B', C, H, W) of the generator's batch.
            step: the optimiser step, for `r1_interval`.
        """
        loss = self.term.discriminator_loss(self.discriminator, real, fake, step)
        accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
