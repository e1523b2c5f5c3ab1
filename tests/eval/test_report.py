"""The report: one file, every picture in it pixel for pixel, text as text."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.pixels import from_uint8, to_uint8
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score
from eval.report import Report, save_grid, score_row


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return from_uint8(torch.randint(0, 256, (count, 3, 8, 8), generator=rng, dtype=torch.uint8))


class Reader(HTMLParser):
    """Tags with their attributes, and the pictures that are in the page itself."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[Tensor] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.links.append(value)
        source = dict(attrs).get("src")
        if tag == "img":
            content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
            self.images.append(torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).movedim(-1, 0))


@pytest.fixture
def report() -> Report:
    return Report("Digits & co", "A <lead> of one line")


def test_the_page_holds_everything_itself(report: Report, tmp_path: Path) -> None:
    images = pictures(6)
    report.text("Words", "some")
    report.pairs("Pairs", images[:3], images[3:], captions=["20 dB", "21 dB", "22 dB"])
    report.classes("Classes", images, torch.tensor([2, 0, 2, 1, 0, 2]), ["zero", "one", "two"])
    report.nearest("Near", images[:2], images[2:].view(2, 2, 3, 8, 8), torch.tensor([[1.0, 2.0], [0.0, 3.5]]))
    report.curves("Curves", {"loss": ([1, 2, 3], [3.0, 2.0, 1.5]), "usage": ([1, 2], [0.1, 0.9])})
    report.histogram("Codes", torch.tensor([5, 0, 2, 9]))
    report.table("Table", [{"what": "a", "seconds": 1.23456}, {"what": "b", "picture count": 7}], "note")
    report.save(tmp_path / "report.html")
    page = Reader((tmp_path / "report.html").read_text())
    assert page.tags.count("section") == 7 and page.tags.count("svg") == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", report.html())
    assert len(page.images) == 3 + 6 + 6


def test_pictures_are_in_it_pixel_for_pixel(report: Report) -> None:
    images = pictures(5)
    report.classes("Classes", images, torch.tensor([1, 0, 1, 0, 0]), ["zero", "one"])
    page = Reader(report.html())
    assert torch.equal(torch.stack(page.images), to_uint8(images[[1, 3, 4, 0, 2]]))
    report.sections.clear()
    report.pairs("Pairs", images[:1], images[1:2])
    stacked = Reader(report.html()).images[0]
    assert torch.equal(stacked[:, :8], to_uint8(images[0]))
    assert torch.equal(stacked[:, -8:], to_uint8(images[1]))


def test_text_is_text(report: Report) -> None:
    report.text("<script>alert(1)</script>", "a & b < c")
    report.pictures("Row", {"<b>": pictures(1)}, {"<b>": ["<i>"]})
    report.table("Table", [{"<u>": "<s>"}])
    page = report.html()
    assert "&lt;script&gt;" in page and "a &amp; b &lt; c" in page and "Digits &amp; co" in page
    assert not {"script", "b", "i", "u", "s", "lead"} & set(Reader(page).tags)


def test_cells_of_a_table(report: Report) -> None:
    report.table("Table", [{"name": "a", "value": 0.123456, "protocol": "long"}, {"value": 12345.6, "n": 3}])
    page = report.html()
    assert re.findall(r"<th>(.*?)</th>", page) == ["name", "value", "protocol", "n"]
    cells = re.findall(r'<td class="(.*?)">(.*?)</td>', page)
    assert cells[:4] == [("", "a"), ("number", "0.1235"), ("protocol", "long"), ("", "")]
    assert cells[4:] == [("", ""), ("number", "1.235e+04"), ("protocol", ""), ("number", "3")]


@pytest.mark.parametrize(("value", "shown"), [(-1e-13, 0.0), (-2.5, -2.5), (0.3, 0.3)])
def test_only_rounding_below_zero_is_shown_as_zero(value: float, shown: float) -> None:
    made = PicturesRecord("made", "ab" * 32, 10, 8, 8, Origin.unknown())
    score = Score("fid@10", value, Provenance("distance", None, made, None, Computation("cpu", "float32", 1, {})))
    assert score_row(score)["value"] == shown
    assert "10 of made (abababab, 8x8" in score_row(score)["protocol"]


def test_captions_that_fit_nothing(report: Report) -> None:
    with pytest.raises(ValueError, match="row 'a': 2 pictures, 1 captions"):
        report.pictures("Row", {"a": pictures(2)}, {"a": ["x"]})
    with pytest.raises(ValueError, match=r"captions for \['b'\]"):
        report.pictures("Row", {"a": pictures(2)}, {"b": ["x", "y"]})


def test_a_grid_holds_the_pictures_in_their_places(tmp_path: Path) -> None:
    images = pictures(5)
    save_grid(images, tmp_path / "grid.png", columns=3, scale=2, gap=3)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png"))).movedim(-1, 0)
    assert sheet.shape == (3, 2 * 19 + 3, 3 * 19 + 3)
    for place, picture in enumerate(to_uint8(images)):
        top, left = 3 + place // 3 * 19, 3 + place % 3 * 19
        block = sheet[:, top : top + 16, left : left + 16]
        assert torch.equal(block[:, ::2, ::2], picture) and torch.equal(block[:, 1::2, 1::2], picture)
        sheet[:, top : top + 16, left : left + 16] = 255
    assert (sheet == 255).all()
    with pytest.raises(ValueError, match="no pictures for"):
        save_grid(images[:0], tmp_path / "grid.png", columns=3)
