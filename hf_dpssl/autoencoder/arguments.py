"""Arguments of training/dae_vq.py: arm, architecture, losses and optimiser of an autoencoder."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..models.choices import VQ_CHOICES, VQ_PRESETS, VQ_TRANSFORMS
from ..runs.flags import option
from ..runs.recipe import RunArguments
from .adversarial_settings import AdversarialSettings
from .choices import ADVERSARIAL_NAMES, ARMS, BUDGETS, LATENT_NORMALIZATIONS

if TYPE_CHECKING:
    from ..models.configuration_vq import VQConfig
    from .adversarial_term import AdversarialTerm
    from .training import Stage

# Flags that are fields of VQConfig by the same name.
CONFIG_FLAGS = (
    "norm_num_groups",
    "mid_block_attention",
    "attention_levels",
    "latent_channels",
    "quantizer",
    "num_codes",
    "codebook_decay",
    "revival_threshold",
    "code_distance",
    "codebook_update",
    "quantizer_gradient",
    "entropy_weight",
    "commitment_weight",
    "kl_weight",
    "equivariance_weight",
    "equivariance_transforms",
    "reconstruction_loss",
    "num_channels",
)
# Flags that a preset sets, and the fields of VQConfig of those that bear another name there.
_OF_PRESETS = (
    "encoder_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_attention",
    "attention_levels",
    "latent_channels",
    "num_codes",
)
_CONFIG_NAMES = {"encoder_channels": "encoder_block_out_channels", "layers_per_block": "encoder_layers_per_block"}
WEAK_DECODER = {"auxiliary_channels": [16, 32], "auxiliary_dropout": 0.05, "auxiliary_dropout_kind": "element"}


@dataclass
class VQArguments(RunArguments):
    """Arm, architecture and optimiser; the defaults are an autoencoder of the embedded digits."""

    num_channels: int = option(3, "1: images are made grey", group="data")

    preset: str | None = option(
        None, "published layout; flags at their defaults count as not given", choices=VQ_PRESETS, group="model"
    )
    encoder_channels: list[int] = option([16, 32], "width of each encoder level; n levels downsample by 2^(n-1)")
    decoder_channels: list[int] = option([24, 48], "width of each decoder level")
    layers_per_block: int = option(1, "residual blocks per level")
    norm_num_groups: int = option(8, "groups of the group norms")
    mid_block_attention: bool = option(False, "self-attention at the lowest resolution")
    attention_levels: list[int] = option([], "levels with self-attention, 0 = full resolution")
    auxiliary_channels: list[int] = option(
        WEAK_DECODER["auxiliary_channels"], "width of each level of stage 1's narrow decoder"
    )
    auxiliary_dropout: float = option(
        WEAK_DECODER["auxiliary_dropout"], "share of what a weak decoder loses in training"
    )
    auxiliary_dropout_kind: str = option(
        WEAK_DECODER["auxiliary_dropout_kind"],
        "what that is: activations, channels or residual branches; or its input becomes noise, or masked positions",
        choices=VQ_CHOICES["decoder_dropout_kind"],
    )
    latent_channels: int = option(4, "channels of latents and codes")
    latent_normalization: str = option(
        "channel",
        "scale of the latents that generators see: each channel's own, or one for all, as diffusers' classes need it",
        choices=LATENT_NORMALIZATIONS,
    )
    quantizer: str | None = option(
        None,
        "codebook, Gaussian latents, or neither; default: vq, with --init_from the source's (none of an encoder)",
        choices=VQ_CHOICES["quantizer"],
    )
    num_codes: int = option(256, "size of the codebook")
    codebook_decay: float = option(0.99, "share kept of the codebook's statistics at each step")
    revival_threshold: float = option(0.03, "codes used below this share of the mean restart; 0: never")
    code_distance: str = option("l2", "of latents and codes", choices=VQ_CHOICES["code_distance"])
    codebook_update: str = option("ema", "running means, or the optimiser", choices=VQ_CHOICES["codebook_update"])
    quantizer_gradient: str = option("straight_through", "past the quantiser", choices=VQ_CHOICES["quantizer_gradient"])
    discriminator_width: int = option(64, "channels of the discriminator's first layer")
    discriminator_layers: int | None = option(None, "halvings of the discriminator; default: by the image size")
    init_from: str | None = option(None, "autoencoder or encoder to take over and freeze; only its decoder is trained")
    init_config: str | None = option(None, "YAML of a taming or latent-diffusion file given to --init_from")
    init_decoder: str = option("keep", "with --init_from: train its decoder, or a fresh one", choices=["keep", "fresh"])

    arm: str = option(
        "joint",
        "how it is trained: jointly, without or with dropout; or in two stages, with stage 1's decoder as strong as "
        "the real one (decoupled), narrow (weak_width), with dropout (weak_dropout) or both (dae)",
        choices=ARMS,
        group="optimiser",
    )
    budget: str | None = option(
        None,
        "steps of a joint arm: stage 1's and then stage 2's for the decoder alone (encoder, its default), the sum of "
        "both stages' (total), or as many as cost what both stages of a decoupled run cost (flops)",
        choices=BUDGETS,
    )
    stage_1_steps: int = option(400, "optimiser steps of stage 1")
    stage_2_steps: int = option(400, "optimiser steps of stage 2")
    train_codebook_in_stage_2: bool = option(False, "the codebook goes on learning beside the frozen encoder")
    reconstruction_loss: str = option("l2", "pixel loss", choices=VQ_CHOICES["reconstruction_loss"])
    commitment_weight: float = option(0.25, "weight of the commitment term")
    entropy_weight: float = option(0.0, "weight of the entropy term, which spreads the use of the codes")
    kl_weight: float = option(1e-6, "weight of the KL term of --quantizer kl")
    equivariance_weight: float = option(
        0.0, "weight of the term that wants transformed latents decoded as transformed images (EQ-VAE), in stage 1"
    )
    equivariance_transforms: list[str] = option(
        list(VQ_TRANSFORMS),
        "which: quarter turns, halved sides, or the images of a batch in turns",
        choices=VQ_TRANSFORMS,
    )
    perceptual: str | None = option(None, "perceptual term: lpips, or folder or Hub id of an encoder")
    perceptual_weight: float = option(1.0, "weight of the perceptual term")
    adversarial: str = option("none", "adversarial term", choices=["none", *ADVERSARIAL_NAMES])
    adversarial_weight: float = option(0.8, "weight of the adversarial term, times the adaptive weight")
    adversarial_start: float = option(0.6, "first step of the discriminator in the last stage; below 1 a share of it")
    adversarial_cap: float = option(1e4, "largest adaptive weight")
    discriminator_warmup: int = option(0, "steps that the discriminator learns before the generator sees it")
    discriminator_learning_rate: float | None = option(None, "default: the autoencoder's")
    r1_weight: float = option(0.0, "weight of the gradient penalty at real images")
    r1_interval: int = option(1, "steps from one gradient penalty to the next, each then weighted so many times more")
    guard_factor: float = option(1.5, "error growth after the adversarial term starts that lowers its weight; 0: off")
    learning_rate: float = option(2e-3, "peak learning rate of each stage")
    adam_betas: list[float] = option([0.9, 0.99], "decay of AdamW's two running means, of the discriminator's too")
    weight_decay: float = option(0.0, "weight decay")
    batch_size: int = option(32, "images per process and batch")
    warmup_steps: int = option(20, "steps of linear warm-up in each stage")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    compile: bool = option(False, "compile the autoencoder with torch.compile")

    validation_steps: int = option(100, "steps between two validations", group="evaluation")
    validation_images: int = option(512, "held-out images of a validation")

    name: str = option("autoencoder", "subfolder of output_dir for the finished autoencoder", group="run")

    def free_to_change(self) -> set[str]:
        """As in every script; validations decide about weights where a guard or the best decoder follows them."""
        decides = self.adversarial != "none" or self.init_from is not None
        return super().free_to_change() - ({"validation_steps", "validation_images"} if decides else set())

    def __post_init__(self):
        super().__post_init__()
        for name in ("stage_1_steps", "stage_2_steps", "validation_steps", "validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam_betas are two numbers in [0, 1), got {self.adam_betas}.")
        if self.budget is not None and self.steps_of_joint_arm is None:
            raise ValueError(
                f"--budget {self.budget} is of the joint arms, and this is {self.label}, whose steps are those of its "
                "stages: leave it out, of a recipe too."
            )
        if self.num_channels not in (1, 3):
            raise ValueError(f"--num_channels must be 1 or 3, got {self.num_channels}.")
        if self.quantizer is None and self.init_from is None:
            self.quantizer = "vq"
        self._apply_preset()
        self.adversarial_settings(1)

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        layout, defaults = copy.deepcopy(VQ_PRESETS[self.preset]), type(self)()
        for name in _OF_PRESETS:
            value, given = layout[_CONFIG_NAMES.get(name, name)], getattr(self, name)
            if given not in (value, getattr(defaults, name)):
                raise ValueError(
                    f"--preset {self.preset} has --{name} {_flag(value)}, got {_flag(given)}: leave one out."
                )
            setattr(self, name, value)
        for name in ("decoder_channels", "auxiliary_channels") if ARMS[self.arm][1] else ("decoder_channels",):
            if getattr(self, name) == getattr(defaults, name):
                setattr(self, name, list(self.encoder_channels))
        self.preset = None  # the resolved recipe holds what it stood for

    def fields_for_source(self) -> dict:
        """Fields of `VQConfig` that flags ask for, for the source of --init_from: all that are not their defaults.

        Those of a fresh decoder are none of the source's; the pixel loss and the channels of images are always given.
        """
        names = {name: name for name in CONFIG_FLAGS if name not in ("reconstruction_loss", "num_channels")}
        names["encoder_channels"] = "encoder_block_out_channels"
        if self.init_decoder == "keep":
            names |= {"decoder_channels": "decoder_block_out_channels", "layers_per_block": "decoder_layers_per_block"}
        defaults = {name: getattr(type(self)(), name) for name in names} | {"quantizer": None}
        return {names[name]: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    def resolve_by_source(self, config: VQConfig) -> None:
        """Make the flags say what was taken over by --init_from, and by it the stored recipe.

        Raises:
            ValueError: codes are asked for where latents have no codebook, or widths for a timm model.
        """
        defaults = type(self)()
        if self.quantizer is None and config.quantizer != "vq" and self.num_codes != defaults.num_codes:
            raise ValueError(
                f"--num_codes {self.num_codes} is of a codebook, which the latents of {self.init_from} have not: add "
                "--quantizer vq (of an encoder), or leave it out."
            )
        if self.encoder_channels not in (defaults.encoder_channels, config.encoder_block_out_channels):
            raise ValueError(
                f"--encoder_channels {_flag(self.encoder_channels)}: the encoder is that of {self.init_from}, leave it "
                "out."
            )
        for name in CONFIG_FLAGS:
            setattr(self, name, copy.copy(getattr(config, name)))
        self.encoder_channels = list(config.encoder_block_out_channels)
        widths, kept = list(config.decoder_block_out_channels), self.init_decoder == "keep"
        if kept:
            self.layers_per_block = config.decoder_layers_per_block
        if kept or (self.decoder_channels == defaults.decoder_channels and len(self.decoder_channels) != len(widths)):
            self.decoder_channels = widths

    @property
    def steps_of_joint_arm(self) -> str | None:
        """The budget, of BUDGETS, where encoder and real decoder begin together; None elsewhere."""
        return None if ARMS[self.arm][0] or self.init_from else self.budget or "encoder"

    def unused_weakness(self) -> list[str]:
        """Flags of a weak decoder, set to something else than their defaults, of which this arm makes no use."""
        _, narrow, dropout = (False, False, False) if self.init_from else ARMS[self.arm]
        unused = [name for name in WEAK_DECODER if not (narrow if name == "auxiliary_channels" else dropout)]
        return [name for name in unused if getattr(self, name) != WEAK_DECODER[name]]

    @property
    def label(self) -> str:
        """The arm, or that an autoencoder was taken over and its decoder alone is trained."""
        return "decoder alone" if self.init_from else self.arm

    def adversarial_settings(self, steps: int) -> AdversarialSettings | None:
        """Settings of the adversarial term in a stage of so many steps."""
        if self.adversarial == "none":
            return None
        start = self.adversarial_start * (steps if self.adversarial_start < 1 else 1)
        return AdversarialSettings(
            self.adversarial,
            weight=self.adversarial_weight,
            start=round(start),
            warmup=self.discriminator_warmup,
            cap=self.adversarial_cap,
            r1_weight=self.r1_weight,
            r1_interval=self.r1_interval,
        )

    def term(self, steps: int) -> AdversarialTerm | None:
        """The adversarial term in a stage of so many steps."""
        from .adversarial_term import AdversarialTerm

        settings = self.adversarial_settings(steps)
        return settings and AdversarialTerm(**asdict(settings))

    def summary(self, stages: list[Stage], *, processes: int) -> dict:
        """What results.json says of a run: arm, budget, steps and operations of stages, decoder kept, adversarial term.

        Args:
            stages: that have run.
            processes: that trained.
        """
        images = self.batch_size * self.gradient_accumulation_steps * processes
        operations = {
            stage.name: {"per_image": stage.flops_per_image, "total": stage.flops_per_image * images * stage.steps}
            for stage in stages
        }
        settings = self.adversarial_settings(stages[-1].steps)
        return {
            "arm": self.label,
            "budget": self.steps_of_joint_arm,
            "stages": {stage.name: stage.steps for stage in stages},
            "operations": operations | {"total": sum(cost["total"] for cost in operations.values())},
            "kept_decoder": stages[-1].kept_decoder,
            "adversarial": None if settings is None else asdict(settings) | {"guard_factor": self.guard_factor},
        }


def _flag(value: object) -> str:
    """As it is written after its flag."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
