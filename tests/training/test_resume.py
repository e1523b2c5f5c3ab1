"""SIGKILL at any moment, resume: the same run, bit for bit."""

import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.training import tiny

Work = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Work]]:
    """By kind: an uninterrupted run, and how to run it."""
    root = tmp_path_factory.mktemp("whole")
    runs = {
        "tokenizer": (root / "tokenizer", tiny.run_tokenizer),
        "generator": (root / "generator", partial(tiny.run_generator, tokenizer_run=root / "tokenizer")),
    }
    for folder, work in runs.values():
        assert run_in_process(work, folder) == 0
    return runs


def run_in_process(work: Callable[..., None], *arguments: object) -> int:
    process = tiny.processes().Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def run_and_kill(work: Work, out: Path, step: int, pause: float) -> int:
    """SIGKILL `pause` seconds after `step` steps are logged."""
    process = tiny.processes().Process(target=work, args=(out,))
    process.start()
    log = out / "log.jsonl"
    while process.is_alive() and (not log.exists() or f'{{"step": {step},' not in log.read_text()):
        time.sleep(0.001)
    time.sleep(pause)
    process.kill()
    process.join()
    return process.exitcode


def assert_same_run(found: Path, wanted: Path, kind: str) -> None:
    for name in ("tokenizer.safetensors", f"{kind}.safetensors"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes()
    assert tiny.journal(found) == tiny.journal(wanted)
    for picture in (wanted / "samples").glob("*.png"):
        assert (found / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_killed_at_any_time(kind: str, seed: int, whole: dict[str, tuple[Path, Work]], tmp_path: Path) -> None:
    wanted, work = whole[kind]
    rng, out = random.Random(seed), tmp_path / "run"
    for step in sorted(rng.sample(range(1, 8), 3)):
        assert run_and_kill(work, out, step, pause=rng.uniform(0, 0.02)) == -9
    assert run_in_process(work, out) == 0
    assert_same_run(out, wanted, kind)


@pytest.mark.parametrize("call", [1, 2, 9, 20, 30, 45, 60, 68])
def test_killed_while_it_writes(call: int, whole: dict[str, tuple[Path, Work]], tmp_path: Path) -> None:
    wanted, work = whole["generator"]
    assert run_in_process(tiny.die_at_call, call, work, tmp_path / "run") == -9
    assert run_in_process(work, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", wanted, "generator")


def test_a_damaged_checkpoint_is_passed_over(whole: dict[str, tuple[Path, Work]], tmp_path: Path) -> None:
    wanted, work = whole["tokenizer"]
    out = tmp_path / "run"
    shutil.copytree(wanted, out)
    newest = out / "checkpoints/step_00000010/optimizer.bin"
    newest.write_bytes(newest.read_bytes()[:-100])
    (out / "tokenizer.safetensors").unlink()
    assert run_in_process(work, out) == 0
    assert_same_run(out, wanted, "tokenizer")
