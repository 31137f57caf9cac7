"""The sharding plan of training/accelerate/fsdp_8_bf16.yaml, by torch's fully_shard in two gloo processes."""

import copy
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from hf_dpssl.latent_training.diffusion import make_transformer
from hf_dpssl.latent_training.latent_run import weight_averages
from hf_dpssl.runs.sharding import PartsOnDisk, common_part, copy_whole_, load_, own_part

RECIPE = Path(__file__).parents[2] / "training/accelerate/fsdp_8_bf16.yaml"
SIZE = dict(num_layers=3, width=16, num_heads=2, patch_size=2, latent_channels=2, latent_size=4, num_classes=3)
STEPS = 3


def units() -> list[str]:
    return yaml.safe_load(RECIPE.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"].split(",")


def shard(model: torch.nn.Module, names: list[str]) -> None:
    """As accelerate does: modules of these classes from the inside out, then the whole."""
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(model.modules())[1:]):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    model = make_transformer(**SIZE).train()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def inputs(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(4, 2, 4, 4, generator=generator)
    return dict(hidden_states=latents, timestep=latents[:, 0, 0, 0] * 100 + 500, class_labels=torch.arange(4))


class Run:
    """A model, its optimiser, its schedule and its average."""

    def __init__(self, names: list[str] | None):
        self.model = make_model()
        if names is not None:
            shard(self.model, names)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-4)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.5, 1, STEPS)
        self.ema = weight_averages(self.model.parameters(), 0.5)
        self.found: dict[str, torch.Tensor] = {}

    def train(self, first: int, last: int, share: slice) -> None:
        for step in range(first, last):
            given = {name: value[share] for name, value in inputs(step).items()}
            loss = (self.model(**given).sample - given["hidden_states"]).square().mean()
            loss.backward()
            self.found[f"loss {step}"] = loss.detach().clone()
            for name, parameter in self.model.named_parameters():
                gradient = parameter.grad
                whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                self.found[f"gradient {step} {name}"] = whole.clone()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.ema.step(self.model.parameters())

    def kept(self) -> dict:
        return dict(model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, ema=self.ema)

    def parts(self) -> dict:
        return {name: own_part(value, [self.model]) for name, value in self.kept().items()}

    def common(self) -> dict:
        return {name: common_part(value) for name, value in self.kept().items()}

    def load(self, parts: dict, common: dict) -> None:
        for name, target in self.kept().items():
            load_(target, [self.model], parts[name], common[name])

    def finish(self) -> dict[str, torch.Tensor]:
        average = make_model()
        copy_whole_(average.parameters(), self.ema.shadow_params)
        self.found |= {f"average {k}": v.detach().clone() for k, v in average.named_parameters()}
        whole = make_model()
        copy_whole_(whole.state_dict().values(), self.model.state_dict().values())
        self.found |= {f"weight {name}": value.clone() for name, value in whole.state_dict().items()}
        return self.found


def in_two(folder: str) -> dict[str, torch.Tensor]:
    """Train sharded, with a stop in the middle that goes on in another run from the parts on the disk."""
    rank = torch.distributed.get_rank()
    share = slice(2 * rank, 2 * rank + 2)
    first = Run(units())
    assert all(isinstance(parameter, DTensor) for parameter in first.model.parameters())
    assert sum(isinstance(module, FSDPModule) for module in first.model.modules()) == 2 * SIZE["num_layers"] + 1
    first.train(0, STEPS - 1, share)
    disk = PartsOnDisk(torch.distributed.new_group(backend="gloo"))
    common = copy.deepcopy(first.common())
    disk.write(first.parts(), Path(folder))
    first.train(STEPS - 1, STEPS, share)  # while the parts of before are being written
    disk.wait()
    second = Run(units())
    parts = second.parts()
    disk.read_(parts, Path(folder))
    second.load(parts, common)
    second.train(STEPS - 1, STEPS, share)
    stopped, whole = second.finish(), first.finish()
    identical = all(torch.equal(stopped[name], whole[name]) for name in stopped)
    blocks_alone = Run(["BasicTransformerBlock"])
    try:
        blocks_alone.train(0, 1, share)
        works = True
    except RuntimeError as error:
        works = "DTensor" not in str(error)
    return whole | {"resumed as it was": torch.tensor(identical), "blocks alone work": torch.tensor(works)}


def test_sharded_run_has_the_losses_gradients_averages_and_states_of_one_process_and_resumes_exactly(
    run_in_two, tmp_path
):
    both, alone = run_in_two(in_two, str(tmp_path / "parts")), Run(None)
    alone.train(0, STEPS, slice(0, 4))
    expected = alone.finish()
    for result in both:
        assert bool(result.pop("resumed as it was"))
        assert not bool(result.pop("blocks alone work"))  # why the embedders are units of their own
    for step in range(STEPS):
        both[0][f"loss {step}"] = both[1][f"loss {step}"] = sum(r[f"loss {step}"] for r in both) / 2
    for result in both:
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                result[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_state_of_a_run_without_shards_is_in_the_common_part_and_loaded_as_it_is():
    run, other = Run(None), Run(None)
    run.train(0, 1, slice(0, 4))
    common = run.common()
    assert not any(run.parts().values())
    assert all(common["model"][name].data_ptr() == value.data_ptr() for name, value in run.model.named_parameters())
    other.load(run.parts(), common)
    assert all(torch.equal(a, b) for a, b in zip(other.ema.shadow_params, run.ema.shadow_params, strict=True))
    assert not {t.data_ptr() for t in other.ema.shadow_params} & {t.data_ptr() for t in run.ema.shadow_params}


def test_recipe_is_one_that_accelerate_reads_and_names_classes_of_the_transformer():
    config = load_config_from_file(str(RECIPE))
    assert isinstance(config, ClusterConfig) and config.distributed_type == "FSDP" and config.num_processes == 8
    assert config.fsdp_config["fsdp_version"] == 2 and config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert set(units()) <= {type(module).__name__ for module in make_model().modules()}


def test_flags_of_the_recipe_are_accelerates_own():
    from accelerate.commands.launch import launch_command_parser

    flags = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    with open(RECIPE, encoding="utf-8") as file:
        assert set(yaml.safe_load(file)["fsdp_config"]) <= flags
