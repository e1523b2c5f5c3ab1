"""Readers of videos on disk, through PyAV: any folder, UCF-101, Kinetics-600.

Each gives a Source whose videos are read by number, in the order of their paths as text. A video that is cut short,
damaged or no video at all raises CorruptVideo with its name.
"""

import csv
import json
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from tqdm.contrib.concurrent import thread_map

from data.errors import CorruptVideo, DataError, check_name
from data.source import SPLITS, Source, existing, split_folder

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".gif", ".mkv", ".mov", ".webm", ".m4v", ".mpg")
GIF_END = b";"
COUNTS_FILE = ".frame_counts.json"  # in the folder of the videos: {name: [bytes of the file, frames]}
UNKNOWN_LICENCE = "not stated: ask the owner of the files"
UCF101_CLASSES, KINETICS600_CLASSES = 101, 600
UCF101_LISTS = {  # split -> its lists, the first that exists is taken: as LARP ships them, as the data set does
    "train": ("ucf101_train.csv", "trainlist01.txt", "ucfTrainTestlist/trainlist01.txt"),
    "val": ("ucf101_val.csv", "testlist01.txt", "ucfTrainTestlist/testlist01.txt"),
}


@dataclass(frozen=True)
class VideoFiles:
    """Videos below `root` by number. May be sent to another process: no file stays open."""

    root: Path
    names: Sequence[str]

    def counts(self) -> np.ndarray:
        """Frames of every video that can be decoded, int64 (V,), 0 for one that is broken.

        All are decoded, once: the numbers are kept in `root`, where that can be written.
        """
        known = self._known()
        sizes = [path.stat().st_size if (path := self.root / name).is_file() else -1 for name in self.names]
        new = [name for name, size in zip(self.names, sizes, strict=True) if known.get(name, [None])[0] != size]
        if new:
            found = thread_map(self._count, new, desc=f"{self.root}: counting frames", disable=None)
            size_of = dict(zip(self.names, sizes, strict=True))
            known |= {name: [size_of[name], count] for name, count in zip(new, found, strict=True)}
            known = {name: entry for name, entry in known.items() if entry[1]}  # a broken one may be mended
            self._keep(known)
        return np.array([known.get(name, [0, 0])[1] for name in self.names], dtype=np.int64)

    def read(self, index: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        """uint8 (T, H, W, 3): the frames that `choose` names, given how many there are.

        How many is what the file lists; where fewer can be decoded, it is asked again with their number.
        Raises CorruptVideo.
        """
        path = self.root / self.names[index]
        times = _times(path)
        frames, there = read_frames(path, choose(len(times)), times)
        if frames is None and there:
            frames, there = read_frames(path, choose(there))
        if frames is None:
            raise CorruptVideo(f"{path}: {there} frames can be decoded, fewer than were counted; copy it again")
        return frames

    def _count(self, name: str) -> int:
        try:
            _times(self.root / name)
            return sum(1 for _ in _decode(self.root / name))
        except CorruptVideo as error:
            log.warning("%s", error)
            return 0

    def _known(self) -> dict[str, list[int]]:
        try:
            return json.loads((self.root / COUNTS_FILE).read_text())
        except (OSError, ValueError):
            return {}

    def _keep(self, counts: dict[str, list[int]]) -> None:
        draft = self.root / f"{COUNTS_FILE}.{os.getpid()}.tmp"
        try:
            draft.write_text(json.dumps(counts))
            draft.replace(self.root / COUNTS_FILE)
        except OSError as error:
            log.warning("%s: frames were counted, the numbers could not be kept there (%s)", self.root, error)
        finally:
            draft.unlink(missing_ok=True)


def read_frames(path: Path, wanted: np.ndarray, times: Sequence[int | None] = ()) -> tuple[np.ndarray | None, int]:
    """The frames with these numbers, ascending, uint8 (T, H, W, 3), and how many were met on the way.

    times: the presentation times of all frames, where known: then decoding begins at the keyframe before the first of
    `wanted`, unless what comes from there is not what they say. None where the video ends before the last of them: then
    all were decoded. Raises CorruptVideo.
    """
    chosen, last = set(wanted.tolist()), int(wanted[-1])
    seeks = 0 < wanted[0] < len(times) and None not in times
    ways = [_from_keyframe(path, int(wanted[0]), times)] if seeks else []
    met = 0
    for numbered in (*ways, enumerate(_decode(path))):
        pictures: dict[int, np.ndarray] = {}
        for number, frame in numbered:
            met = number + 1
            if number in chosen:
                pictures[number] = frame.to_ndarray(format="rgb24")
                if pictures[number].shape != next(iter(pictures.values())).shape:
                    raise CorruptVideo(f"{path}: the size of its frames changes at frame {number}; encode it again")
            if number == last:
                return np.stack([pictures[place] for place in wanted.tolist()]), met
    return None, met


def _from_keyframe(path: Path, start: int, times: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Numbered frames from the keyframe at or before `start` on, as long as their times are those expected."""
    first = None
    for place, frame in enumerate(_decode(path, times[start])):
        if first is None:
            first = bisect_left(times, frame.pts) if frame.key_frame and frame.pts is not None else len(times)
        number = first + place
        if number > start + place or number >= len(times) or frame.pts != times[number]:
            return
        yield number, frame


def _times(path: Path) -> list[int | None]:
    """When each frame is shown, sorted; None where the file does not say. Nothing is decoded.

    Raises CorruptVideo for a file that holds fewer frames than it promises.
    """
    with _opened(path) as container, _naming(path):
        stream = _stream(path, container)
        packets = container.demux(stream)
        times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        promised = stream.frames
    if path.suffix.lower() == ".gif" and path.read_bytes()[-1:] != GIF_END:
        raise CorruptVideo(f"{path}: cut off after {len(times)} frames; copy it again, or leave it out")
    if not times or len(times) < promised - 1:  # one more than there are is what many AVI files say
        raise CorruptVideo(
            f"{path}: holds {len(times)} frames, {promised or 'at least 1'} should be there; copy it again, or leave it out"
        )
    return times if None in times else sorted(times)


def _decode(path: Path, time: int | None = None) -> Iterator[av.VideoFrame]:
    """All frames in the order in which they are shown, or those from the keyframe before `time` on."""
    with _opened(path) as container, _naming(path):
        stream = _stream(path, container)
        if time is not None:
            container.seek(time, stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt and time is None:
                raise CorruptVideo(f"{path}: frame {number} is damaged; copy it again, or leave it out")
            if frame.is_corrupt:
                return
            yield frame


def _opened(path: Path) -> av.container.InputContainer:
    with _naming(path):
        return av.open(path)


def _stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise CorruptVideo(f"{path}: holds no video stream; leave it out")
    return container.streams.video[0]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what FFmpeg and the file system say about a file into CorruptVideo."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise CorruptVideo(
            f"{path}: not a readable video ({error.strerror}); copy it again, or leave it out"
        ) from error


def open_videos(root: str | Path, split: str) -> Source:
    """root/<split>/<class>/**: videos in one folder a class, or all in root/<split>/ itself: one class, "all".

    With split "all" the same without <split>. Raises DataError where there are none, and where some lie beside the
    class folders.
    """
    folder = split_folder(root, split, "videos")
    names = _videos_below(folder, "videos")
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise DataError(f"videos: {folder / flat[0]} lies beside folders of videos; put it into one of them, its class")
    return _source("videos", folder, split, names, [name.split("/")[0] if "/" in name else "all" for name in names])


def open_ucf101(root: str | Path, split: str) -> Source:
    """UCF-101 (Soomro et al. 2012): root/<class>/v_<class>_gNN_cNN.avi, divided by one of UCF101_LISTS in `root`; or
    root/<split>/<class>/v_*, as VideoGPT has it. "val" is the test part of its first division.

    The class is what the file's name says, not the folder's, as in LARP. Raises DataError for another number of classes
    than 101, and for listed files that are not there.
    """
    check_name(split, SPLITS, "ucf101: split")
    root = existing(root, "ucf101")
    lists = [root / name for name in UCF101_LISTS.get(split, ()) if (root / name).is_file()]
    if lists:
        folder, names = _listed("ucf101", root, lists[0])
    elif split == "all" or any((root / alias).is_dir() for alias in SPLITS[split]):
        folder = split_folder(root, split, "ucf101")
        names = _videos_below(folder, "ucf101")
    else:
        raise DataError(
            f"ucf101: {root} has no list of split {split!r} ({', '.join(UCF101_LISTS[split])}) and no folder of that "
            "name; unpack the lists of the data set there"
        )
    strange = [name for name in names if not re.fullmatch(r"v_[^_]+_.*", Path(name).stem)]
    if strange:
        raise DataError(f"ucf101: {folder / strange[0]} is not named like v_ApplyEyeMakeup_g01_c01.avi")
    kinds = [Path(name).stem.split("_")[1] for name in names]
    return _of_classes(
        _source("ucf101", folder, split, names, kinds, "not stated by its authors; cite Soomro et al. 2012"),
        UCF101_CLASSES,
    )


def open_kinetics600(root: str | Path, split: str) -> Source:
    """Kinetics-600 (Carreira et al. 2018): root/<split>/<class>/*.mp4; or videos named by a list root/k600_<split>.csv
    with the columns path and action, as LARP ships one for validation.

    Raises DataError for another number of classes than 600, and for listed files that are not there.
    """
    check_name(split, SPLITS, "kinetics600: split")
    root = existing(root, "kinetics600")
    listing = root / f"k600_{split}.csv"
    if listing.is_file():
        folder, names = _listed("kinetics600", root, listing)
        action = {Path(row["path"]).name: row["action"] for row in _rows("kinetics600", listing, ("path", "action"))}
        kinds = [action[Path(name).name] for name in names]
    else:
        folder = split_folder(root, split, "kinetics600")
        names = _videos_below(folder, "kinetics600")
        kinds = [Path(name).parent.name for name in names]
    return _of_classes(_source("kinetics600", folder, split, names, kinds), KINETICS600_CLASSES)


def _source(
    name: str, folder: Path, split: str, names: list[str], kinds: list[str], licence: str = UNKNOWN_LICENCE
) -> Source:
    classes = sorted(set(kinds))
    number = {kind: place for place, kind in enumerate(classes)}
    return Source(
        name=name,
        split=split,
        licence=licence,
        path=folder,
        classes=classes,
        labels=np.array([number[kind] for kind in kinds], dtype=np.int64),
        names=names,
        pictures=VideoFiles(folder, names),
    )


def _of_classes(source: Source, count: int) -> Source:
    if len(source.classes) != count:
        raise DataError(
            f"{source.name}: {source.path} has videos of {len(source.classes)} classes, expected {count}, so that labels "
            "are those of published models; for a subset take the set 'videos'"
        )
    return source


def _videos_below(folder: Path, name: str) -> list[str]:
    """Below `folder`, as text in the order of text."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise DataError(f"{name}: {folder} holds no videos ({', '.join(VIDEO_SUFFIXES)}); put them there")
    return names


def _listed(name: str, root: Path, listing: Path) -> tuple[Path, list[str]]:
    """`root`, and the listed videos below it, sorted. The list's paths may begin with folders that `root` lies in."""
    if listing.suffix == ".csv":
        paths = [row["path"] for row in _rows(name, listing, ("path",))]
    else:  # "<class>/<file>", and in lists for training the number of the class
        paths = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    if not paths:
        raise DataError(f"{name}: {listing} lists no videos; copy it again")
    parts = Path(paths[0]).parts
    above = next((n for n in range(len(parts)) if (root / Path(*parts[n:])).is_file()), None)
    if above is None:
        raise DataError(
            f"{name}: {listing} begins with {paths[0]}, which is not in {root}, nor is {parts[-1]} itself; "
            "put the videos there under these names"
        )
    names = sorted(Path(*Path(path).parts[above:]).as_posix() for path in paths)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of {len(names)} videos of {listing} are not in {root}, the first is {missing[0]}; "
            "put them there, or take them out of the list"
        )
    return root, names


def _rows(name: str, listing: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with listing.open(newline="") as file:
        reader = csv.DictReader(file)
        lacking = [column for column in columns if column not in (reader.fieldnames or ())]
        if lacking:
            raise DataError(f"{name}: {listing} has the columns {reader.fieldnames}, needs {', '.join(lacking)} too")
        return list(reader)
