"""Files of tensors: read without running code, written all or nothing.

Reading: safetensors; or a torch file under `weights_only=True`, where every class outside torch's own short list
becomes an inert record, and a function is refused by name. Writing: to a temporary file beside the target, flushed to
the disk, then renamed, so a full disk or a kill leaves the previous file whole.
"""

import builtins
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

DATA_MAKERS = ("numpy.", "_codecs.encode", "collections.", "datetime.")  # lower-case names of data: inert like classes


class CheckpointError(ValueError):
    """A checkpoint file that is missing, damaged, or holds something else than tensors."""


def read_tensors(path: str | Path, nested: str | None = None) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, by name.

    nested: the key of a torch file under which the state dict lies ("model", "ema", "trainer.model" for a dict within a
    dict, ...); None for a flat one.
    Raises CheckpointError for a missing, truncated or foreign file, for code in it, and for a `nested` it lacks.
    """
    return next(iter(read_places(path, [nested]).values()))


def read_places(path: str | Path, places: Sequence[str | None]) -> dict[str | None, dict[str, Tensor]]:
    """The tensors at each of `places` (see read_tensors) where a file has some; it is read once.

    A safetensors file is flat: it has its tensors at None, whatever the places. Raises CheckpointError as read_tensors,
    for what the last place lacks where it has none of them.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {None: {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (it is no mapping)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file, copy or download it again ({error})"
            ) from error
    content, found, refusal = _load_torch_file(path), {}, None
    for place in places:
        try:
            found[place] = _tensors_at(content, place, path)
        except CheckpointError as error:
            refusal = error
    if not found:
        raise refusal
    return found


def _tensors_at(content: Any, place: str | None, path: Path) -> dict[str, Tensor]:
    for part in () if place is None else place.split("."):
        if not isinstance(content, Mapping) or part not in content:
            keys = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"{path}: has no entry {place!r}; it holds {keys}")
        content = content[part]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: expected a flat dict of tensors, found {keys}; name the entry that holds them")
    return dict(content)


def _load_torch_file(path: Path) -> Any:
    try:
        # torch.save has written zip archives since 1.6; an older file gets no stand-ins: tensors and containers only
        foreign = get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
        functions = [name for name in foreign if _is_function(name)]
        if functions:
            raise CheckpointError(
                f"{path}: holds calls of {', '.join(functions)}, which is code, not data; refused. "
                "Ask its author for a safetensors file, or for the state dict alone"
            )
        with safe_globals([(_stand_in(name), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch's readers let whatever a damaged pickle raises through
        raise CheckpointError(
            f"{path}: not a whole torch checkpoint (truncated, or something else); copy or download it again "
            f"({type(error).__name__}: {error})"
        ) from error


def _is_function(name: str) -> bool:
    """Whether a pickle's global is to be refused: by its spelling, since nothing is imported to find out."""
    module, _, last = name.rpartition(".")
    if module == "builtins":
        return not isinstance(getattr(builtins, last, None), type)
    return not last.lstrip("_")[:1].isupper() and not name.startswith(DATA_MAKERS)


def _stand_in(name: str) -> Callable[..., Any]:
    """What is called in place of a foreign class. The entries of a defaultdict are set one by one, so it is a dict."""
    if name == "collections.defaultdict":
        return _plain_dict
    return type(name.rpartition(".")[2], (_Inert,), {})


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


class _Inert:
    """Stands for an object of a class that this reader does not construct: keeps what it was given, does nothing."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Run `write` on a temporary path beside `path`, then put the result in its place.

    An error (a full disk, say) removes the temporary file and leaves an existing `path` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, written atomically. metadata: strings kept in its header."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda draft: save_file(whole, draft, dict(metadata or {})))


def checksum(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
