"""scripts/evaluate.py on models and scripts/make_reference.py: the scores that files of pictures would have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eval.pictures import PictureError
from scripts import evaluate, make_reference, reconstruct, sample
from tests.small import generator_run

DATA = {"name": "none", "classes": ["a", "b", "c"]}
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generator_run(tmp_path_factory.mktemp("runs") / "tiny", DATA)


def call(script: Any, *words: object) -> None:
    script.main([str(word) for word in (*words, *CPU)])


def test_samples_need_no_file_to_be_scored(run: Path, tmp_path: Path) -> None:
    """From model to network in one go, or by way of an npz: the same pixels, scores and origin, in any batches."""
    model = ("--run", run, "--num", 40, "--dtype", "float64", "--seed", 3)
    call(sample, *model, "--out", tmp_path / "made.npz", "--class-plan", "random", "--batch-size", 9)
    against = ("--reference", "digits", "--protocol", "rc512")
    call(evaluate, "--samples", tmp_path / "made.npz", *against)
    call(evaluate, *model, *against, "--class-plan", "random", "--out", tmp_path / "model.json", "--batch-size", 16)
    by_file, at_once = (json.loads((tmp_path / name).read_text()) for name in ("made.rc512.json", "model.json"))
    assert by_file.keys() == at_once.keys() >= {"fd_rc512@40", "kd_rc512@40", "audit"}
    for name in ("fd_rc512@40", "kd_rc512@40"):
        assert at_once[name]["value"] == pytest.approx(by_file[name]["value"], rel=1e-6)
    made, here = (content["fd_rc512@40"]["provenance"]["samples"] for content in (by_file, at_once))
    assert made["sha256"] == here["sha256"] and made["count"] == here["count"] == 40
    for part in ("seed", "class_sampling", "guidance", "sampler", "checkpoint"):
        assert made["origin"][part] == here["origin"][part]
    assert (
        here["origin"]["quantisation"] == "clamp(255 (x + 1) / 2, 0, 255), rounded half to even"
    )  # the protocol's own
    assert not list(tmp_path.glob(".*"))  # nothing is left of the work


def test_a_reference_is_made_once(run: Path, tmp_path: Path) -> None:
    call(
        make_reference,
        "--pictures",
        "digits",
        "--size",
        16,
        "--protocol",
        "rc512",
        "--out",
        tmp_path / "real.safetensors",
    )
    call(sample, "--run", run, "--num", 40, "--out", tmp_path / "made.npz")
    for name, reference in (("pictures", "digits"), ("file", tmp_path / "real.safetensors")):
        words = ("--reference", reference, "--protocol", "rc512", "--out", tmp_path / f"{name}.json")
        call(evaluate, "--samples", tmp_path / "made.npz", *words)
    pictures, file = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("pictures", "file"))
    for name in ("fd_rc512@40", "kd_rc512@40"):
        assert file[name] == pictures[name]
    with pytest.raises(FileExistsError, match=r"real\.safetensors: exists"):
        call(make_reference, "--pictures", "digits", "--protocol", "rc512", "--out", tmp_path / "real.safetensors")
    with pytest.raises(PictureError, match="a reference file is called NAME"):
        call(make_reference, "--pictures", "digits", "--protocol", "rc512", "--out", tmp_path / "real.npz")


def test_a_tokenizer_reconstructs_the_reference(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PSNR as scripts/reconstruct.py measures it; what no weights are at hand for is left out, with the file to get."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    rng = torch.Generator().manual_seed(0)
    for number in range(12):
        (tmp_path / "real" / "a").mkdir(parents=True, exist_ok=True)
        picture = torch.randint(0, 256, (16, 16, 3), generator=rng, dtype=torch.uint8).numpy()
        Image.fromarray(picture).save(tmp_path / "real" / "a" / f"{number:02d}.png")
    tokenizer = run.with_name("tiny-tokenizer")
    words = ("--reference", tmp_path / "real", "--protocol", "llamagen-rfid", "--out", tmp_path / "scores.json")
    call(evaluate, "--run", tokenizer, *words, "--batch-size", 5)
    data = ("--data", "folder", "--root", tmp_path / "real", "--split", "all", "--out", tmp_path)
    call(reconstruct, "--run", tokenizer, *data)
    scores = json.loads((tmp_path / "scores.json").read_text())
    apart = json.loads((tmp_path / "reconstruction-folder-all.json").read_text())
    assert scores["psnr_db"]["value"] == pytest.approx(apart["psnr_db"]["value"], rel=1e-6)
    assert (
        scores["psnr_db"]["provenance"]["reference"]["sha256"] == apart["psnr_db"]["provenance"]["reference"]["sha256"]
    )
    (reason,) = scores["left_out"]["llamagen-rfid"].values()
    assert "no weights of InceptionV3" in reason
