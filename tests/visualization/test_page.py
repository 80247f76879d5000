"""The report page: what is in it, escaped, in order, with its pictures inside."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from cdetr_jax.visualization.page import Page


class _Reader(HTMLParser):
    """Texts by the tag around them, and the pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.pictures = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.pictures.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append((self.open[-1], data))


def test_a_page_keeps_text_tables_and_pictures(tmp_path):
    page = Page("cats & <dogs>")
    page.heading("Table")
    page.table(["class", "AP"], [["<b>", "0.5"]])
    page.command('a "b"\n  c')
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    page.picture(Image.fromarray(pixels), 'the "worst"')
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    page.picture(tmp_path / "a.jpg", "a file")
    page.save(tmp_path / "page.html")

    text = (tmp_path / "page.html").read_text()
    assert "http" not in text, "it needs no network"
    reader = _Reader()
    reader.feed(text)
    assert not reader.open
    assert reader.texts == [
        ("title", "cats & <dogs>"), ("h1", "cats & <dogs>"), ("h2", "Table"), ("th", "class"), ("th", "AP"),
        ("td", "<b>"), ("td", "0.5"), ("pre", 'a "b"\n  c'), ("figcaption", 'the "worst"'), ("figcaption", "a file"),
    ]  # fmt: skip
    assert [picture["alt"] for picture in reader.pictures] == ['the "worst"', "a file"]
    kinds, data = zip(*(picture["src"].split(";base64,") for picture in reader.pictures), strict=True)
    assert kinds == ("data:image/png", "data:image/jpeg")
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[0]))))
    np.testing.assert_array_equal(decoded, pixels)
