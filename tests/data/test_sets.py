"""Data sets by name: what is in the built-in ones, what happens to bad names, places and pictures."""

import gzip
import json
import logging
import pickle
from collections import Counter
from pathlib import Path
from traceback import clear_frames

import numpy as np
import pytest
import torch
from PIL import Image

from data.builtin import ASSETS
from data.errors import CorruptImage, DataError
from data.loader import batches, evaluation_batches, sample_rng
from data.sets import PictureSet, open_set

CATEGORIES = {  # of the base emoji without components
    "Activities": 85,
    "Animals & Nature": 159,
    "Flags": 270,
    "Food & Drink": 131,
    "Objects": 264,
    "People & Body": 386,
    "Smileys & Emotion": 169,
    "Symbols": 224,
    "Travel & Places": 218,
}


def colour(folder: Path, names: str, shade: int = 0) -> None:
    """Pictures of one colour each: red tells the number."""
    for number, name in enumerate(names.split()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (shade + 8 * number, 100, 200)).save(path)


def break_picture(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """12 pictures of two classes; numbers 3 and 7 are cut short."""
    for kind in "ab":
        colour(tmp_path / "train" / kind, "0.png 1.png 2.png 3.png 4.png 5.png", shade=48 * "ab".index(kind))
    for name in ("a/3.png", "b/1.png"):
        break_picture(tmp_path / "train" / name)
    return tmp_path


def contents(pictures: PictureSet) -> list[bytes]:
    return [pictures[i]["image"].numpy().tobytes() for i in range(len(pictures))]


def test_digits_are_the_rows_of_the_file_in_a_border_split_by_picture() -> None:
    train, val, everything = (open_set("digits", split=split) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(everything)) == (4000, 1000, 5000)
    assert np.bincount(train.labels).tolist() == [400] * 10 and np.bincount(val.labels).tolist() == [100] * 10
    with gzip.open(train.source.path, "rt") as file:
        rows = [np.array(line.split(","), dtype=float) for line in file]
    for pictures, numbers in ((train, (0, 399, 400, 3999)), (val, (0, 99, 100, 999))):
        for number in numbers:
            row = rows[int(pictures.source.names[number].removeprefix("row "))]
            digit = np.pad(row[:784].reshape(28, 28), 2) / 127.5 - 1
            sample = pictures[number]
            torch.testing.assert_close(
                sample["image"], torch.tensor(digit).float().expand(3, 32, 32), atol=1e-6, rtol=0
            )
            assert (
                sample["label"] == int(row[-1]) and sample["label"].dtype == torch.int64 and sample["index"] == number
            )
    assert set(train.source.names).isdisjoint(val.source.names)
    assert train.classes == [str(digit) for digit in range(10)]


def test_emoji_are_1906_in_nine_classes_no_picture_in_both_splits() -> None:
    train, val, everything = (open_set("emoji32", split=split) for split in ("train", "val", "all"))
    assert (len(train), len(val), len(everything)) == (1716, 190, 1906)
    assert Counter(everything.classes[label] for label in everything.labels) == CATEGORIES
    assert train.classes == val.classes == sorted(CATEGORIES)
    assert len(set(val.labels)) == 9
    assert set(contents(train)).isdisjoint(contents(val))
    codepoints = [name.split()[0] for name in everything.source.names]
    assert codepoints == sorted(codepoints) and len(set(codepoints)) == 1906
    assert [name.split()[0] for name in val.source.names] == codepoints[9::10]


def test_emoji_stand_on_white_and_look_as_named() -> None:
    everything = open_set("emoji32", split="all")
    number = {name.split()[0]: i for i, name in enumerate(everything.source.names)}
    heart, square = (everything[number[codepoint]]["image"] for codepoint in ("2764-FE0F", "1F7E6"))
    assert torch.equal(heart[:, 0, 0], torch.ones(3)) and torch.equal(heart[:, 31, 31], torch.ones(3))
    red, green, blue = heart[:, 16, 16].tolist()
    assert red > 0.5 and max(green, blue) < -0.4  # U+2764: red heart
    assert square[:, 16, 16].argmax() == 2  # U+1F7E6: blue square
    dark = torch.tensor([(sample < -0.9).all(0).float().mean() for sample in (heart, square)])
    assert dark.max() == 0  # nothing was put on black before it was reduced


def test_the_splits_stay_what_they_were() -> None:
    digits, emoji = open_set("digits", split="train").describe(), open_set("emoji32", split="val").describe()
    assert digits["files_sha256"] == "7fe12993c01c17773e8e64127677c2763d0fc4d84d4cb3b5869f9b01e8e54509"
    assert emoji["files_sha256"] == "58f00d0cc12ae312de2873f6825f24040bfd97b65e088e7b191feccc597ae386"


def test_the_sheet_travels_with_its_notice_and_list() -> None:
    listing = json.loads((ASSETS / "emoji32.json").read_text())
    assert len(listing["emoji"]) == 1906
    assert "Apache License, Version 2.0" in (ASSETS / "emoji32-NOTICE.txt").read_text()
    assert (ASSETS / "emoji32.webp").stat().st_size < 2_000_000


def test_opening_says_name_count_and_licence_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        pictures = open_set("emoji32", split="train")
        next(batches(pictures, 4, seed=0))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "emoji32" in line and "1716 pictures" in line and "Apache-2.0" in line


def test_description_holds_what_a_result_must_carry() -> None:
    pictures = open_set("emoji32", split="val", size=16, transform="ten", crop_range=1.05)
    facts = pictures.describe()
    assert json.loads(json.dumps(facts)) == facts
    wanted = {"name": "emoji32", "split": "val", "count": 190, "size": 16, "transform": "ten", "crop_range": 1.05}
    assert wanted.items() <= facts.items() and facts["classes"] == sorted(CATEGORIES)
    assert facts["sha256"] == json.loads((ASSETS / "emoji32.json").read_text())["sha256"]
    assert pictures[0]["image"].shape == (10, 3, 16, 16)


def test_a_set_can_be_sent_to_another_process(damaged: Path) -> None:
    for pictures in (open_set("digits", split="val"), open_set("folder", split="train", root=str(damaged))):
        sent = pickle.loads(pickle.dumps(pictures))
        assert torch.equal(sent[5]["image"], pictures[5]["image"]) and sent.describe() == pictures.describe()


def test_mirroring_spares_classes_that_change_their_meaning() -> None:
    pictures = open_set("emoji32", split="train", flip=True)
    mirrored = Counter()
    for index in range(0, len(pictures), 3):
        plain = pictures[index]["image"]
        for epoch in range(4):
            seen = pictures.sample(index, sample_rng(1, epoch, index))["image"]
            assert torch.equal(seen, plain) or torch.equal(seen, plain.flip(-1))
            mirrored[pictures.classes[pictures.labels[index]], not torch.equal(seen, plain)] += 1
    assert not mirrored["Flags", True] and not mirrored["Symbols", True]
    faces = mirrored["Smileys & Emotion", True], mirrored["Smileys & Emotion", False]
    assert 0.3 < faces[0] / sum(faces) < 0.6  # half of those that are not symmetric
    with pytest.raises(DataError, match="digits: every class changes its meaning"):
        open_set("digits", split="train", flip=True)


def test_random_crops_are_drawn_in_training_and_fixed_in_evaluation(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    (tmp_path / "train/a").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "train/a/0.png")
    pictures = open_set("folder", split="train", root=str(tmp_path), transform="random")
    seen = [pictures.sample(0, sample_rng(0, epoch, 0))["image"] for epoch in range(5)]
    assert len({crop.numpy().tobytes() for crop in seen}) == 5
    assert torch.equal(pictures[0]["image"], pictures[0]["image"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "emoji", "split": "train"}, "data set 'emoji' is not known; did you mean 'emoji32'"),
        ({"name": "digits", "split": "trian"}, "split 'trian' is not known; did you mean 'train'"),
        ({"name": "cifar10", "split": "trian", "root": "."}, "split 'trian' is not known; did you mean 'train'"),
        ({"name": "digits", "split": "train", "transform": "centre"}, "transform 'centre' .* did you mean 'center'"),
        ({"name": "digits", "split": "train", "root": "x"}, "built in and takes no root"),
        ({"name": "folder", "split": "train"}, "give root="),
        ({"name": "folder", "split": "train", "root": "/no/such/place"}, "/no/such/place does not exist"),
        ({"name": "wds", "split": "train", "root": "/no/such/place"}, "/no/such/place does not exist"),
    ],
)
def test_what_cannot_be_opened_is_named_with_the_cure(given: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_set(**given)


def test_class_order_is_by_text_and_can_be_pinned(tmp_path: Path) -> None:
    colour(tmp_path / "train", "n2/0.png n10/0.png n1/0.png")
    colour(tmp_path / "val", "n2/0.png n10/0.png")
    train = open_set("folder", split="train", root=str(tmp_path))
    assert train.classes == ["n1", "n10", "n2"] and train.describe()["classes"] == train.classes
    alone = open_set("folder", split="val", root=str(tmp_path))
    pinned = open_set("folder", split="val", root=str(tmp_path), classes=train.classes)
    assert alone.labels.tolist() == [0, 1] and pinned.labels.tolist() == [1, 2] and pinned.classes == train.classes
    with pytest.raises(DataError, match="1 classes that the given order of 2 lacks: n1"):
        open_set("folder", split="train", root=str(tmp_path), classes=alone.classes)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_skips_counts_and_names_unreadable_pictures(
    damaged: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = open_set("folder", split="train", root=str(damaged), max_corrupt=2)
    stream = batches(pictures, 6, seed=0, workers=workers)
    seen = [next(stream) for _ in range(6)]  # three epochs
    indices = torch.cat([batch["index"] for batch in seen])
    counts = Counter(indices.tolist())
    assert counts == {i: 6 if i in (4, 8) else 3 for i in range(12) if i not in (3, 7)}  # the next one stands in
    red = (torch.cat([batch["image"][:, 0, 0, 0] for batch in seen]) + 1) * 127.5
    torch.testing.assert_close(red, 8.0 * indices, atol=0.01, rtol=0)  # pictures still belong to their numbers
    assert torch.equal(torch.cat([batch["label"] for batch in seen]), (indices >= 6).long())  # and so do labels
    root = damaged / "train"
    assert pictures.corrupt == [f"{root}/a/3.png", f"{root}/b/1.png"]
    if workers == 0:
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 2 and all("cannot be read" in line and f"{root}/" in line for line in warnings)


@pytest.mark.parametrize("workers", [0, 2])
def test_beyond_the_limit_training_stops_and_lists_the_files(damaged: Path, workers: int) -> None:
    pictures = open_set("folder", split="train", root=str(damaged), max_corrupt=1)
    stream = batches(pictures, 6, seed=0, workers=workers)
    with pytest.raises(DataError) as raised:
        for _ in range(4):
            next(stream)
    message = str(raised.value)
    clear_frames(raised.tb)
    del raised, stream  # whole cycles of frames hold the iterator: without them its workers go at once
    assert "a/3.png" in message and "b/1.png" in message and "max_corrupt is 1" in message


def test_an_unreadable_picture_is_an_error_in_evaluation_and_where_asked(damaged: Path) -> None:
    pictures = open_set("folder", split="train", root=str(damaged))
    with pytest.raises(CorruptImage, match=r"picture 3, .*a/3\.png, cannot be read"):
        list(evaluation_batches(pictures, 4))
    strict = open_set("folder", split="train", root=str(damaged), on_corrupt="error")
    with pytest.raises(CorruptImage, match=r"b/1\.png"):
        strict.sample(7, sample_rng())


def test_a_set_without_one_readable_picture_says_so(tmp_path: Path) -> None:
    colour(tmp_path / "train", "a/0.png a/1.png")
    for path in (tmp_path / "train/a").iterdir():
        path.write_bytes(b"no picture at all")
    pictures = open_set("folder", split="train", root=str(tmp_path))
    with pytest.raises(DataError, match="not one picture"):
        pictures.sample(1, sample_rng())
