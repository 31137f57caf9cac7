"""Search among embeddings: against brute force, from the command line, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from pictures import noise, write_pictures
from PIL import Image
from tiny_encoders import save_ours

from hf_dpssl.cli.commands import main
from hf_dpssl.embedding.embedder import ImageEmbedder
from hf_dpssl.embedding.embedding_job import EmbedJob, embed_images
from hf_dpssl.embedding.embeddings_table import EmbeddingsTable, search_images


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(encoder, pictures, embeddings) folders."""
    base = tmp_path_factory.mktemp("made")
    save_ours(base / "encoder")
    write_pictures(base / "pictures")
    embed_images(EmbedJob(str(base / "encoder"), str(base / "pictures"), str(base / "embeddings"), rows_per_shard=10))
    return base / "encoder", base / "pictures", base / "embeddings"


def brute_force(bank: np.ndarray, query: np.ndarray, metric: str) -> list[tuple[float, int]]:
    """All similarities, best first, one pair after the other in float64."""
    found = []
    for i, row in enumerate(bank.astype(np.float64)):
        other = query.astype(np.float64)
        cosine = float(row @ other / np.sqrt((row @ row) * (other @ other)))
        found.append((cosine if metric == "cosine" else -float(np.sqrt(((row - other) ** 2).sum())), i))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_search_equals_brute_force(metric, made, tmp_path):
    encoder, _, folder = made
    table, paths = EmbeddingsTable(folder), []
    for seed in (200, 201):
        paths.append(tmp_path / f"{seed}.png")
        Image.fromarray(noise(seed, 16, 16)).save(paths[-1])
    found = search_images(table, paths, k=23, metric=metric)
    queries = ImageEmbedder(encoder, device="cpu").embed_pictures([Image.open(path) for path in paths])
    for rows, query in zip(found, queries, strict=True):
        expected = brute_force(table.embeddings.numpy(), query.numpy(), metric)
        assert [row["index"] for row in rows] == [index for _, index in expected]
        np.testing.assert_allclose([row["similarity"] for row in rows], [value for value, _ in expected], atol=1e-5)
        assert all(row["file"] == table.files[row["index"]] for row in rows)


def test_a_picture_of_the_set_finds_itself_first_with_its_class(made):
    _, pictures, folder = made
    found = search_images(EmbeddingsTable(folder), [pictures / "dog" / "007.png"], k=2, metric="euclidean")[0]
    assert found[0]["file"] == "dog/007.png" and found[0]["label"] == "dog" and found[0]["split"] == "train"
    assert found[0]["similarity"] == pytest.approx(0, abs=1e-5) and found[1]["similarity"] < -1e-5


def test_command_prints_rows_and_writes_json_and_grid(made, tmp_path, capsys):
    _, pictures, folder = made
    queries = [str(pictures / "cat" / "000.png"), str(pictures / "dog" / "001.png")]
    argv = [str(folder), *queries, "--k", "3", "--output", str(tmp_path / "found.json")]
    assert main(["search", *argv, "--grid", str(tmp_path / "grid.png")]) == 0
    printed = capsys.readouterr().out
    assert all(query in printed for query in queries) and "cat/000.png" in printed
    written = json.loads((tmp_path / "found.json").read_text())
    assert [len(entry["neighbours"]) for entry in written["queries"]] == [3, 3] and written["metric"] == "cosine"
    assert main(["search", *argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["queries"] == written["queries"]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 65 + 1, 4 * 65 + 1, 3)
    assert (grid[1:65, 1:65] == grid[1:65, 66:130]).all()  # a query, and itself as its nearest neighbour


def test_encoder_that_has_moved_is_given_and_another_one_refused(made, tmp_path):
    encoder, pictures, folder = made
    (tmp_path / "copy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "copy" / name).write_bytes((encoder / name).read_bytes())
    query = [pictures / "cat" / "000.png"]
    moved = search_images(EmbeddingsTable(folder), query, encoder=str(tmp_path / "copy"))
    assert moved == search_images(EmbeddingsTable(folder), query)
    save_ours(tmp_path / "other", model_args={"channels": [8, 8, 16, 24]})
    with pytest.raises(ValueError, match="is not the encoder that made"):
        search_images(EmbeddingsTable(folder), query, encoder=str(tmp_path / "other"))


def test_bad_input_says_what_is_allowed(made, tmp_path, capsys):
    _, pictures, folder = made
    query = str(pictures / "cat" / "000.png")
    (tmp_path / "words.png").write_bytes(b"no picture"), (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir(), (tmp_path / "begun" / "plan.json").write_text("{}")
    for argv, message in [
        ([str(folder), query, "--k", "24"], "k must lie in [1, 23]"),
        ([str(folder), query, "--k", "0"], "k must lie in [1, 23]"),
        ([str(folder), str(tmp_path / "words.png")], "words.png is not a readable picture"),
        ([str(folder), str(tmp_path / "nowhere.png")], "nowhere.png is not a readable picture"),
        ([str(tmp_path / "empty"), query], "empty: none"),
        ([str(tmp_path / "begun"), query], "unfinished: run the same hf-dpssl embed again"),
    ]:
        assert main(["search", *argv]) == 2
        assert message in capsys.readouterr().err


def test_pictures_of_a_changed_data_set_are_not_shown_for_others(tmp_path):
    save_ours(tmp_path / "encoder")
    mine = write_pictures(tmp_path / "pictures", 4)
    table = embed_images(EmbedJob(str(tmp_path / "encoder"), str(mine), str(tmp_path / "out")))
    assert np.array_equal(np.asarray(table.pictures([1])[0]), noise(2, 16, 16))
    assert len(table) == 4 and table.embeddings.dtype == torch.float32
    (mine / "cat" / "000.png").unlink()
    with pytest.raises(ValueError, match="is not what it was"):
        table.pictures([1])
