"""What the recipes at paper scale cost, computed and not measured: floating-point operations, hours and memory.

    python training/evidence/recipe_costs.py                    # minutes; writes results/recipe_costs.json
    python training/evidence/recipe_costs.py --write_recipes    # also the line that says so in each recipe
    python training/evidence/recipe_costs.py --recipes dit-b2-imagenet    # these alone; the others' figures stay

Operations: torch's FlopCounterMode on one real step of the recipe's own model, forward and backward, on a small
batch (convolutions and matrix products; a multiplication and an addition are two; MoCo's queue is full).
Hours: operations of the whole run over an assumed share of the GPUs' peak, if the loader keeps up. For scale: the
published 53 hours of MoCo-v2 on 8 V100 in fp32 are 35 % of their peak by the same count (`check` in the results).
Memory: as `hf-dpssl rehearse` (rehearse.py): a step at full size on a GPU that is not there. Workspaces of the GPU's
libraries and the allocator's gaps come on top.
Autoencoders: operations and hours of encoder and decoder in all stages, each with its own decoder; perceptual network,
discriminator and what gradient checkpointing computes again come on top. Memory: all of the largest stage.
Maps: the three stages of contrastive training; t-SNE of pixels and features, on the CPU, comes on top.
Domains: all runs of the plan with the batches that they draw, and their evaluations, of which selection by training
domains takes fewer; in TF32, of half the peak. Memory: of the largest run; SWAD's averages of the weights, and the
pictures as bytes, come on top.
Latent DiTs and token models: the transformer's steps on cached latents or codes; beside them the cache that is made
before, and the grids that they draw after them (run_times.py).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

EVIDENCE = Path(__file__).parent
sys.path[:0] = [str(EVIDENCE), str(EVIDENCE.parent)]

import dae_ar  # noqa: E402
import dae_vq  # noqa: E402
import domains  # noqa: E402
import map as map_script  # noqa: E402
import rehearse  # noqa: E402
from contrastive import ContrastiveArguments, make_model  # noqa: E402
from rehearsed_steps import Started, Step  # noqa: E402
from run_times import PEAK_TERAFLOPS, SHARES_OF_PEAK, TRAINING_IMAGES, cache_of, grids_of, seconds_of, span  # noqa: E402

from hf_dpssl.autoencoder.training import step_flops  # noqa: E402
from hf_dpssl.data.image_data import TABLE  # noqa: E402
from hf_dpssl.domains.domains_arguments import DomainsArguments  # noqa: E402
from hf_dpssl.domains.hyperparameters import Hyperparameters, hyperparameters  # noqa: E402
from hf_dpssl.domains.known_sets import KNOWN_SETS  # noqa: E402
from hf_dpssl.domains.networks import TunedEncoder, build  # noqa: E402
from hf_dpssl.generation.pipeline_vq_token import code_nats  # noqa: E402
from hf_dpssl.latent_training.diffusion import make_transformer  # noqa: E402
from hf_dpssl.latent_training.dit_arguments import DiTArguments  # noqa: E402
from hf_dpssl.latent_training.token_arguments import ARArguments  # noqa: E402
from hf_dpssl.runs.atomic_files import atomic_file  # noqa: E402
from hf_dpssl.runs.contrastive_arguments import MapArguments  # noqa: E402
from hf_dpssl.runs.recipe import find_recipe, parse, save_recipe  # noqa: E402
from hf_dpssl.runs.rehearsed_memory import memory_rehearsal  # noqa: E402
from hf_dpssl.runs.results import write_results  # noqa: E402

RECIPES = (
    "simclr-resnet50-cifar10",
    "t-simclr-resnet50-cifar10",
    "moco-v2-resnet50-imagenet",
    "t-moco-v2-resnet50-imagenet",
    "t-moco-v2-dof5-resnet50-imagenet",
)
AUTOENCODERS = {"vq-gan-f16-faceshq": 8, "vq-dae-f16-faceshq": 8, "vq-dae-f8-imagenet": 8}  # GPUs they are meant for
TRANSFORMERS = {"dit-b2-imagenet": 8, "dit-xl2-imagenet": 8}
TOKEN_MODELS = {"ar-faceshq": 8}
MAPS = {"map-cifar10": 1}
DOMAINS = {"domains-pacs-resnet50": 1}
# README of facebookresearch/moco: 200 epochs of MoCo-v2 on 8 V100, whose fp32 peak is 15.7 TFLOPS.
PUBLISHED = {"recipe": "moco-v2-resnet50-imagenet", "gpus": 8, "peak_teraflops": 15.7, "hours": 53}
COMMENT = "# Computed, not measured:"
TIMES = "# There a step takes"
BATCH = 2  # whose operations are counted


def main(argv: list[str] | None = None) -> dict:
    """Compute all recipes; returns {recipe: figures}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EVIDENCE / "results" / "recipe_costs.json")
    parser.add_argument("--write_recipes", action="store_true", help="put the figures into the recipes' comments")
    everything = [*RECIPES, *AUTOENCODERS, *TRANSFORMERS, *TOKEN_MODELS, *MAPS, *DOMAINS]
    parser.add_argument("--recipes", nargs="+", choices=everything, help="compute these alone")
    known = parser.parse_args(argv)
    wanted = known.recipes or everything
    costs = json.loads(known.output.read_text(encoding="utf-8"))["metrics"] if known.recipes else {}
    costs |= {name: recipe_costs(name) for name in tqdm(RECIPES, desc="recipes", unit="recipe") if name in wanted}
    costs |= {name: autoencoder_costs(name, gpus) for name, gpus in AUTOENCODERS.items() if name in wanted}
    costs |= {name: transformer_costs(name, gpus) for name, gpus in TRANSFORMERS.items() if name in wanted}
    costs |= {name: token_costs(name, gpus) for name, gpus in TOKEN_MODELS.items() if name in wanted}
    costs |= {name: map_costs(name, gpus) for name, gpus in MAPS.items() if name in wanted}
    costs |= {name: domain_costs(name, gpus) for name, gpus in DOMAINS.items() if name in wanted}
    samples = {"images per batch counted": BATCH}
    note = "computed, not measured: see the top of recipe_costs.py"
    published = PUBLISHED["gpus"] * PUBLISHED["peak_teraflops"] * 1e12 * PUBLISHED["hours"] * 3600
    check = PUBLISHED | {"share_of_peak": costs[PUBLISHED["recipe"]]["operations"] / published}
    assumed = {"peak_teraflops": PEAK_TERAFLOPS, "shares_of_peak": list(SHARES_OF_PEAK)}
    about = {"note": note, "assumed": assumed, "check": check}
    write_results(known.output, costs, dataset="random pixels", seed=0, samples=samples, **about)
    if known.write_recipes:
        for name in wanted:
            write_comment(find_recipe(name), costs[name])
    return costs


def recipe_costs(name: str) -> dict:
    """Figures of one recipe: operations, hours by GPU and share of the peak, images per second, bytes per GPU."""
    args = parse(ContrastiveArguments, ["--recipe", name], "")
    entry = TABLE[args.dataset]
    torch.manual_seed(0)
    model = make_model(args, entry.image_size, *entry.statistics).train()
    gpus = args.num_processes or 1
    steps = args.num_train_epochs * (TRAINING_IMAGES[args.dataset] // (args.batch_size * gpus))
    images = steps * args.batch_size * gpus
    per_image = step_operations(model, entry.image_size, BATCH) / BATCH
    hours = hours_of(images * per_image, gpus)
    return {
        "operations_per_image": per_image,
        "operations": images * per_image,
        "steps": steps,
        "images": images,
        "gpus": gpus,
        "hours": hours,
        "images_per_second": {g: {s: images / h / 3600 for s, h in by_share.items()} for g, by_share in hours.items()},
        "bytes_per_gpu": memory_of("contrastive", name, gpus),
    }


def map_costs(name: str, gpus: int) -> dict:
    """Figures of a map's recipe, as `recipe_costs`, by stage."""
    args = parse(MapArguments, ["--recipe", name], "")
    per_epoch = TRAINING_IMAGES[args.dataset] // (args.batch_size * gpus)
    stages = map_script.stages_of(args, per_epoch)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            recipe = Path(folder) / f"{stage.name}.yaml"
            save_recipe(stage, recipe)
            asked = rehearse.parsed(["contrastive", "--recipe", str(recipe)])
            process = rehearse.Process(gpus, stage.mixed_precision, sharded=False)
            found[stage.name] = rehearse.memory_of(asked, 0, process)
    steps = {stage.name: stage.num_train_epochs * per_epoch for stage in stages}
    images = {stage: number * args.batch_size * gpus for stage, number in steps.items()}
    per_image = {stage: figures["operations"] / args.batch_size for stage, figures in found.items()}
    operations = sum(per_image[stage] * images[stage] for stage in images)
    hours, total = hours_of(operations, gpus), sum(images.values())
    return {
        "operations_per_image": per_image,
        "operations": operations,
        "steps": steps,
        "images": images,
        "gpus": gpus,
        "hours": hours,
        "images_per_second": {g: {s: total / h / 3600 for s, h in by_share.items()} for g, by_share in hours.items()},
        "bytes_per_gpu": max((figures["bytes"] for figures in found.values()), key=lambda parts: parts["total"]),
    }


def domain_costs(name: str, gpus: int) -> dict:
    """Figures of a recipe of domain generalisation, as `recipe_costs`, of all its runs."""
    args = parse(DomainsArguments, ["--recipe", name], "")
    known = KNOWN_SETS[args.dataset]
    targets = [(number,) for number in range(known.domains)]
    cells = domains.plan(args, [number for (number,) in targets], known.domains)
    process = rehearse.Process(gpus, args.mixed_precision, sharded=False)
    given = {cell: hyperparameters(cell.algorithm, args.protocol, cell.draw, cell.seed) for cell in cells}
    per_image, largest = {}, {}
    for algorithm in args.algorithms:
        own = [settings for cell, settings in given.items() if cell.algorithm == algorithm]
        chosen = max(own, key=lambda settings: settings.batch_size)
        step = domain_step(args, algorithm, chosen, known.domains - 1, known.classes)
        found = rehearse.step_memory(step, process)
        largest[algorithm] = found["bytes"]
        per_image[algorithm] = found["operations"] / (chosen.batch_size * (known.domains - 1))
    images = args.steps * (known.domains - 1) * sum(settings.batch_size for settings in given.values())
    operations = sum(
        per_image[cell.algorithm] * args.steps * (known.domains - 1) * settings.batch_size
        for cell, settings in given.items()
    )
    # Held-out fifths of the sources, and the target; each domain is held out once.
    evaluations = -(-args.steps // args.evaluation_steps) + 1
    measured = evaluations * known.images * (0.2 * (known.domains - 1) + 1) * len(cells) / known.domains
    operations += measured * per_image["erm"] / 3
    hours = hours_of(2 * operations, gpus)
    return {
        "operations_per_image": per_image,
        "operations": operations,
        "steps": args.steps * len(cells),
        "images": images + round(measured),
        "gpus": gpus,
        "peak": "the peak of TF32",
        "hours": hours,
        "bytes_per_gpu": max(largest.values(), key=lambda parts: parts["total"]),
    }


def domain_step(args: DomainsArguments, algorithm: str, given: Hyperparameters, sources: int, classes: int) -> Step:
    """An update of an algorithm that fine-tunes the recipe's encoder on pictures of so many domains."""
    encoder = timm.create_model(args.encoder.removeprefix("timm/"), num_classes=0)
    side = encoder.pretrained_cfg["input_size"][-1]

    def tuned(extra_channels: int) -> tuple[TunedEncoder, int]:
        return TunedEncoder(encoder.forward, encoder, extra_channels), encoder.num_features

    about = {"shape": (3, side, side), "classes": classes, "seed": 0, "order": 0}
    built = build(algorithm, args.protocol, given, **about, encoder=tuned)
    settings = dict(given.settings)
    if built.adapts:
        settings |= {"context": built.context, "support": given.batch_size}

    def batch() -> dict:
        count = sources * given.batch_size
        return {"images": torch.zeros(count, 3, side, side), "labels": torch.zeros(count, dtype=torch.int64)}

    def start() -> Started:
        new = type(built)(built.featurizer, built.classifier, **settings).train()
        optimizers = [value for value in vars(new).values() if isinstance(value, torch.optim.Optimizer)]

        def run(batch: dict) -> None:
            parts = (batch[key].chunk(sources) for key in ("images", "labels"))
            new.update(list(zip(*parts, strict=True)))

        return Started(run, optimizers)

    return Step([built], batch, start)


def hours_of(operations: float, gpus: int) -> dict[str, dict[str, float]]:
    """{GPU: {share of its peak: hours}} of so many operations on `gpus` of them."""
    return {
        gpu: {f"{share:g}": operations / (gpus * peak * 1e12 * share) / 3600 for share in SHARES_OF_PEAK}
        for gpu, peak in PEAK_TERAFLOPS.items()
    }


def autoencoder_costs(name: str, gpus: int) -> dict:
    """Figures of one autoencoder's recipe: operations per image and steps of each stage, and operations and hours."""
    args = parse(dae_vq.VQArguments, ["--recipe", name], "")
    per_image = {}
    with torch.device("meta"):
        model, stages = dae_vq.make_model(args, SimpleNamespace(image_size=args.image_size))
        for stage in stages:
            if stage.decoder == "fresh":
                model.replace_decoder(args.decoder_channels, args.layers_per_block)
            per_image[stage.name] = step_flops(model, args.image_size, train_encoder=stage.train_encoder)
    images = {stage.name: stage.steps * args.batch_size * gpus for stage in stages}
    operations = sum(per_image[stage] * images[stage] for stage in images)
    return {
        "operations_per_image": per_image,
        "operations": operations,
        "steps": {stage.name: stage.steps for stage in stages},
        "images": images,
        "gpus": gpus,
        "hours": hours_of(operations, gpus),
        "bytes_per_gpu": memory_of("dae_vq", name, gpus),
    }


def transformer_costs(name: str, gpus: int) -> dict:
    """Figures of one latent DiT's recipe, as `recipe_costs`; 32 x 32 x 4 latents of 1000 classes."""
    args = parse(DiTArguments, ["--recipe", name], "")
    with torch.device("meta"):
        model = make_dit(args, args.num_layers)
        with FlopCounterMode(display=False) as counter:
            dit_loss(model, 1).backward()
    return _figures("dae_dit", name, counter.get_total_flops(), args, gpus)


def _figures(script: str, name: str, per_image: int, args: DiTArguments | ARArguments, gpus: int) -> dict:
    """Those of a transformer, of its operations for an image."""
    images = args.max_train_steps * args.batch_size * gpus
    hours = hours_of(images * per_image, gpus)
    asked = rehearse.parsed([script, "--recipe", name])
    return {
        "operations_per_image": per_image,
        "operations": images * per_image,
        "start": cache_of(asked, gpus),
        **({"end": grids_of(asked, per_image / 3, gpus)} if script == "dae_dit" else {}),
        "steps": args.max_train_steps,
        "images": images,
        "gpus": gpus,
        "hours": hours,
        "images_per_second": {g: {s: images / h / 3600 for s, h in by_share.items()} for g, by_share in hours.items()},
        "bytes_per_gpu": memory_of(script, name, gpus),
    }


def token_costs(name: str, gpus: int) -> dict:
    """Figures of one token model's recipe, as `recipe_costs`; 16 x 16 codes of 1,024, as those of its autoencoder."""
    args = parse(ARArguments, ["--recipe", name], "")
    args.gradient_checkpointing = False  # what is computed again is not counted again
    config = SimpleNamespace(num_codes=1024, latent_size=16)
    with torch.device("meta"):
        model = dae_ar.make_model(args, SimpleNamespace(config=config), 0).train()
    with memory_rehearsal() as memory, FlopCounterMode(display=False) as counter:
        memory.fake_module_(model)
        codes = torch.zeros(1, config.latent_size, config.latent_size, dtype=torch.int64, device="cuda")
        code_nats(model, codes, codes[:, 0, 0], config.num_codes).mean().backward()
    return _figures("dae_ar", name, counter.get_total_flops(), args, gpus)


def make_dit(args: DiTArguments, num_layers: int) -> torch.nn.Module:
    """The recipe's transformer with so many blocks."""
    return make_transformer(
        num_layers=num_layers,
        width=args.width,
        num_heads=args.num_heads,
        patch_size=args.patch_size,
        latent_channels=4,
        latent_size=32,
        num_classes=1000,
        learned_variance=args.learned_variance,
    ).train()


def dit_loss(model: torch.nn.Module, batch_size: int) -> torch.Tensor:
    """A loss of random latents."""
    noised, labels = torch.randn(batch_size, 4, 32, 32), torch.zeros(batch_size, dtype=torch.int64)
    return model(noised, timestep=torch.rand(batch_size), class_labels=labels).sample.square().mean()


def step_operations(model: torch.nn.Module, image_size: int, batch_size: int) -> int:
    """Operations of one forward and backward pass of `batch_size` images in two views."""
    if hasattr(model, "queue"):
        model.queue.normal_()
        model.queue_filled.fill_(len(model.queue))
    ours = {torch.ops.mkldnn._linear_pointwise: lambda x, y, *_, **__: 2 * x[0] * x[1] * y[0]}  # `products.product`
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        model(*torch.randn(2, batch_size, 3, image_size, image_size)).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def memory_of(script: str, name: str, gpus: int) -> dict[str, int]:
    """Bytes per GPU by what they hold, of the stage that takes most of them, as `hf-dpssl rehearse`."""
    asked = rehearse.parsed([script, "--recipe", name])
    process = rehearse.Process(gpus, asked.args.mixed_precision, sharded=False)
    stages = (rehearse.memory_of(asked, i, process) for i in range(len(rehearse.stage_names(asked))))
    return max((stage["bytes"] for stage in stages), key=lambda parts: parts["total"])


def comment(costs: dict) -> str:
    """The line of a recipe that says what it costs."""
    low, high = (f"{share:g}" for share in SHARES_OF_PEAK)
    hours = {
        share: f"{value:.0f}" if value >= 100 else f"{value:.2g}" for share, value in costs["hours"]["A100"].items()
    }
    operations = f"{costs['operations']:.1e}".replace("e+", "e")
    of_parts = "" if {"images_per_second", "peak"} & costs.keys() else " of encoder and decoder"
    rates = costs.get("images_per_second")
    loaded = f" if {rates['A100'][low]:,.0f} images/s are loaded" if rates else ""
    memory = f"{costs['bytes_per_gpu']['total'] / 1e9:.1f} GB per GPU"
    return (
        f"{COMMENT} {operations} operations{of_parts}, {memory}; {hours[low]} h ({hours[high]}) on "
        f"{costs['gpus']} A100 at {low} ({high}) of {costs.get('peak', 'peak')}{loaded}."
    )


def comment_of_times(costs: dict) -> str:
    """The line after it: time of a step, and what comes before and after all of them."""
    low, high = (f"{share:g}" for share in SHARES_OF_PEAK)

    def spans(seconds: dict) -> str:
        return f"{span(seconds[low])} ({span(seconds[high])})"

    stages = costs["steps"] if isinstance(costs["steps"], dict) else {"": costs["steps"]}
    steps = []
    for stage, number in stages.items():
        operations = costs["operations_per_image"][stage] * costs["images"][stage] if stage else costs["operations"]
        operations *= 2 if "peak" in costs else 1  # TF32
        of_stage = f" in {stage}" if stage else ""
        steps.append(spans(seconds_of(operations / number, costs["gpus"])["A100"]) + of_stage)
    said = f"{TIMES} {' and '.join(steps)}"
    if "start" in costs:
        start = costs["start"]
        said += f"; before, a cache of {start['bytes'] / 1e9:.2g} GB takes {spans(start['seconds']['A100'])}"
    if "end" in costs:
        said += f", after, {costs['end']['images']} pictures {spans(costs['end']['seconds']['A100'])}"
    return f"{said}."


def write_comment(path: Path, costs: dict) -> None:
    """Replace the comment lines of a recipe."""
    text = re.sub(f"^{TIMES}.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = f"{comment(costs)}\n{comment_of_times(costs)}"
    with atomic_file(path) as file:
        file.write(re.sub(f"^{COMMENT}.*$", lines, text, count=1, flags=re.MULTILINE))


if __name__ == "__main__":
    main()
