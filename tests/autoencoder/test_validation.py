"""Validation while an autoencoder trains: a mean over images, in eval mode, whatever the batches."""

import torch

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.training import Validation
from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images


def test_psnr_is_the_mean_over_the_images_of_all_batches_and_leaves_the_model_in_its_mode():
    table = ImageSource(load_images("digits"), image_size=8, batch_size=1, seed=0).training_table()
    rows = range(0, 1200, 4)  # 300 images are two batches
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8], "norm_num_groups": 4, "decoder_dropout": 0.5}
    model = VQAutoencoder(VQConfig(image_size=8, num_codes=8, **widths)).train()
    found = Validation(table, rows, 3).psnr(model)
    assert model.training
    images = table.readable_batch(rows)["images"].double() / 255
    with torch.no_grad():
        decoded = model.eval()(images.float() * 2 - 1).pixel_values.double().clamp(-1, 1)
    errors = (images - (decoded + 1) / 2).square().mean((1, 2, 3))
    expected = float((-10 * errors.log10()).mean())
    assert abs(found - expected) < 1e-3
    assert abs(found - float((-10 * errors[:256].log10()).mean())) > 1e-2  # the batches differ
