"""Arguments of training/domains.py: which domains, algorithms, searches and seeds."""

from __future__ import annotations

from dataclasses import dataclass

from ..embedding.choices import BAD_IMAGES
from ..runs.flags import option
from .choices import ALGORITHMS, DIGITS, SELECTIONS, SOUPS

_STEPS = {"network": 5001, "fine_tune": 5001, "frozen": 1001}  # DomainBed's; a linear head needs fewer
_DIGITS_STEPS = 301  # of the embedded digits


@dataclass
class DomainsArguments:
    """Domain generalisation, each domain held out once; the defaults are rotated digits and DomainBed's network."""

    dataset: str = option(
        "rotated_digits",
        "rotated_digits, rotated_mnist, colored_mnist, pacs ..., NAME=FOLDER of these, Hub id, parquet file, or folder "
        "DOMAIN/CLASS/image",
        group="data",
    )
    dataset_revision: str | None = option(None, "branch, tag or commit of a Hub data set")
    domain_column: str | None = option(None, "column of domains; default: the folders of the first level")
    image_column: str | None = option(None, "column of pictures; found by its type when not given")
    label_column: str | None = option(None, "column of classes; found by its type when not given")
    images: int | None = option(None, "so many pictures, drawn at random, of each class of each domain its share")
    image_size: int | None = option(None, "side in pixels; default: the encoder's own, or 32")
    on_bad_image: str = option("error", "unreadable pictures", choices=BAD_IMAGES)

    encoder: str | None = option(
        None, "folder or Hub id of an encoder; default: DomainBed's network for small pictures, from scratch",
        group="model",
    )  # fmt: skip
    frozen: bool = option(False, "a linear head on cached features of the encoder, in place of fine-tuning it")

    algorithms: list[str] = option(
        ["erm", "vrex", "arm"], "side by side; soups average the weights of erm's draws (DiWA)", group="optimiser",
        choices=[*ALGORITHMS, *SOUPS],
    )  # fmt: skip
    steps: int | None = option(None, "updates of a run; default: 5001, frozen 1001, rotated_digits 301")
    draws: int = option(1, "hyper-parameters of each algorithm: the defaults, then random draws as DomainBed's")
    seeds: int = option(1, "repetitions with other splits, weights, order and draws; five or more give an interval")
    tolerance_ratio: float = option(0.3, "of swad; 0.2 for VLCS in its paper")

    targets: list[str] = option([], "domains that are held out, one at a time; default: each", group="evaluation")
    evaluation_steps: int = option(100, "steps from one evaluation to the next")
    selection: list[str] = option(
        ["training_domains", "oracle"],
        "rules that choose checkpoint and draw; leave_one_domain_out also runs with every two domains held out",
        choices=SELECTIONS,
    )
    batch_size: int = option(64, "pictures embedded at once, with --frozen")

    output_dir: str = option(
        "outputs/domains", "folder of results.json, table.md and cells/, one file a run", group="run"
    )
    overwrite: bool = option(False, "discard the runs of output_dir that were made otherwise")
    seed: int = option(0, "first of the seeds")
    mixed_precision: str = option("no", "bf16: networks in bfloat16, losses in float32", choices=["no", "bf16"])

    @property
    def protocol(self) -> str:
        """network, frozen or fine_tune."""
        return "network" if self.encoder is None else "frozen" if self.frozen else "fine_tune"

    def __post_init__(self):
        if self.steps is None:
            self.steps = _DIGITS_STEPS if self.dataset == "rotated_digits" else _STEPS[self.protocol]
        for name in ("steps", "draws", "seeds", "evaluation_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("seed", "tolerance_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        of_pictures = ["images", "image_size", "domain_column", "image_column", "label_column", "dataset_revision"]
        given = [name for name in of_pictures if getattr(self, name) is not None]
        if given and self.dataset in DIGITS:
            raise ValueError(f"--{given[0]} is not for {self.dataset}, which takes all digits: leave it out.")
        if self.frozen and self.image_size is not None:
            raise ValueError("--image_size is not for --frozen: the encoder has its own.")
        if self.frozen and self.encoder is None:
            raise ValueError("--frozen is of an --encoder: name one, or leave --frozen out.")
        for name in ("algorithms", "targets", "selection"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"--{name} names one twice: {' '.join(getattr(self, name))}.")
        soups = [name for name in self.algorithms if name in SOUPS]
        if soups and ("erm" not in self.algorithms or self.draws < 2):
            raise ValueError(f"{soups[0]} is of erm's runs with two or more draws: add erm, and --draws 2 or more.")
