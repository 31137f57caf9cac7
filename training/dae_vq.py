"""Train an autoencoder: jointly or decoupled (DAE: weak auxiliary decoder, freeze, real decoder), VQ, KL or plain.

    python training/dae_vq.py                          # digits, CPU, minutes: jointly, then the decoder alone
    python training/dae_vq.py --arm dae                # DAE: stage 1 against a weak decoder, then the real one
    python training/dae_vq.py --budget total           # jointly to the end, the SUM of both stages' steps
    python training/dae_vq.py --budget total --adversarial hinge --perceptual outputs/demo/encoder    # a VQGAN
    python training/dae_vq.py --init_from path/to/VQModel        # a new decoder for an autoencoder one has
    accelerate launch training/dae_vq.py --dataset path/to/images --image_size 64

Writes OUTPUT_DIR/NAME (autoencoder with latent statistics and hashes of the frozen tensors,
results.json, recipe.yaml, reconstructions.png, curves.png, model card) and checkpoints that
`--resume_from_checkpoint latest` continues, in either stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hf_dpssl.autoencoder.arguments import CONFIG_FLAGS, VQArguments
from hf_dpssl.cli.errors import reported
from hf_dpssl.runs.console import say
from hf_dpssl.runs.recipe import announce, parse, save_recipe

if __name__ == "__main__":
    announce(VQArguments, __doc__)  # help and wrong flags end here, before the libraries are imported

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler

from hf_dpssl.autoencoder.adversarial_term import Adversary, ReconstructionGuard
from hf_dpssl.autoencoder.perceptual import load_perceptual
from hf_dpssl.autoencoder.training import (
    ARMS,
    BestDecoder,
    Stage,
    Validation,
    batch_usage,
    check_codebook_size,
    curve_summary,
    evaluate,
    measure_latents,
    say_plateau,
    stages_of,
    step_flops,
    warn_of_low_usage,
)  # fmt: skip
from hf_dpssl.convert.autoencoder_importers import convert_autoencoder
from hf_dpssl.data.batches import ImageSource, load_images_for
from hf_dpssl.data.keyed_random import derive_seed
from hf_dpssl.data.views import PRESETS, to_model_range
from hf_dpssl.hub.model_card import write_card
from hf_dpssl.models.configuration_vq import VQConfig
from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from hf_dpssl.models.modeling_vq import VQAutoencoder, VQAutoencoderOutput
from hf_dpssl.runs.atomic_files import atomic_folder
from hf_dpssl.runs.lineage import lineage_of_run
from hf_dpssl.runs.plots import plot_curves, save_grid
from hf_dpssl.runs.results import write_results
from hf_dpssl.runs.training_loop import TrainingLoop, finish, start_accelerator


def main(argv: list[str] | None = None) -> Path:
    """Run the script with command-line arguments `argv`; returns the folder of the finished autoencoder."""
    args = parse(VQArguments, argv, __doc__)
    accelerator = start_accelerator(args)
    set_seed(args.seed)

    # Data
    data = load_images_for(args)
    source = ImageSource.from_arguments(data, args, accelerator, args.image_size or data.entry.image_size)

    validation = validation_of(args, source)

    # Model
    model, stages = make_model(args, source)
    model.to(accelerator.device)
    if model.quantizer is not None:
        model.quantizer.defer_update = True  # the codebook moves once per optimiser step
    if _has_new_codebook(model):
        initialize_codebook(model, source, args)
    say(f"{args.label}: " + ", ".join(f"{stage.name} {stage.steps} steps" for stage in stages))
    if unused := args.unused_weakness():
        say(f"not used: --{', --'.join(unused)}, since {args.label} has no such weak decoder (--arm dae has)")

    # Stages
    history = []
    for stage in stages:
        if not stage.train_encoder:
            model.config.codebook_frozen = not args.train_codebook_in_stage_2
            model.freeze_encoder()
        if stage.decoder == "fresh":
            torch.manual_seed(derive_seed(args.seed, "decoder of stage 2"))
            model.replace_decoder(args.decoder_channels, args.layers_per_block)
        if accelerator.is_main_process:
            stage.flops_per_image = step_flops(model, source.image_size, train_encoder=stage.train_encoder)
        model, entries = train_stage(model, stage, stage is stages[-1], args, accelerator, source, validation)
        history += [entry | {"step": entry["step"] + (history[-1]["step"] if history else 0)} for entry in entries]
        if not stage.train_encoder:
            model.check_encoder_unchanged()

    # Save
    target = Path(args.output_dir) / args.name
    source.training_table(together=True)  # what is measured there is read by all processes
    with torch.compiler.set_stance("force_eager"):  # a graph of another batch size would be compiled for one use
        save(model.eval(), args, source, stages, history, target, accelerator)
    finish(accelerator, args, source.skipped)
    return target


def make_model(args: VQArguments, source: ImageSource) -> tuple[VQAutoencoder, list[Stage]]:
    """The autoencoder of the first stage, and the stages."""
    if args.init_from is not None:
        options = {"image_size": source.image_size, "num_channels": args.num_channels}
        options |= args.fields_for_source()
        model = convert_autoencoder(args.init_from, config_file=args.init_config, **options)
        model.config.reconstruction_loss = args.reconstruction_loss
        args.resolve_by_source(model.config)
        if _has_new_codebook(model):
            args.train_codebook_in_stage_2 = True
        return model, [Stage("decoder", args.stage_2_steps, False, args.init_decoder)]
    _, narrow, dropout = ARMS[args.arm]
    options = {name: getattr(args, name) for name in CONFIG_FLAGS} | {"image_size": source.image_size}
    options |= {"encoder_block_out_channels": args.encoder_channels, "encoder_layers_per_block": args.layers_per_block}
    full = VQConfig(**options, decoder_block_out_channels=args.decoder_channels)
    first = VQConfig(
        **options,
        decoder_block_out_channels=args.auxiliary_channels if narrow else args.decoder_channels,
        decoder_dropout=args.auxiliary_dropout if dropout else 0.0,
        decoder_dropout_kind=args.auxiliary_dropout_kind,
    )
    flops = {}
    if args.steps_of_joint_arm == "flops":
        reference = VQAutoencoder(full)
        whole, alone = (step_flops(reference, source.image_size, train_encoder=learns) for learns in (True, False))
        flops = {"joint": whole, "stage_1": whole, "stage_2": alone}
    set_seed(args.seed)  # the encoder is drawn first: it is the same in every arm
    model = VQAutoencoder(first)
    return model, stages_of(args.arm, args.steps_of_joint_arm, args.stage_1_steps, args.stage_2_steps, flops)


def _has_new_codebook(model: VQAutoencoder) -> bool:
    """Whether nothing has trained its codebook yet: of a run from scratch, or one given to an encoder's features."""
    return model.quantizer is not None and not model.quantizer.is_initialized


def validation_of(args: VQArguments, source: ImageSource) -> Validation | None:
    """Fixed held-out images, where the data set has some."""
    table = source.evaluation_table(together=True)
    if table is None:
        say("no held-out images: nothing is validated, the guard is off, and the last decoder is kept")
        return None
    return Validation(table, table.random_rows(args.validation_images), args.num_channels, source.process)


@torch.no_grad()
def initialize_codebook(model: VQAutoencoder, source: ImageSource, args: VQArguments) -> None:
    """k-means start on the latents of the first optimiser step's images."""
    if source.table is not None:
        check_codebook_size(model.config, len(source.table))
    batches = iter(source.loader())
    latents = []
    for _ in range(args.gradient_accumulation_steps):
        batch = next(batches)
        pixel_values = pixels(batch, args, 0.0)
        latents.append(model.encode_latents(pixel_values.to(model.device)))  # leaves no statistics behind
    torch.manual_seed(derive_seed(args.seed, "k-means"))
    model.quantizer.initialize_(torch.cat(latents).permute(0, 2, 3, 1).flatten(0, 2))


def pixels(batch: dict, args: VQArguments, flip: float) -> torch.Tensor:
    """Images of a batch in [-1, 1], mirrored with probability `flip`, (B, num_channels, H, W)."""
    images = to_model_range(batch["images"], batch["sample_ids"], batch["epoch"], seed=args.seed, flip=flip)
    return images.mean(1, keepdim=True) if args.num_channels == 1 else images


def train_stage(
    model: VQAutoencoder, stage: Stage, is_last: bool, args: VQArguments, accelerator: Accelerator,
    source: ImageSource, validation: Validation | None,
) -> tuple[VQAutoencoder, list[dict]]:  # fmt: skip
    """Train one stage (or find it finished in a checkpoint); returns the model and its log."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        model.compile()
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer, scheduler = make_optimizer(parameters, args.learning_rate, stage.steps, args)
    checkpoints = f"{args.name}/{stage.name}"
    loop = TrainingLoop(args, accelerator, checkpoints, stage.steps, source.loader, source.skipped, source.data)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    perceptual = load_perceptual(args.perceptual).to(accelerator.device) if args.perceptual else None
    adversary = make_adversary(args, stage, source, accelerator) if is_last and args.adversarial != "none" else None
    best = BestDecoder(latest=bool(adversary or perceptual)) if args.init_from and validation else None
    kept = ({"best": best} if best else {}) | (adversary.kept() if adversary else {})
    loop.keep(model=wrapped, optimizer=optimizer, scheduler=scheduler, **kept)
    quantizer = model.quantizer if stage.train_encoder or not model.config.codebook_frozen else None
    if best and loop.step == 0:
        best.offer(model, validation.psnr(model), 0)

    for batch in loop:
        pixel_values = pixels(batch, args, PRESETS[source.data.entry.augmentation].flip)
        with accelerator.accumulate(wrapped, *(adversary.wrapped() if adversary else ())):
            # Autoencoder
            output = wrapped(pixel_values)
            loss, values = total_loss(args, model, output, pixel_values, perceptual, adversary, loop.step)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            # Discriminator, on the same batch
            if adversary and adversary.trains(loop.step):
                values["adv_d"] = adversary.step(accelerator, pixel_values, output.pixel_values, loop.step)
        loop.log(**{name: value.detach() if torch.is_tensor(value) else value for name, value in values.items()})
        if accelerator.sync_gradients:
            scheduler.step()
            if adversary and adversary.trains(loop.step):
                adversary.scheduler.step()
            if quantizer is not None:
                quantizer.update_codebook_()
            step = loop.step + 1
            if validation and step % args.validation_steps == 0 and step < stage.steps:
                validate(model, validation, loop, step, adversary, best)
    # The last weights are in their checkpoint before they are validated, which may fail; it is written again with that.
    if validation and not any(e["step"] == loop.step and "validation_psnr" in e for e in loop.history):
        validate(model, validation, loop, loop.step, adversary, best)
        loop.save(wait=True)

    stage.seconds = loop.seconds
    model = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    if best:
        best.restore(model)
        stage.kept_decoder = best.summary()
    accelerator.free_memory()
    return model, [entry | {"stage": stage.name} for entry in loop.history]


def total_loss(
    args: VQArguments, model: VQAutoencoder, output: VQAutoencoderOutput, pixel_values: torch.Tensor,
    perceptual: torch.nn.Module | None, adversary: Adversary | None, step: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The autoencoder's loss with its perceptual and adversarial terms, and these for the log."""
    target, values = output.recon, {"recon": output.recon, "commit": output.commit}
    if args.equivariance_weight:
        values["equivariance"] = output.equivariance
    if output.codes is not None:
        usage = batch_usage(output.codes, model.config.num_codes)
        values |= {"perplexity": output.perplexity, "usage": usage}
    if perceptual is not None:
        values["perceptual"] = perceptual(pixel_values, output.pixel_values)
        target = target + args.perceptual_weight * values["perceptual"]
    loss = output.loss - output.recon + target
    if adversary and adversary.reaches_generator(step):
        term, more = adversary.generator_term(output.pixel_values, target, model.last_decoder_layer)
        loss, values = loss + term, values | more
    return loss, values


def make_optimizer(parameters: list, learning_rate: float, steps: int, args: VQArguments):
    """AdamW and its schedule over a stage."""
    settings = {"betas": tuple(args.adam_betas), "weight_decay": args.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, **settings)
    schedule = dict(num_warmup_steps=args.warmup_steps, num_training_steps=steps)
    return optimizer, get_scheduler(args.lr_scheduler, optimizer, **schedule)


def make_discriminator(args: VQArguments, image_size: int) -> PatchDiscriminator:
    """The discriminator, drawn from a seed of its own."""
    torch.manual_seed(derive_seed(args.seed, "discriminator"))
    shape = {"num_channels": args.num_channels, "image_size": image_size, "width": args.discriminator_width}
    return PatchDiscriminator(PatchDiscriminatorConfig(**shape, num_layers=args.discriminator_layers)).train()


def make_adversary(args: VQArguments, stage: Stage, source: ImageSource, accelerator: Accelerator) -> Adversary:
    """Discriminator, its optimiser and the guard."""
    bare = make_discriminator(args, source.image_size)
    rate = args.discriminator_learning_rate or args.learning_rate
    term = args.term(stage.steps)
    optimizer, scheduler = make_optimizer(list(bare.parameters()), rate, max(1, stage.steps - term.start), args)
    discriminator, optimizer = accelerator.prepare(bare.to(accelerator.device), optimizer)
    guard = ReconstructionGuard(args.guard_factor)
    return Adversary(term, bare, discriminator, optimizer, scheduler, guard)


def validate(
    model: VQAutoencoder, validation: Validation, loop: TrainingLoop, step: int, adversary: Adversary | None,
    best: BestDecoder | None,
) -> None:  # fmt: skip
    """PSNR after `step` steps into the log, the guard and, for a taken-over autoencoder, the best decoder."""
    decibels = validation.psnr(model)
    entry = {"step": step, "validation_psnr": decibels}
    if adversary and adversary.guard.check(10 ** (-decibels / 10), step, adversary.reaches_generator(step - 1)):
        entry["guard"] = adversary.guard.scale
    loop.history.append(entry)
    if best:
        best.offer(model, decibels, step)
    if model.quantizer is not None and loop.accelerator.is_main_process:
        warn_of_low_usage(model.quantizer.usage(), f"{loop.name}, step {step}")


def save(
    model: VQAutoencoder, args: VQArguments, source: ImageSource, stages: list[Stage], history: list[dict],
    target: Path, accelerator: Accelerator,
) -> None:  # fmt: skip
    """Write weights, config and recipe, evaluate, and write the complete checkpoint folder.

    All processes call this: the first one writes, they measure together.
    """
    data, training_table = source.data, source.training_table()
    held_out = source.evaluation_table() or training_table
    train_rows, held_out_rows = (t.random_rows(args.evaluation_images) for t in (training_table, held_out))
    measure_latents(model, training_table, train_rows, args.latent_normalization)
    about = {"arm": args.label, "class_names": data.class_names, "metrics": {}}
    model.config.dpssl |= about | {"dataset": data.name, "licence_of_data": data.entry.licence}

    def write_weights(folder: Path) -> None:
        model.save_pretrained(folder)
        save_recipe(args, folder / "recipe.yaml")
        plot_curves(history, folder / "curves.png", title=f"autoencoder, {args.label}")

    if accelerator.is_main_process:
        with atomic_folder(target) as folder:
            write_weights(folder)
    # The weights are safe before they are measured, which takes long and may fail.
    metrics, pictures = evaluate(model, held_out, held_out_rows, accelerator)
    if not accelerator.is_main_process:
        return
    model.config.dpssl["metrics"] = metrics
    if "code_usage" in metrics:
        warn_of_low_usage(metrics, f"{len(held_out_rows)} images at the end")
    about = {"quantizer": model.config.quantizer, "codes": model.config.num_codes}
    about |= args.summary(stages, processes=source.process[1]) | curve_summary(history, stages)
    others = {"encoder and codebook": args.init_from}
    others |= {"perceptual loss": None if args.perceptual == "lpips" else args.perceptual}
    about |= lineage_of_run(accelerator, data, [stage.seconds for stage in stages], others)
    samples = {"train": len(training_table), "latent_statistics": len(train_rows), "evaluation": len(held_out_rows)}
    with atomic_folder(target) as folder:
        write_weights(folder)
        save_grid(pictures, folder / "reconstructions.png", columns=8, min_side=64)
        write_results(folder / "results.json", metrics, dataset=data.name, seed=args.seed, samples=samples, **about)
        write_card(folder)
    say_plateau(about["plateau"])
    say(f"{target}: " + ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


if __name__ == "__main__":
    sys.exit(reported("dae_vq.py", main))
