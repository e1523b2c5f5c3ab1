"""Files of tensors: what is read, what is refused without running, and that a failed write harms nothing."""

import argparse
import collections
import errno
import hashlib
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.checkpoint import CheckpointError, checksum, read_tensors, save_tensors, write_atomic


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator)
    return {
        "weight": weight,
        "half": weight.bfloat16(),
        "turned": weight.T,  # not contiguous
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def assert_same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run" / "model.safetensors"
    save_tensors(path, tensors(), {"step": "3"})
    assert_same(read_tensors(path), tensors())
    assert listing(path.parent) == ["model.safetensors"]
    save_tensors(path, {"other": torch.ones(1)})
    assert_same(read_tensors(str(path)), {"other": torch.ones(1)})


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_old_and_new_flat_and_nested(tmp_path: Path, zipped: bool) -> None:
    torch.save(tensors(), tmp_path / "flat.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "flat.pt"), tensors())
    content = {"model": collections.OrderedDict(tensors()), "steps": 7}
    torch.save(content, tmp_path / "nested.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "nested.pt", "model"), tensors())


class Settings:
    """A class of the file's author."""

    def __init__(self) -> None:
        self.rate = 1e-4

    def __setstate__(self, state: dict[str, float]) -> None:
        raise AssertionError("the class in the file was used")


def test_foreign_objects_beside_the_tensors_are_inert(tmp_path: Path) -> None:
    counts = collections.defaultdict(int)
    counts["a"] = 3
    beside = {
        "args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(x=1)),
        "settings": Settings(),
        "path": Path("somewhere"),
        "numpy": [np.float64(3.0), np.arange(4)],
        "counts": counts,
        "types": [dict, int, Settings],
    }
    torch.save({"model": tensors(), **beside}, tmp_path / "model.pt")
    assert_same(read_tensors(tmp_path / "model.pt", "model"), tensors())


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def test_code_in_a_file_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    calls = {
        "builtins.exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "posix.system": Call(os.system, f"touch {mark}"),
        "shutil.copy": Call(shutil.copy, __file__, str(mark)),
    }
    for name, call in calls.items():
        torch.save({"model": tensors(), "extra": call}, tmp_path / "code.pt")
        with pytest.raises(
            CheckpointError, match=rf"code\.pt: holds calls of {name}, which is code, not data; refused"
        ):
            read_tensors(tmp_path / "code.pt", "model")
    torch.save({"model": tensors(), "extra": Call(mark.touch)}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "code.pt", "model")
    assert not mark.exists()


def test_a_class_that_would_act_when_made_does_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"model": tensors(), "extra": Call(subprocess.Popen, ["touch", str(mark)])}, tmp_path / "code.pt")
    assert_same(read_tensors(tmp_path / "code.pt", "model"), tensors())
    assert not mark.exists()


def test_code_in_an_old_or_bare_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    call = Call(exec, f"open({str(mark)!r}, 'w')")
    torch.save({"w": call}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"w": call}, protocol=2))
    for name in ("old.pt", "bare.pt"):
        with pytest.raises(CheckpointError, match=name):
            read_tensors(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if name == "model.safetensors":
        save_tensors(path, tensors())
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=name == "model.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"{name}: not a whole .* copy or download it again"):
        read_tensors(path)


def test_files_of_something_else_are_named(tmp_path: Path) -> None:
    (tmp_path / "page.pt").write_text("<html>404 not found</html>")
    (tmp_path / "page.safetensors").write_text("<html>404 not found</html>")
    for name in ("page.pt", "page.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: not a whole"):
            read_tensors(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"none\.pt: no such checkpoint file"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        read_tensors(tmp_path)


def test_the_wrong_entry_is_told_with_what_there_is(tmp_path: Path) -> None:
    torch.save({"ema": tensors(), "steps": 7}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"has no entry 'model'; it holds \['ema', 'steps'\]"):
        read_tensors(tmp_path / "model.pt", "model")
    with pytest.raises(CheckpointError, match=r"expected a flat dict of tensors, found \['ema', 'steps'\]"):
        read_tensors(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="expected a flat dict of tensors, found int"):
        read_tensors(tmp_path / "model.pt", "steps")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="has no entry 'model'; it holds list"):
        read_tensors(tmp_path / "list.pt", "model")


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, tensors())
    before = checksum(path)

    def write(draft: Path) -> None:
        draft.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device", str(draft))

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert checksum(path) == before
    assert listing(tmp_path) == ["model.safetensors"]


def test_a_file_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"

    def write(draft: Path) -> None:
        assert draft.parent == path.parent  # or the rename would not be atomic
        draft.write_bytes(b"new")
        assert not path.exists()

    write_atomic(path, write)
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, lambda draft: (draft.write_bytes(b"x"), (_ for _ in ()).throw(KeyboardInterrupt)))
    assert path.read_bytes() == b"new"
    assert listing(tmp_path) == ["numbers.bin"]


def test_checksum_is_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert checksum(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_tensors_come_back_on_the_cpu_without_gradient(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"w": torch.nn.Parameter(torch.ones(2))})
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        read = read_tensors(tmp_path / name)["w"]
        assert_close(read, torch.ones(2))
        assert not read.requires_grad
