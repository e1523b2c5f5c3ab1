"""Checkpoints: whole or passed over, and there after a full disk."""

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from layers.checkpoint import CheckpointError, checksum
from tests.training import tiny
from training.checkpoint import Checkpoints, check_whole
from training.run import NotWritten

STATE_BYTES = 4 * (64 * 64 + 64)  # of the model below, in float32


def make(folder: Path, keep_last: int = 2) -> tuple[nn.Module, Checkpoints]:
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return model, Checkpoints(folder / "checkpoints", accelerator, keep_last, parts=[model, optimizer])


def steps_on_disk(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_newest_stay(tmp_path: Path) -> None:
    _, checkpoints = make(tmp_path, keep_last=2)
    for step in (1, 2, 10, 100):
        checkpoints.save(step)
    assert steps_on_disk(checkpoints) == ["step_00000010", "step_00000100"]


def test_resume_finds_the_state_of_the_newest(tmp_path: Path) -> None:
    model, checkpoints = make(tmp_path)
    checkpoints.save(1)
    with torch.no_grad():
        model.weight.add_(1)
    wanted = model.weight.detach().clone()
    checkpoints.save(2)
    again, found = make(tmp_path)
    assert found.resume() == 2
    assert torch.equal(again.weight, wanted)


def test_without_checkpoints_training_begins_at_the_beginning(tmp_path: Path) -> None:
    assert make(tmp_path)[1].resume() == 0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "manifest.json"])
def test_a_truncated_file_is_named_and_the_one_before_taken(name: str, tmp_path: Path) -> None:
    _, checkpoints = make(tmp_path)
    checkpoints.save(1)
    checkpoints.save(2)
    for step, left in ((2, 1), (1, 0)):
        damaged = tmp_path / f"checkpoints/step_{step:08d}" / name
        damaged.write_bytes(damaged.read_bytes()[:-20])
        with pytest.raises(CheckpointError, match=name):
            check_whole(damaged.parent)
        if left:
            assert checkpoints.resume() == 1
        else:
            with pytest.raises(CheckpointError, match=f"every checkpoint is damaged.*{name}"):
                checkpoints.resume()


def test_a_changed_file_of_the_same_size_is_found(tmp_path: Path) -> None:
    _, checkpoints = make(tmp_path)
    checkpoints.save(1)
    file = tmp_path / "checkpoints/step_00000001/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        check_whole(file.parent)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    _, checkpoints = make(tmp_path)
    checkpoints.save(1)
    manifest = tmp_path / "checkpoints/step_00000001/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "processes": 8}))
    with pytest.raises(CheckpointError, match=r"8 processes, now there are 1; launch with --num_processes 8"):
        checkpoints.resume()


class Touch:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    _, checkpoints = make(tmp_path)
    checkpoints.save(1)
    folder, proof = tmp_path / "checkpoints/step_00000001", tmp_path / "it-ran"
    torch.save(Touch(proof), folder / "optimizer.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "optimizer.bin"
    manifest["files"]["optimizer.bin"] = [file.stat().st_size, checksum(file)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step_00000001: holds something else than tensors"):
        checkpoints.resume()
    assert not proof.exists()


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoints = make(tmp_path)
    checkpoints.save(1)

    def half_written(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(NotWritten) as error:
        checkpoints.save(2)
    for part in ("step_00000002", f"{STATE_BYTES:,} bytes", "are free", "No space left", "step_00000001", "--resume"):
        assert part in str(error.value)
    assert steps_on_disk(checkpoints) == ["step_00000001"]
    assert checkpoints.resume() == 1


def train_under_a_limit(out: Path, tokenizer_run: Path) -> None:
    """Files cannot grow beyond 20,000 bytes: smaller than any checkpoint, larger than all before it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        tiny.run_generator(out, tokenizer_run, steps=10)
    except NotWritten as error:
        (out / "said.txt").write_text(str(error))


def test_a_run_that_met_a_full_disk_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    processes = tiny.processes()

    def run(work: object, *arguments: object) -> None:
        process = processes.Process(target=work, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == 0

    run(tiny.run_tokenizer, tmp_path / "vq", 1)
    run(tiny.run_generator, tmp_path / "whole", tmp_path / "vq")
    run(tiny.run_generator, tmp_path / "cut", tmp_path / "vq", 4)
    run(train_under_a_limit, tmp_path / "cut", tmp_path / "vq")
    said = (tmp_path / "cut/said.txt").read_text()
    assert "step_00000008: could not be written" in said and "checkpoints/step_00000004" in said
    run(tiny.run_generator, tmp_path / "cut", tmp_path / "vq")
    for name in ("generator.safetensors", "tokenizer.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
