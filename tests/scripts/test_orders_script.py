"""scripts/orders.py on pictures of 16 x 16 pixels: a row is trained, sampled, scored, written, and not done twice."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image

from eval.classifier import Classifier
from layers.record import build
from tests.goldens import ROOT
from training.options import ConfigError
from training.run import CLASSES, RunFolder, load_run

DIGITS = {"name": "digits", "classes": [str(digit) for digit in range(10)]}
TOKENIZER = {
    "class_path": "VQTokenizer",
    "init_args": {
        "image_size": 16,
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
        "channels": 4,
        "encoder_mult": [1, 1, 1, 1],
        "groups": 2,
        "z_channels": 4,
        "res_blocks": 1,
    },
}
GENERATOR = {"class_path": "NextToken", "init_args": {"dim": 16, "depth": 1, "heads": 2}}
SETTINGS = {"seconds": 0.3, "num": 20, "seed": 0, "jobs": 1}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield import_module("orders")


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row that was made."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("orders")
    tokenizer = build(TOKENIZER, CLASSES)
    run = RunFolder(folder / "tokenizer", "tokenizer", TOKENIZER, DIGITS, seed=0)
    run.begin()
    run.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    Classifier(10).save(folder / "orders/classifier.safetensors")
    lesson = {
        "out": "unused",
        "tokenizer_run": str(folder / "tokenizer"),
        "data": {"name": "digits", "batch_size": 8},
        "generator": GENERATOR,
        "sampler": {"filter": {"top_k": 9}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(lesson))
    script.orders(folder / "orders", [f"{folder}/tiny.yaml"], **SETTINGS)
    return folder


def test_a_row_says_what_it_costs_and_scores(folder: Path) -> None:
    row = json.loads((folder / "orders/rows/tiny/result.json").read_text())
    run = load_run(folder / "orders/rows/tiny/run")
    assert row["parameters"] == sum(it.numel() for it in run.generator.parameters())
    assert row["steps"] == run.record["step"] > 1
    assert row["forward_passes"] == run.generator.spec.length  # a token a round
    assert row["training_seconds"] > 0.1 and row["seconds_an_image"] > 0
    assert 0 < row["activation_bytes"] < row["peak_bytes"]
    scores = row["scores"]
    assert 0 <= scores["classifier/label_accuracy"]["value"] <= 1
    assert scores["classifier/frechet_classifier_distance@20"]["provenance"]["samples"]["count"] == 20


def test_the_table_and_the_grid_have_a_line_a_row(folder: Path) -> None:
    head, _, *lines = (folder / "orders/orders.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["tiny", "(tokenizer)"]  # what it could reach at best
    assert {line.count("|") for line in lines} == {head.count("|")}
    with Image.open(folder / "orders/orders.png") as grid:
        assert grid.size == (20 * 18 + 2, 18 + 2)  # 20 pictures of 16 x 16, 2 pixels apart


def test_a_finished_row_stays(script: ModuleType, folder: Path) -> None:
    before = (folder / "orders/rows/tiny/result.json").stat().st_mtime_ns
    script.orders(folder / "orders", [f"{folder}/tiny.yaml"], **SETTINGS)
    assert (folder / "orders/rows/tiny/result.json").stat().st_mtime_ns == before


def test_a_row_that_is_none_is_refused_by_name(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="next-tokens: no row of the table"):
        script.orders(tmp_path, ["next-tokens"], **SETTINGS)


def test_every_row_of_the_table_is_a_configuration(script: ModuleType, tmp_path: Path) -> None:
    configs = {name: script.parse_row(name, tmp_path, 0) for name in script.ROWS}
    assert {config["data"]["name"] for config in configs.values()} == {"digits"}
    assert all(script.tokenizer_config(config["tokenizer_run"]).is_file() for config in configs.values())
    assert len({json.dumps([it["generator"], it["tokenizer_run"]]) for it in configs.values()}) == len(configs)
