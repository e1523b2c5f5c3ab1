"""scripts/edit.py from a run with random weights: the strip it writes, and what it refuses."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.sets import open_set
from layers.record import build
from tests.goldens import ROOT
from training.run import CLASSES, RunFolder, feeding, load_run

TOKENIZER = {
    "class_path": "MultiScaleVQTokenizer",
    "init_args": {
        "scales": [1, 2, 4],
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
        "channels": 4,
        "mult": [1, 1, 1, 1],
        "res_blocks": 1,
        "groups": 2,
    },
}
GENERATOR = {"class_path": "NextScale", "init_args": {"dim": 16, "depth": 1, "heads": 2, "num_classes": 10}}
DATA = {"name": "digits", "classes": [str(digit) for digit in range(10)]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    tokenizer = build(TOKENIZER, CLASSES)
    first = RunFolder(root / "tokenizer", "tokenizer", TOKENIZER, DATA, seed=0)
    first.begin()
    first.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    second = RunFolder(root / "generator", "generator", GENERATOR, DATA, 0, load_run(root / "tokenizer"))
    generator = build(GENERATOR, CLASSES, **feeding(GENERATOR, tokenizer))
    second.begin()
    second.export(generator.state_dict(), generator.spec, step=1)
    (root / "generator/config.yaml").write_text("sampler: {greedy: false}\n")
    return root / "generator"


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("edit")


def tiles(path: Path, count: int) -> list[np.ndarray]:
    """The pictures of the strip, each 32 x 32, 2 pixels of white around."""
    strip = np.asarray(Image.open(path).convert("RGB"))
    assert strip.shape == (36, 34 * count + 2, 3)
    return [strip[2:34, 34 * i + 2 : 34 * i + 34] for i in range(count)]


@pytest.mark.parametrize("outside", [False, True])
def test_the_strip_shows_the_picture_what_is_given_of_it_and_the_versions(
    run: Path, edit: object, tmp_path: Path, outside: bool
) -> None:
    words = ["--run", str(run), "--data", "digits", "--item", "3", "--box", "0", "16", "32", "16", "--samples", "2"]
    edit.main([*words, "--outside", str(outside).lower(), "--device", "cpu", "--out", str(tmp_path / "strip.png")])
    picture, given, *made = tiles(tmp_path / "strip.png", 4)
    original = open_set("digits", split="val")[3]["image"].movedim(0, -1).numpy() * 127.5 + 128
    assert np.array_equal(picture, original.clip(0, 255).astype(np.uint8))
    kept, anew = (slice(16, 32), slice(0, 16)) if outside else (slice(0, 16), slice(16, 32))
    for version in (given, *made):
        assert np.array_equal(version[:, kept], picture[:, kept])
    assert len(np.unique(given[:, anew].reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(made[0][:, anew], made[1][:, anew])


def test_a_picture_file_needs_a_class_and_gets_it(run: Path, edit: object, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    words = ["--run", str(run), "--picture", str(tmp_path / "grey.png"), "--box", "8", "8", "8", "8"]
    words += ["--device", "cpu", "--samples", "1", "--out", str(tmp_path / "strip.png")]
    with pytest.raises(SystemExit):
        edit.main(words)
    edit.main([*words, "--label", "4"])
    assert (tiles(tmp_path / "strip.png", 3)[0] == 90).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "digits", "--box", "0", "0", "40", "8"], "not within a picture of 32 x 32 pixels"),
        (["--box", "0", "0", "4", "8"], "give --picture FILE or --data NAME"),
    ],
)
def test_what_cannot_be_edited_is_refused(
    run: Path, edit: object, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        edit.main(["--run", str(run), *words, "--device", "cpu", "--out", "unused.png"])
    assert said in capsys.readouterr().err
