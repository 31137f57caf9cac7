"""The arm of claim 1 that learns a map from neighbours of pixels: its rows, its loss, and what it saves."""

import json
import sys

import numpy as np
import pytest
import torch
from launches import REPOSITORY
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.manifold._t_sne import _joint_probabilities, _kl_divergence
from sklearn.metrics.pairwise import euclidean_distances

from hf_dpssl import evaluation
from hf_dpssl.autoencoder.measures import load_pictures
from hf_dpssl.embedding import ImageEmbedder

sys.path.insert(0, str(REPOSITORY / "training" / "evidence"))
import parametric_tsne

SMALL = ["--dataset", "digits", "--image_size", "16", "--model_args", '{"channels": [8, 8, 8, 8], "stem_width": 8}']


def test_every_epoch_of_parametric_t_sne_draws_each_row_at_most_once_in_an_order_of_its_own():
    first, second, other = (torch.stack(list(parametric_tsne.drawn_rows(10, 4, 4, seed))) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    for epoch in (first[:2], first[2:]):
        assert len(epoch.flatten().unique()) == 8 and epoch.max() < 10
    assert not torch.equal(first[:2], first[2:])


def test_parametric_t_sne_learns_scikit_learns_objective_and_saves_the_encoder_that_it_measured(tmp_path):
    argv = [
        *SMALL,
        "--batch_size",
        "128",
        "--num_train_epochs",
        "6",
        "--perplexity",
        "10",
        "--output_dir",
        str(tmp_path),
    ]
    assert parametric_tsne.main(argv) == 0
    written = json.loads((tmp_path / "encoder/results.json").read_text())
    curve = [loss for _, loss in written["loss_curve"]]
    pictures = load_pictures("digits", 16, None)
    embedder = ImageEmbedder(str(tmp_path / "encoder"), kind="embeddings")
    found = {name: embedder.model(part.pixel_values).embeddings for name, part in pictures.items()}
    train, held_out = (found[name].detach() for name in ("train", "evaluation"))
    labels = {name: part.labels for name, part in pictures.items()}
    measured = evaluation.knn(train, labels["train"], held_out, labels["evaluation"], k=20, metric="euclidean")
    assert written["metrics"]["knn_top1_embeddings"] == pytest.approx(measured["knn_top1"], abs=0.5)
    pixels = pictures["train"].pixel_values.flatten(1).numpy()
    assert trustworthiness(pixels[:500], train[:500], n_neighbors=10) > 0.8  # .5 of a map at random
    # Up to the noise of batches, the last steps' loss is scikit-learn's for as many pictures in the saved map.
    [rows] = parametric_tsne.drawn_rows(len(pixels), 256, 1, 0)
    distances = euclidean_distances(PCA(50, random_state=0).fit_transform(pixels)[rows], squared=True)
    p = _joint_probabilities(distances.astype(np.float32), 10, verbose=0)
    wanted, _ = _kl_divergence(train[rows].double().numpy().ravel(), p, 1, len(rows), 2)
    assert curve[-1] == pytest.approx(wanted, rel=0.1) and curve[-1] < 0.7 * curve[0]


def test_parametric_t_sne_of_fewer_images_than_a_step_draws_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="1437 training images, fewer than the 1600 of a step: lower --batch_size"):
        parametric_tsne.main([*SMALL, "--batch_size", "800", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
