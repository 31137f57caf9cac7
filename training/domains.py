"""Domain generalisation: ERM, IRM, GroupDRO, Mixup, MMD, SagNet, ARM, VREx, RSC, SWAD, each domain held out once.

    python training/domains.py                                         # rotated digits, CPU, minutes
    python training/domains.py --dataset path/to/domains --encoder outputs/demo/encoder --frozen
    accelerate launch training/domains.py --recipe domains-pacs-resnet50

Every algorithm has the same number of draws of hyper-parameters. Writes OUTPUT_DIR/cells/ (one JSON a run),
results.json and table.md (per-domain, mean and worst accuracy by each rule of selection), anew after each draw. Started
again it goes on with the runs that are not there yet; processes share the runs, which do not depend on how many there
are.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from hf_dpssl.cli.errors import reported
from hf_dpssl.domains.choices import DIGITS, SOUPS
from hf_dpssl.domains.domains_arguments import DomainsArguments
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(DomainsArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from hf_dpssl.domains.cells import Cell, Trainer
from hf_dpssl.domains.digit_domains import digit_domains
from hf_dpssl.domains.domain_checks import notes_of_missing
from hf_dpssl.domains.domain_tensors import DomainTensors
from hf_dpssl.domains.encoded_domains import PretrainedEncoder, feature_tensors, picture_tensors
from hf_dpssl.domains.known_sets import account, load_set
from hf_dpssl.domains.selection import as_markdown, table
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.models.matrix_products import allow_tf32
from hf_dpssl.runs.atomic_files import atomic_file, write_json
from hf_dpssl.runs.redaction import redacted, without_folders
from hf_dpssl.runs.results import write_results

_IMAGE_SIZE = 32  # of pictures for DomainBed's small network
_DECIDING = (
    "frozen",
    "steps",
    "evaluation_steps",
    "tolerance_ratio",
    "mixed_precision",
)  # with the inputs and weights themselves
_VIEWS = "by the cell's seed and the domain"  # of fine-tuning; before, by the first seed of the command alone
_FLAGS_OF = {"data": "pictures", "encoder_weights": "--encoder", "every_target": "--selection (leave_one_domain_out)"}
_FLAGS_OF |= {"views": "random views"}


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the results."""
    args = parse(DomainsArguments, argv, __doc__)
    # Without this, processes of a machine without GPU do not find each other.
    accelerator = Accelerator(cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available())
    allow_tf32(accelerator.device)
    folder = Path(args.output_dir)

    # Data and encoder
    with accelerator.main_process_first():  # which fills the cache of features
        tensors, encoder, notes = load(args, accelerator.device)
    targets = args.targets or tensors.names
    every_target = "leave_one_domain_out" in args.selection
    about = {"every_target": every_target, "device": accelerator.device, "encoder": encoder}
    about |= {"tolerance_ratio": args.tolerance_ratio, "mixed_precision": args.mixed_precision}
    trainer = Trainer(tensors, args.protocol, args.steps, args.evaluation_steps, **about)

    # Runs
    numbers = [tensors.names.index(name) for name in targets]
    cells = plan(args, numbers, len(tensors.names))
    decided = {name: getattr(args, name) for name in _DECIDING}
    decided |= {"data": tensors.digest(), "every_target": every_target, "encoder_weights": fingerprint(encoder)}
    decided |= {"views": _VIEWS} if encoder is not None else {}
    missing = check(cells, folder, decided, args)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_recipe(args, folder / "recipe.yaml")
    for soups in (False, True):
        part = [cell for cell in missing if (cell.algorithm in SOUPS) == soups]
        mine = part[accelerator.process_index :: accelerator.num_processes]
        runs = tqdm(mine, "soups" if soups else "runs", unit="run", disable=None if mine else True)
        for number, cell in enumerate(runs, 1):
            run(cell, trainer, args, folder, decided)
            draw_ends = all((cell.seed, cell.draw) != (after.seed, after.draw) for after in mine[number : number + 1])
            if draw_ends and accelerator.is_main_process:
                report(args, folder, cells, decided, targets, tensors, notes)
        accelerator.wait_for_everyone()

    # Table
    if accelerator.is_main_process:
        text = report(args, folder, cells, decided, targets, tensors, notes)
        say(f"{text}\nwritten to {folder / 'results.json'} and {folder / 'table.md'}")
    accelerator.wait_for_everyone()
    return folder


def load(args: DomainsArguments, device: torch.device) -> tuple[DomainTensors, PretrainedEncoder | None, list[str]]:
    """Inputs of all domains, the encoder that is fine-tuned, and what a reader of the table must know of the data."""
    if args.dataset in DIGITS:
        if args.encoder is not None:
            raise ValueError(f"{args.dataset} is learned from scratch: leave out --encoder, or name a set of pictures.")
        tensors = digit_domains(args.dataset, args.seed)
        check_domain_names(args, tensors.names)
        return tensors, None, [f"{args.dataset}: {sum(map(len, tensors.labels)):,} pictures."]
    embedder = ImageEmbedder(args.encoder, device=device) if args.encoder is not None else None
    columns = {name: getattr(args, name) for name in ("domain_column", "label_column", "image_column")}
    given = load_set(args.dataset, revision=args.dataset_revision, limit=args.images, seed=args.seed, **columns)
    check_domain_names(args, given.domain_names)
    encoder = None
    if args.protocol == "frozen":
        reading = {"batch_size": args.batch_size, "on_bad_image": args.on_bad_image}
        tensors = feature_tensors(embedder, given, cache=Path(args.output_dir) / "features", **reading)
    else:
        encoder = PretrainedEncoder(embedder) if embedder is not None else None
        size = args.image_size or (encoder.size if encoder is not None else _IMAGE_SIZE)
        tensors = picture_tensors(given, size, args.on_bad_image)
    whole = account(args.dataset, given)
    notes = [whole or f"{without_folders(args.dataset)}: {sum(map(len, tensors.labels)):,} pictures."]
    notes += notes_of_missing(tensors.missing_classes)
    return tensors, encoder, notes


def check_domain_names(args: DomainsArguments, names: list[str]) -> None:
    """ValueError where the flags do not fit the domains of that name."""
    if unknown := set(args.targets) - set(names):
        raise ValueError(f"--targets {sorted(unknown)} are no domains of {args.dataset!r}, which has {names}.")
    if len(names) < 3 and "leave_one_domain_out" in args.selection:
        raise ValueError("--selection leave_one_domain_out holds two domains out, and needs three or more.")


def fingerprint(encoder: PretrainedEncoder | None) -> str | None:
    """Of the weights that are fine-tuned."""
    return None if encoder is None else encoder.embedder.fingerprint


def plan(args: DomainsArguments, targets: list[int], domains: int) -> list[Cell]:
    """All runs, seed by seed and draw by draw, so that any first part of them gives a table of equal budgets."""
    cells = []
    pairs = [(target, other) for target in targets for other in range(domains) if other != target]
    held_out = [(target,) for target in targets]
    if "leave_one_domain_out" in args.selection:
        held_out += sorted({tuple(sorted(pair)) for pair in pairs})
    learned = [name for name in args.algorithms if name not in SOUPS]
    for seed, draw in itertools.product(range(args.seed, args.seed + args.seeds), range(args.draws)):
        cells += [Cell(name, out, draw, seed) for name in learned for out in held_out]
    soups = [name for name in args.algorithms if name in SOUPS]
    seeds = range(args.seed, args.seed + args.seeds)
    return cells + [Cell(name, (target,), args.draws, seed) for seed in seeds for name in soups for target in targets]


def check(cells: list[Cell], folder: Path, decided: dict, args: DomainsArguments) -> list[Cell]:
    """The cells that are not there yet.

    Raises:
        ValueError: one is there that was made otherwise.
    """
    missing = []
    for cell in cells:
        path = folder / "cells" / f"{cell.name}.json"
        if not path.exists() or (in_soups(cell, args) and not weights_of(cell, folder).exists()):
            missing.append(cell)
            continue
        differing = differences(cell, json.loads(path.read_text(encoding="utf-8"))["decided"], decided)
        if differing and not args.overwrite:
            flags = ", ".join(_FLAGS_OF.get(name, f"--{name}") for name in differing)
            raise ValueError(
                f"{path} was made with other {flags}: give another --output_dir, or --overwrite for new runs."
            )
        if differing:
            missing.append(cell)
    return missing


def differences(cell: Cell, before: dict, now: dict) -> list[str]:
    """What decides a cell and is not now what it was before."""
    of_others = set() if cell.algorithm == "swad" else {"tolerance_ratio"}
    return sorted(name for name in (before | now).keys() - of_others if before.get(name) != now.get(name))


def in_soups(cell: Cell, args: DomainsArguments) -> bool:
    """Whether the weights of a cell are averaged with others."""
    return cell.algorithm == "erm" and len(cell.targets) == 1 and bool(set(args.algorithms) & set(SOUPS))


def weights_of(cell: Cell, folder: Path) -> Path:
    """Where they lie."""
    return folder / "weights" / f"{cell.name}.safetensors"


def run(cell: Cell, trainer: Trainer, args: DomainsArguments, folder: Path, decided: dict) -> None:
    """Run one cell and write its record, after its weights where soups are made of them."""
    if cell.algorithm in SOUPS:
        parts = [Cell("erm", cell.targets, draw, cell.seed) for draw in range(args.draws)]
        content, _ = trainer.average(cell, [load_file(weights_of(part, folder)) for part in parts])
    else:
        content, state = trainer.run(cell)
        if in_soups(cell, args):
            with atomic_file(weights_of(cell, folder), "wb") as file:
                file.write(save({name: value.cpu().contiguous() for name, value in state.items()}))
    write_json(folder / "cells" / f"{cell.name}.json", content | {"decided": decided})


def report(args: DomainsArguments, folder: Path, cells: list[Cell], decided: dict, targets, tensors, notes) -> str:
    """Write results.json and table.md, whose text is returned, of those runs of the plan that are there."""
    runs = []
    for cell in cells:
        path = folder / "cells" / f"{cell.name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if not differences(cell, found["decided"], decided):
                runs.append(found)
    rows = table(runs, args.selection, targets)
    encoder = "from scratch" if args.encoder is None else without_folders(args.encoder)
    search = f"{args.draws} of hyper-parameters, the first of them the defaults" if args.draws > 1 else "the defaults"
    budget = f"Each algorithm: {search}; {args.steps} steps a run. {args.protocol}, {encoder}."
    if len(runs) < len(cells):
        budget = f"Not finished: {len(runs)} of {len(cells)} runs; rows are of seeds and draws that all have. {budget}"
    notes = [budget, *notes, *(f"{run['algorithm']} diverged in a run." for run in runs if run["diverged"])]
    text = as_markdown(rows, targets, list(dict.fromkeys(notes)))
    samples = {name: len(labels) for name, labels in zip(tensors.names, tensors.labels, strict=True)}
    about = {"dataset": without_folders(args.dataset), "seed": args.seed, "samples": samples}
    arguments = redacted({name: value for name, value in asdict(args).items() if name != "output_dir"})
    metrics = {f"{row['algorithm']}_{row['selection']}": row["mean"] for row in rows}
    write_results(folder / "results.json", metrics, **about, rows=rows, arguments=arguments, notes=notes)
    with atomic_file(folder / "table.md") as file:
        file.write(text)
    return text


if __name__ == "__main__":
    sys.exit(reported("domains.py", main))
