"""The first frames of videos, for a generator that goes on from them."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.clips import center_clip, first
from data.errors import DataError
from data.source import existing
from data.videos import VideoFiles, open_videos


class GivenFrames:
    """N videos' first frames, float32 (3, f, S, S) in [-1, 1] each: of one file, or of all videos below a folder in the
    order of their paths.

    frames: f; size: S, reached as for training on clips (`data.clips.center_clip`); stride: every so many frames.
    Raises DataError where there are no videos; when read, CorruptVideo, and DataError for a video that is too short.
    """

    def __init__(self, place: str | Path, frames: int, size: int, stride: int = 1) -> None:
        place = existing(place, "given clips")
        if place.is_file():
            self.videos = VideoFiles(place.parent, [place.name])
        else:
            self.videos = open_videos(place, "all").pictures
        self.place, self.frames, self.size, self.stride = place, frames, size, stride

    def __len__(self) -> int:
        return len(self.videos.names)

    def __getitem__(self, index: int) -> Tensor:
        span = (self.frames - 1) * self.stride + 1

        def choose(count: int) -> np.ndarray:
            if count < span:
                every = "" if self.stride == 1 else f", one of every {self.stride}"
                raise DataError(
                    f"{self.videos.root / self.videos.names[index]}: has {count} frames, the first {span} are needed "
                    f"({self.frames} are given{every}); give a longer video, or fewer frames"
                )
            return first(count, self.frames, self.stride)

        return center_clip(self.videos.read(index, choose), self.size) * 2 - 1

    def describe(self) -> dict[str, Any]:
        """Plain values, to be kept with what is made from these frames."""
        chosen = {"frames": self.frames, "size": self.size, "stride": self.stride}
        return {"source": str(self.place), "videos": list(self.videos.names), **chosen}
