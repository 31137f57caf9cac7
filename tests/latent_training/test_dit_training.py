"""Steps of the latent DiT's training: accumulation and processes leave them unchanged; checkpointing, compilation."""

import dae_dit
import datasets
import pytest
import torch
import torch.distributed as dist
from cases import for_each
from pictures import row, write_parquet
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.data.batches import ordered_batches
from hf_dpssl.data.image_data import load_images
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer
from hf_dpssl.latent_training.dit_arguments import DiTArguments
from hf_dpssl.latent_training.latent_run import autoencoder_of_run, classes_of_run, weight_averages
from hf_dpssl.latent_training.token_alignment import TokenAlignedTransformer

OBJECTIVES = {
    "flow": {"timestep_sampling": "logit_normal"},
    "v_prediction": {"objective": "v_prediction", "min_snr_gamma": 5.0},
    "learned_variance": {"objective": "epsilon", "learned_variance": True},
    "aligned": {"align_encoder": "given"},
    "mean_flow": {"objective": "mean_flow"},
}
IMAGES = 40


class Latents(torch.utils.data.Dataset):
    """Latents, labels and images by formula."""

    def __len__(self):
        return IMAGES

    def __getitems__(self, items):
        rows = torch.tensor([row for _, row in items])
        values = (rows.view(-1, 1, 1, 1) + torch.arange(2 * 16).view(1, 2, 4, 4)).sin()
        return dict(latents=values, labels=rows % 3, sample_ids=rows, epoch=items[0][0], images=rows.view(-1, 1, 1, 1))


def features(images: torch.Tensor) -> torch.Tensor:
    """(B, 4, 5), in place of an encoder."""
    return (images.view(-1, 1, 1) * torch.linspace(0.1, 1, 20).view(1, 4, 5)).cos()


def make_model(args: DiTArguments) -> torch.nn.Module:
    torch.manual_seed(0)
    size = dict(num_layers=2, width=16, num_heads=2, patch_size=2, latent_channels=2, latent_size=4, num_classes=3)
    mean_flow = args.objective == "mean_flow"
    model = make_transformer(**size, learned_variance=args.learned_variance, mean_flow=mean_flow)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return TokenAlignedTransformer(model, block=1, features=5, width=8) if args.align_encoder else model


def autoencoder() -> VQAutoencoder:
    shape = dict(image_size=8, latent_channels=2, encoder_block_out_channels=[8, 8], decoder_block_out_channels=[8, 8])
    return VQAutoencoder(VQConfig(**shape, num_codes=4, norm_num_groups=4, latent_mean=[0.1, 0], latent_std=[1, 2]))


def train(name: str, batch_size: int, accumulate: int = 1, steps: int = 6, **options) -> dict[str, torch.Tensor]:
    """Weights after some steps of AdamW, and all losses."""
    args = DiTArguments(**OBJECTIVES[name])
    bare = make_model(args).train()
    if options.get("checkpointing"):
        getattr(bare, "transformer", bare).enable_gradient_checkpointing()
    if options.get("compiled"):
        bare.compile()
    several = dist.is_available() and dist.is_initialized()
    model = DistributedDataParallel(bare) if several else bare
    process = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, eps=1e-4
    )  # else rounding decides signs of tiny gradients
    vae, scheduler = autoencoder(), make_scheduler(args.objective, args.learned_variance)
    batches = iter(ordered_batches(Latents(), batch_size, 0, process=process, accumulate=accumulate))
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            given = features if name == "aligned" else None
            loss = dae_dit.step_losses(model, next(batches), vae, scheduler, args, 3, given)["loss"] / accumulate
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses).view(steps, -1).sum(1)} | {k: v.detach() for k, v in bare.named_parameters()}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_an_autoencoder_of_a_recipe_is_trained_with_the_loader_workers_of_that_recipe(tmp_path):
    """Those of the generator read a cache."""
    for recipe, own in ((None, False), ("vq-dae-f8-imagenet", True)):
        args = DiTArguments(output_dir=str(tmp_path), autoencoder_recipe=recipe, num_workers=3)
        argv = autoencoder_of_run(args, list)
        assert ("--num_workers" not in argv) is own and "--seed" in argv


@pytest.mark.extended
@for_each("name", OBJECTIVES)
def test_accumulation_leaves_the_trajectory_unchanged_over_epochs(name):
    whole = train(name, 16)  # three epochs; 8 images of each are left over, which batches of 8 must not show either
    assert_same(train(name, 8, accumulate=2), whole)
    start = make_model(DiTArguments(**OBJECTIVES[name])).state_dict()
    assert max(float((whole[k] - start[k]).abs().max()) for k in whole if k in start) > 1e-3


def run_all() -> dict[str, torch.Tensor]:
    return {f"{name} {key}": value for name in OBJECTIVES for key, value in train(name, 8).items()}


@pytest.mark.extended
def test_two_processes_follow_one_of_twice_the_batch(run_in_two):
    both = run_in_two(run_all)
    for name in OBJECTIVES:
        expected = train(name, 16)
        found = [{k.removeprefix(f"{name} "): v for k, v in r.items() if k.startswith(f"{name} ")} for r in both]
        found[0]["losses"] = found[1]["losses"] = (found[0]["losses"] + found[1]["losses"]) / 2
        for result in found:
            assert_same(result, expected)


@pytest.mark.parametrize("name", ["learned_variance", "aligned", "mean_flow"])
def test_gradient_checkpointing_changes_nothing(name):
    assert_same(train(name, 8, steps=3, checkpointing=True), train(name, 8, steps=3), tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "aligned"])
def test_compilation_changes_rounding_only(name):
    assert_same(train(name, 8, steps=3, compiled=True), train(name, 8, steps=3))


def test_arguments_that_do_not_go_together_are_refused():
    assert DiTArguments(preset="dit-b-4").width == 768 and DiTArguments(preset="dit-b-4", width=768).patch_size == 4
    for match, options in {
        "has --width 384, got 100": dict(preset="dit-s-2", width=100),
        "--learned_variance needs --objective epsilon": dict(learned_variance=True),
        "logit_normal needs --objective flow": dict(objective="epsilon", timestep_sampling="logit_normal"),
        "--min_snr_gamma must be positive": dict(min_snr_gamma=0.0),
        "--logit_std must be positive": dict(logit_std=0.0),
        "--validation_extractor needs --validation_steps": dict(validation_extractor="inception"),
        "--validation_classifier needs --validation_steps": dict(validation_classifier="inception"),
        "--best_metric fid needs --validation_extractor": dict(best_metric="fid", validation_steps=2),
        r"--align_block lies in \[1, 4\], got 5": dict(align_block=5),
        "leave out --streaming": dict(align_encoder="given", streaming=True),
        "--validation_images must be at least 1": dict(validation_images=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            DiTArguments(**options)


def test_labels_that_cannot_be_classes_are_refused_unless_the_run_is_unconditional(tmp_path):
    images = [row(i) for i in range(20)]
    path = write_parquet(tmp_path / "set.parquet", images, label=([0.5, 1.5] * 10, datasets.Value("float32")))
    data = load_images(str(path))
    with pytest.raises(ValueError, match="column 'label' of .* it holds Value.*; or learn without classes by --uncond"):
        classes_of_run(DiTArguments(), data)
    assert classes_of_run(DiTArguments(unconditional=True), data) == []
    assert classes_of_run(DiTArguments(unconditional=True), load_images("digits")) == []
    assert classes_of_run(DiTArguments(), load_images("digits")) == [str(digit) for digit in range(10)]


class Operations(TorchDispatchMode):
    """Names of what is called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_weights_are_averaged_by_two_operations_however_many_they_are():
    model = make_model(DiTArguments())
    start = [parameter.detach().clone() for parameter in model.parameters()]
    averages = weight_averages(model.parameters(), 0.75)
    averages.optimization_step = 100  # past the warm-up
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    with Operations() as called:
        averages.step(model.parameters())
    assert called.names == ["_foreach_sub", "_foreach_sub_"]
    for average, before in zip(averages.shadow_params, start, strict=True):
        torch.testing.assert_close(average, before + 0.25)
