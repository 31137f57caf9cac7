"""Cached codes against direct encoding, with the guarantees of cached latents."""

import datasets
import numpy as np
import pytest
import torch
from cases import for_each
from tiny_latents import COUNT, assert_holds, build, encoded, make_autoencoder, make_table, written

from hf_dpssl.data.image_table import ImageTable
from hf_dpssl.latent_training.latent_cache import CodeTable, LatentTable


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(scope="module")
def autoencoder():
    return make_autoencoder()


@pytest.fixture
def table(tmp_path):
    return make_table(tmp_path / "set")


@torch.no_grad()
def encoded_codes(autoencoder, rows):
    """Codes of `noise` pictures, one by one: the nearest codebook entry of each latent."""
    latents = encoded(autoencoder, rows).permute(0, 2, 3, 1)  # (N, h, w, C)
    return torch.cdist(latents.double(), autoencoder.quantizer.codebook.double()).argmin(-1)


@pytest.mark.extended
@for_each("num_codes, dtype", [(16, np.int16), (2**15, np.int16), (2**15 + 1, np.int32)])
def test_cached_codes_are_those_of_the_images_in_the_smallest_type_that_holds_them(table, tmp_path, num_codes, dtype):
    autoencoder = make_autoencoder(num_codes=num_codes)
    with torch.no_grad():
        autoencoder.quantizer.codebook[-8:].copy_(encoded(autoencoder, [0]).permute(0, 2, 3, 1).flatten(0, 2)[:8])
    cached = build(autoencoder, table, tmp_path / "cache", content="codes")
    expected = encoded_codes(autoencoder, range(COUNT))
    assert all(shard.dtype == dtype and isinstance(shard, np.memmap) for shard in cached.shards)
    assert cached.codes().dtype == torch.int64 and torch.equal(cached.codes(), expected)
    assert int(expected.max()) == num_codes - 1 or num_codes - 8 in expected
    batch = cached.__getitems__([(3, row) for row in (22, 0, 9)])
    assert torch.equal(batch["codes"], expected[[22, 0, 9]]) and batch["labels"].tolist() == [1, 0, 0]
    assert batch["sample_ids"].tolist() == [22, 0, 9] and batch["epoch"] == 3 and "latents" not in batch


def test_cache_of_codes_is_reused_finished_and_rebuilt_as_that_of_latents(autoencoder, table, tmp_path):
    folder = tmp_path / "cache"
    build(autoencoder, table, folder, content="codes")
    before = written(folder)
    build(autoencoder, table, folder, content="codes")
    assert written(folder) == before
    for name in ("index.json", "codes-00001.npy"):
        (folder / name).unlink()
    finished = build(autoencoder, table, folder, content="codes")
    assert torch.equal(finished.codes(), encoded_codes(autoencoder, range(COUNT)))
    assert written(folder)["codes-00000.npy"] == before["codes-00000.npy"]
    changed = make_autoencoder()
    with torch.no_grad():
        changed.quantizer.codebook.copy_(changed.quantizer.codebook.flip(0))
    rebuilt = build(changed, table, folder, content="codes")
    assert rebuilt.fingerprint != finished.fingerprint
    assert torch.equal(rebuilt.codes(), encoded_codes(changed, range(COUNT)))


def test_codes_latents_and_splits_are_not_taken_for_one_another(autoencoder, table, tmp_path):
    held_out = ImageTable(table.data, table.data.evaluation, 16)
    fingerprints = {
        build(autoencoder, images, tmp_path / f"{name} {content}", content=content).fingerprint
        for name, images in (("train", table), ("held out", held_out))
        for content in ("latents", "codes")
    }
    assert len(fingerprints) == 4
    build(autoencoder, table, tmp_path / "cache", content="codes")
    with pytest.raises(ValueError, match="is a cache of codes, not of latents"):
        LatentTable(tmp_path / "cache")
    assert_holds(build(autoencoder, table, tmp_path / "cache"), autoencoder, range(COUNT))
    with pytest.raises(ValueError, match="is a cache of latents, not of codes"):
        CodeTable(tmp_path / "cache")
    with pytest.raises(ValueError, match="content must be one of"):
        build(autoencoder, table, tmp_path / "cache", content="pixels")


def test_autoencoder_without_codes_has_none_to_cache(table, tmp_path):
    with pytest.raises(ValueError, match=r"quantizer='none'\) has no codes to cache"):
        build(make_autoencoder(quantizer="none"), table, tmp_path / "cache", content="codes")
    assert not (tmp_path / "cache").exists()
