"""Pictures and drawings as HTML: what is text stays text, and pixels are those of the picture."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import torch
from PIL import Image

from hf_dpssl.pages.demo_outputs import about_models
from hf_dpssl.pages.page_pictures import curves_svg, map_svg, picture_grid, to_pictures

BAD = '"><script>alert(1)</script>&amp;'


class Read(HTMLParser):
    """Tags, attribute values and text as a browser reads them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.values, self.text = set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.values += [value for _, value in attributes]

    def handle_data(self, data):
        self.text += data


def test_names_of_classes_and_pictures_cannot_become_markup():
    picture = Image.new("RGB", (2, 2))
    grid = Read(picture_grid([picture], [BAD], download=BAD, alternatives=[BAD]))
    assert grid.tags == {"div", "figure", "a", "img", "figcaption"} and grid.text == BAD
    assert BAD in grid.values and f"{BAD}-0.png" in grid.values
    points = Read(map_svg(torch.rand(3, 2), [0, 1, 0], [BAD, "b"], BAD))
    assert points.tags == {"svg", "g", "text"} and points.text == f"{BAD}{BAD}b" and BAD in points.values
    curves = Read(curves_svg({"loss": [1.0, 0.5]}, BAD))
    assert curves.tags == {"svg", "polyline"} and BAD in curves.values


def test_pictures_have_the_rounded_pixels_and_addresses_hold_them_losslessly():
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    expected = np.rint((np.clip(images.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8)
    pictures = to_pictures(images)
    for picture, pixels in zip(pictures, expected, strict=True):
        assert (np.asarray(picture).transpose(2, 0, 1) == pixels).all()
    address = next(v for v in Read(picture_grid(pictures[:1], ["one"])).values if v.startswith("data:image/png"))
    stored = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert (np.asarray(stored) == np.asarray(pictures[0])).all()


def test_a_page_says_what_its_models_are_on_what_and_for_how_long_they_were_trained(tmp_path):
    (tmp_path / "mine").mkdir()
    results = {"dataset": "/home/me/<b>faces", "training": {"seconds": 90}}
    (tmp_path / "mine" / "results.json").write_text(json.dumps(results))
    text = about_models({"dit": str(tmp_path / "mine"), "dae": "no id"})
    assert "<b>dit</b>: mine, trained on &lt;b&gt;faces, for 1.5 min" in text and str(tmp_path) not in text
    assert "<b>dae</b>: no id, training data not recorded, time not recorded" in text
