"""scripts/sample.py from the command line: a grid, many samples on one and two processes, and what it refuses."""

import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layers.record import build
from layers.spec import Grid, TokenSpec
from tests.goldens import ROOT
from tests.processes import ENVIRONMENT, command
from training.options import command_line
from training.run import CLASSES, RunFolder, load_run

TOKENIZER = {
    "class_path": "VQTokenizer",
    "init_args": {
        "image_size": 8,
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
        "channels": 8,
        "encoder_mult": [1, 1],
        "groups": 2,
        "z_channels": 8,
        "res_blocks": 1,
    },
}
GENERATOR = {"class_path": "NextToken", "init_args": {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}}
DATA = {"name": "none", "classes": ["a", "b", "c"]}
CONFIG = "sampler: {filter: {top_k: 9}, guidance: {scale: 1.5}, greedy: false}\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights, every one of them, so that its samples are of all kinds."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    tokenizer, spec = build(TOKENIZER, CLASSES), TokenSpec(Grid(1, 4, 4), (1, 8, 8), vocab_size=16)
    generator = build(GENERATOR, CLASSES, spec=spec)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    first = RunFolder(root / "tokenizer", "tokenizer", TOKENIZER, DATA, seed=0)
    first.begin()
    first.export(tokenizer.state_dict(), spec, step=1)
    second = RunFolder(root / "generator", "generator", GENERATOR, DATA, 0, load_run(root / "tokenizer"))
    second.begin()
    second.export(generator.state_dict(), spec, step=1)
    (root / "generator/config.yaml").write_text(CONFIG)
    return root / "generator"


def sample(*words: object, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("sample.py", "--device", "cpu", *words, processes=processes),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_samples_do_not_depend_on_batch_size_or_processes(run: Path, tmp_path: Path) -> None:
    arrays = []
    for batch_size, processes in ((64, 1), (7, 2)):
        out = tmp_path / f"{batch_size}.npz"
        options = (
            "--num",
            600,
            "--out",
            out,
            "--dtype",
            "float64",
            "--batch-size",
            batch_size,
            "--class-plan",
            "random",
        )
        made = sample("--run", run, *options, processes=processes)
        assert made.returncode == 0, made.stderr
        arrays.append(np.load(out))
    assert np.array_equal(arrays[0]["arr_0"], arrays[1]["arr_0"]) and arrays[0]["arr_0"].shape == (600, 8, 8, 3)
    assert np.array_equal(arrays[0]["arr_1"], arrays[1]["arr_1"])
    assert len(np.unique(arrays[0]["arr_0"], axis=0)) > 500
    record = json.loads((tmp_path / "64.json").read_text())
    assert record["sampler"]["filter"]["top_k"] == 9 and record["sampler"]["guidance"]["scale"] == 1.5  # the run's own
    assert record["count"] == 600 and record["seed"] == 0 and record["class_plan"] == "random"
    assert record["source"]["sha256"].keys() == {"tokenizer", "generator"}
    again = sample("--run", run, "--num", 600, "--out", tmp_path / "64.npz")
    assert again.returncode != 0 and "exists already" in again.stderr


def in_process(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The same, called here; the message it ends with, or nothing."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("sample")
    try:
        command_line(lambda: script.main(["--device", "cpu", *map(str, words)]))
    except SystemExit as end:
        return str(end.code)
    return ""


def test_a_grid_has_a_row_a_class_and_options_override_the_recipe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    for name, more in (("a", ()), ("b", ("--sampler.filter.top_k", 1)), ("c", ("--sampler.greedy", "true"))):
        grid = tmp_path / f"{name}.png"
        assert in_process(monkeypatch, "--run", run, "--classes", 2, 0, "--per-class", 3, "--grid", grid, *more) == ""
        pictures.append(np.asarray(Image.open(grid)))
    assert pictures[0].shape == (2 * 8 + 3 * 2, 3 * 8 + 4 * 2, 3)
    assert not np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[1], pictures[2])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--classes", 3, "--grid", "x.png"), "class id 3 is out of range: this model knows 0 to 2"),
        (("--grid", "x.png", "--sampler.filter.top_q", 3), "top_q"),
        (("--grid", "x.png", "--num", 3), "give --grid FILE, or --num N with --out FILE"),
        (("--grid", "x.png", "--sampler.filter.top_p", 1.5), "top_p is 1.5, must be in"),
    ],
)
def test_what_it_refuses_is_named(
    run: Path,
    words: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in in_process(monkeypatch, "--run", run, *words) + capsys.readouterr().err


def test_runs_that_cannot_be_sampled_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such run folder" in in_process(monkeypatch, "--run", tmp_path / "nothing", "--grid", "x.png")
    assert "holds a tokenizer" in in_process(monkeypatch, "--run", run.parent / "tokenizer", "--grid", "x.png")
