"""Files: results are written all or nothing, weights are known by their checksum."""

import hashlib
import json
import os
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any


def write_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a draft beside `path`, then put it there. An error leaves an existing file as it was, and no draft."""
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


def write_whole(path: str | Path, content: bytes) -> None:
    """Put `content` under `path`, all or nothing."""
    write_file(path, lambda draft: draft.write_bytes(content))


def write_json(path: str | Path, content: Any) -> None:
    """Plain values as standard JSON; numbers that JSON lacks become the strings "inf", "-inf" and "nan"."""
    write_whole(path, (json.dumps(_standard(content), indent=1, allow_nan=False) + "\n").encode())


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _standard(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _standard(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(entry) for entry in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value
