"""Whether the runs of a claim would start at a scale beyond the machine: two steps on tensors without values."""

import shlex
import sys

import pytest
from launches import REPOSITORY

from hf_dpssl.cli.train import SCRIPTS
from hf_dpssl.models.modeling_vaegan import VAEGAN
from hf_dpssl.runs.recipe import parse

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
sys.path.insert(0, str(REPOSITORY / "training"))
import claim_rehearsal
import claim_statements
import dae_gan
import reproduce

STUDIES = sorted(path.stem for path in (claim_statements.CLAIMS / "studies").glob("*.yaml"))


def with_arms(name: str, scale: str, arms: list[str]) -> dict:
    """A shipped study with some of its arms, and nothing shared."""
    study = claim_statements.read_study(name, scale)
    return study | {"arms": {arm: study["arms"][arm] for arm in arms}, "shared": {}}


def test_a_rehearsed_generator_learns_the_latents_that_its_own_arm_trains():
    study = with_arms("weakness", "paper", ["joint_encoder", "gaussian", "decoupled"])
    runs, left = claim_rehearsal.runs_of(study)
    assert left == ["report", "one_step"]
    transformers = [run for run in runs if run.script == "dae_dit"]
    assert [run.arms for run in transformers] == [[arm] for arm in study["arms"] for _ in range(3)]
    for run in transformers:
        args = parse(SCRIPTS["dae_dit"], list(run.flags), "")
        trained = parse(SCRIPTS["dae_vq"], shlex.split(args.autoencoder_args), "")
        assert args.autoencoder is None and trained.encoder_channels == [128, 128, 256, 256, 512]
        assert trained.quantizer == ("kl" if run.arms == ["gaussian"] else "vq")
    tokens = [run for run in runs if run.script == "dae_ar"]
    assert [run.arms for run in tokens] == [["joint_encoder"], ["decoupled"]]  # the other one has no codes


def test_networks_that_a_study_trains_before_are_left_out_of_its_rehearsal_by_name():
    runs, _ = claim_rehearsal.runs_of(claim_statements.read_study("autoencoders", "paper"))
    assert [run.without for run in runs if run.script == "dae_vq"] == [("--perceptual",)] * 4
    runs, left = claim_rehearsal.runs_of(claim_statements.read_study("one_step_features", "paper"))
    [drift] = [run for run in runs if run.script == "dae_drift"]
    assert drift.without == ("--features",) and drift.arms == ["latent", "t_simclr", "simclr", "moco", "untrained"]
    assert "contrastive --autoencoder" in left
    runs, left = claim_rehearsal.runs_of(claim_statements.read_study("one_step", "paper"))
    assert [run.arms for run in runs if run.script == "dae_dit"] == [["dit_25"], ["mean_flow_1"], ["joint_dit_25"]]
    assert "dae_drift --init_from" in left


def test_a_rehearsal_counts_the_parameters_of_the_run_itself_and_a_run_that_cannot_start_is_an_error(capsys):
    study = with_arms("gan", "paper", ["noise"])
    reproduce.print_rehearsal("gan", study)
    printed = capsys.readouterr().out
    assert printed.startswith("gan, scale paper: 1 different runs of 1 in one seed, two steps of each")
    args = parse(SCRIPTS["dae_gan"], list(claim_rehearsal.runs_of(study)[0][0].flags), "")
    networks = [VAEGAN(dae_gan.model_config(args, 32, None, None)), dae_gan.make_discriminator(args, "generator", 32)]
    count = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert f"  dae_gan of noise (without --validation_extractor): generator {count / 1e6:.1f} M parameters, " in printed
    study["numbers"] |= {"latent_dim": -1}
    with pytest.raises(ValueError, match="latent_dim must be"):
        list(claim_rehearsal.rehearsed(study))


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_training_runs_of_scale_paper_start_and_fit_into_a_gpu_of_141_gb(name):
    for run, stages in claim_rehearsal.rehearsed(claim_statements.read_study(name, "paper")):
        for stage, found in stages.items():
            assert 0 < found["bytes"]["total"] < 141e9, (run.script, run.arms, stage)
