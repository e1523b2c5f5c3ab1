"""scripts/published.py as a user runs it: what it prints, and its exit code."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.goldens import ROOT
from training.published import entries

SCRIPT = ROOT / "scripts/published.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    return Run(monkeypatch, capsys)


class Run:
    """Call it with command line words -> exit code, and what was printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str]:
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):  # printed by the interpreter, with code 1
                return 1, end.code
            code = end.code or 0
        return code, "".join(self.capsys.readouterr())


def test_list_has_a_row_for_every_checkpoint(run: Run) -> None:
    code, said = run("list")
    rows = {line.split()[0]: line for line in said.splitlines()[1:]}
    assert code == 0 and list(rows) == list(entries())
    for word in ("1411.0 M", "384", "llamagen-vq16", "1.75", "FID 2.34", "FoundationVision/LlamaGen/c2i_XXL_384.pt"):
        assert word in rows["llamagen-xxl-384"]


def test_show_tells_file_recipe_and_protocol(run: Run) -> None:
    code, said = run("show", "llamagen-3b-384")
    assert code == 0
    for word in ("resolve/main/c2i_3B_384.pt", "vq_ds16_c2i.pt", "scale: 1.65", "value: 2.18", "50000", "2406.06525"):
        assert word in said


def gpt_b() -> dict[str, torch.Tensor]:
    """LlamaGen-B in the original layout, of zeros that a torch file keeps in one number each."""
    block = {"attention.wqkv": (2304, 768), "attention.wo": (768, 768), "attention_norm": (768,), "ffn_norm": (768,)}
    block |= {"feed_forward.w1": (2048, 768), "feed_forward.w2": (768, 2048), "feed_forward.w3": (2048, 768)}
    shapes = {f"layers.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    shapes |= {"cls_embedding.embedding_table": (1001, 768), "norm": (768,)}
    shapes |= {"tok_embeddings": (16384, 768), "output": (16384, 768)}
    return {f"{name}.weight": torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def test_check_says_what_a_file_holds(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "c2i_B_256.pt"
    torch.save({"model": gpt_b() | {"freqs_cis": torch.zeros(257, 32, 2)}}, path)
    code, said = run("check", str(path))
    lines = {line[2:12].strip(): line[14:] for line in said.splitlines() if line.startswith("  ")}
    assert code == 0
    assert lines["fits"].startswith("llamagen-b-256, llamagen-b-384")
    assert lines["tensors"] == "89, none left over" and lines["parameters"] == "110,888,448"
    assert lines["ignored"] == "freqs_cis (the rotary table, computed from the layout)"


def test_check_fails_with_the_faults_of_the_nearest(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save({"model": gpt_b() | {"extra": torch.zeros(2), "norm.weight": torch.zeros(5)}}, path)
    code, said = run("check", str(path))
    assert code == 1
    assert said.splitlines()[1:] == [
        "  extra (2,) fits 0 rules: map it once, or ignore it with a reason",
        "  trunk.norm.weight is (5,), the model has (768,)",
    ]
    code, said = run("check", str(path), "--name", "llamagen-l-384")
    assert code == 1 and re.search(r"of that name; \d+ keys differ from llamagen-l-384:", said)
    assert re.search(r"and \d+ more$", said)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["show", "llamagen-xl-348"], 1, "did you mean 'llamagen-xl-384'"),
        (["check", "absent.pt", "--name", "llamagen"], 1, "is not known; did you mean"),
        (["frobnicate"], 2, "list"),
        (["--help"], 0, "Say which published checkpoint a file holds"),
    ],
)
def test_wrong_words_are_answered_and_fail(run: Run, words: list[str], code: int, said: str) -> None:
    found, answer = run(*words)
    assert found == code and said in " ".join(answer.split())


def test_a_failure_ends_the_process_with_code_1() -> None:
    answer = subprocess.run(
        [sys.executable, str(SCRIPT), "check", "absent.pt"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "error: absent.pt: no such checkpoint file\n"
