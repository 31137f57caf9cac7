"""What codes of images are like: how many are used, and how predictable they are, in nats under a fixed small prior.

Source: van den Oord et al. 2017, section 3.3 (a prior over codes learned after the autoencoder); Vaswani et al. 2017
(causal attention); additive smoothing of counts: Laplace 1814, as Krichevsky and Trofimov 1981 use it for coding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

LAYERS, WIDTH, HEADS = 2, 64, 4
STEPS, BATCH_TOKENS, LEARNING_RATE, WEIGHT_DECAY = 1000, 1024, 8e-3, 0.1


def codebook_usage(codes: Tensor, num_codes: int) -> dict[str, float]:
    """Usage of a codebook over a set of images.

    Args:
        codes: int64 code ids of any shape, of all images.
        num_codes: size of the codebook.

    Returns:
        code_usage: percent of the codes that occur; code_perplexity: exp of the entropy (nats) of
        their frequencies, in [1, num_codes]; dead_codes: codes that never occur.

    Raises:
        ValueError: no codes, or an id outside [0, num_codes).
    """
    if codes.numel() == 0 or int(codes.min()) < 0 or int(codes.max()) >= num_codes:
        raise ValueError(f"codes must be non-empty and lie in [0, {num_codes - 1}].")
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    frequency = counts / counts.sum()
    entropy = -torch.special.xlogy(frequency, frequency).sum()
    dead = int((counts == 0).sum())
    return {
        "code_usage": 100 * (1 - dead / num_codes),
        "code_perplexity": float(entropy.exp()),
        "dead_codes": float(dead),
    }


def code_prior(
    train_codes: Tensor, test_codes: Tensor, num_codes: int, *, seed: int = 0, steps: int = STEPS
) -> dict[str, float]:
    """Negative log-likelihood of an image's codes, lower = more predictable, and what counts alone give.

    The prior is a causal transformer (GPT-2 of transformers: 2 layers of width 64, 4 heads) that reads codes row by
    row, without classes, trained on `train_codes` for 1000 steps of about 1024 tokens. Size, budget and
    hyper-parameters are constants of this module, so that figures differ by the codes alone. They are comparable
    where image set, number of codes per image and codebook size are the same: more or other codes also say more
    about the image. Latents without codes have densities instead of probabilities, whose nats change with
    their scale; they are not measured here.

    Args:
        train_codes: (M, h, w) or (M, T) int64 in [0, num_codes), what the prior learns from.
        test_codes: (N, h, w) or (N, T), of other images.
        num_codes: size of the codebook.
        seed: of initialisation and order; the global random state is left as it is.
        steps: budget; figures of different budgets cannot be compared.

    Returns:
        prior_nats: per image, under the transformer. prior_nats_unigram: under smoothed counts of the codes, all
        positions together; prior_nats_position: likewise for each position. prior_nats_uniform: T log(num_codes).

    Raises:
        ValueError: no images, shapes that differ, no steps, or ids outside the codebook.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    train, test = _check(train_codes, num_codes, "train_codes"), _check(test_codes, num_codes, "test_codes")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"images have {train.shape[1]} codes in train_codes and {test.shape[1]} in test_codes.")
    length = train.shape[1]
    per_position = sum(_count_nats(train[:, i], test[:, i], num_codes) for i in range(length))
    return {
        "prior_nats": _transformer_nats(train, test, num_codes, seed, steps),
        "prior_nats_unigram": length * _count_nats(train, test, num_codes),
        "prior_nats_position": per_position,
        "prior_nats_uniform": length * math.log(num_codes),
    }


def _count_nats(train: Tensor, test: Tensor, num_codes: int) -> float:
    """Mean of -log (n_c + 1) / (n + K) over test codes, n_c and n counted on the training codes."""
    counts = torch.bincount(train.flatten(), minlength=num_codes).double() + 1
    return float(-(counts / counts.sum()).log()[test.flatten()].mean())


def _transformer_nats(train: Tensor, test: Tensor, num_codes: int, seed: int, steps: int) -> float:
    length = train.shape[1]
    batch = max(1, min(len(train), BATCH_TOKENS // length))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(num_codes, length).train()
        parameters = list(model.parameters())
        decays = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups = [{"params": decays[0], "weight_decay": WEIGHT_DECAY}, {"params": decays[1], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05, cycle_momentum=False
        )
        order = train.new_empty(0)
        for _ in tqdm(range(steps), "code prior", leave=False, delay=5):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(len(train), generator=generator)])
            rows, order = order[:batch], order[batch:]
            loss = _nats(model, train[rows], num_codes).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float(torch.cat([_nats(model, part, num_codes) for part in test.split(batch * 8)]).sum(1).mean())


def _model(num_codes: int, length: int) -> torch.nn.Module:
    """Token num_codes starts an image."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=length, vocab_size=num_codes + 1)
    rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    special = dict(bos_token_id=num_codes, eos_token_id=None, activation_function="gelu_pytorch_tanh")
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, **special))


def _nats(model: torch.nn.Module, codes: Tensor, num_codes: int) -> Tensor:
    """-log p of each code (B, T) given those before it."""
    inputs = F.pad(codes[:, :-1], (1, 0), value=num_codes)  # (B, T)
    logits = model(input_ids=inputs, use_cache=False).logits[..., :num_codes]
    return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none").double()


def _check(codes: Tensor, num_codes: int, name: str) -> Tensor:
    if codes.ndim not in (2, 3) or codes.numel() == 0 or codes.is_floating_point():
        raise ValueError(
            f"{name} must be whole numbers (N, h, w) or (N, T), one row per image, got {tuple(codes.shape)} "
            f"of {codes.dtype}; latents without a codebook have no nats that can be compared."
        )
    if int(codes.min()) < 0 or int(codes.max()) >= num_codes:
        raise ValueError(
            f"{name} must lie in [0, {num_codes - 1}], got [{int(codes.min())}, {int(codes.max())}]: "
            "is num_codes that of this autoencoder?"
        )
    return codes.flatten(1).long().cpu()
