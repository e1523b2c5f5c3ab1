"""scripts/evaluate.py: samples that are the reference itself, under both protocols, and the errors a user meets."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.loader import evaluation_batches
from data.sets import open_set
from eval.classifier import Classifier, train_classifier
from eval.features import FeatureError
from eval.pictures import PictureError
from eval.pixels import to_uint8
from eval.weights import MetricWeightsMissing
from scripts import evaluate
from tests.eval.conftest import RECORD
from tests.goldens import ROOT


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    pictures = next(evaluation_batches(open_set("digits", split="train"), 4000))
    return train_classifier(pictures["image"], pictures["label"], 10, steps=40)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """The held-out digits as a sample file with its record."""
    pictures = next(evaluation_batches(open_set("digits", split="val"), 1000))
    array = to_uint8(pictures["image"]).movedim(1, -1).numpy()
    np.savez(tmp_path / "samples.npz", array, pictures["label"].numpy())
    (tmp_path / "samples.json").write_text(json.dumps(RECORD | {"count": 1000}))
    return tmp_path / "samples.npz"


def run(*arguments: object) -> None:
    evaluate.main([str(argument) for argument in arguments])


def test_pictures_scored_against_themselves_by_a_classifier(
    classifier: Classifier, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier.save(tmp_path / "classifier.safetensors")
    protocol = ("--protocol", "classifier", "--classifier", tmp_path / "classifier.safetensors")
    run("--samples", samples, "--reference", "digits", *protocol, "--device", "cpu")
    content = json.loads((tmp_path / "samples.classifier.json").read_text())
    assert content.keys() == {"frechet_classifier_distance@1000", "label_accuracy", "classifier_accuracy", "audit"}
    assert abs(content["frechet_classifier_distance@1000"]["value"]) < 1e-9
    assert content["label_accuracy"]["value"] == content["classifier_accuracy"]["value"] > 0.5
    provenance = content["frechet_classifier_distance@1000"]["provenance"]
    assert provenance["network"]["weights_sha256"] == classifier.network().record.weights_sha256
    assert provenance["samples"]["sha256"] == provenance["reference"]["sha256"]
    assert provenance["samples"]["origin"]["seed"] == 3
    assert provenance["reference"]["origin"]["record"]["split"] == "val"
    audit = content["audit"]
    assert {role: found["count"] for role, found in audit.items()} == {"samples": 1000, "reference": 1000}
    assert audit["samples"]["sizes"] == [{"height": 32, "width": 32, "count": 1000}]
    assert audit["samples"]["classes"] == audit["reference"]["classes"]
    assert audit["samples"]["grey"] == 1000
    printed = capsys.readouterr().out
    assert f"audit of {samples}\n    note    count: 1000 pictures" in printed and "audit of digits val" in printed
    assert "frechet_classifier_distance@1000" in printed and "not comparable to published numbers" in printed
    with pytest.raises(FileExistsError, match=r"samples\.classifier\.json: exists; choose another --out"):
        run("--samples", samples, "--reference", "digits", *protocol)
    run("--samples", samples, "--reference", samples, *protocol, "--overwrite", "true")


def test_a_classifier_is_trained_when_none_is_given(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "train_classifier", partial(train_classifier, steps=2))
    with pytest.raises(FeatureError, match=r"no data set to train a classifier on; give --classifier FILE"):
        run("--samples", samples, "--reference", samples, "--protocol", "classifier")
    run("--samples", samples, "--reference", "digits", "--protocol", "classifier", "--seed", 1, "--device", "cpu")
    content = json.loads((tmp_path / "samples.classifier.json").read_text())
    pictures = next(evaluation_batches(open_set("digits", split="train"), 4000))
    same = train_classifier(pictures["image"], pictures["label"], 10, seed=1, steps=2).network().record
    assert content["label_accuracy"]["provenance"]["network"]["weights_sha256"] == same.weights_sha256


def test_a_folder_scored_against_the_same_pictures_by_inception(inception_file: Path, tmp_path: Path) -> None:
    array = torch.randint(0, 256, (6, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    np.savez(tmp_path / "reference.npz", array)
    folder = tmp_path / "made"
    folder.mkdir()
    for number, picture in enumerate(array):
        Image.fromarray(picture).save(folder / f"{number}.png")
    weights = ("--metric-weights", f"inception={inception_file}", "--batch-size", 4, "--device", "cpu")
    run("--samples", folder, "--reference", tmp_path / "reference.npz", "--protocol", "torch-fidelity", *weights)
    content = json.loads((tmp_path / "made.torch-fidelity.json").read_text())
    score = content["frechet_unpublished_inception_distance@6"]
    assert abs(score["value"]) < 1e-8
    others = {"precision_unpublished_inception@6", "recall_unpublished_inception@6", "left_out", "audit"}
    assert content.keys() == {score["name"], *others}
    assert content["precision_unpublished_inception@6"]["value"] == 1
    assert len(content["left_out"]["torch-fidelity"]) == 2  # ten splits, and subsets of 1000, of six pictures
    assert score["provenance"]["samples"]["origin"]["seed"] == "not recorded"


def test_faults_of_samples_are_audited(
    inception_file: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two equal samples, of floats in [0, 1] that were cast to uint8, in two of ten classes: scored, but not in silence."""
    array = torch.randint(0, 2, (6, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    array[4] = array[2]
    np.savez(tmp_path / "cast.npz", array, np.array([0, 9, 0, 9, 0, 9]))
    np.savez(tmp_path / "few.npz", **{key: value[::170] for key, value in np.load(samples).items()})
    protocol = ("--protocol", "torch-fidelity", "--metric-weights", f"inception={inception_file}", "--device", "cpu")
    run("--samples", tmp_path / "cast.npz", "--reference", tmp_path / "few.npz", *protocol)
    audit = json.loads((tmp_path / "cast.torch-fidelity.json").read_text())["audit"]
    warned = {it["name"] for it in audit["samples"]["findings"] if it["level"] == "warning"}
    assert warned == {"count", "duplicates", "range"}
    assert "6 pictures, the protocol asks for 50000" in audit["samples"]["findings"][0]["text"]
    assert audit["samples"]["duplicates"] == {"count": 1, "first": [[2, 4]]}
    assert audit["samples"]["classes"]["missing"] == {"count": 8, "first": list(range(1, 9))}
    assert {it["level"] for it in audit["reference"]["findings"]} == {"note"}
    printed = capsys.readouterr().out
    assert "warning duplicates: 1 of 6 pictures equal an earlier one (4 = 2)" in printed
    assert "warning range: grey levels 0 to 1" in printed


def test_bad_input_is_named(inception_file: Path, samples: Path, tmp_path: Path) -> None:
    weights = ("--protocol", "torch-fidelity", "--out", tmp_path / "out.json", "--metric-weights")
    weights = (*weights, f"inception={inception_file}")
    (tmp_path / "empty").mkdir()
    for place, fault in (("empty", "holds no pictures"), ("none.npz", "not a whole npz file")):
        with pytest.raises(PictureError, match=fault):
            run("--samples", tmp_path / place, "--reference", samples, *weights)
        with pytest.raises(PictureError, match=fault):
            run("--samples", samples, "--reference", tmp_path / place, *weights)
    (tmp_path / "samples.json").write_text('{"count": 50000}')
    with pytest.raises(PictureError, match="holds 1000 pictures, its record says 50000"):
        run("--samples", samples, "--reference", "digits", *weights)
    (tmp_path / "samples.json").unlink()
    with pytest.raises(MetricWeightsMissing, match=r"(?s)none\.pth: no such weights file.*sha256 begins with 6726825d"):
        run("--samples", samples, "--reference", "digits", *weights[:-1], f"inception={tmp_path / 'none.pth'}")
    assert not (tmp_path / "out.json").exists()


def test_the_command_line_ends_in_one_line() -> None:
    command = [sys.executable, "scripts/evaluate.py", "--samples", "nowhere.npz", "--reference", "digits"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--protocol", "classifier"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: nowhere.npz: not a whole npz file")
    assert "Traceback" not in done.stderr


def test_missing_weights_end_in_a_status_of_their_own(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    words = ["evaluate.py", "--samples", samples, "--reference", samples, "--protocol", "all", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as end:
        evaluate.command()
    assert end.value.code == 3
    assert "--metric-weights inception=FILE" in capsys.readouterr().err


def test_help_explains_every_option() -> None:
    text = evaluate.parser().format_help()
    for option in ("samples", "reference", "protocol", "metric-weights", "classifier", "batch-size", "out"):
        assert f"--{option}" in text
    assert "FID" in text and "NAME.npz" in text
