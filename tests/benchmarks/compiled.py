"""What torch.compile gains on this machine: forward and backward of each kind of network, compiled beside eager.

    python tests/benchmarks/compiled.py [--rounds 7] [--threads 1]

Networks of the recipes' kinds, made small enough for a CPU. Seconds are those of the processor, after compilation,
which takes up to some minutes the first time. Recipes set `compile` for the kinds of network that gain here; nothing
has been measured on a GPU. Writes tests/benchmarks/results/compiled.json.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Comparison, compare, parser
from torch import nn

from hf_dpssl.contrastive.modeling_pretraining import SimCLRForPreTraining
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.generation.pipeline_vq_token import code_nats, make_language_model
from hf_dpssl.latent_training.diffusion import make_transformer
from hf_dpssl.models.configuration_vq import VQConfig
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.results import write_results

RESULTS = Path(__file__).parent / "results" / "compiled.json"
CLASSES = 10
Network = tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]  # and its loss


def dit() -> Network:
    """Six layers of width 384, 64 tokens, 8 samples."""
    sizes = dict(num_layers=6, width=384, num_heads=6, patch_size=2, latent_channels=4, latent_size=16)
    latents, times, labels = torch.randn(8, 4, 16, 16), torch.rand(8), torch.arange(8)
    given = {"timestep": 1000 * times, "class_labels": labels}
    return make_transformer(**sizes, num_classes=CLASSES), lambda m: m(latents, **given).sample.square().mean()


def dense_generator() -> Network:
    """Four dense layers of width 1,024, 256 samples of 4 x 4 x 4 numbers."""
    noise, labels = torch.randn(256, 4, 4, 4), torch.arange(256) % CLASSES
    model = LatentMLP(in_channels=4, sample_size=4, num_layers=4, width=1024, num_embeds_ada_norm=CLASSES)
    given = {"timestep": torch.ones(256), "class_labels": labels}
    return model, lambda m: m(noise, **given).sample.square().mean()


def tokens() -> Network:
    """Four Llama layers of width 256, 256 codes of 4 samples."""
    sizes = dict(num_layers=4, width=256, num_heads=4, num_codes=1024, num_classes=CLASSES, num_tokens=256)
    codes, labels = torch.randint(1024, (4, 256)), torch.arange(4)
    return make_language_model("llama", **sizes), lambda m: code_nats(m, codes, labels, 1024).mean()


def autoencoder() -> Network:
    """A VQ autoencoder of 4 pictures of 64 px."""
    widths = {"encoder_block_out_channels": [32, 64, 64], "decoder_block_out_channels": [32, 64, 64]}
    model = VQAutoencoder(VQConfig(image_size=64, num_codes=1024, **widths))
    model.quantizer.defer_update = True
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    return model, lambda m: (m(images).pixel_values - images).square().mean()


def encoder() -> Network:
    """t-SimCLR with a ResNet-18 of 32 pairs of pictures of 32 px."""
    options = {"architecture": "resnet18", "stem": "small_image", "normalization": "anchor", "kernel": "student_t"}
    views = torch.randn(2, 32, 3, 32, 32)
    return SimCLRForPreTraining(ContrastiveConfig(**options)), lambda m: m(*views).loss


NETWORKS = {
    "DiT": dit,
    "dense one-step generator": dense_generator,
    "token model": tokens,
    "VQ autoencoder": autoencoder,
    "t-SimCLR": encoder,
}


def comparison(name: str) -> Comparison:
    """A network compiled beside itself."""
    torch.manual_seed(0)
    model, loss = NETWORKS[name]()
    model.train()
    compiled = copy.deepcopy(model)
    compiled.compile()

    def step(of: nn.Module) -> float:
        of.zero_grad()
        value = loss(of)
        value.backward()
        return value.item()

    step(compiled)  # the first may start what the second, which is compiled again, finds there
    step(model)
    return Comparison(f"{name}, compiled", "eager", lambda: step(compiled), lambda: step(model))


def main() -> None:
    """Compare all networks and write the JSON."""
    args = parser(__doc__, 7).parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in NETWORKS:
        rows += compare([comparison(name)], args.rounds, time.process_time)
        torch.compiler.reset()
    samples = {"rounds": args.rounds}
    write_results(RESULTS, {"comparisons": rows}, dataset="random numbers", seed=0, samples=samples)


if __name__ == "__main__":
    main()
