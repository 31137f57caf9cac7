"""Validation while an autoencoder trains: a mean over images, in eval mode, whatever the batches."""

import pytest
import torch

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.training import Validation
from hf_dpssl.data.batches import ImageSource
from hf_dpssl.data.image_data import load_images


def make_model() -> VQAutoencoder:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": [8, 8], "norm_num_groups": 4, "decoder_dropout": 0.5}
    return VQAutoencoder(VQConfig(image_size=8, num_codes=8, **widths)).train()


def digits():
    return ImageSource(load_images("digits"), image_size=8, batch_size=1, seed=0).training_table()


def _shared_psnr(rows: range) -> dict[str, torch.Tensor]:
    rank, table = torch.distributed.get_rank(), digits()
    validation, alone = (Validation(table, rows, 3, *process) for process in ([(rank, 2)], []))
    seen = sum(map(len, validation.batches))
    model = make_model()
    return {"images": torch.tensor(seen), "found": torch.tensor([v.psnr(model) for v in (validation, alone)])}


@pytest.mark.extended
def test_processes_share_the_images_and_find_the_psnr_of_all(run_in_two):
    for rows, seen in ((range(0, 1200, 4)[:299], [150, 149]), (range(1), [1, 0])):
        both = run_in_two(_shared_psnr, rows)
        assert [int(result["images"]) for result in both] == seen
        shared, alone = both[0]["found"]
        assert torch.equal(both[1]["found"], both[0]["found"]) and abs(shared - alone) < 1e-4


def test_psnr_is_the_mean_over_the_images_of_all_batches_and_leaves_the_model_in_its_mode():
    table = digits()
    rows = range(0, 1200, 4)  # 300 images are two batches
    model = make_model()
    found = Validation(table, rows, 3).psnr(model)
    assert model.training
    images = table.readable_batch(rows)["images"].double() / 255
    with torch.no_grad():
        decoded = model.eval()(images.float() * 2 - 1).pixel_values.double().clamp(-1, 1)
    errors = (images - (decoded + 1) / 2).square().mean((1, 2, 3))
    expected = float((-10 * errors.log10()).mean())
    assert abs(found - expected) < 1e-3
    assert abs(found - float((-10 * errors[:256].log10()).mean())) > 1e-2  # the batches differ
