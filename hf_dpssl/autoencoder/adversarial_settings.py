"""Settings of an adversarial term. No library is imported here: command lines check them without waiting for one."""

from dataclasses import dataclass

from .choices import ADVERSARIAL_NAMES


@dataclass(frozen=True)
class AdversarialSettings:
    """When the term starts, and how strong it is.

    loss: of ADVERSARIAL_NAMES. weight: of the generator's term, times the adaptive weight, which is at most `cap`.
    start: step from which the discriminator learns. warmup: steps that it learns before the generator sees it.
    r1_weight: of the gradient penalty at real images; 0 leaves it out. r1_interval: steps from one penalty to the
    next, each then weighted so many times more (Karras et al. 2020, appendix B), which costs that much less.
    """

    loss: str = "hinge"
    weight: float = 0.8
    start: int = 0
    warmup: int = 0
    cap: float = 1e4
    r1_weight: float = 0.0
    r1_interval: int = 1

    def __post_init__(self):
        if self.loss not in ADVERSARIAL_NAMES:
            raise ValueError(f"the adversarial loss must be one of {sorted(ADVERSARIAL_NAMES)}, got {self.loss!r}.")
        if min(self.weight, self.start, self.warmup, self.r1_weight) < 0 or self.cap <= 0:
            raise ValueError(f"weights and steps of the adversarial term must not be negative, cap positive: {self}.")
        if self.r1_interval < 1:
            raise ValueError(f"r1_interval must be at least 1, got {self.r1_interval}.")

    def trains_discriminator(self, step: int) -> bool:
        """Whether the discriminator learns at optimiser step `step`, counted from 0."""
        return step >= self.start

    def reaches_generator(self, step: int) -> bool:
        """Whether the generator's loss holds the term at optimiser step `step`."""
        return step >= self.start + self.warmup
