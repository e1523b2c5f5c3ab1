"""scripts/reconstruct.py on a small run: its numbers are those of the tokenizer taken by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.loader import evaluation_batches
from data.sets import open_set
from eval.pixels import to_uint8
from eval.reconstruction import psnr, ssim
from scripts import reconstruct
from tests.small import tokenizer_run
from training.run import RunError, load_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder of a small tokenizer with random weights, made for emoji of 16x16."""
    return tokenizer_run(tmp_path / "run", open_set("emoji32", split="train").describe())


def test_scores_and_pictures(run: Path) -> None:
    reconstruct.main(["--run", str(run), "--pictures", "5", "--batch-size", "64", "--device", "cpu"])
    scores = json.loads((run / "reconstruction-emoji32-val.json").read_text())
    loaded = load_run(run)
    images = next(evaluation_batches(open_set("emoji32", split="val", size=16), 190))["image"]
    with torch.inference_mode():
        tokens = loaded.tokenizer.encode(images)
        decoded = loaded.tokenizer.decode(tokens)
    made, real = to_uint8(decoded), to_uint8(images)
    values = {name: score["value"] for name, score in scores.items()}
    assert values["psnr_db"] == pytest.approx(float(psnr(made, real).mean()), abs=1e-3)
    assert values["ssim"] == pytest.approx(float(ssim(made, real).mean()), abs=1e-4)
    assert values["codebook_usage"] == pytest.approx(len(tokens.unique()) / 64, abs=1 / 64)
    provenance = scores["psnr_db"]["provenance"]
    assert provenance["reference"]["count"] == 190
    assert provenance["samples"]["origin"]["checkpoint"]["sha256"]["tokenizer"] == loaded.tokenizer_sha256
    assert provenance["reference"]["origin"]["record"]["split"] == "val"
    sheet = torch.from_numpy(np.array(Image.open(run / "reconstruction-emoji32-val.png"))).movedim(-1, 0)
    first, second = sheet[:, 2:34:2, 2:34:2], sheet[:, 2:34:2, 36:68:2]  # enlarged twice, 2 pixels apart
    assert torch.equal(first, real[0])
    assert (second.int() - made[0].int()).abs().max() <= 1


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path) -> None:
    arguments = ["--run", str(run), "--data", "emoji32", "--out", str(tmp_path / "out"), "--device", "cpu"]
    reconstruct.main(arguments)
    with pytest.raises(FileExistsError, match=r"reconstruction-emoji32-val\.json: exists; choose another --out"):
        reconstruct.main(arguments)
    reconstruct.main([*arguments, "--overwrite", "true"])


def test_a_place_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no run\.json"):
        reconstruct.main(["--run", str(tmp_path)])
