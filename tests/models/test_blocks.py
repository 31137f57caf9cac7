"""Parts of contrastive models: strided convolutions of single pixels under bfloat16 on a CPU."""

import copy

import torch
from tiny_encoders import config, images

from hf_dpssl import ContrastiveEncoder, SimCLRForPreTraining
from hf_dpssl.models.blocks import OnePixelConv2d, guard_one_pixel_convolutions_


def test_strided_convolution_of_one_pixel_is_float32_under_autocast_and_of_more_is_not():
    for size in [1, 2]:
        plain = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        guarded = torch.nn.Sequential(copy.deepcopy(plain), torch.nn.Conv2d(12, 4, 1))
        guard_one_pixel_convolutions_(guarded)
        assert [type(module) for module in guarded] == [OnePixelConv2d, torch.nn.Conv2d]
        inputs = torch.randn(5, 8, size, size).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            output = guarded[0](inputs)
        assert output.dtype == (torch.float32 if size == 1 else torch.bfloat16)
        output.float().square().sum().backward()
        plain(inputs.float()).square().sum().backward()
        tolerance = 0 if size == 1 else 0.05
        for (name, found), (_, expected) in zip(guarded[0].named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=tolerance, atol=tolerance, msg=name)
        assert guarded[0](inputs.float()).equal(plain(inputs.float()))  # without autocast nothing differs


def test_last_stage_of_a_resnet_at_16_px_is_guarded_and_its_names_stay():
    options = config("resnet")
    model = SimCLRForPreTraining(options).train()
    assert {n: p.shape for n, p in model.encoder.state_dict().items()} == {
        n: p.shape for n, p in ContrastiveEncoder(options).state_dict().items()
    }
    seen = {}
    for name, module in model.encoder.named_modules():
        if isinstance(module, OnePixelConv2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(0), images(1)).loss.backward()
    inputs, output = seen["timm_model.layer4.0.conv1"]
    assert inputs.shape[-2:] == (1, 1) and output.dtype == torch.float32
    assert seen["timm_model.layer2.0.conv1"][1].dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())
