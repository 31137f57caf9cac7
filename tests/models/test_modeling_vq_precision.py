"""Precision, memory and speed settings of the VQ autoencoder change neither results nor the codebook's precision."""

import copy

import pytest
import torch
from tiny_autoencoders import gradients, images, make

from hf_dpssl import VQAutoencoder

# The name in transformers 5.1; later versions have another one beside it.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")


def saved_bytes(model: VQAutoencoder, pixel_values: torch.Tensor) -> int:
    """Bytes that one forward keeps for its backward, weights left out."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(pixel_values).loss
    assert loss.requires_grad  # it holds the graph until here
    return sum(kept.values())


def test_checkpointing_gives_the_same_gradients_and_keeps_fewer_activations():
    for kind in ["element", "depth"]:
        plain = make(decoder_dropout=0.3, decoder_dropout_kind=kind, attention_levels=[1]).train()
        thrifty = copy.deepcopy(plain)
        thrifty.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found, expected = gradients(thrifty, images(1)), gradients(plain, images(1))
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6)
        assert saved_bytes(thrifty, images(1)) < 0.4 * saved_bytes(plain, images(1))


def test_new_decoder_keeps_checkpointing_precision_and_memory_format():
    model = make().to(memory_format=torch.channels_last).to(torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.replace_decoder([16, 24], 1)
    weight = model.last_decoder_layer
    assert weight is model.decoder.conv_out.weight and weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    found = gradients(model, images())
    plain = copy.deepcopy(model)
    plain.gradient_checkpointing_disable()
    assert saved_bytes(model, images()) < 0.6 * saved_bytes(plain, images())
    torch.testing.assert_close(found["decoder.conv_in.weight"], gradients(plain, images())["decoder.conv_in.weight"])


def test_channels_last_changes_the_layout_and_not_the_result():
    model = make()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    pixel_values = images(1).to(memory_format=torch.channels_last)
    assert other.decoder.conv_in.weight.stride() != model.decoder.conv_in.weight.stride()
    with torch.no_grad():
        found, expected = other(pixel_values), model(images(1))
    torch.testing.assert_close(found.pixel_values, expected.pixel_values, atol=1e-5, rtol=1e-4)
    assert torch.equal(found.codes, expected.codes)
    learned = gradients(other.train(), pixel_values)
    for name, gradient in gradients(model.train(), images(1)).items():
        torch.testing.assert_close(learned[name], gradient, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(other.quantizer.codebook, model.quantizer.codebook)


def test_codebook_stays_float32_in_bfloat16_and_codes_come_back_exactly():
    for autocast in [False, True]:
        model = make()
        if not autocast:
            model.to(torch.bfloat16)
        start = model.quantizer.codebook.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                output = model(images(1))
                assert output.latents.dtype == output.pixel_values.dtype == torch.bfloat16
                assert torch.equal(model.decode_codes(output.codes).pixel_values, output.pixel_values)
            loss = model.train()(images(1)).loss
        loss.backward()
        codebook = model.quantizer.codebook
        assert loss.dtype == codebook.dtype == model.quantizer.sums.dtype == torch.float32
        assert not torch.equal(codebook, start) and not torch.equal(codebook, codebook.bfloat16().float())
        vectors = output.latents.double().permute(0, 2, 3, 1).reshape(-1, 3)
        distances = torch.cdist(vectors, start.double())
        chosen = distances.gather(1, output.codes.view(-1, 1))[:, 0]
        torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-6, rtol=1e-5)
        assert model.encoder.conv_in.weight.grad.isfinite().all()


def test_frozen_encoder_keeps_no_graph():
    model = make().train()
    assert saved_bytes(model, images()) > 0 and model(images()).latents.requires_grad
    every, model = saved_bytes(model, images()), copy.deepcopy(model)
    model.freeze_encoder()
    output = model(images())
    assert not output.latents.requires_grad and not output.commit.requires_grad and output.loss.requires_grad
    assert saved_bytes(model, images()) < 0.7 * every
