"""scripts/explain_fid.py as a user runs it: what it prints, and its exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.files import write_json
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score
from scripts.explain_fid import explain_fid
from tests.goldens import ROOT


def write(path: Path, value: float, batch_size: int) -> Path:
    pictures = PicturesRecord("ours.npz", "a" * 64, 50_000, 256, 256, Origin.unknown())
    computed = Computation("cpu", "float32", batch_size, {})
    score = Score("fid@50000", value, Provenance("Fréchet distance", None, pictures, pictures, computed))
    write_json(path, {score.name: score.record(), "audit": {}})
    return path


def test_two_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain_fid(write(tmp_path / "ours.json", 3.0, 64), write(tmp_path / "theirs.json", 3.5, 1))
    said = capsys.readouterr().out
    assert said.startswith("fid@50000: 3 / 3.5, second - first +0.5\n  arithmetic computation batch_size: 64 / 1\n")
    assert "more than arithmetic explains" in said


def test_an_error_is_one_line(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours.json", 3.0, 64)
    command = [sys.executable, ROOT / "scripts/explain_fid.py", ours, tmp_path / "none.json", "--score", "fid@50000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.fullmatch(rf"error: {tmp_path}/none\.json: not a readable .*\n", done.stderr)
