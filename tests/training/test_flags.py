"""Flags that no recipe sets arrive where they act."""

from types import SimpleNamespace

import contrastive
import dae_gan
import dae_vq
import datasets
import huggingface_hub
import pytest
import torch
from cases import for_each
from tiny_checkpoints import save_checkpoints

from hf_dpssl.autoencoder.arguments import CONFIG_FLAGS, VQArguments
from hf_dpssl.autoencoder.choices import ARMS
from hf_dpssl.data.batches import load_images_for
from hf_dpssl.latent_training.gan_arguments import GANArguments
from hf_dpssl.models.modeling_discriminator import PatchDiscriminator, PatchDiscriminatorConfig
from hf_dpssl.runs.contrastive_arguments import ContrastiveArguments, MapArguments
from hf_dpssl.runs.recipe import parse

SMALL = ["--encoder_channels", "8", "16", "--decoder_channels", "8", "16", "--auxiliary_channels", "8", "8"]


def test_every_flag_of_the_architecture_and_quantiser_is_a_field_of_the_saved_config():
    given = {
        "norm_num_groups": 4, "mid_block_attention": True, "attention_levels": [1], "latent_channels": 3,
        "quantizer": "kl", "num_codes": 17, "codebook_decay": 0.9, "revival_threshold": 0.1,
        "code_distance": "cosine", "codebook_update": "gradient", "quantizer_gradient": "rotation",
        "entropy_weight": 0.2, "commitment_weight": 0.5, "kl_weight": 1e-3,
        "equivariance_weight": 0.3, "equivariance_transforms": ["scales"], "reconstruction_loss": "l1",
        "num_channels": 1,
    }  # fmt: skip
    assert set(given) == set(CONFIG_FLAGS)
    defaults = VQArguments()
    assert not [name for name, value in given.items() if getattr(defaults, name) == value]
    flags = [str(word) for name, value in given.items() for word in (f"--{name}", *_words(value))]
    for arm in ARMS:
        args = parse(VQArguments, [*flags, *SMALL, "--arm", arm], "")
        model, _ = dae_vq.make_model(args, SimpleNamespace(image_size=16))
        assert {name: getattr(model.config, name) for name in given} == given, arm


def _words(value: object) -> list:
    return value if isinstance(value, list) else [value]


def test_settings_of_the_adversarial_term_are_the_flags():
    flags = "--adversarial non_saturating --adversarial_weight 0.1 --adversarial_start 0.25 --adversarial_cap 7"
    flags += " --discriminator_warmup 3 --r1_weight 2 --r1_interval 5"
    term = parse(VQArguments, flags.split(), "").term(steps=40)
    assert (term.loss, term.weight, term.start, term.cap) == ("non_saturating", 0.1, 10, 7)
    assert (term.warmup, term.r1_weight, term.r1_interval) == (3, 2, 5)


def test_perplexity_is_that_of_the_pretraining_model():
    args = parse(ContrastiveArguments, ["--temperature", "auto", "--perplexity", "0.3"], "")
    model = contrastive.make_model(args, 16, [0.5] * 3, [0.5] * 3)
    assert model.config.temperature == "auto" and model.config.perplexity == 0.3


@for_each(
    "arguments, flags, message",
    [
        (ContrastiveArguments, "--num_train_epochs 0", "--num_train_epochs must be at least 1, got 0"),
        (ContrastiveArguments, "--max_train_steps 0", "--max_train_steps must be at least 1, got 0"),
        (ContrastiveArguments, "--max_train_steps -3", "--max_train_steps must be at least 1, got -3"),
        (ContrastiveArguments, "--knn_k 0", "--knn_k must be at least 1, got 0"),
        (ContrastiveArguments, "--learning_rate -1", "--learning_rate must not be negative, got -1.0"),
        (ContrastiveArguments, "--learning_rate nan", "--learning_rate must not be negative, got nan"),
        (ContrastiveArguments, "--warmup_steps -1", "--warmup_steps must not be negative, got -1"),
        (VQArguments, "--warmup_steps -1", "--warmup_steps must not be negative, got -1"),
        (MapArguments, "--warmup_epochs -1", "--warmup_epochs must not be negative, got -1"),
        (MapArguments, "--stage_3_share -1", "--stage_3_share must not be negative, got -1.0"),
    ],
)
def test_numbers_with_which_nothing_is_learned_are_refused(arguments, flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments, flags.split(), "")
    assert message in capsys.readouterr().err


@for_each(
    "flags, message",
    [
        ("--temperature 2 --perplexity 0.1", "--perplexity is of --temperature auto, which is 2.0: leave it out"),
        ("--kernel cosine --perplexity 0.1", "--perplexity is of --temperature auto, which is 0.2: leave it out"),
        ("--queue_size 512", "--queue_size is of --negatives queue: leave it out"),
        ("--momentum 0.99", "--momentum is of --negatives queue: leave it out"),
        ("--momentum_schedule cosine", "--momentum_schedule is of --negatives queue: leave it out"),
    ],
)
def test_contrastive_flags_that_would_do_nothing_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(ContrastiveArguments, flags.split(), "")
    assert message in capsys.readouterr().err
    parse(ContrastiveArguments, [*flags.split(), "--negatives", "queue", "--temperature", "auto"], "")


def test_revision_of_a_hub_data_set_is_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    args = parse(ContrastiveArguments, ["--dataset", "nobody/nothing", "--dataset_revision", "v7"], "")
    with pytest.raises(ValueError, match="nobody/nothing at revision 'v7'"):
        load_images_for(args)


def test_loss_of_the_gan_weighs_reconstruction_and_kl_by_their_flags():
    args = parse(GANArguments, ["--reconstruction_weight", "3", "--kl_weight", "0.5"], "")
    torch.manual_seed(0)
    bare = PatchDiscriminator(PatchDiscriminatorConfig(width=4, image_size=16)).eval()
    real, fake = torch.randn(2, 4, 3, 16, 16)
    values = {"recon": torch.tensor(2.0), "kl": torch.tensor(7.0)}
    loss = dae_gan.generator_loss(args, SimpleNamespace(term=args.term(), bare=bare), real, fake, values)
    with torch.no_grad():
        adversarial = torch.log1p(torch.exp(-bare(fake).logits)).mean()
    torch.testing.assert_close(loss, adversarial + 3 * 2 + 0.5 * 7)


COMPILED = [  # script, flags, what is compiled, file that is written
    ("dae_dit", "--sampling_steps 1 --grid_images_per_class 1", "DiTTransformer2DModel", "transformer/config.json"),
    ("dae_ar", "--samples_per_class 1", "GPT2LMHeadModel", "language_model/config.json"),
    ("dae_gan", "--latent noise --num_generated 4", "VAEGAN", "config.json"),
]


@pytest.mark.extended
@for_each("script, flags, model, file", COMPILED)
def test_a_compiled_generator_trains_to_a_checkpoint(script, flags, model, file, run_script, tmp_path, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def eager(module, **options):  # a backend without a compiler: the same code, in seconds
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    flags = [*flags.split(), "--max_train_steps", 1, "--batch_size", 4, "--width", 8, "--output_dir", tmp_path / "run"]
    flags += ["--name", "made", "--evaluation_images", 20, "--compile"]
    if script != "dae_gan":
        flags += ["--num_layers", 1, "--num_heads", 2]
        flags += ["--autoencoder", save_checkpoints(tmp_path, ("autoencoder",))["autoencoder"]]
    run_script(script, flags)
    assert compiled == [model]
    assert (tmp_path / "run/made" / file).is_file()
