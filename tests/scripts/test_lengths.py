"""Pictures from the first tokens alone: scripts/sample.py --preview and scripts/reconstruct.py --lengths; and clips."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.sets import open_set
from eval.pixels import to_uint8
from eval.reconstruction import psnr, ssim
from layers.noise import Noise
from layers.record import build
from layers.spec import Condition
from sampling.clip_files import LETTERS
from sampling.decode import generate
from sampling.sampler import Sampler
from scripts import reconstruct, sample
from tests.eval.test_fvd import blind_network
from tests.small import generator_run as grid_run
from tests.small_clips import DATA, FRAMES, SIZE
from tests.small_clips import tokenizer_run as clip_run
from training.run import CLASSES, RunError, RunFolder, load_run

TOKENIZER = {
    "class_path": "MultiScaleVQTokenizer",
    "init_args": {
        "scales": [1, 2, 4],
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
        "channels": 4,
        "mult": [1, 2, 2],
        "groups": 2,
        "res_blocks": 1,
    },
}
GENERATOR = {"class_path": "NextScale", "init_args": {"dim": 16, "depth": 1, "heads": 2, "num_classes": 3}}
LENGTHS = (1, 5, 21)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 16x16 pictures on three scales, with random weights."""
    root = tmp_path_factory.mktemp("scales")
    torch.manual_seed(0)
    tokenizer = build(TOKENIZER, CLASSES)
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first = RunFolder(root / "tokenizer", "tokenizer", TOKENIZER, open_set("digits", split="train").describe(), seed=0)
    first.begin()
    first.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    generator = build(GENERATOR, CLASSES, spec=tokenizer.spec, reader=tokenizer.reader())
    for name, parameter in generator.named_parameters():
        if not name.startswith("reader."):
            torch.nn.init.normal_(parameter, std=0.3)
    second = RunFolder(root / "generator", "generator", GENERATOR, DATA, 0, load_run(root / "tokenizer"))
    second.begin()
    second.export(generator.state_dict(), generator.spec, step=1)
    (root / "generator/config.yaml").write_text("{}")
    return root


def call(script: Any, *words: object) -> None:
    script.main([str(word) for word in (*words, "--device", "cpu")])


def cells(sheet: np.ndarray, rows: int, columns: int, side: int) -> np.ndarray:
    """uint8 (rows, columns, side, side, 3) from below the line of names."""
    step = side + 2
    body = sheet[LETTERS + 4 + 2 :, 2:]
    assert body.shape == (rows * step, columns * step, 3)
    return body.reshape(rows, step, columns, step, 3)[:, :side, :, :side].transpose(0, 2, 1, 3, 4)


def enlarged(pictures: Tensor, scale: int) -> Tensor:
    """Floats (B, 3, S, S) -> uint8 (B, scale S, scale S, 3)."""
    return to_uint8(pictures).repeat_interleave(scale, -1).repeat_interleave(scale, -2).movedim(1, -1)


def test_a_filmstrip_of_previews_has_a_row_a_sample_and_a_column_a_length(run: Path, tmp_path: Path) -> None:
    words = ("--run", run / "generator", "--classes", 2, 0, "--per-class", 2, "--batch-size", 3)
    call(sample, *words, "--preview", tmp_path / "previews.png")
    loaded = load_run(run / "generator")
    with torch.inference_mode():
        about, noise = Condition(label=torch.tensor([2, 2, 0, 0])), Noise(0, torch.arange(4))
        tokens = generate(loaded.generator, about, Sampler(), noise).tokens
        wanted = torch.stack([enlarged(loaded.tokenizer.decode(tokens[:, :n]), 4) for n in LENGTHS], 1)
    sheet = np.asarray(Image.open(tmp_path / "previews.png"))
    found = cells(sheet, 4, 3, 64)
    assert np.abs(found.astype(int) - wanted.numpy()).max() <= 1
    names = sheet[: LETTERS + 4, 2:].reshape(LETTERS + 4, 3, 66, 3)
    assert all(name.min() < 100 for name in names.transpose(1, 0, 2, 3))  # something is written above every column
    call(sample, *words, "--preview", tmp_path / "previews.gif")
    film = Image.open(tmp_path / "previews.gif")
    assert film.n_frames == 3 and film.size == (2 * 66 + 2, LETTERS + 4 + 2 * 66 + 2)


def test_a_tokenizer_that_decodes_the_whole_alone_has_no_previews(tmp_path: Path) -> None:
    grid_run(tmp_path / "grid", DATA)
    with pytest.raises(RunError, match="--preview: this tokenizer decodes all 64 tokens or none"):
        call(sample, "--run", tmp_path / "grid", "--preview", tmp_path / "x.png")
    with pytest.raises(RunError, match="--lengths 1,64: this tokenizer does not decode 1 tokens; it decodes 64"):
        call(reconstruct, "--run", tmp_path / "grid-tokenizer", "--lengths", "1,64", "--data", "digits")


def test_every_length_is_scored_and_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    words = ("--run", run / "tokenizer", "--num", 20, "--pictures", 4, "--out", tmp_path, "--batch-size", 7)
    call(reconstruct, *words, "--lengths", "5,1,21")
    said = capsys.readouterr().out
    content = json.loads((tmp_path / "reconstruction-digits-val-lengths.json").read_text())["lengths"]
    assert list(content) == ["1", "5", "21"]
    pictures = open_set("digits", split="val", size=16)
    chosen = torch.linspace(0, len(pictures) - 1, 20).long().tolist()
    images = torch.stack([pictures[i]["image"] for i in chosen])
    tokenizer = load_run(run / "tokenizer").tokenizer
    with torch.inference_mode():
        tokens = tokenizer.encode(images)
        again = {n: tokenizer.decode(tokens[:, :n]) for n in LENGTHS}
    for n in LENGTHS:
        values = {name: score["value"] for name, score in content[str(n)].items()}
        made, real = to_uint8(again[n]), to_uint8(images)
        assert values["psnr_db"] == pytest.approx(float(psnr(made, real).mean()), abs=1e-3)
        assert values["ssim"] == pytest.approx(float(ssim(made, real).mean()), abs=1e-4)
        assert "codebook_usage" not in values and content[str(n)]["ssim"]["provenance"]["reference"]["count"] == 20
        row = next(line for line in said.splitlines() if line.split()[:1] == [str(n)])
        assert f"{values['psnr_db']:.4f}" in row and f"{values['ssim']:.4f}" in row
    assert "left out: lpips/vgg: no weights of VGG16" in said
    places = torch.linspace(0, 19, 4).long()
    shown = torch.stack([enlarged(each[places], 4) for each in (images, *again.values())], 1)
    found = cells(np.asarray(Image.open(tmp_path / "reconstruction-digits-val-lengths.png")), 4, 4, 64)
    assert np.abs(found.astype(int) - shown.numpy()).max() <= 1
    assert Image.open(tmp_path / "reconstruction-digits-val-lengths-plot.png").size[0] > 900
    with pytest.raises(FileExistsError, match=r"lengths\.json: exists; choose another --out"):
        call(reconstruct, *words, "--lengths", "1")
    with pytest.raises(RunError, match="does not decode 2 tokens; it decodes 1, 5, 21"):
        call(reconstruct, *words, "--lengths", "1,2")
    with pytest.raises(RunError, match="--lengths one: invalid literal"):
        call(reconstruct, *words, "--lengths", "one")


def test_a_tokenizer_of_clips_is_scored_frame_by_frame_and_as_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    trained_on = open_set("moving_digits", split="train", size=SIZE, frames=FRAMES, window="first").describe()
    run = clip_run(tmp_path / "larp", trained_on)
    opened = reconstruct.open_network
    monkeypatch.setattr(
        reconstruct, "open_network", lambda name, *given: blind_network() if "i3d" in name else opened(name, *given)
    )
    call(reconstruct, "--run", run, "--num", 6, "--pictures", 2, "--batch-size", 4)
    scores = json.loads((run / "reconstruction-moving_digits-val.json").read_text())
    clips = open_set("moving_digits", split="val", size=SIZE, frames=FRAMES, window="first")  # as the run's own
    images = torch.stack([clips[i]["image"] for i in torch.linspace(0, len(clips) - 1, 6).long().tolist()])
    tokenizer = load_run(run).tokenizer
    with torch.inference_mode():
        again = tokenizer.decode(tokenizer.encode(images))
    made, real = (to_uint8(each.movedim(1, 2)) for each in (again, images))  # (B, T, 3, S, S)
    errors = (made.double() - real.double()).square().flatten(1).mean(1)
    assert scores["psnr_db"]["value"] == pytest.approx(float((10 * (255**2 / errors).log10()).mean()), abs=1e-3)
    wanted = ssim(made.flatten(0, 1), real.flatten(0, 1)).mean()
    assert scores["ssim"]["value"] == pytest.approx(float(wanted), abs=1e-4)
    assert scores["ssim"]["provenance"]["definition"].endswith("mean over frames of all clips")
    assert scores["psnr_db"]["provenance"]["samples"]["frames"] == FRAMES
    film = scores["fd_blind@6"]["provenance"]
    assert film["protocol"]["name"] == "larp-reconstruction" and film["reference"]["count"] == 6
    assert film["samples"]["origin"]["checkpoint"]["sha256"]["tokenizer"] == load_run(run).tokenizer_sha256
    assert "codebook_usage" in scores and "left out: lpips/vgg" in capsys.readouterr().out
    strip = np.asarray(Image.open(run / "reconstruction-moving_digits-val.png"))
    step = SIZE + 2
    rows = strip[2:, 2:].reshape(4, step, FRAMES, step, 3)[:, :SIZE, :, :SIZE].transpose(0, 2, 1, 3, 4)
    first, last = (real[i].movedim(1, -1).numpy() for i in (0, 5))
    assert np.array_equal(rows[0], first) and np.array_equal(rows[2], last)
