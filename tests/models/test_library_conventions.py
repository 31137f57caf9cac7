"""What transformers, diffusers, timm, accelerate and peft ask of a model class, and how their own classes answer."""

import os

import pytest
import timm
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file
from tiny_checkpoints import autoencoder_model, dit_pipeline, encoder_model, gan_model
from transformers import AutoConfig, AutoModel, TimmWrapperModel, Trainer, TrainingArguments

from hf_dpssl import ContrastiveEncoder, PatchDiscriminator, PatchDiscriminatorConfig, VQAutoencoder, VQDiTPipeline


def discriminator_model() -> PatchDiscriminator:
    return PatchDiscriminator(PatchDiscriminatorConfig(width=8, image_size=16, spectral_norm=True)).eval()


def models() -> list:
    encoder = encoder_model().eval()
    return [autoencoder_model(), gan_model().eval(), encoder, encoder.encoder, discriminator_model()]


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16) * 2 - 1


def weight_files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if name.endswith(".safetensors")}


def test_variant_of_a_pipeline_stands_beside_its_full_weights_and_leaves_them_alone(tmp_path):
    pipeline = dit_pipeline()
    pipeline.save_pretrained(tmp_path)
    before = weight_files(tmp_path / "vae")
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    after = weight_files(tmp_path / "vae")
    assert {name: after[name] for name in before} == before
    halves = [load_file(tmp_path / "vae" / name) for name in after.keys() - before.keys()]
    assert len(halves) > 2 and all("fp16" in name for name in after.keys() - before.keys())
    found = {name: tensor for half in halves for name, tensor in half.items()}
    assert found["encoder.conv_in.weight"].dtype == torch.float16
    full = VQDiTPipeline.from_pretrained(tmp_path)
    half = VQDiTPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    for name, tensor in full.vae.state_dict().items():
        assert torch.equal(half.vae.state_dict()[name], tensor.to(found[name].dtype)), name


def test_timm_layout_has_variants_and_shards_that_stock_classes_load(tmp_path):
    encoder = encoder_model().encoder.eval()
    encoder.save_pretrained(tmp_path)
    before = weight_files(tmp_path)
    encoder.half().save_pretrained(tmp_path, variant="fp16")
    assert weight_files(tmp_path).keys() == before.keys() | {"model.fp16.safetensors"}
    assert weight_files(tmp_path)["model.safetensors"] == before["model.safetensors"]
    for loader in (ContrastiveEncoder, TimmWrapperModel):
        loaded = loader.from_pretrained(tmp_path, variant="fp16")
        assert loaded.dtype == torch.float16
        for name, tensor in encoder.timm_model.state_dict().items():
            assert torch.equal(loaded.timm_model.state_dict()[name], tensor), name
    encoder.float().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(weight_files(tmp_path / "shards")) > 2
    for loader in (ContrastiveEncoder, TimmWrapperModel):
        loaded = loader.from_pretrained(tmp_path / "shards").eval()
        pixel_values = images()
        assert torch.equal(loaded(pixel_values).pooler_output, encoder(pixel_values).pooler_output)


def test_timm_fine_tunes_from_our_folder_with_its_own_rule_for_grey_images(tmp_path):
    encoder = encoder_model().encoder
    encoder.save_pretrained(tmp_path)
    ours = encoder.timm_model.state_dict()
    for options in ({"num_classes": 5}, {"in_chans": 1}, {"in_chans": 1, "num_classes": 3}):
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
        found = model.state_dict()
        for name, tensor in ours.items():
            grey = "in_chans" in options and name == "conv1.0.weight"
            expected = tensor.sum(1, keepdim=True) if grey else tensor
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
        logits = model(torch.rand(2, options.get("in_chans", 3), 16, 16))
        assert logits.shape == (2, options.get("num_classes", encoder.num_features))


def test_trainer_reports_the_loss_of_evaluation_and_loads_the_best_model(tmp_path):
    model = autoencoder_model()
    rows = [{"pixel_values": image} for image in images(8)]
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    options |= {"use_cpu": True, "report_to": [], "learning_rate": 1e-2, "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **options)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and min(losses) == trainer.state.best_metric
    with torch.no_grad():
        expected = model.eval()(torch.stack([row["pixel_values"] for row in rows])).loss
    assert float(expected) == pytest.approx(min(losses), rel=1e-4)


def test_outputs_come_as_tuples_where_asked_and_misspelt_arguments_are_refused():
    for model in models():
        pixel_values = images()
        named = model(pixel_values)
        plain = model(pixel_values, return_dict=False)
        assert type(plain) is tuple and len(plain) == len(named.to_tuple())
        for found, expected in zip(plain, named.to_tuple(), strict=True):
            assert torch.equal(found, expected)
        model.config.return_dict = False
        assert type(model(pixel_values)) is tuple
        model.config.return_dict = True
        with pytest.raises(TypeError, match="paired_pixel_value"):
            model(pixel_values, paired_pixel_value=pixel_values)
    model = autoencoder_model()
    assert model(images(), return_loss=False).loss is None
    for output in (model.encode(images(), return_dict=False), model.decode(torch.zeros(1, 4, 8, 8), return_dict=False)):
        assert type(output) is tuple


def test_models_built_on_meta_get_the_weights_that_their_constructor_draws():
    for model in models():
        torch.manual_seed(7)
        expected = type(model)(model.config)
        with torch.device("meta"):
            found = type(model)(model.config)
        found.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*found.parameters(), *found.buffers()):
                tensor.fill_(-77)
        torch.manual_seed(7)
        found.init_weights()
        tensors = dict(found.named_parameters()) | dict(found.named_buffers())
        for name, tensor in (*expected.named_parameters(), *expected.named_buffers()):
            assert torch.equal(tensors[name], tensor), f"{type(model).__name__}.{name}"
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        found.init_weights()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_discriminator_is_known_to_the_auto_classes(tmp_path):
    model = discriminator_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PatchDiscriminatorConfig
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    pixel_values = images()
    assert type(loaded) is PatchDiscriminator
    assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_no_device_map_cuts_inside_what_has_a_shortcut(tmp_path):
    for model in models():
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        for share in (0.3, 0.5, 0.7):
            memory = {0: int(share * size), "cpu": 10 * size}
            names = list(model._no_split_modules)
            device_map = infer_auto_device_map(model, memory, no_split_module_classes=names)
            for name, module in model.named_modules():
                whole = type(module).__name__ in ("ResnetBlock2D", "Attention", "VectorQuantizer", "ContrastiveEncoder")
                assert not (whole and any(key.startswith(f"{name}.") for key in device_map)), (name, device_map)
    model = autoencoder_model()
    model.save_pretrained(tmp_path)
    spread = VQAutoencoder.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": 10**9})
    pixel_values = images()
    assert torch.equal(spread(pixel_values).pixel_values, model(pixel_values).pixel_values)


def test_adapters_are_saved_alone_as_by_the_classes_of_transformers(tmp_path):
    peft = pytest.importorskip("peft")
    for model, layer in (
        (autoencoder_model(), "conv1"),
        (encoder_model().encoder, "conv2"),
        (encoder_model(), "conv2"),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder).eval()
        try:
            model.add_adapter(peft.LoraConfig(target_modules=[layer]))
        except ValueError as error:
            pytest.skip(f"transformers wants another peft: {error}")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros as they start
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / "adapter")
        assert weight_files(folder / "adapter").keys() == {"adapter_model.safetensors"}
        loaded = type(model).from_pretrained(folder / "adapter").eval()
        pixel_values = images()
        with torch.no_grad():
            for found, expected in zip(loaded(pixel_values).to_tuple(), model(pixel_values).to_tuple(), strict=True):
                assert torch.equal(found, expected)
