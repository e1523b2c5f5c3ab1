"""What a reader finds: the pictures or videos of one split, as they are stored."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from data.errors import DataError, check_name

SPLITS = {  # ours -> the names it goes by on disk, the first that exists is taken; "all": the place itself, undivided
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
    "all": (),
}


class Pictures(Protocol):
    """Pictures by number, decoded when asked; may be sent to another process."""

    def __getitem__(self, index: int) -> Image.Image: ...


class Videos(Protocol):
    """Videos by number, frames decoded when asked; may be sent to another process."""

    def counts(self) -> np.ndarray:
        """Frames of every video, int64 (N,); 0 for a broken one."""

    def read(self, index: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        """uint8 (T, H, W, 3): of a video the frames that `choose` names, ascending, given how many there are."""


@dataclass(frozen=True)
class Source:
    """N pictures, or N videos, of one split.

    path: the file or folder they come from. labels int64 (N,): places in `classes`. names: N names below `path`.
    sha256: of the content where it is one small file, else None. chiral: the classes whose pictures mean something
    else when mirrored.
    """

    name: str
    split: str
    licence: str
    path: Path
    classes: list[str]
    labels: np.ndarray
    names: Sequence[str]
    pictures: Pictures | Videos
    sha256: str | None = None
    chiral: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise DataError(f"{self.name}: {self.path} holds no pictures or videos for the split {self.split!r}")
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise DataError(
                f"{self.name}: {self.path} has labels {self.labels.min()} .. {self.labels.max()} "
                f"for {len(self.classes)} classes; labels must be 0 .. {len(self.classes) - 1}"
            )

    @cached_property
    def files_sha256(self) -> str:
        """Of the list of names and class names: it tells whether number i is still the same picture."""
        lines = (f"{self.classes[label]} {name}\n" for label, name in zip(self.labels, self.names, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class ArrayPictures:
    """Pictures held in memory: uint8 (N, H, W) or (N, H, W, 3)."""

    array: np.ndarray

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


def existing(root: str | Path, name: str) -> Path:
    """`root` as a path. Raises DataError where nothing is there."""
    root = Path(root)
    if not root.exists():
        raise DataError(f"{name}: {root.absolute()} does not exist; give root=, the place that holds the files")
    return root


def split_folder(root: str | Path, split: str, name: str) -> Path:
    """root/train and the like; `root` itself for "all". Raises DataError: a split is never read from another place."""
    check_name(split, SPLITS, f"{name}: split")
    root = existing(root, name)
    found = [root / alias for alias in SPLITS[split] if (root / alias).is_dir()]
    if split != "all" and not found:
        looked = ", ".join(f"{alias}/" for alias in SPLITS[split])
        raise DataError(
            f"{name}: {root} has no folder {looked}; make one, or take split='all' to read {root} undivided"
        )
    return root if split == "all" else found[0]


def split_files(root: str | Path, split: str, suffix: str, name: str) -> list[Path]:
    """The files *.suffix of a split, sorted: in root/train, or in root or root/data with "train" in their names.

    With "all": every such file of `root`, or `root` itself when it is a file. Raises DataError where there is none.
    """
    check_name(split, SPLITS, f"{name}: split")
    root = existing(root, name)
    if split == "all":
        found = [root] if root.is_file() else sorted(root.glob(f"*.{suffix}"))
        looked = f"*.{suffix}"
    else:
        patterns = [
            pattern
            for alias in SPLITS[split]
            for pattern in (f"{alias}/*.{suffix}", f"*{alias}*.{suffix}", f"data/*{alias}*.{suffix}")
        ]
        found = next((files for pattern in patterns if (files := sorted(root.glob(pattern)))), [])
        looked = ", ".join(patterns)
    if not found:
        raise DataError(
            f"{name}: {root} holds no {looked}; put the files there, or take split='all' for one undivided set"
        )
    return found
