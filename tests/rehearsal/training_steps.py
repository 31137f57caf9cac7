"""One training step of every script, tiny, on whatever device a model and a batch lie on."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import dae_dit
import dae_drift
import dae_gan
import dae_vq
import torch

from hf_dpssl.autoencoder.adversarial_term import AdversarialTerm, Adversary, ReconstructionGuard
from hf_dpssl.autoencoder.perceptual import PerceptualDistance
from hf_dpssl.contrastive.modeling_pretraining import MoCoForPreTraining, SimCLRForPreTraining
from hf_dpssl.data.views import NATURAL, TwoViews
from hf_dpssl.domains.algorithms import ALGORITHMS
from hf_dpssl.domains.cells import Cell, Trainer
from hf_dpssl.domains.domain_tensors import DomainTensors
from hf_dpssl.domains.hyperparameters import hyperparameters
from hf_dpssl.generation.latent_mlp import LatentMLP
from hf_dpssl.generation.pipeline_vq_token import code_nats, make_language_model
from hf_dpssl.latent_training.diffusion import dropped_labels, make_scheduler, make_transformer
from hf_dpssl.latent_training.drift_arguments import DriftArguments
from hf_dpssl.latent_training.drift_training import DecodedFeatures
from hf_dpssl.latent_training.token_alignment import SpatialFeatures, TokenAlignedTransformer
from hf_dpssl.models.configuration_vq import VQConfig
from hf_dpssl.models.modeling_contrastive import ContrastiveConfig, ContrastiveEncoder
from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from hf_dpssl.models.modeling_vaegan import VAEGAN, VAEGANConfig
from hf_dpssl.models.modeling_vq import VQAutoencoder
from hf_dpssl.runs.rehearsal import rehearsal

SIDE = 16
COUNT = 8
WIDTHS = {
    "image_size": SIDE,
    "num_codes": 16,
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
}


def batch():
    """Images, codes, latents, labels and numbers of a batch, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "latents": torch.randn(COUNT, 4, 8, 8, generator=generator),
        "codes": torch.randint(0, 16, (COUNT, 4, 4), generator=generator),
        "labels": torch.arange(COUNT) % 3,
        "sample_ids": torch.arange(COUNT),
    }


def contrastive(**options):
    """(modules, what comes before the first step, forward and backward) of training/contrastive.py; "queue" is MoCo."""
    made = MoCoForPreTraining if options.pop("negatives", "batch") == "queue" else SimCLRForPreTraining
    if made is MoCoForPreTraining:
        options["queue_size"] = 4 * COUNT
    options = {"normalization": "anchor"} | options
    config = ContrastiveConfig(architecture="test_resnet.r160_in1k", projection_dim=8, **options)
    model = made(config).train()
    views = TwoViews(NATURAL, [0.5] * 3, [0.2] * 3, 0)

    def step(given):
        model(*views(given["images"], given["sample_ids"], 0)).loss.backward()

    return [model], lambda: None, step


def autoencoder(adversarial: bool = False, perceptual: bool = False, **options):
    """Of training/dae_vq.py; with an adversarial term both its halves, perceptual by an encoder's features."""
    config = VQConfig(**WIDTHS | options)
    torch.manual_seed(0)
    model = VQAutoencoder(config).train()
    if model.quantizer is not None:
        model.quantizer.defer_update = True
    args = SimpleNamespace(seed=0, num_channels=3, equivariance_weight=config.equivariance_weight)
    adversary = adversary_of(AdversarialTerm()) if adversarial else None
    distance = PerceptualDistance(encoder().timm_model, [0.5] * 3, [0.2] * 3) if perceptual else None
    args.perceptual_weight = 1.0
    modules = [model, *([adversary.bare] if adversary else []), *([distance] if perceptual else [])]

    def prepare():
        if adversary:
            adversary.optimizer = torch.optim.AdamW(adversary.bare.parameters())

    def step(given):
        images = dae_vq.pixels(given | {"epoch": 0}, args, 0.5)
        output = model(images)
        loss, _ = dae_vq.total_loss(args, model, output, images, distance, adversary, 0)
        loss.backward()
        if adversary:
            adversary.step(SimpleNamespace(backward=torch.Tensor.backward), images, output.pixel_values)
        if model.quantizer is not None:
            model.quantizer.update_codebook_()

    return modules, prepare, step


def adversary_of(term):
    bare = PatchDiscriminator(PatchDiscriminatorConfig(image_size=SIDE, width=8, num_layers=1)).train()
    return Adversary(term, bare, bare, None, None, ReconstructionGuard())


def encoder() -> ContrastiveEncoder:
    return ContrastiveEncoder(ContrastiveConfig(architecture="test_resnet.r160_in1k"))


def transformer(objective="flow", aligned: bool = False, **options):
    """Of training/dae_dit.py; aligned with an encoder's features of the images."""
    model = make_transformer(
        num_layers=1, width=16, num_heads=2, patch_size=2, latent_channels=4, latent_size=8, num_classes=3,
        learned_variance=options.get("learned_variance", False), mean_flow=objective == "mean_flow",
    ).train()  # fmt: skip
    codec = SimpleNamespace(normalize_latents=lambda latents: latents)
    args = SimpleNamespace(seed=0, objective=objective, logit_normal=None, class_dropout=0.1, min_snr_gamma=None)
    vars(args).update({name: value for name, value in options.items() if name != "learned_variance"})
    scheduler = make_scheduler(objective, options.get("learned_variance", False))
    features = SpatialFeatures(encoder(), 4) if aligned else None
    if aligned:
        model = TokenAlignedTransformer(model, block=1, features=features.dimension, width=16).train()

    def step(given):
        if aligned:  # no module: nobody else moves what it holds
            features.mean, features.std = (x.to(given["images"].device) for x in (features.mean, features.std))
        dae_dit.step_losses(model, given | {"epoch": 0}, codec, scheduler, args, 3, features)["loss"].backward()

    return [model, *([features.encoder] if aligned else [])], lambda: None, step


def one_step_generator(decoded: bool = False, dense: bool = False):
    """Of training/dae_drift.py, guided; in the features of decoded pictures, or in the latent; `dense`: no DiT."""
    args = DriftArguments(batch_size=COUNT, images_per_set=4, real_per_set=4, guidance_scale=2.0, negatives_per_set=2)
    vae = VQAutoencoder(VQConfig(**WIDTHS, latent_mean=[0.0] * 4, latent_std=[1.0] * 4)).eval()
    space = DecodedFeatures(encoder().eval(), vae) if decoded else torch.nn.Identity()
    layers = {"in_channels": 4, "sample_size": 8, "num_layers": 1, "width": 16, "num_embeds_ada_norm": 3}
    model = LatentMLP(**layers).train() if dense else transformer()[0][0]

    def step(given):
        if decoded:  # no module: nobody else moves what it holds
            space.mean, space.std = (x.to(given["latents"].device) for x in (space.mean, space.std))
        latents = given["latents"].view(2, 4, 4, 8, 8)
        weights = latents.new_ones(2, 4 + 2)
        sets = {"latents": latents, "negatives": latents[:, :2], "weights": weights, "epoch": 0}
        sets |= {key: given[key][:2] for key in ("labels", "sample_ids")}
        dae_drift.step_loss(model, sets, vae, [space], args)[0].backward()

    return [model, vae, *([space.encoder] if decoded else [])], lambda: None, step


def language_model(architecture):
    """Of training/dae_ar.py."""
    model = make_language_model(
        architecture, num_layers=1, width=16, num_heads=2, num_codes=16, num_classes=3, num_tokens=16, dropout=0.1
    ).train()

    def step(given):
        key = dict(sample_ids=given["sample_ids"], epoch=0, seed=0)
        labels = dropped_labels(given["labels"], probability=0.1, null_class=3, **key)
        code_nats(model, given["codes"], labels, 16).mean().backward()

    return [model], lambda: None, step


def gan(latent, **settings):
    """Of training/dae_gan.py: generator, then discriminator; `settings` are those of the adversarial term."""
    config = VAEGANConfig(image_size=SIDE, width=8, latent_dim=8, latent=latent)
    model = VAEGAN(config).train()
    adversary = adversary_of(AdversarialTerm(**settings))
    args = SimpleNamespace(reconstruction="pixels", reconstruction_weight=1.0, kl_weight=1.0)

    def prepare():
        adversary.optimizer = torch.optim.AdamW(adversary.bare.parameters())

    def step(given):
        real = given["images"].float() / 127.5 - 1
        given = given | {"epoch": 0, "latents": given["latents"].flatten(1)[:, :8]}
        fake, values = dae_gan.images_of(model, config, real, given, 0)
        dae_gan.generator_loss(args, adversary, real, fake, values).backward()
        adversary.step(SimpleNamespace(backward=torch.Tensor.backward), real, fake)

    return [model, adversary.bare], prepare, step


def domains(algorithm: str):
    """Of training/domains.py, from reading the minibatches on: small pictures of two domains, a third is held out."""
    given = batch()
    images, labels = given["images"], given["labels"]
    tensors = DomainTensors(["a", "b", "c"], 3 * [images], 3 * [labels], ["x", "y", "z"])
    trainer = Trainer(tensors, "network", steps=3, every=3)
    cell = Cell(algorithm, (2,), 0, 0)
    settings = replace(hyperparameters(algorithm, "network", 0, 0), batch_size=COUNT // 2)
    model, prepare_inputs, splits = trainer._begin(cell, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def prepare():  # its optimisers have its weights as they were before it was moved
        moved = dict(model.named_parameters())
        for optimizer in (value for value in vars(model).values() if isinstance(value, torch.optim.Optimizer)):
            for group in optimizer.param_groups:
                group["params"] = [moved[names[id(parameter)]] for parameter in group["params"]]

    def step(given):
        trainer.device = given["images"].device
        model.update(trainer._minibatches(cell, settings, prepare_inputs, splits, [0, 1], model.steps))

    return [model], prepare, step


CASES = {
    "contrastive SimCLR": lambda: contrastive(kernel="cosine", temperature=0.5),
    "contrastive t-SimCLR": lambda: contrastive(kernel="student_t", temperature=1.0, dof=5.0, normalization="joint"),
    "contrastive SimCLR auto": lambda: contrastive(kernel="cosine", temperature="auto"),
    "contrastive t-SimCLR auto": lambda: contrastive(kernel="student_t", temperature="auto", normalization="joint"),
    "contrastive LeJEPA": lambda: contrastive(sigreg_weight=0.1),
    "contrastive MoCo": lambda: contrastive(negatives="queue", kernel="cosine", temperature=0.2),
    "contrastive t-MoCo": lambda: contrastive(negatives="queue", kernel="student_t", temperature=5.0, dof=10.0),
    "contrastive t-MoCo auto": lambda: contrastive(negatives="queue", kernel="student_t", temperature="auto"),
    "dae_vq": lambda: autoencoder(),
    "dae_vq kl": lambda: autoencoder(quantizer="kl"),
    "dae_vq equivariant": lambda: autoencoder(equivariance_weight=0.5),
    "dae_vq gradient": lambda: autoencoder(codebook_update="gradient"),
    "dae_vq cosine": lambda: autoencoder(code_distance="cosine"),
    "dae_vq perceptual": lambda: autoencoder(perceptual=True),
    "dae_vq adversarial": lambda: autoencoder(adversarial=True),
    "dae_dit flow": lambda: transformer(),
    "dae_dit epsilon": lambda: transformer("epsilon"),
    "dae_dit learned variance": lambda: transformer("epsilon", learned_variance=True),
    "dae_dit aligned": lambda: transformer(aligned=True),
    "dae_dit mean_flow": lambda: transformer("mean_flow"),
    "dae_drift": lambda: one_step_generator(),
    "dae_drift mlp": lambda: one_step_generator(dense=True),
    "dae_drift decoded": lambda: one_step_generator(decoded=True),
    "dae_ar gpt2": lambda: language_model("gpt2"),
    "dae_ar llama": lambda: language_model("llama"),
    "dae_gan dae": lambda: gan("dae"),
    "dae_gan dae, penalty": lambda: gan("dae", r1_weight=10.0),
    "dae_gan noise": lambda: gan("noise"),
    "dae_gan vae": lambda: gan("vae"),
    "dae_gan simclr": lambda: gan("simclr"),
} | {f"domains {name}": functools.partial(domains, name) for name in ALGORITHMS if name != "swad"}  # erm, averaged


def waits_of(name: str) -> list[str]:
    """What the host waits for in a later step of a case: forward, backward, clipping and update."""
    modules, prepare, step = CASES[name]()
    with rehearsal() as rehearsed:
        for module in modules:
            rehearsed.fake_module_(module)
        prepare()
        learned = [parameter for parameter in modules[0].parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned)
        given = {key: rehearsed.fake_of(value) for key, value in batch().items()}
        for _ in range(6 if "MoCo" in name else 3):  # the first starts codebook and temperature, four fill the queue
            rehearsed.clear()
            step(given)
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return list(rehearsed.syncs)


class Graphs:
    """A backend of torch.compile that runs what was traced as it is, and counts the graphs that hold an operation."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += any(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward
