"""scripts/demo.py with a hundredth of its training: every part runs, is measured, and is not done twice."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT, command
from training.run import load_run

SCORES = ("classifier_accuracy", "label_accuracy", "reconstruction_psnr_db", "codebook_usage")


def demo(out: Path, *words: object) -> str:
    made = subprocess.run(
        command("demo.py", "--out", out, "--share", "0.01", *words), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    demo(folder)
    return folder


def test_every_score_is_measured_and_carries_its_protocol(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    distances = metrics["frechet"]
    assert all(0 <= metrics[name] <= 100 for name in SCORES)
    assert 0 < distances["real_floor"] < distances["samples"] and all(map(math.isfinite, distances.values()))
    assert distances.keys() == {"samples", "real_floor", "uniform_tokens"}
    assert metrics["compute_seconds"] > 0 and metrics["peak_memory_bytes"] > 2**20
    samples = metrics["provenance"]["frechet.samples"]
    assert samples["name"] == "frechet_classifier_distance@1000"  # never FID
    assert samples["provenance"]["samples"]["origin"]["guidance"]["scale"] == 2.0
    assert samples["provenance"]["reference"]["name"] == "digits val"


def test_the_report_stands_alone_and_the_run_loads(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page and "frechet_classifier_distance@1000" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    run = load_run(out)
    assert run.generator.spec == run.tokenizer.spec and list(run.classes) == [str(digit) for digit in range(10)]


def test_a_finished_demo_is_left_alone_and_a_stopped_one_goes_on(out: Path) -> None:
    kept = {name: (out / name).read_bytes() for name in ("metrics.json", "report.html", "generator.safetensors")}
    assert "finished already" in demo(out)
    (out / "metrics.json").unlink()  # as if it had been stopped before the last file
    demo(out)
    assert (out / "generator.safetensors").read_bytes() == kept["generator.safetensors"]
    again, before = json.loads((out / "metrics.json").read_text()), json.loads(kept["metrics.json"])
    assert {name: again[name] for name in (*SCORES, "frechet")} == {name: before[name] for name in (*SCORES, "frechet")}
