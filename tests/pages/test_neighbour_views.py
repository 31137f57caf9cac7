"""A bank of pictures in an encoder's eyes: neighbours against a loop, places on the map, the page."""

import json
import math
import re

import pytest
import torch
from tiny_encoders import save_ours

from hf_dpssl.pages.demo_outputs import example_pictures
from hf_dpssl.pages.neighbour_views import EncoderView, PictureBank
from hf_dpssl.pages.uploads import read_upload


@pytest.fixture(scope="module")
def bank():
    return PictureBank("digits", 40)


@pytest.fixture(scope="module", params=[4, 2], ids=["t-sne", "2-d head"])
def view(request, bank, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_ours(folder, projection_dim=request.param)
    return EncoderView(str(folder), bank)


def test_bank_is_spread_over_the_held_out_digits(bank):
    assert len(bank) == 40 and len(set(bank.labels)) >= 8
    assert bank.class_names == [str(digit) for digit in range(10)]
    assert bank.name(0) == str(bank.labels[0]) and bank.thumbnails.shape == (40, 3, *bank.pictures[0].size)


def test_neighbours_are_those_of_a_loop_over_cosines(view, bank):
    picture = bank.pictures[7]
    indices, similarities = view.neighbours(picture, 5)
    features = view.embedder.embed_pictures(bank.pictures)
    cosines = [float(torch.cosine_similarity(features[7], row, dim=0)) for row in features]
    assert indices == sorted(range(40), key=lambda i: -cosines[i])[:5]
    assert indices[0] == 7 and similarities == pytest.approx(sorted(cosines)[::-1][:5], abs=1e-5)


def test_a_picture_of_the_bank_stands_at_its_own_place_or_amid_its_neighbours_by_their_likeness(
    view, bank, monkeypatch
):
    place = view.place(bank.pictures[3])
    if view.head is not None:
        torch.testing.assert_close(place, view.places[3], atol=1e-5, rtol=1e-4)
    else:  # amid its five neighbours, the nearer the more they are like it: e times the weight for 0.02 of cosine
        indices, cosines = view.neighbours(bank.pictures[3], 5)
        assert indices[0] == 3
        cosines = [1.0, 0.99, 0.98, 0.95, 0.5]  # an untrained encoder's are all alike
        monkeypatch.setattr(view, "neighbours", lambda *_: (indices, cosines))
        place = view.place(bank.pictures[3])
        weights = [math.exp((cosine - 1) / 0.02) for cosine in cosines]
        places = [weight * view.places[i].double() for i, weight in zip(indices, weights, strict=True)]
        torch.testing.assert_close(place.double(), sum(places) / sum(weights), atol=1e-3, rtol=1e-3)
    assert view.map_name == ("t-SNE of its features" if view.head is None else "the encoder's own 2-D head")


def test_page_has_all_pictures_and_the_new_one_with_a_ring(view, bank):
    for picture, count in ((None, 40), (read_upload(example_pictures(1)[0]), 41)):
        page = view.map_page(picture, "Map <of> digits")
        content = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page).group(1))
        assert len(content["labels"]) == len(content["names"]) == count == len(content["maps"][0]["points"]) // 2
        assert content["marked"] == (-1 if picture is None else 40)
        assert "Map &lt;of&gt; digits" in page and (picture is None or content["names"][40] == "your picture")


def test_a_bank_of_an_unknown_data_set_is_refused():
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        PictureBank("./no-such-folder")
