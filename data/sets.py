"""Data sets by name: pictures or clips with labels, cropped to one size.

open_set("digits", split="train")
open_set("folder", split="val", root="/data/birds", size=256, classes=recorded_with_the_checkpoint)
open_set("ucf101", split="train", root="/data/UCF-101", size=128, frames=16, flip=True)
"""

import logging
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.utils.data import Dataset

from data.builtin import open_digits, open_emoji
from data.clip_set import ClipSet
from data.crops import TRANSFORMS, mirrored
from data.errors import CorruptImage, DataError, check_name
from data.loader import sample_rng
from data.moving_digits import open_moving_digit, open_moving_digits
from data.readers import open_cifar10, open_folder, open_imagenet, open_parquet, open_tar, open_wds
from data.skipping import Skips
from data.source import Source
from data.videos import open_kinetics600, open_ucf101, open_videos

log = logging.getLogger(__name__)

BUILT_IN: dict[str, Callable[[str], Source]] = {
    "digits": open_digits,
    "emoji32": open_emoji,
    "moving_digits": open_moving_digits,
    "moving_digit": open_moving_digit,
}
ON_DISK: dict[str, Callable[[str, str], Source]] = {
    "folder": open_folder,
    "tar": open_tar,
    "wds": open_wds,
    "parquet": open_parquet,
    "cifar10": open_cifar10,
    "imagenet": open_imagenet,
    "videos": open_videos,
    "ucf101": open_ucf101,
    "kinetics600": open_kinetics600,
}
OF_VIDEOS = ("moving_digits", "moving_digit", "videos", "ucf101", "kinetics600")
UNREADABLE = (  # what PIL and the file system raise for damaged pictures
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_set(
    name: str,
    *,
    split: str,
    root: str | None = None,
    size: int = 32,
    transform: str = "center",
    flip: bool = False,
    crop_range: float = 1.1,
    classes: Sequence[str] | None = None,
    on_corrupt: Literal["skip", "error"] = "skip",
    max_corrupt: int = 10,
    frames: int | None = None,
    window: str | None = None,
    stride: int | None = None,
    short: Literal["repeat", "drop"] | None = None,
) -> "PictureSet | ClipSet":
    """Open a data set and log its name, count and licence.

    Args:
        name: of pictures: digits or emoji32 (built in); folder, tar, wds, parquet, cifar10 or imagenet (read below `root`).
            Of videos: moving_digits, moving_digit (built in); videos, ucf101 or kinetics600 (below `root`)
        split: train, val, or all (the place undivided)
        root: folder that holds the files; not for built-in sets
        size: side of the square crops, in pixels
        transform: center, random, var_center, var_random; center_flip (2 crops a picture) or ten (10 crops). Of videos:
            center, random, center_flip
        flip: mirror half of the training samples, but not those of classes that change their meaning when mirrored
        crop_range: ten crops are cut from a centre crop of size * crop_range
        classes: the class order to keep, as recorded with a checkpoint; default: the set's own, ordered as text
        on_corrupt: what training does with an unreadable picture: skip it (named, counted) or stop
        max_corrupt: so many unreadable pictures are skipped, one more is an error
        frames: of a clip; only for videos, as all that follows; default: 16
        window: which frames of a video: random (default), random_stride (1 to `stride`), uniform, center, first; or
            consecutive: all clips that lie end to end, each a sample
        stride: every so many frames; default: 1
        short: of a video with too few frames the last one is repeated (default), or it is dropped, which needs all
            frames to be counted once
    Raises DataError for an unknown name, a place that is missing or empty, and classes that `classes` lacks.
    """
    check_name(name, [*BUILT_IN, *ON_DISK], "data set")
    if name in BUILT_IN:
        if root is not None:
            raise DataError(
                f"{name}: it is built in and takes no root, got {root!r}; drop it, or take the set 'folder'"
            )
        source = BUILT_IN[name](split)
    elif root is None:
        raise DataError(f"{name}: give root=, the folder that holds the files")
    else:
        source = ON_DISK[name](root, split)
    if classes is not None:
        source = _with_classes(source, list(classes))
    cut = {"frames": frames, "window": window, "stride": stride, "short": short}
    cut = {option: value for option, value in cut.items() if value is not None}
    if name in OF_VIDEOS:
        loading = {"size": size, "transform": transform, "flip": flip}
        pictures = ClipSet(source, **cut, **loading, on_corrupt=on_corrupt, max_corrupt=max_corrupt)
    elif cut:
        raise DataError(f"{name}: holds pictures; drop {', '.join(cut)}, or take one of {', '.join(OF_VIDEOS)}")
    else:
        pictures = PictureSet(source, size, transform, flip, crop_range, on_corrupt, max_corrupt)
    log.info(
        "data set %s (%s): %d %s of %d classes from %s, licence: %s",
        name,
        split,
        len(pictures),
        "clips" if name in OF_VIDEOS else "pictures",
        len(pictures.classes),
        source.path,
        source.licence,
    )
    return pictures


def _with_classes(source: Source, classes: list[str]) -> Source:
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise DataError(
            f"{source.name}: {source.path} has {len(unknown)} classes that the given order of {len(classes)} lacks: "
            f"{', '.join(unknown[:5])}; a model trained with that order does not know them"
        )
    place = np.array([classes.index(name) for name in source.classes], dtype=np.int64)
    return replace(source, classes=classes, labels=place[source.labels])


class PictureSet(Dataset[dict[str, Any]]):
    """N samples {"image": float32 (3, S, S) in [-1, 1], "label": int64 (), "index": int}; image (A, 3, S, S) where the
    transform makes A > 1 crops.

    set[i] is the sample for evaluation: never mirrored, the same at every call, an error (CorruptImage) where the
    picture cannot be read. `sample` is the one for training.
    """

    def __init__(
        self,
        source: Source,
        size: int = 32,
        transform: str = "center",
        flip: bool = False,
        crop_range: float = 1.1,
        on_corrupt: Literal["skip", "error"] = "skip",
        max_corrupt: int = 10,
    ) -> None:
        check_name(transform, TRANSFORMS, "transform")
        if flip and source.chiral.issuperset(source.classes):
            raise DataError(f"{source.name}: every class changes its meaning when mirrored; drop flip=True")
        self.source = source
        self.size = size
        self.transform = transform
        self.crops = TRANSFORMS[transform][0]
        self.flip = flip
        self.crop_range = crop_range
        self.classes = source.classes
        self.labels = source.labels
        self.skips = Skips(source.name, "picture", len(self), on_corrupt, max_corrupt)

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sample(index, self._read(index), sample_rng(index=index), mirror=False)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The sample for training, its crop and mirroring drawn from `rng`.

        An unreadable picture is named in the log and counted, and the next readable one stands in for it, with its own
        label and index; every other sample stays what it was. Raises DataError listing the files when they are more
        than `max_corrupt` (counted in each process of a distributed run by itself).
        """
        place, image = self.skips.read(index, self._read, self.filename)
        return self._sample(place, image, rng, self.flip)

    def filename(self, index: int) -> str:
        """The file of a sample, or its place inside one."""
        return f"{self.source.path}/{self.source.names[index]}"

    @property
    def corrupt(self) -> list[str]:
        """The unreadable pictures met so far in training, by all workers."""
        return [self.filename(index) for index in self.skips.numbers]

    def describe(self) -> dict[str, Any]:
        """Plain values that say what this set is, to be kept with whatever is made from it."""
        return {
            "name": self.source.name,
            "split": self.source.split,
            "count": len(self),
            "licence": self.source.licence,
            "source": str(self.source.path),
            "size": self.size,
            "transform": self.transform,
            "crop_range": self.crop_range if self.transform == "ten" else None,
            "flip": self.flip,
            "classes": self.classes,
            "sha256": self.source.sha256,
            "files_sha256": self.source.files_sha256,
        }

    def _read(self, index: int) -> Image.Image:
        try:
            return self.source.pictures[index].convert("RGB")  # decodes
        except UNREADABLE as error:
            raise CorruptImage(
                f"{self.source.name}: picture {index}, {self.filename(index)}, cannot be read ({error}); "
                "replace it, or take it out of the set"
            ) from error

    def _sample(self, index: int, image: Image.Image, rng: np.random.Generator, mirror: bool) -> dict[str, Any]:
        label = int(self.labels[index])
        crop = TRANSFORMS[self.transform][1](image, self.size, rng, self.crop_range)  # uint8 (S, S, 3) or (A, S, S, 3)
        if mirror and rng.random() < 0.5 and self.classes[label] not in self.source.chiral:
            crop = mirrored(crop)
        image = torch.from_numpy(np.ascontiguousarray(rearrange(crop, "... h w c -> ... c h w")))
        return {"image": image.float() / 127.5 - 1, "label": torch.tensor(label), "index": index}
