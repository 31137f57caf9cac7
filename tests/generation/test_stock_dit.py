"""diffusers' own DiTPipeline: the same images from the same weights, its folders load, and ours become such folders."""

import copy
import json

import pytest
import torch
from cases import for_each
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from foreign_processes import run_foreign
from tiny_pipelines import generator, make_dit, make_exportable

from hf_dpssl import VQDiTPipeline
from hf_dpssl.autoencoder import latent_codec
from hf_dpssl.generation.stock_dit import stock_autoencoder

SYNONYMS = {0: "tench, Tinca tinca", 1: "goldfish, Carassius auratus", 134: "crane", 517: "crane"}


def make_stock(out_channels: int = 8) -> DiTPipeline:
    """DiTPipeline as published for ImageNet, but small: 1000 classes, AutoencoderKL, learned variance, DDIM."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, out_channels=out_channels, num_layers=3, sample_size=8
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    names = {i: SYNONYMS.get(i, f"thing {i}") for i in range(1000)}
    stock = DiTPipeline(transformer.eval(), vae.eval(), scheduler, names)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture(scope="module")
def stock():
    return make_stock()


@pytest.fixture(scope="module")
def ours(stock, tmp_path_factory):
    """The stock folder, with the names as in the published one, loaded by our class."""
    folder = tmp_path_factory.mktemp("stock")
    stock.save_pretrained(folder)
    index = folder / "model_index.json"
    names = {str(i): SYNONYMS.get(i, f"thing {i}") for i in range(1000)}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))
    pipeline = VQDiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.extended
@for_each("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@for_each("labels", [[207], [207, 1, 999, 207]])
@for_each("guidance_scale", [1.0, 4.0])
@for_each("precompute", [True, False])
def test_images_equal_those_of_the_stock_pipeline(stock, ours, scheduler, labels, guidance_scale, precompute):
    stock.scheduler = scheduler.from_config(stock.scheduler.config)
    ours.scheduler = scheduler.from_config(stock.scheduler.config)
    ours.precompute_modulations = precompute
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 8, "output_type": "np"}
    expected = stock(labels, generator=generator(), **options).images
    found = ours(labels, generator=generator(), **options).images
    ours.precompute_modulations = True
    assert expected.std() > 0.02 and abs(found - expected).max() < 1e-4


def test_names_of_a_stock_folder_work_with_each_synonym(ours):
    assert ours.class_ids(["tench", "Tinca tinca", "tench, Tinca tinca", 0]) == [0, 0, 0, 0]
    assert ours.class_ids("goldfish") == [1] and ours.class_ids(torch.tensor([3, 4])) == [3, 4]
    with pytest.raises(ValueError, match="known are for example .*goldfish"):
        ours.class_ids("goldfsh")
    with pytest.raises(ValueError, match=r"class ids lie in \[0, 999\], got 1000"):
        ours.class_ids(1000)


def test_a_name_has_the_id_that_diffusers_gives_it_or_is_refused_as_of_several_classes(ours):
    names = ["crane", "tench, Tinca tinca", "heron", "maillot", "maillot, tank suit", "dog, pug", "pug, moth", *"abc"]
    names.append("heron")
    in_file = {str(i): names[i] for i in sorted(range(11), key=str)}  # 10 before 2
    pipeline = make_dit(names)
    pipeline.register_to_config(id2label=in_file)
    stock = DiTPipeline(None, None, None, id2label=in_file)
    assert pipeline.class_ids("tench, Tinca tinca") == [1]
    several = {"heron": [2, 10], "maillot": [3, 4], "pug": [5, 6]}
    assert stock.get_label_ids(["heron"]) == [2]
    for name, expected in stock.labels.items():
        if name not in several:
            assert pipeline.class_ids(name) == stock.get_label_ids([name]) == [expected]
            continue
        message = rf"'{name}' is a name of classes {several[name]}: give the id \(diffusers takes {expected}\)"
        with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
            pipeline.class_ids(name)


def test_stock_folder_without_names_numbers_its_classes_and_survives_saving(stock, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    pipeline = VQDiTPipeline.from_pretrained(tmp_path / "stock")
    assert len(pipeline.class_names) == 1000 and pipeline.class_ids([999]) == [999]
    pipeline.save_pretrained(tmp_path / "ours")
    again = VQDiTPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    options = {"generator": generator(), "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(again([7], **options).images, ours_images(pipeline, [7], **options | {"generator": generator()}))


def ours_images(pipeline, labels, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(labels, **options).images


def test_pictures_go_through_autoencoder_kl(ours):
    picture = torch.rand(3, 16, 16, generator=generator(3))
    mask = torch.zeros(16, 16)
    mask[:6] = 1
    options = {"generator": generator(), "num_inference_steps": 4, "output_type": "pt"}
    found = ours([1], image=picture, mask_image=mask, **options).images
    torch.testing.assert_close(found[0, :, 6:], picture[:, 6:], rtol=0, atol=1e-6)
    assert (found[0, :, :6] - picture[:, :6]).abs().mean() > 0.05


def test_other_autoencoders_of_diffusers_encode_decode_and_draw():
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    widths = {"down_block_out_channels": (8, 16), "up_block_out_channels": (8, 16), "norm_num_groups": 4}
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "scaling_factor": 0.5}
    stock = make_stock()
    pixel_values = torch.rand(2, 3, 16, 16) * 2 - 1
    for vae in (AsymmetricAutoencoderKL(**blocks, **widths), AutoencoderTiny(**small, **counts)):
        vae.eval()
        with torch.no_grad():
            encoded = vae.encode(pixel_values)
            encoded = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()
            latents = latent_codec.encode(vae, pixel_values)
            torch.testing.assert_close(latents, encoded * vae.config.scaling_factor, rtol=0, atol=0)
            torch.testing.assert_close(latent_codec.decode(vae, latents), vae.decode(encoded).sample)
        pipeline = VQDiTPipeline(stock.transformer, vae, stock.scheduler, vae_fingerprint=latent_codec.fingerprint(vae))
        pipeline.set_progress_bar_config(disable=True)
        options = {"image": pixel_values / 2 + 0.5, "num_inference_steps": 2, "output_type": "pt"}
        assert pipeline([1, 2], generator=generator(), **options).images.shape == pixel_values.shape
        pipeline.vae = copy.deepcopy(vae)
        pipeline.vae.register_to_config(scaling_factor=2.0)
        with pytest.raises(ValueError, match=f"scaling_factor is 2 and was {vae.config.scaling_factor}"):
            pipeline([1, 2], generator=generator(), **options)


FOREIGN = """
from diffusers import DiTPipeline
found = {}
for folder in ("VQModel", "AutoencoderKL"):
    pipeline = DiTPipeline.from_pretrained(folder)
    assert sorted(pipeline.labels) == ["cat", "dog", "horse"], pipeline.labels
    assert type(pipeline.vae).__name__ == folder
    options = {"guidance_scale": 3.0, "num_inference_steps": 6, "generator": torch.manual_seed(0), "output_type": "np"}
    found[folder] = pipeline(pipeline.get_label_ids(["dog", "cat"]), **options).images.tolist()
print(json.dumps(found))
"""


@pytest.mark.extended
def test_export_gives_the_same_images_where_hf_dpssl_cannot_be_imported(tmp_path):
    expected = {}
    for quantizer, folder in (("vq", "VQModel"), ("kl", "AutoencoderKL")):
        pipeline = make_exportable(quantizer)
        pipeline.export_stock(tmp_path / folder)
        options = {"guidance_scale": 3.0, "num_inference_steps": 6, "output_type": "pt"}
        expected[folder] = pipeline(["dog", "cat"], generator=torch.manual_seed(0), **options).images
    found = run_foreign(FOREIGN, tmp_path)
    for folder, images in expected.items():
        assert images.std() > 0.02
        torch.testing.assert_close(torch.tensor(found[folder]).permute(0, 3, 1, 2), images, rtol=0, atol=1e-4)


def test_null_class_of_an_exported_transformer_is_row_1000(tmp_path):
    pipeline = make_exportable()
    pipeline.export_stock(tmp_path / "stock")
    again = DiTPipeline.from_pretrained(tmp_path / "stock").transformer
    for name, tensor in pipeline.transformer.state_dict().items():
        found = again.state_dict()[name]
        if "embedding_table" in name:
            assert found.shape[0] == 1001 and torch.equal(found[:3], tensor[:3])
            assert torch.equal(found[1000], tensor[3])
        else:
            assert torch.equal(found, tensor)


@pytest.mark.parametrize("quantizer", ["vq", "kl"])
def test_our_pipeline_loads_its_own_export_and_draws_the_same_images(tmp_path, quantizer):
    pipeline = make_exportable(quantizer)
    pipeline.export_stock(tmp_path / "stock")
    again = VQDiTPipeline.from_pretrained(tmp_path / "stock")
    assert again.class_names == pipeline.class_names and again.null_class == 1000
    with pytest.raises(ValueError, match=r"class ids lie in \[0, 2\], got 3"):
        again.class_ids(3)
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "pt"}
    expected, found = (ours_images(p, ["dog", 0], generator=generator(), **options) for p in (pipeline, again))
    assert expected.std() > 0.02
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_exported_autoencoder_has_shifted_latents_and_the_same_reconstruction():
    vae = make_exportable().vae
    stock, pictures = stock_autoencoder(vae), torch.rand(2, 3, 16, 16, generator=generator()) * 2 - 1
    with torch.no_grad():
        latents = vae.encode_latents(pictures)
        shifted = stock.encode(pictures).latents
        torch.testing.assert_close(
            shifted, latents - torch.tensor(vae.config.latent_mean).view(1, 4, 1, 1), rtol=0, atol=1e-5
        )
        expected = vae.decode(vae.quantize(latents).quantized).pixel_values
        torch.testing.assert_close(stock.decode(shifted).sample, expected, rtol=0, atol=1e-4)


REFUSALS = [
    ({"objective": "flow"}, "FlowMatchEulerDiscreteScheduler has no scale_model_input"),
    ({"scheduler": EulerDiscreteScheduler(beta_end=0.02)}, "starts from noise of another scale"),
    ({"scheduler": DDPMScheduler(variance_type="fixed_large")}, "adds noise in its last step"),
    ({"latent_std": [1.0, 2.0, 1.0, 1.0]}, "scaled per channel"),
    ({"latent_std": None}, "has no latent_mean and latent_std"),
    ({"code_distance": "cosine"}, "not by 'cosine'"),
    ({"quantizer": "none"}, "no plain autoencoder"),
    ({"decoder_block_out_channels": [16, 16]}, r"differ in block_out_channels \(\[8, 16\] and \[16, 16\]\)"),
]  # fmt: skip


@for_each("change, reason", REFUSALS)
def test_export_is_refused_with_the_reason(tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        make_exportable(**change).export_stock(tmp_path / "stock")
    assert not (tmp_path / "stock").exists()


def test_export_is_refused_with_a_learned_variance_in_use(tmp_path, stock):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    pipeline = VQDiTPipeline(make_stock().transformer, stock.vae, scheduler)
    with pytest.raises(ValueError, match="takes a learned variance"):
        pipeline.export_stock(tmp_path / "stock")
