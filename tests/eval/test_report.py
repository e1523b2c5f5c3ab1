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

from eval.audit import Audit
from eval.bootstrap import Interval, share_interval
from eval.pixels import from_uint8, to_uint8
from eval.protocol import ProtocolRecord
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score
from eval.report import (
    Report,
    class_accuracy,
    evaluation_report,
    nearest_pictures,
    pictures_at,
    save_grid,
    score_row,
)


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


def test_films_are_in_it_byte_for_byte(tmp_path: Path) -> None:
    page = Report("Films", "")
    page.films("Clips", {"one": b"GIF89a one", "two": b"GIF89a two"}, width=96)
    found = re.findall(r'<img src="data:image/gif;base64,([^"]+)" width="96" alt="(one|two) 1">', page.html())
    assert [(base64.b64decode(content), name) for content, name in found] == [
        (b"GIF89a one", "one"),
        (b"GIF89a two", "two"),
    ]


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


# ---- the page of an evaluation


def made(name: str, value: float, protocol: str | None = None, reference: bool = True) -> Score:
    sets = [PicturesRecord(which, "ab" * 32, 10, 8, 8, Origin.unknown()) for which in ("made", "real")]
    asked = protocol and ProtocolRecord(protocol, "paper", 10, True, None, "round", "real pictures", ())
    computed = Computation("cpu", "float32", 1, {})
    record = Provenance(f"what {name} is", None, sets[0], sets[1] if reference else None, computed, asked)
    return Score(name, value, record)


def uint8(count: int, seed: int = 0) -> Tensor:
    return to_uint8(pictures(count, seed))


def test_pictures_at_their_numbers_over_batches() -> None:
    images = uint8(11)
    index = torch.tensor([7, 0, 10, 7])
    read = []
    batches = (read.append(number) or part for number, part in enumerate(torch.cat((images, images)).split(4)))
    assert torch.equal(pictures_at(batches, index), images[index])
    assert read == [0, 1, 2]
    with pytest.raises(ValueError, match="picture 12 asked of 11"):
        pictures_at(images.split(4), torch.tensor([3, 12]))


def test_the_nearest_pictures_are_those_of_all_pairs() -> None:
    """Sample 5 is picture 3 of the bank, so it comes first, at distance 0."""
    samples, bank = uint8(9), uint8(20, seed=1)
    samples[5] = bank[3]
    features = [images.flatten(1).float()[:, :50] for images in (samples, bank)]
    near = nearest_pictures(*features, samples.split(4), bank.split(7), "pixels", "real", rows=4, count=3)
    distance = torch.cdist(features[0].double(), features[1].double())
    order = distance.min(1).values.argsort()[:4]
    expected, index = distance[order].sort(1)
    assert near.sample.tolist() == order.tolist() and near.sample[0] == 5 and near.distances[0, 0] == 0
    assert torch.equal(near.index, index[:, :3]) and near.index[0, 0] == 3
    torch.testing.assert_close(near.distances.double(), expected[:, :3], rtol=1e-5, atol=1e-3)
    assert torch.equal(near.samples, samples[order]) and torch.equal(near.pictures, bank[index[:, :3]])
    assert near.looked == 9 and near.typical == pytest.approx(float(distance.min(1).values.median()), rel=1e-5)
    some = nearest_pictures(*features, samples.split(4), bank.split(7), "pixels", "real", rows=2, looked=4)
    assert some.looked == 3 and set(some.sample.tolist()) <= {0, 3, 6}


def test_the_page_of_an_evaluation_has_all_that_was_gathered() -> None:
    samples, bank = uint8(6), uint8(8, seed=1)
    near = nearest_pictures(
        samples.flatten(1).float(), bank.flatten(1).float(), [samples], [bank], "pixels", "training set", 3, 2
    )
    audit = Audit("made")
    audit.update(torch.cat((samples, samples[:1])))
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    interval = Interval(2.0, 0.05, 1.9, 2.1, 0.95, "influence of every picture")
    scores = [made("fid@10", 2.0, "adm"), made("fid@10", -1e-9, "clean")]
    page = evaluation_report(
        "AR <B>",
        scores,
        samples[[4, 0, 1]],
        {"adm/fid@10": interval},
        {"made": audit.findings()},
        labels,
        torch.tensor([0, 1, 1, 1, 2, 2]),
        ["cat", "dog", "owl"],
        near,
        labels[[4, 0, 1]],
    ).html()
    read = Reader(page)
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Scores",
        "For a paper&#39;s table",
        "Audit",
        "Samples by class",
        "Nearest pictures of training set",
        "Samples recognised as their class",
    ]
    shown = torch.stack(read.images)
    assert torch.equal(shown[:3], samples[[0, 1, 4]])
    beside = torch.cat((near.samples[:, None], near.pictures), 1)
    assert torch.equal(shown[3:], beside.flatten(0, 1))
    text = page.replace("\N{NO-BREAK SPACE}", " ")
    for words in ("2.000 ± 0.050", "1.9 .. 2.1", "under adm, clean", "what fid@10 is", "influence of every picture"):
        assert words in text
    assert '<td class="warning">warning</td><td class="">1 of 7 pictures equal an earlier one (6 = 0)' in text
    assert f"{float(near.distances[0, 0]):.3g} (no. {int(near.index[0, 0])})" in text
    assert "| AR &lt;B&gt; | 2.000 ± 0.050 | adm [1] |" in text and "| AR &lt;B&gt; | 0 | clean [2] |" in text
    assert not {"script", "b"} & set(read.tags)


def test_a_page_of_scores_alone() -> None:
    page = evaluation_report("Bare", [made("fid@10", 2.0)], uint8(2)).html()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Scores", "For a paper&#39;s table", "Samples"]
    assert re.findall(r"<th>(.*?)</th>", page) == ["metric", "value", "protocol"]


def test_accuracy_of_every_class() -> None:
    rows = class_accuracy(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 1, 2, 2]), ["cat", "dog", "owl"])
    low, high = share_interval(1, 3).low, share_interval(1, 3).high
    assert rows[0] == {
        "class": "cat",
        "pictures": 3,
        "accuracy": 1 / 3,
        "95 %": f"{low:.3f} .. {high:.3f}",
        "mostly taken for": "dog (2)",
    }
    assert (rows[1]["class"], rows[1]["accuracy"], rows[1]["mostly taken for"]) == ("owl", 1.0, "")
    with pytest.raises(ValueError, match=r"labels \(2,\), guesses \(3,\)"):
        class_accuracy(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))


def test_many_classes_are_a_chart_and_the_ends_of_a_table() -> None:
    labels = torch.arange(40).repeat_interleave(4)
    guesses = torch.where(torch.arange(160) % 4 < labels // 8, labels, 0)  # shares rise with the class
    page = evaluation_report("Many", [made("fid@10", 2.0)], uint8(2), labels=labels, guesses=guesses)
    assert [section["title"] for section in page.sections[-2:]] == [
        "Accuracy of every class",
        "Samples recognised as their class",
    ]
    shares = [float(cells[2][1]) for cells in page.sections[-1]["cells"]]
    assert len(shares) == 16 and shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
