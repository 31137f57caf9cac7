"""A small image set, an autoencoder for it, the cache of its latents, and what that should hold."""

from __future__ import annotations

import torch
from datasets import ClassLabel
from pictures import BROKEN, noise, row, write_parquet

from hf_dpssl.data.image_data import load_images
from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.latent_training.latent_cache import build_latent_cache
from hf_dpssl.models.modeling_vq import VQAutoencoder, VQConfig

COUNT = 23


def make_autoencoder(seed=0, **options):
    torch.manual_seed(seed)
    widths = dict(encoder_block_out_channels=[8, 8], norm_num_groups=4)
    config = VQConfig(**(dict(image_size=16, num_codes=16, mid_block_attention=False, **widths) | options))
    return VQAutoencoder(config).eval()


def make_table(path, broken=(), first=0, on_bad_image="error", preload=False, size=16):
    images = [BROKEN if i in broken else row(first + i, 16, 16) for i in range(COUNT)]
    labels = ([i % 3 for i in range(COUNT)], ClassLabel(names=["a", "b", "c"]))
    write_parquet(path / "train.parquet", images, label=labels)
    write_parquet(path / "test.parquet", [row(500, 16, 16)], label=([0], labels[1]))
    data = load_images(str(path))
    table = ImageTable(data, data.train, size, on_bad_image)
    if preload:
        table.preload(2**20)
    return table


def build(autoencoder, table, folder, **options):
    defaults = dict(batch_size=4, rows_per_shard=10)
    return build_latent_cache(autoencoder, table, folder, **(defaults | options))


@torch.no_grad()
def encoded(autoencoder, rows, first=0):
    """Latents of `noise` pictures, encoded one by one, without table or cache."""
    pixels = [torch.from_numpy(noise(first + i, 16, 16)).permute(2, 0, 1)[None] / 127.5 - 1 for i in rows]
    return torch.cat([autoencoder.encode(p).latents for p in pixels])


def assert_holds(cached, autoencoder, rows, first=0):
    rows = list(rows)
    assert len(cached) == len(rows)
    assert cached.labels.tolist() == [i % 3 for i in rows]
    found = cached.latents(torch.arange(len(rows)))
    assert found.dtype == torch.float32 and found.shape == (len(rows), 4, 8, 8)
    assert torch.allclose(found, encoded(autoencoder, rows, first), atol=1e-5)


def written(folder):
    """When each file was last written, and which file it is."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
