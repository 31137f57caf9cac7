"""What the tests keep of earlier runs is what doing it again gives."""

import copy

import pytest
import torch
from PIL import Image
from repeated_work import Unrendered, keep_counted_operations

from hf_dpssl import VQAutoencoder, VQConfig
from hf_dpssl.autoencoder.training import step_flops
from hf_dpssl.data.decoding import decode_image, to_square_tensor
from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.runs import plots


def test_digits_are_those_of_their_split_rows_and_size_whether_preloaded_or_read_in_batches():
    data = load_images("digits")
    for split in (data.evaluation, data.train, data.train.select(range(30, 90))):
        rows = list(range(0, len(split), 29))
        labels = [split[row]["label"] for row in rows]
        for size in (16, 12):
            expected = torch.stack([to_square_tensor(decode_image(split[row]["image"]), size) for row in rows])
            for _ in range(2):
                whole, unread = ImageTable(data, split, size), ImageTable(data, split, size)
                assert whole.preload(2**24) == {} and unread.preload(10) == {}
                assert unread.images is None and len(whole.images) == len(split)
                assert torch.equal(whole.images[rows], expected) and whole.labels[rows].tolist() == labels
                batch = unread.readable_batch(rows)
                assert torch.equal(batch["images"], expected) and batch["labels"].tolist() == labels
                whole.images.zero_()  # is nobody else's
                batch["images"].zero_()


@pytest.mark.extended
def test_operations_are_counted_anew_for_another_configuration_size_or_frozen_encoder():
    small = dict(image_size=8, encoder_block_out_channels=[4, 4], norm_num_groups=2, num_codes=8)
    models = [VQAutoencoder(VQConfig(**small)), VQAutoencoder(VQConfig(**small | {"norm_num_groups": 4}))]
    models.append(VQAutoencoder(VQConfig(**small | {"encoder_block_out_channels": [8, 8]})))
    models.append(copy.deepcopy(models[0]))
    models[-1].encoder.requires_grad_(False)
    cases = [(model, size, learns) for model in models for size in (8, 16) for learns in (True, False)]
    expected = [step_flops(model, size, train_encoder=learns) for model, size, learns in cases]
    count = keep_counted_operations()
    for _ in range(2):
        assert [count(model, size, train_encoder=learns) for model, size, learns in cases] == expected
    assert len(set(expected)) > 6


def test_an_unrendered_figure_has_the_size_of_a_rendered_one(tmp_path, monkeypatch):
    history = [{"step": step, **{f"loss {i}": step / (i + 1) for i in range(6)}} for step in range(3)]
    plots.plot_curves(history, tmp_path / "rendered.png", title="curves")
    monkeypatch.setattr(plots, "Figure", Unrendered)
    plots.plot_curves(history, tmp_path / "unrendered.png", title="curves")
    rendered, unrendered = (Image.open(tmp_path / f"{name}.png") for name in ("rendered", "unrendered"))
    assert rendered.size == unrendered.size
    assert rendered.convert("L").getextrema()[0] < 128 and unrendered.getextrema() == (255, 255)
