"""A set of clips: which frames of which video a sample is, read, cropped, and labelled."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.clips import CLIP_TRANSFORMS, WINDOWS, index_all_clips
from data.errors import DataError, check_name
from data.loader import sample_rng
from data.skipping import Skips
from data.source import Source

CONSECUTIVE = "consecutive"


class ClipSet(Dataset[dict[str, Any]]):
    """N samples {"image": float32 (3, T, S, S) in [-1, 1], "label": int64 (), "index": int}; image (A, 3, T, S, S) where
    the transform makes A > 1 clips.

    A clip lies under "image", so that whatever trains on pictures trains on clips. set[i] is the sample for evaluation:
    never mirrored, the same at every call, an error (CorruptVideo) where the video cannot be read. `sample` is the one
    for training. N is the number of videos, or with window "consecutive" that of all their clips.

    frames: T; the other arguments: see open_set. Raises DataError where no video is long enough.
    """

    def __init__(
        self,
        source: Source,
        frames: int = 16,
        window: str = "random",
        stride: int = 1,
        short: Literal["repeat", "drop"] = "repeat",
        size: int = 64,
        transform: str = "center",
        flip: bool = False,
        on_corrupt: Literal["skip", "error"] = "skip",
        max_corrupt: int = 10,
    ) -> None:
        check_name(window, (*WINDOWS, CONSECUTIVE), "window")
        check_name(short, ("repeat", "drop"), "short")
        check_name(transform, CLIP_TRANSFORMS, "transform of clips")
        if frames < 1 or stride < 1:
            raise DataError(f"{source.name}: frames is {frames}, stride {stride}; both must be at least 1")
        if window == "uniform" and stride > 1:
            raise DataError(f"{source.name}: uniform frames span the whole video; leave stride out, it is {stride}")
        if flip and source.chiral.issuperset(source.classes):
            raise DataError(f"{source.name}: every class changes its meaning when mirrored; drop flip=True")
        self.source = source
        self.frames, self.window, self.stride, self.short = frames, window, stride, short
        self.size = size
        self.transform = transform
        self.crops = CLIP_TRANSFORMS[transform][0]
        self.flip = flip
        self.rows = self._index()
        self.classes = source.classes
        self.labels = source.labels[self.rows[:, 0]]
        self.skips = Skips(source.name, "clip", len(self), on_corrupt, max_corrupt)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = sample_rng(index=index)
        return self._sample(index, self._read(index, _seed(rng)), rng, mirror=False)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The sample for training, its window, crop and mirroring drawn from `rng`.

        An unreadable video is named in the log and counted, and the next readable clip stands in for it, with its own
        label and index; every other sample stays what it was. Raises DataError listing the files when they are more
        than `max_corrupt` (counted in each process of a distributed run by itself).
        """
        seed = _seed(rng)  # of the window, whichever video it is cut out of in the end
        place, frames = self.skips.read(index, lambda place: self._read(place, seed), self.filename)
        return self._sample(place, frames, rng, self.flip)

    def filename(self, index: int) -> str:
        """The file of a sample, or its place inside one."""
        return f"{self.source.path}/{self.source.names[self.rows[index, 0]]}"

    @property
    def corrupt(self) -> list[str]:
        """The videos of unreadable clips met so far in training, by all workers."""
        return [self.filename(index) for index in self.skips.numbers]

    def describe(self) -> dict[str, Any]:
        """Plain values that say what this set is, to be kept with whatever is made from it."""
        return {
            "name": self.source.name,
            "split": self.source.split,
            "count": len(self),
            "videos": len(self.source.labels),
            "licence": self.source.licence,
            "source": str(self.source.path),
            "frames": self.frames,
            "window": self.window,
            "stride": self.stride,
            "short": self.short,
            "size": self.size,
            "transform": self.transform,
            "crop_range": None,
            "flip": self.flip,
            "classes": self.classes,
            "sha256": self.source.sha256,
            "files_sha256": self.source.files_sha256,
        }

    def _index(self) -> np.ndarray:
        """int64 (N, 2): the video of each clip, and its first frame where the window is consecutive.

        A broken video keeps a row where frames are counted: it is to be met, not to vanish.
        """
        whole = np.stack((np.arange(len(self.source.labels)), np.zeros(len(self.source.labels), dtype=np.int64)), 1)
        if self.window != CONSECUTIVE and self.short == "repeat":
            return whole
        counts = self.source.pictures.counts()
        block = self.frames * self.stride
        if self.window == CONSECUTIVE:
            least = block
        else:
            least = self.frames if self.window in ("random_stride", "uniform") else block - self.stride + 1
        padded = np.where(counts == 0, block, counts)
        rows = index_all_clips(padded, block) if self.window == CONSECUTIVE else whole[padded >= least]
        if not len(rows):
            longest = int(counts.argmax())
            raise DataError(
                f"{self.source.name}: no video of {self.source.path} has {least} frames, the longest is "
                f"{self.source.names[longest]} with {counts[longest]}; take fewer frames, a smaller stride, or "
                "window='random' and short='repeat'"
            )
        return rows

    def _read(self, index: int, seed: int) -> np.ndarray:
        video, start = self.rows[index]

        def choose(n: int) -> np.ndarray:
            if self.window == CONSECUTIVE:
                return start + np.arange(self.frames) * self.stride
            return WINDOWS[self.window](n, self.frames, np.random.default_rng(seed), self.stride)

        return self.source.pictures.read(int(video), choose)

    def _sample(self, index: int, frames: np.ndarray, rng: np.random.Generator, mirror: bool) -> dict[str, Any]:
        label = int(self.labels[index])
        clip: Tensor = CLIP_TRANSFORMS[self.transform][1](frames, self.size, rng)  # (3, T, S, S) or (A, 3, T, S, S)
        if mirror and rng.random() < 0.5 and self.classes[label] not in self.source.chiral:
            clip = clip.flip(-1)
        return {"image": clip * 2 - 1, "label": torch.tensor(label), "index": index}


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**63))
