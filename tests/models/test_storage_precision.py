"""What a checkpoint is does not depend on the precision in which it was built, cast, saved or loaded."""

import itertools

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_checkpoints import NAMES, autoencoder_model, dit_pipeline
from transformers import AutoModel, TorchAoConfig

from hf_dpssl import ContrastiveConfig, SimCLRForPreTraining, VQAutoencoder, VQDiTPipeline
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.latent_training.diffusion import make_scheduler, make_transformer

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def stock_pipeline() -> VQDiTPipeline:
    """A pipeline on diffusers' own autoencoder, whose config can record nothing of ours."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**sizes, **blocks).eval()
    sizes = {"num_layers": 1, "width": 16, "num_heads": 2, "patch_size": 2, "latent_channels": 4, "latent_size": 8}
    transformer = make_transformer(**sizes, num_classes=2)
    return VQDiTPipeline(transformer, vae, make_scheduler("flow"), NAMES, latent_codec.fingerprint(vae))


@pytest.mark.extended
def test_pipeline_saved_in_one_precision_loads_in_every_other_and_knows_a_foreign_autoencoder(tmp_path):
    for make in (dit_pipeline, stock_pipeline):
        for first, second in itertools.permutations(PRECISIONS[1:]):
            folder = tmp_path / f"{make.__name__} {first} {second}"
            make().to(first).save_pretrained(folder / "1")
            VQDiTPipeline.from_pretrained(folder / "1", torch_dtype=torch.float32)
            VQDiTPipeline.from_pretrained(folder / "1", torch_dtype=second).save_pretrained(folder / "2")
            VQDiTPipeline.from_pretrained(folder / "2", torch_dtype=torch.float32)
        pipeline = make().to(torch.float16)
        next(pipeline.vae.encoder.parameters()).data.view(-1)[0] *= 1.01
        pipeline.save_pretrained(tmp_path / make.__name__)
        for dtype in PRECISIONS[:2]:
            with pytest.raises(ValueError, match="is not the one the transformer was trained on"):
                VQDiTPipeline.from_pretrained(tmp_path / make.__name__, torch_dtype=dtype)


def test_frozen_autoencoder_that_was_cast_and_cast_back_is_unchanged_and_one_that_was_tampered_with_is_not(tmp_path):
    for casts in [*itertools.permutations(PRECISIONS), (torch.bfloat16, torch.float32)]:
        model = autoencoder_model()
        model.freeze_encoder()
        fingerprint = model.fingerprint()
        for dtype in casts:
            model.to(dtype)
        model.save_pretrained(tmp_path)
        loaded = VQAutoencoder.from_pretrained(tmp_path, dtype=torch.float32)
        loaded.check_encoder_unchanged()
        assert model.fingerprint() == loaded.fingerprint() == fingerprint
        loaded.encoder.conv_in.weight.data[0, 0, 0, 0] += 0.25
        with pytest.raises(RuntimeError, match="frozen tensors have changed"):
            loaded.save_pretrained(tmp_path / "never")
        assert not (tmp_path / "never").exists()


def test_frozen_config_without_record_is_refused_with_the_call_that_makes_one(tmp_path):
    model = autoencoder_model()
    model.config.encoder_frozen = True
    with pytest.raises(RuntimeError, match="call model.freeze_encoder()"):
        model.save_pretrained(tmp_path / "never")
    model.freeze_encoder()
    model.save_pretrained(tmp_path)


def test_models_built_in_bfloat16_keep_codebook_and_calibration_in_float32_and_train():
    model = AutoModel.from_config(autoencoder_model().config, dtype=torch.bfloat16)
    assert model.encoder.conv_in.weight.dtype == torch.bfloat16
    assert {t.dtype for t in model.quantizer.state_dict().values()} == {torch.float32, torch.int64}
    start = model.quantizer.codebook.clone()
    model.train()(torch.rand(4, 3, 16, 16)).loss.backward()
    assert not torch.equal(model.quantizer.codebook, start)

    config = ContrastiveConfig("resnet10t", {"channels": [8, 8, 16, 16]}, temperature="auto", learnable_dof=True)
    for model in (SimCLRForPreTraining._from_config(config, dtype=torch.bfloat16), SimCLRForPreTraining(config)):
        model.to(torch.bfloat16).train()
        assert {t.dtype for t in model.calibration.state_dict().values()} == {torch.float32, torch.int64}
        images = torch.rand(8, 3, 16, 16)
        model(images, images.flip(3)).loss.backward()


def test_quantised_autoencoder_is_that_of_its_checkpoint(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = autoencoder_model()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = VQAutoencoder.from_pretrained(tmp_path, quantization_config=config)
    assert sum("Int8" in type(parameter.data).__name__ for parameter in quantized.parameters()) == 8
    assert quantized.fingerprint() == model.fingerprint()
    images = torch.rand(2, 3, 16, 16)
    error = (quantized(images).pixel_values - model(images).pixel_values).abs().max()
    assert 0 < error < 0.05
    quantized.save_pretrained(tmp_path / "int8")
    assert VQAutoencoder.from_pretrained(tmp_path / "int8").fingerprint() == model.fingerprint()
