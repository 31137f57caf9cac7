"""Scripts beside loops written anew from the formulas: what they save is what a few lines of torch arrive at."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from plain_loop import Average, all_digits, assert_same, cosine, descend, digits
from transformers import AutoModelForCausalLM

from hf_dpssl import (
    VAEGAN,
    MoCoForPreTraining,
    SimCLRForPreTraining,
    VQAutoencoder,
    VQConfig,
)
from hf_dpssl.data import keyed_random
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.views import PRESETS, TwoViews

STEPS, BATCH = 4, 16


def state_of(folder, loop: str, step: int) -> dict:
    return torch.load(folder / f"checkpoints/{loop}/step-{step:08d}/state.pt", weights_only=True)


# Autoencoder

WIDTHS = [
    "--encoder_channels",
    8,
    16,
    "--decoder_channels",
    8,
    16,
    "--auxiliary_channels",
    8,
    8,
    "--norm_num_groups",
    4,
]
VQ = [*WIDTHS, "--stage_1_steps", STEPS, "--stage_2_steps", STEPS, "--batch_size", BATCH, "--num_codes", 8]
VQ += ["--warmup_steps", 0, "--auxiliary_dropout", 0, "--revival_threshold", 0, "--codebook_decay", 0.5]
VQ += ["--learning_rate", 0.01, "--validation_steps", 100, "--checkpointing_steps", 2]


def plain_autoencoder(model: VQAutoencoder, learns: list[str], train_codebook: bool) -> VQAutoencoder:
    """Train some modules of a copy, and its codebook by running means of counts and sums."""
    parameters = [p for name in learns for p in getattr(model, name).parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    codebook, counts, sums = (getattr(model.quantizer, name).clone() for name in ("codebook", "counts", "sums"))
    for step, batch in enumerate(digits(BATCH, STEPS)):
        pixels = batch["pixels"]
        latents = model.quant_conv(model.encoder(pixels))  # (B, 4, 8, 8)
        if "encoder" not in learns:
            latents = latents.detach()
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, 4)
        codes = torch.cdist(vectors.detach(), codebook).argmin(1)
        nearest = codebook[codes].view(BATCH, 8, 8, 4).permute(0, 3, 1, 2)
        decoded = model.decoder(model.post_quant_conv(latents + (nearest - latents).detach()))
        loss = (decoded - pixels).pow(2).mean() + 0.25 * (latents - nearest).pow(2).mean()
        descend(loss, optimizer, cosine(0.01, step, STEPS))
        if train_codebook:
            chosen = F.one_hot(codes, 8).float()
            counts = 0.5 * counts + 0.5 * chosen.sum(0)
            sums = 0.5 * sums + 0.5 * chosen.T @ vectors.detach()
            codebook = sums / counts[:, None]
    model.quantizer.codebook.copy_(codebook)
    return model


@pytest.mark.parametrize("arm, stages", [("joint", ("joint", "decoder")), ("dae", ("stage-1", "stage-2"))])
def test_saved_autoencoder_is_that_of_two_plain_loops_with_a_codebook_of_running_means(
    arm, stages, run_script, starts, tmp_path
):
    run_script("dae_vq", [*VQ, "--arm", arm, "--output_dir", tmp_path])
    saved = VQAutoencoder.from_pretrained(tmp_path / "autoencoder").eval()
    first, second = (starts[f"autoencoder/{stage}"]["model"] for stage in stages)
    start = first.quantizer.codebook.clone()
    first = plain_autoencoder(first, ["encoder", "quant_conv", "post_quant_conv", "decoder"], train_codebook=True)
    kept = ("encoder", "quant_conv", "quantizer.codebook")

    def frozen(model):
        return [tensor for name, tensor in model.state_dict().items() if name.startswith(kept)]

    assert len(frozen(saved)) > 10
    assert_same(frozen(saved), frozen(first))
    assert float((saved.quantizer.codebook - start).norm(dim=1).min()) > 1e-3  # all codes have moved
    assert saved.config.encoder_frozen and saved.config.encoder_sha256 == saved.hash_encoder()
    end_of_stage_1 = state_of(tmp_path, f"autoencoder/{stages[0]}", STEPS)["model"]
    assert all(
        tensor.equal(end_of_stage_1[name]) for name, tensor in saved.state_dict().items() if name.startswith(kept)
    )
    if arm == "dae":  # the real decoder is drawn anew
        assert second.decoder.conv_in.weight.shape != first.decoder.conv_in.weight.shape
    else:
        assert_same(second.decoder.parameters(), first.decoder.parameters())
    assert not any(p.requires_grad for name in ("encoder", "quant_conv") for p in getattr(second, name).parameters())
    second = plain_autoencoder(second, ["post_quant_conv", "decoder"], train_codebook=False)
    assert_same(saved.decoder.parameters(), second.decoder.parameters())
    pixels, _ = all_digits()
    with torch.no_grad():
        latents = saved.quant_conv(saved.encoder(pixels)).double().numpy()
    np.testing.assert_allclose(saved.config.latent_mean, latents.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(saved.config.latent_std, latents.std((0, 2, 3)), rtol=1e-4)


@pytest.mark.extended
def test_discriminator_of_a_vqgan_follows_a_schedule_of_its_own(run_script, tmp_path):
    """It learns from step 1 on, and so has 3 of the 4 steps: the rate falls along a cosine of that length."""
    flags = ["--budget", "total", "--stage_1_steps", 2, "--stage_2_steps", 2, "--adversarial", "non_saturating"]
    flags += ["--adversarial_start", 1, "--discriminator_width", 8, "--discriminator_learning_rate", 0.003]
    run_script(
        "dae_vq", [*VQ, *flags, "--checkpointing_steps", 1, "--checkpoints_total_limit", 4, "--output_dir", tmp_path]
    )
    for step in range(1, STEPS + 1):
        state = state_of(tmp_path, "autoencoder/joint", step)
        rates = [state[f"{side}optimizer"]["param_groups"][0]["lr"] for side in ("", "discriminator_")]
        assert rates == pytest.approx([cosine(0.01, step, 4), cosine(0.003, step - 1, 3)], abs=1e-9)
    first, last = (state_of(tmp_path, "autoencoder/joint", step)["discriminator"] for step in (1, 4))
    assert [name for name, tensor in first.items() if last[name].equal(tensor)] == []


# GAN

GAN = ["--width", 8, "--latent_dim", 4, "--discriminator_width", 8, "--batch_size", BATCH, "--num_generated", 4]
GAN += ["--max_train_steps", STEPS, "--stage_1_steps", STEPS, "--stage_1_dropout", 0, "--ema_decay", 0.15]
GAN += ["--lr_scheduler", "cosine", "--checkpointing_steps", 1, "--checkpoints_total_limit", 9]


def plain_gan(model: VAEGAN, discriminator: torch.nn.Module, train_encoder: bool) -> list[torch.Tensor]:
    """The averaged generator after training a copy against a discriminator with non-saturating losses and R1."""
    parameters = [*(model.encoder.parameters() if train_encoder else ()), *model.generator.parameters()]
    ours, theirs = (torch.optim.Adam(p, betas=(0.5, 0.999)) for p in (parameters, list(discriminator.parameters())))
    average = Average(model.generator.parameters(), 0.15)
    for step, batch in enumerate(digits(BATCH, STEPS)):
        real, rate = batch["pixels"], cosine(0.002, step, STEPS)
        posterior, prior = (
            keyed_random.normal(batch["sample_ids"], (4,), seed=0, epoch=0, stream=stream)
            for stream in ("posterior", "prior")
        )
        mean, log_variance = model.encoder(real).chunk(2, dim=1)
        rebuilt = model.generator(mean + torch.exp(0.5 * log_variance) * posterior)
        fake = torch.cat([rebuilt, model.generator(prior)])
        divergence = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
        loss = -torch.sigmoid(discriminator(fake).logits).log().mean()
        loss = loss + 10 * (rebuilt - real).abs().mean() + 1e-3 * divergence
        descend(loss, ours, rate)
        real = real.requires_grad_()
        logits = discriminator(real).logits
        of_fake = discriminator(fake.detach()).logits
        loss = -0.5 * (torch.sigmoid(logits).log().mean() + torch.sigmoid(-of_fake).log().mean())
        if step % 4 == 0:
            slope = torch.autograd.grad(logits.flatten(1).mean(1).sum(), real, create_graph=True)[0]
            loss = loss + 10 * 4 * 0.5 * slope.pow(2).sum((1, 2, 3)).mean()
        descend(loss, theirs, rate, clip=float("inf"))
        average.step(model.generator.parameters())
    return average.values


def test_saved_gan_is_the_averaged_generator_of_a_plain_loop_beside_a_frozen_encoder(run_script, starts, tmp_path):
    run_script("dae_gan", [*GAN, "--latent", "dae", "--output_dir", tmp_path])
    saved = VAEGAN.from_pretrained(tmp_path / "gan").eval()
    first, second = (starts[f"gan/{stage}"] for stage in ("stage-1", "generator"))
    plain_gan(first["model"], first["discriminator"], train_encoder=True)
    assert_same(saved.encoder.parameters(), first["model"].encoder.parameters())
    end_of_stage_1 = state_of(tmp_path, "gan/stage-1", STEPS)["model"]
    assert all(end_of_stage_1[f"encoder.{name}"].equal(p) for name, p in saved.encoder.state_dict().items())
    average = plain_gan(second["model"], second["discriminator"], train_encoder=False)
    assert_same(saved.generator.parameters(), average)
    for loop in ("stage-1", "generator"):
        for step in range(1, STEPS + 1):
            state = state_of(tmp_path, f"gan/{loop}", step)
            rates = [state[f"{side}optimizer"]["param_groups"][0]["lr"] for side in ("", "discriminator_")]
            assert rates == pytest.approx([cosine(0.002, step, STEPS)] * 2, abs=1e-9)


# Encoders

ENCODER = ["--model_args", '{"channels": [8, 8, 16, 16]}', "--projection_dim", 8, "--batch_size", BATCH]
ENCODER += ["--max_train_steps", STEPS, "--evaluation_images", 64, "--checkpointing_steps", 100]


def two_views(steps: int):
    """Both views of the first batches of the digits."""
    views = TwoViews(PRESETS["digits"], *load_images("digits").entry.statistics, seed=0)
    for batch in digits(BATCH, steps):
        yield views(batch["images"], batch["sample_ids"], batch["epoch"])


def test_saved_encoder_is_that_of_a_plain_loop_of_t_simclr(run_script, starts, tmp_path):
    kernel = ["--feature_norm", "none", "--temperature", 2]
    run_script("contrastive", [*ENCODER, *kernel, "--output_dir", tmp_path])
    model = starts["encoder"]["model"].train()
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *model.head.parameters()], weight_decay=1e-4)
    for step, pair in enumerate(two_views(STEPS)):
        embeddings = model.head(model.encoder(torch.cat(pair)).pooler_output)
        squared = (embeddings[:, None] - embeddings[None]).pow(2).sum(2)
        log_k = -3 * torch.log1p(squared / (2.0 * 5.0))  # temperature 2, 5 degrees of freedom
        others = ~torch.eye(2 * BATCH, dtype=torch.bool)
        loss = log_k[others].exp().sum().log() - log_k.diagonal(BATCH).mean()
        descend(loss, optimizer, cosine(2e-3, step, STEPS))
    saved = SimCLRForPreTraining.from_pretrained(tmp_path / "encoder" / "pretraining")
    assert_same(saved.state_dict().values(), model.state_dict().values())


def test_saved_encoder_is_that_of_a_plain_loop_of_moco(run_script, starts, tmp_path):
    flags = ["--negatives", "queue", "--normalization", "anchor", "--kernel", "cosine", "--feature_norm", "l2"]
    flags += [
        "--temperature",
        0.2,
        "--queue_size",
        40,
        "--momentum",
        0.5,
        "--optimizer",
        "sgd",
        "--learning_rate",
        0.05,
    ]
    run_script("contrastive", [*ENCODER, *flags, "--output_dir", tmp_path])
    model = starts["encoder"]["model"].train()
    parameters = [*model.encoder.parameters(), *model.head.parameters()]
    averaged = [*model.key_encoder.parameters(), *model.key_head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    queue = torch.zeros(0, 8)
    for step, (view_1, view_2) in enumerate(two_views(STEPS)):
        query = F.normalize(model.head(model.encoder(view_1).pooler_output))
        with torch.no_grad():
            for old, new in zip(averaged, parameters, strict=True):
                old.copy_(0.5 * old + 0.5 * new)
            key = F.normalize(model.key_head(model.key_encoder(view_2).pooler_output))
        negatives = queue if len(queue) else key
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], dim=1) / 0.2
        descend(-logits.log_softmax(1)[:, 0].mean(), optimizer, cosine(0.05, step, STEPS))
        queue = torch.cat([queue, key])[-40:]
    saved = MoCoForPreTraining.from_pretrained(tmp_path / "encoder" / "pretraining")
    for name in ("encoder", "head", "key_encoder", "key_head"):
        ours, theirs = (getattr(m, name).state_dict().values() for m in (saved, model))
        assert_same(ours, theirs)
    cursor = int(saved.queue_cursor)
    assert_same([saved.queue.roll(-cursor, 0)], [queue])  # a ring: the oldest key stands at the cursor


# Generators in the latents of an autoencoder of random weights: 4 x 4 cells, 4 channels, 16 codes

NULL = 10  # after the ten digits


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8, 8], "norm_num_groups": 4, "num_codes": 16}
    statistics = {"latent_mean": [0.5, -0.5, 0.0, 1.0], "latent_std": [0.25, 0.5, 0.2, 0.1]}
    folder = tmp_path_factory.mktemp("autoencoder")
    VQAutoencoder(VQConfig(image_size=16, **widths, **statistics)).save_pretrained(folder)
    return folder


@torch.no_grad()
def encoded(folder):
    model, (pixels, labels) = VQAutoencoder.from_pretrained(folder).eval(), all_digits()
    parts = [model.encode(part) for part in pixels.split(256)]
    return torch.cat([part.latents for part in parts]), torch.cat([part.codes for part in parts]), labels


def with_dropped_classes(batch: dict, labels: torch.Tensor) -> torch.Tensor:
    """Labels of a batch, about half of them the null class."""
    drawn = keyed_random.uniform(batch["sample_ids"], 1, seed=0, epoch=0, stream="class dropout")[:, 0]
    assert 0.2 < float((drawn < 0.5).float().mean()) < 0.8
    return torch.where(drawn < 0.5, NULL, labels[batch["sample_ids"]])


LATENT = ["--width", 16, "--num_layers", 2, "--num_heads", 2, "--class_dropout", 0.5, "--batch_size", 32]
LATENT += ["--warmup_steps", 0, "--ema_decay", 0.2, "--learning_rate", 0.01]


def test_saved_dit_is_the_averaged_one_of_a_plain_loop_on_normalised_latents(run_script, starts, autoencoder, tmp_path):
    flags = [*LATENT, "--patch_size", 2, "--max_train_steps", 8, "--sampling_steps", 1, "--grid_images_per_class", 1]
    run_script("dae_dit", [*flags, "--autoencoder", autoencoder, "--output_dir", tmp_path])
    model = starts["dit"]["model"].train()
    latents, _, labels = encoded(autoencoder)
    shift, scale = torch.tensor([0.5, -0.5, 0.0, 1.0]), torch.tensor([0.25, 0.5, 0.2, 0.1])
    latents = (latents - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0)
    average = Average(model.parameters(), 0.2)
    for step, batch in enumerate(digits(32, 8)):
        key = {"sample_ids": batch["sample_ids"], "seed": 0, "epoch": batch["epoch"]}
        clean = latents[batch["sample_ids"]]
        noise = keyed_random.normal(**key, shape=(4, 4, 4), stream="noise")
        level = keyed_random.uniform(**key, count=1, stream="timestep")[:, 0]
        mixed = torch.lerp(clean, noise, level.view(-1, 1, 1, 1))
        output = model(mixed, timestep=1000 * level, class_labels=with_dropped_classes(batch, labels)).sample
        descend((output - (noise - clean)).pow(2).mean(), optimizer, cosine(0.01, step, 8))
        average.step(model.parameters())
    saved = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", subfolder="transformer")
    assert_same(saved.parameters(), average.values)


def test_saved_language_model_is_the_averaged_one_of_a_plain_loop(run_script, starts, autoencoder, tmp_path):
    flags = [*LATENT, "--dropout", 0, "--max_train_steps", STEPS, "--samples_per_class", 1]
    run_script("dae_ar", [*flags, "--autoencoder", autoencoder, "--output_dir", tmp_path])
    model = starts["ar"]["model"].train()
    _, codes, labels = encoded(autoencoder)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "wte" not in name and "wpe" not in name]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    average = Average(model.parameters(), 0.2)
    for step, batch in enumerate(digits(32, STEPS)):
        wanted = codes[batch["sample_ids"]].flatten(1)
        given = torch.cat([16 + with_dropped_classes(batch, labels)[:, None], wanted[:, :-1]], 1)
        log_p = model(given).logits[..., :16].log_softmax(2)
        descend(-log_p.gather(2, wanted[..., None]).mean(), optimizer, cosine(0.01, step, STEPS))
        average.step(model.parameters())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ar", subfolder="language_model")
    assert_same(saved.parameters(), average.values)
