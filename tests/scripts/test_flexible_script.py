"""scripts/flexible.py on pictures of 16 x 16 pixels: a grid cut short and a line of any length, measured once and set down."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from eval.classifier import Classifier
from eval.files import write_json
from tests.goldens import ROOT
from training.jobs import tokenizer_job
from training.options import parse, tokenizer_parser
from training.run import load_run

GRID = {
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
LINE = {
    "class_path": "FlexTokTokenizer",
    "init_args": {
        "autoencoder": {
            "class_path": "KLTokenizer",
            "init_args": {
                "image_size": 16,
                "channels": 2,
                "width": 4,
                "mult": [1, 1, 1],
                "res_blocks": 1,
                "encoder_attention": [],
                "groups": 2,
            },
        },
        "quantizer": {"class_path": "FSQ", "init_args": {"levels": [4, 4]}},
        "tokens": 8,
        "encoder_dim": 16,
        "encoder_depth": 1,
        "decoder_dim": 16,
        "decoder_depth": 1,
        "head_dim": 8,
        "frequencies": 8,
        "steps": 2,
        "guidance": 1.0,
    },
}
TRAIN = {"steps": 2, "save_every": 2, "warmup": 0, "sample_every": 0, "trackers": []}
SETTINGS = {"seconds": 0.3, "num": 20, "seed": 0}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        module = import_module("flexible")
        patch.setattr(module, "LENGTHS", (2,))
        yield module


def trained(folder: Path, tokenizer: dict[str, Any], objective: dict[str, Any]) -> None:
    data = {"name": "digits", "size": 16, "batch_size": 4}
    config = {"out": str(folder), "data": data, "tokenizer": tokenizer, "objective": objective, "train": TRAIN}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    tokenizer_job(parse(tokenizer_parser(), ["--config", str(file)]))


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator on the line, and the grid beside it."""
    folder = tmp_path_factory.mktemp("flexible")
    trained(folder / "grid", GRID, {"terms": {"codebook": 1.0, "commitment": 0.25}})
    trained(folder / "line", LINE, {"l2": 0.0, "terms": {"flow": 1.0}})
    lesson = {
        "out": "unused",
        "tokenizer_run": str(folder / "line"),
        "data": {"name": "digits", "batch_size": 8},
        "generator": {"class_path": "NextToken", "init_args": {"dim": 16, "depth": 1, "heads": 2}},
        "sampler": {"filter": {"top_k": 9}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(lesson))
    Classifier(10).save(folder / "out/classifier.safetensors")
    names = ("classifier/label_accuracy", "classifier/frechet_classifier_distance@20", "rc512/fd_rc512@20")
    for name in ("grid", "line"):  # what scripts/orders.py makes of the tokenizers is no matter here, and slow
        made = {"name": f"({name})", "scores": {score: {"value": 0.0} for score in names}}
        write_json(folder / f"out/tokenizers/{name}.json", made)
    script.flexible(folder / "out", [f"{folder}/tiny.yaml"], [str(folder / "grid")], **SETTINGS)
    return folder


def test_every_length_of_a_line_is_scored_and_a_grid_is_filled_up(folder: Path) -> None:
    line, grid = (json.loads((folder / f"out/lengths/{name}.json").read_text()) for name in ("line", "grid"))
    assert line["filler"] is None and list(line["lengths"]) == ["2", "8"]
    assert grid["filler"] in range(16) and list(grid["lengths"]) == ["2", "4"]
    for found in (line, grid):
        assert found["training_seconds"] > 0 and found["source"]["run"] == found["name"]
        assert found["parameters"] == sum(it.numel() for it in load_run(folder / found["name"]).tokenizer.parameters())
        assert all(0 < value["psnr"] < 20 for value in found["lengths"].values())


def test_the_filler_stands_for_every_token_after_the_first_ones(script: ModuleType, folder: Path) -> None:
    tokenizer = load_run(folder / "grid").tokenizer
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    cut = torch.tensor([[3, 1, 7, 7], [5, 9, 7, 7]])
    assert torch.equal(script.first(tokenizer, tokens, 2, 7), tokenizer.decode(cut))
    assert torch.equal(script.first(tokenizer, tokens, 4, 7), tokenizer.decode(tokens))


def test_previews_count_how_often_half_of_the_tokens_is_closer_to_all(folder: Path) -> None:
    found = json.loads((folder / "out/previews/tiny.json").read_text())
    assert found["tokens"] == [2, 4, 8] and found["samples"] == 20
    assert found["half_is_closer"] * 20 in range(21)


def test_the_table_has_a_line_a_generator_and_one_for_the_tokenizer_without(folder: Path) -> None:
    head, _, *lines = (folder / "out/flexible.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [["NextToken", "line", "8"], ["", "grid", "4"]]
    assert {line.count("|") for line in lines} == {head.count("|")}
    with Image.open(folder / "out/flexible.png") as plot:
        assert plot.size[0] > 500


def test_what_is_finished_stays(script: ModuleType, folder: Path) -> None:
    files = [path for path in (folder / "out").rglob("*.json") if path.parent.name in ("lengths", "previews", "tiny")]
    before = [path.stat().st_mtime_ns for path in files]
    script.flexible(folder / "out", [f"{folder}/tiny.yaml"], [str(folder / "grid")], **SETTINGS)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_every_row_is_a_configuration_whose_tokenizer_is_one(script: ModuleType, tmp_path: Path) -> None:
    for row in script.ROWS:
        config = script.orders.parse_row(str(script.orders.CONFIGS / f"generators/{row}.yaml"), tmp_path, 0)
        assert script.orders.tokenizer_config(config["tokenizer_run"]).is_file()
