"""Arms, budgets, costs and curves of autoencoder training."""

import pytest
import torch

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.arguments import VQArguments
from hf_dpssl.autoencoder.training import (
    ARMS,
    BestDecoder,
    Stage,
    batch_usage,
    check_codebook_size,
    curve_summary,
    plateau,
    stages_of,
    step_flops,
    warn_of_low_usage,
)  # fmt: skip


def make(**options) -> VQAutoencoder:
    torch.manual_seed(0)
    settings = {"image_size": 16, "encoder_block_out_channels": [8, 16], "norm_num_groups": 4, "num_codes": 16}
    return VQAutoencoder(VQConfig(**settings | {"mid_block_attention": False} | options))


def described(arm: str, budget: str = "total", **flops) -> list[tuple]:
    return [(s.steps, s.train_encoder, s.decoder) for s in stages_of(arm, budget, 30, 10, flops)]


def test_decoupled_arms_have_two_stages_and_a_fresh_decoder():
    for arm, (decoupled, *_) in ARMS.items():
        if decoupled:
            assert described(arm) == [(30, True, "first"), (10, False, "fresh")]


@pytest.mark.parametrize("arm", ["joint", "joint_dropout"])
def test_budgets_of_a_joint_arm(arm):
    assert described(arm) == [(40, True, "first")]
    assert described(arm, "encoder") == [(30, True, "first"), (10, False, "keep")]
    # Two stages cost 30 * 6 + 10 * 3 = 210: 35 joint steps of 6.
    assert described(arm, "flops", joint=6.0, stage_1=6.0, stage_2=3.0) == [(35, True, "first")]


def test_step_flops_of_a_convolution_are_two_per_multiplication_and_thrice_with_its_backward():
    ours = step_flops(make(quantizer="none"), 16, train_encoder=True)
    frozen = step_flops(make(quantizer="none"), 16, train_encoder=False)
    model, forward = make(quantizer="none"), {"encoder": 0, "decoder": 0}

    def count(part):
        def hook(module, inputs, output):
            forward[part] += 2 * output[0].numel() * module.weight[0].numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            part = "encoder" if name.startswith(("encoder", "quant_conv")) else "decoder"
            module.register_forward_hook(count(part))
    model(torch.zeros(1, 3, 16, 16))
    first = 2 * 16 * 16 * model.encoder.conv_in.weight.numel()  # the images take no gradient
    last = 2 * 8 * 8 * model.post_quant_conv.weight.numel()  # nor do frozen latents
    assert ours == 3 * (forward["encoder"] + forward["decoder"]) - first
    assert frozen == forward["encoder"] + 3 * forward["decoder"] - last


@pytest.mark.extended
def test_operations_of_checkpointed_activations_are_not_counted_twice():
    model = make()
    plain = step_flops(model, 16, train_encoder=True)
    model.gradient_checkpointing_enable()
    assert step_flops(model, 16, train_encoder=True) == plain
    assert all(module.gradient_checkpointing for module in (model.encoder, model.decoder))


def test_counting_leaves_model_and_generator_as_they_were():
    model = make()
    state, randomness = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    step_flops(model, 16, train_encoder=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), randomness) and not model.config.encoder_frozen


def test_best_decoder_is_put_back_also_after_a_checkpoint():
    model, best = make(), BestDecoder()
    best.offer(model, 20.0, 0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(1.0)
    best.offer(model, 19.0, 5)
    resumed = BestDecoder()
    resumed.load_state_dict(best.state_dict())
    resumed.restore(model)
    assert (resumed.psnr, resumed.step) == (20.0, 0)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_latest_decoder_above_the_start_is_kept_where_psnr_is_not_all_that_counts():
    model, best = make(), BestDecoder(latest=True)
    for step, psnr in enumerate([20.0, 25.0, 21.0, 19.0]):
        with torch.no_grad():
            model.decoder.conv_out.bias.fill_(step)
        best.offer(model, psnr, step)
    best.restore(model)
    assert best.summary() == {"psnr_at_start": 20.0, "psnr_kept": 21.0, "step_kept": 2}
    assert (model.decoder.conv_out.bias == 2).all()


def test_codebook_larger_than_the_data_is_refused_by_number_of_latent_vectors():
    config = make().config  # 16 codes, 8 x 8 cells
    check_codebook_size(config, 1)
    config.num_codes = 129
    check_codebook_size(config, 3)
    with pytest.raises(
        ValueError, match=r"129 codes is larger than the data: 2 training images of 8 x 8 cells have 128"
    ):
        check_codebook_size(config, 2)
    config.quantizer = "kl"
    check_codebook_size(config, 2)


def test_usage_of_a_batch_is_the_share_of_different_codes_and_a_low_one_is_warned_about(caplog):
    codes = torch.randint(0, 20, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert float(batch_usage(codes, 64)) == pytest.approx(100 * len(set(codes.flatten().tolist())) / 64)
    warn_of_low_usage({"code_usage": 50.0, "dead_codes": 32.0}, "step 1")
    assert not caplog.records
    warn_of_low_usage({"code_usage": 25.0, "dead_codes": 48.0}, "step 2")
    assert "step 2: only 25 % of the codes are in use (48 dead)" in caplog.text


def test_results_hold_curves_operations_and_settings_of_a_run():
    history = [{"step": i, "validation_psnr": 20.0 + (i == 1), "stage": "joint"} for i in range(3)]
    history += [{"step": 3, "validation_psnr": 12.34567, "guard": 0.5, "stage": "decoder"}, {"step": 4, "recon": 0.1}]
    stages = [Stage("joint", 30, True, flops_per_image=6.0), Stage("decoder", 10, False, "keep", 3.0)]
    found = curve_summary(history, stages)
    assert found["plateau"] == {"joint": {"gain_in_last_fifth": -1.0, "converged": True}, "decoder": None}
    assert found["validation_psnr"][-1] == [3, 12.346] and found["guard_lowered_weight"] == [3]
    args = VQArguments(arm="joint", budget="encoder", batch_size=4, gradient_accumulation_steps=2, adversarial="hinge")
    said = args.summary(stages, processes=2)
    assert said["operations"]["joint"]["total"] == 30 * 6 * 16 and said["operations"]["total"] == (180 + 30) * 16
    assert said["budget"] == "encoder" and said["stages"] == {"joint": 30, "decoder": 10}
    assert said["adversarial"]["start"] == 6 and said["adversarial"]["guard_factor"] == 1.5
    assert VQArguments().summary(stages, processes=1)["adversarial"] is None


def test_a_curve_is_flat_when_the_last_fifth_of_its_steps_gains_less_than_half_a_decibel():
    def history(values):
        points = enumerate(values, 1)
        return [{"step": 100 * i, "validation_psnr": value, "stage": "joint"} for i, value in points]

    rising = plateau(history([10 + i for i in range(11)]), "joint")
    assert rising == {"gain_in_last_fifth": 2.0, "converged": False}
    assert plateau(history([10] * 8 + [10.2, 10.3, 10.4]), "joint")["converged"]
    assert plateau(history([10, 11]), "joint") is None and plateau(history([1, 2, 3]), "stage-1") is None


def test_arguments_resolve_budget_preset_and_the_start_of_the_adversarial_term():
    budgets = [VQArguments(**given).steps_of_joint_arm for given in ({}, {"budget": "total"}, {"arm": "dae"})]
    assert VQArguments().arm == "joint" and budgets == ["encoder", "total", None]
    assert VQArguments(init_from="folder").steps_of_joint_arm is None and VQArguments().budget is None
    args = VQArguments(preset="f16")
    assert args.encoder_channels == [128, 128, 256, 256, 512] and args.num_codes == 1024
    assert args.decoder_channels == args.encoder_channels and args.preset is None
    assert VQArguments(preset="f2", num_codes=1024, decoder_channels=[32, 64]).decoder_channels == [32, 64]
    assert VQArguments().term(100) is None
    assert VQArguments(adversarial="hinge", adversarial_start=0.6).term(1000).start == 600
    assert VQArguments(adversarial="hinge", adversarial_start=30001).term(1000).start == 30001
    for wrong, named in (
        ({"num_channels": 4}, "num_channels"),
        ({"adam_betas": [0.9]}, "adam_betas"),
        ({"arm": "weak_width", "budget": "flops"}, "--budget flops is of the joint arms, and this is weak_width"),
        ({"init_from": "folder", "budget": "total"}, "this is decoder alone, .* leave it out, of a recipe too"),
        ({"validation_steps": 0}, "validation_steps"),
        ({"preset": "f8", "num_codes": 1024}, "--preset f8 has --num_codes 16384, got 1024: leave one out"),
        ({"preset": "f2", "encoder_channels": [64, 64]}, "has --encoder_channels 64 128, got 64 64"),
        ({"preset": "f4", "layers_per_block": 3}, "has --layers_per_block 2, got 3"),
    ):
        with pytest.raises(ValueError, match=named):
            VQArguments(**wrong)


@pytest.mark.parametrize(
    "arm, unused",
    [
        ("joint", ["auxiliary_channels", "auxiliary_dropout", "auxiliary_dropout_kind"]),
        ("joint_dropout", ["auxiliary_channels"]),
        ("weak_width", ["auxiliary_dropout", "auxiliary_dropout_kind"]),
        ("dae", []),
    ],
)
def test_flags_of_a_weak_decoder_that_an_arm_does_not_use_are_named(arm, unused):
    given = {"auxiliary_channels": [4, 8], "auxiliary_dropout": 0.1, "auxiliary_dropout_kind": "mask"}
    assert VQArguments(arm=arm, **given).unused_weakness() == unused
    assert VQArguments(arm=arm).unused_weakness() == [] == VQArguments(arm=arm, preset="f16").unused_weakness()
