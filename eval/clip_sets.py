"""Sets of videos, and the clips that are cut out of them to be scored: from sample files (npz), videos and frames.

Reading is strict, as in `eval.pictures`: what is damaged, missing, too short, of another type or another size ends in a
PictureError that names the file. Nothing is held as a whole: clips are cut while a video is decoded.

Axes: N videos or clips, T frames, H, W places. Videos are read once, in their order, so clips come in the order of their
videos and starts, whatever the order in which they were drawn; no video score depends on it.
"""

import random
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from tqdm import tqdm

from eval.clips import Place, centre_window, consecutive_clips, fit_shorter_side, larp_reference, random_windows
from eval.pictures import (
    SUFFIXES,
    UNREADABLE,
    PictureError,
    PictureSet,
    array_header,
    open_arrays,
    read_labels,
    read_picture,
    read_record,
)
from eval.provenance import Origin

VIDEO_SUFFIXES = (".mp4", ".avi", ".gif", ".mkv", ".mov", ".webm", ".m4v", ".mpg")
GIF_END = b";"
AS_DECODED = "as decoded from files"


@dataclass(frozen=True)
class VideoSet:
    """Videos of any lengths. names: of each, for errors; counts: how many frames of each can be decoded.

    frames(numbers), ascending: for each of these videos its frames, an iterable of uint8 (3, H, W), afresh at every call.
    labels: int64 (N,), of the videos.
    """

    name: str
    names: Sequence[str]
    counts: Sequence[int]
    frames: Callable[[Sequence[int]], Iterator[Iterable[Tensor]]]
    origin: Origin
    labels: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """Which clips are cut out of a set of videos: length frames, every stride-th one. Called with the set, their places.

    rule: "whole": the videos are the clips, made to be scored; longer ones are refused.
    "first": as "whole", and of longer videos the first frames.
    "consecutive": all that lie end to end. "larp": `count` of these, drawn by Python's generator.
    "random": one from a random start, of the first `count` videos that have length * stride frames.
    "centre": one around the middle of every video that is long enough.

    count: how many the protocol asks for. Where there are fewer, all are taken, and the score carries their number.
    """

    rule: Literal["whole", "first", "consecutive", "larp", "random", "centre"]
    length: int | None = 16
    stride: int = 1
    count: int | None = None
    seed: int = 0

    def __call__(self, videos: VideoSet) -> list[Place]:
        """Raises PictureError where no video is long enough; "whole" and "first" where a single one is not."""
        if self.length is None or self.rule in ("whole", "first"):
            named = zip(videos.names, videos.counts, strict=True)
            return [Place(number, self.of_sample(name, count)) for number, (name, count) in enumerate(named)]
        least = self.length * self.stride
        counts = [count if count >= least else 0 for count in videos.counts]
        if not any(counts):
            longest = max(range(len(counts)), key=videos.counts.__getitem__)
            raise PictureError(
                f"{videos.name}: no video has {least} frames, the longest is {videos.names[longest]} with "
                f"{videos.counts[longest]}; give longer videos, or score under a protocol of shorter clips"
            )
        if self.rule == "random":
            long_enough = sum(count > 0 for count in counts)
            count = min(self.count or long_enough, long_enough)
            return random_windows(counts, random.Random(self.seed), self.length, self.stride, count)
        if self.rule == "centre":
            numbers = [number for number, count in enumerate(counts) if count][: self.count]
            return [Place(number, centre_window(counts[number], self.length)) for number in numbers]
        clips = consecutive_clips(counts, self.length)
        if self.rule == "consecutive":
            return clips[: self.count]
        return larp_reference(counts, min(self.count or len(clips), len(clips)), self.length, self.seed)

    def of_sample(self, name: str, count: int) -> range:
        """The frames of the clip that a sample of `count` frames is. One of `length` frames is taken to have the stride
        already. Raises PictureError where it is too short, under "whole" also where it is too long."""
        if self.length is None or count == self.length:
            return range(count)
        span = (self.length - 1) * self.stride + 1
        if count < span or (self.rule == "whole" and count > span):
            cure = "make longer samples" if count < span else f"cut them to {span} first"
            raise PictureError(
                f"{name}: has {count} frames, the protocol compares {self.length}"
                f"{f' frames, every {self.stride}th' if self.stride > 1 else ''}; {cure}, or choose another protocol"
            )
        return range(0, span, self.stride)

    def __str__(self) -> str:
        drawn = f", seed {self.seed}" if self.rule in ("larp", "random") else ""
        every = "" if self.stride == 1 else f", every {self.stride}th"
        return f"{self.rule} clips of {self.length or 'all'} frames{every}{drawn}"


FITS = {  # how videos of another size than the clips they are compared with become squares of their size
    "larp": "shorter side by antialiased bilinear, the other rounded down, centre crop",
    "stylegan-v": "shorter side by PIL's Lanczos, the other rounded down, centre crop, uint8",
    "videogpt": "shorter side by bilinear without antialiasing, the other rounded up, centre crop",
}


def fit(clip: Tensor, size: int, rule: str) -> Tensor:
    """Clip uint8 (3, T, H, W) -> (3, T, size, size) by FITS[rule]: uint8 under "stylegan-v", else float in [-1, 1].

    "larp" is the reader of real clips in LARP's sampling script, "stylegan-v" the conversion of videos to frames (which
    then saves JPEG), "videogpt" the reader of VideoGPT. Raises ValueError for another rule.
    """
    if rule not in FITS:
        raise ValueError(f"fit: unknown rule {rule!r}; known: {', '.join(FITS)}")
    if rule == "videogpt":
        return fit_shorter_side(clip[None], size)[0] * 2 - 1
    frames = rearrange(clip, "c t h w -> t c h w")
    if rule == "larp":
        fitted = vision.center_crop(vision.resize(frames / 255, [size], antialias=True), [size, size])
        return rearrange(fitted, "t c h w -> c t h w") * 2 - 1
    pictures = [vision.resize(vision.to_pil_image(frame), [size], InterpolationMode.LANCZOS) for frame in frames]
    return torch.stack([vision.pil_to_tensor(vision.center_crop(picture, [size, size])) for picture in pictures], 1)


def clips_of(
    videos: VideoSet, places: Sequence[Place], size: int | None = None, rule: str | None = None, cut: str = "given"
) -> PictureSet:
    """The clips at these places as a set to be scored, (3, T, H, W) each, in the order of the videos and starts.

    size, rule: where the first video is not size x size, all are brought there by FITS[rule], and the clips are floats,
    for the protocol to round or not; but under "stylegan-v". Otherwise they are the uint8 of the videos. cut: how the
    places were chosen, for the record. Raises PictureError where there is no place; while reading, where a clip has
    another size than the first.
    """
    if not places:
        raise PictureError(f"{videos.name}: no clip to be scored; give longer videos, or more of them")
    ordered = sorted(places, key=lambda place: (place.video, place.frames.start))
    labels = None if videos.labels is None else videos.labels[[place.video for place in ordered]]
    fitted = False
    if rule is not None and size is not None:
        (frames,) = videos.frames([ordered[0].video])
        fitted = next(iter(frames)).shape[-2:] != (size, size)
    facts = {"clips": cut, "videos": len(videos.counts), "fit": FITS[rule] if fitted else "none"}
    origin = replace(videos.origin, record={**videos.origin.record, **facts})

    def read(batch: int, start: int, stop: int) -> Iterator[Tensor]:
        return _batches(videos, ordered[start:stop], partial(fit, size=size, rule=rule) if fitted else None, batch)

    return PictureSet(videos.name, len(ordered), read, origin, labels, floats=fitted and rule != "stylegan-v")


def frames_of(clips: PictureSet) -> PictureSet:
    """All frames of all clips as pictures, clip by clip, for a score of single frames; labels go with the frames."""
    length = next(clips.batches(1)).shape[2]

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        at = start // length  # in clips
        for batch in clips.batches(max(1, size // length), at, -(-stop // length)):
            pictures = rearrange(batch, "b c t h w -> (b t) c h w")
            yield from pictures[max(0, start - at * length) : stop - at * length].split(size)
            at += len(batch)

    labels = None if clips.labels is None else clips.labels.repeat_interleave(length)
    return replace(clips, name=f"frames of {clips.name}", count=clips.count * length, read=read, labels=labels)


def halves(videos: VideoSet, places: Sequence[Place], seed: int = 0) -> tuple[list[Place], list[Place]]:
    """Two lists of equally many clips that have no video in common: the score between them is the floor of a real set.

    Raises PictureError where all clips are of one video.
    """
    of_video: dict[int, list[Place]] = {}
    for place in places:
        of_video.setdefault(place.video, []).append(place)
    if len(of_video) < 2:
        raise PictureError(f"{videos.name}: clips of one video; two disjoint sets need at least 2, give more videos")
    numbers = sorted(of_video)
    random.Random(seed).shuffle(numbers)
    sides: tuple[list[Place], list[Place]] = ([], [])
    for number in numbers:
        min(sides, key=len).extend(of_video[number])
    count = min(map(len, sides))
    return sides[0][:count], sides[1][:count]


def read_videos(path: str | Path) -> VideoSet:
    """A sample file NAME.npz with its record NAME.json, or a folder of videos or of folders of frames.

    npz: `arr_0` uint8 (N, T, H, W, 3) and, if labelled, `arr_1` int (N,). Folder: with samples.json and labels.json;
    videos (VIDEO_SUFFIXES) in it and below, in the order of their paths, or folders that hold the frames of one video
    each as pictures, in the order of their numbers. Raises PictureError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        videos, record = _read_folder(path), read_record(path / "samples.json")
    elif path.suffix == ".npz":
        videos, record = _read_npz(path), read_record(path.with_suffix(".json"))
    else:
        cure = "give NAME.npz, or a folder of videos or of folders of frames"
        raise PictureError(f"{path}: {cure if path.exists() else 'no such file or folder'}")
    count = len(videos.counts)
    promised = record.get("count", count)
    if promised != count:
        raise PictureError(
            f"{path}: holds {count} videos, its record says {promised}; finish or copy the samples again"
        )
    told = bool(record) or not path.is_dir()
    origin = Origin.of_samples(record) if told else Origin.of_data(AS_DECODED, {"files": str(path)})
    return replace(videos, origin=origin)


def _batches(
    videos: VideoSet, ordered: Sequence[Place], fitted: Callable[[Tensor], Tensor] | None, size: int
) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    first = None
    for name, clip in _cut(videos, ordered):
        clip = clip if fitted is None else fitted(clip)
        first = first or (name, clip.shape)
        if clip.shape != first[1]:
            raise PictureError(
                f"{name}: its clip is {_sizes(clip.shape)}, that of {first[0]} is {_sizes(first[1])}; "
                "a score needs one size: crop them by a stated rule first"
            )
        batch.append(clip)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _cut(videos: VideoSet, ordered: Sequence[Place]) -> Iterator[tuple[str, Tensor]]:
    """(name of the video, clip (3, T, H, W)) in the order of the places; keeps only frames of clips that are not whole."""
    of_video: dict[int, list[range]] = {}
    for place in ordered:
        of_video.setdefault(place.video, []).append(place.frames)
    for number, frames in zip(of_video, videos.frames(list(of_video)), strict=True):
        name, waiting = videos.names[number], [(wanted, []) for wanted in of_video[number]]
        for index, frame in enumerate(frames):
            for wanted, kept in waiting:
                if index in wanted:
                    if kept and kept[0].shape != frame.shape:
                        raise PictureError(
                            f"{name}: frame {index} is {_sizes(frame.shape)}, frame {wanted[0]} is "
                            f"{_sizes(kept[0].shape)}; all frames of a video must have one size"
                        )
                    kept.append(frame)
            while waiting and len(waiting[0][1]) == len(waiting[0][0]):
                yield name, torch.stack(waiting.pop(0)[1], 1)
            if not waiting:
                break
        if waiting:
            raise PictureError(
                f"{name}: gave {index + 1} frames, {videos.counts[number]} were counted; it changed while it was read"
            )


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))


def _read_npz(path: Path) -> VideoSet:
    shape, dtype, fortran, labels = open_arrays(path, "(N, T, H, W, 3)")
    if dtype != np.uint8 or len(shape) != 5 or shape[-1] != 3 or fortran:
        order = ", columns first" if fortran else ""
        cure = "round floats to uint8 under a stated rule before they are saved"
        if len(shape) == 4:
            cure = "these are pictures; score them under a protocol for pictures"
        raise PictureError(
            f"{path}: arr_0 must be uint8 (N, T, H, W, 3), channels last; it is {dtype} {shape}{order}; {cure}"
        )
    if labels is not None and len(labels) != shape[0]:
        raise PictureError(f"{path}: {len(labels)} labels for {shape[0]} clips")
    if not shape[0]:
        raise PictureError(f"{path}: arr_0 holds no clips; make or copy them again")
    names = [f"{path}, clip {number}" for number in range(shape[0])]
    frames = partial(_npz_frames, path, shape)
    return VideoSet(str(path), names, [shape[1]] * shape[0], frames, Origin.unknown(), labels)


def _npz_frames(path: Path, shape: tuple[int, ...], numbers: Sequence[int]) -> Iterator[Tensor]:
    count, *video = shape
    wanted = set(numbers)
    number = 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            array_header(file)
            for number in range(numbers[-1] + 1):  # those between are read too: the archive's checksum is of all bytes
                content = bytearray(file.read(int(np.prod(video))))
                if number in wanted:
                    frames = torch.frombuffer(content, dtype=torch.uint8).view(video)
                    yield rearrange(frames, "t h w c -> t c h w")
            if number == count - 1:
                file.read()  # to the end, where the archive's own checksum is compared
    except (*UNREADABLE, RuntimeError) as error:
        raise PictureError(f"{path}: damaged at clip {number} of {count} ({error}); copy or make it again") from error


def _read_folder(path: Path) -> VideoSet:
    found = (file for file in path.rglob("*") if file.suffix.lower() in (*VIDEO_SUFFIXES, *SUFFIXES))
    files = sorted(found, key=Path.as_posix)  # as text, whatever way this Python compares paths
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if videos and pictures:
        raise PictureError(f"{path}: holds videos ({videos[0]}) and pictures ({pictures[0]}); leave one kind of them")
    if videos:
        counts = [_count_frames(file) for file in tqdm(videos, desc=f"{path}: counting frames", disable=None)]
        names = [str(file) for file in videos]
        frames = partial(_video_frames, videos)
    else:
        folders = _folders_of_frames(path, pictures)
        counts = [len(pictures) for pictures in folders.values()]
        names = [str(folder) for folder in folders]
        frames = partial(_picture_frames, list(folders.values()))
    labels = read_labels(path)
    if labels is not None and labels.shape != (len(names),):
        raise PictureError(f"{path}/labels.json: {len(labels)} labels for {len(names)} videos")
    return VideoSet(str(path), names, counts, frames, Origin.unknown(), labels)


def _folders_of_frames(path: Path, pictures: Sequence[Path]) -> dict[Path, list[Path]]:
    """Each folder with its pictures, frame 2 before frame 10."""
    if not pictures:
        kinds = ", ".join(VIDEO_SUFFIXES)
        raise PictureError(f"{path}: holds no videos ({kinds}) and no folders of frames ({', '.join(SUFFIXES)})")
    folders: dict[Path, list[Path]] = {}
    for picture in pictures:
        folders.setdefault(picture.parent, []).append(picture)
    if path in folders:
        raise PictureError(
            f"{folders[path][0]}: a picture beside the folders of frames; put the frames of every video into a folder"
        )
    return {folder: sorted(folders[folder], key=_number_in_name) for folder in sorted(folders, key=Path.as_posix)}


def _number_in_name(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _picture_frames(folders: Sequence[Sequence[Path]], numbers: Sequence[int]) -> Iterator[Iterable[Tensor]]:
    return (map(read_picture, folders[number]) for number in numbers)


def _count_frames(file: Path) -> int:
    """By decoding, for what a file says of itself may be wrong, and shifts the choice of all later clips."""
    said = [promised for promised, _ in _decode(file)]
    if file.suffix.lower() == ".gif" and file.read_bytes()[-1:] != GIF_END:
        raise PictureError(f"{file}: cut off after {len(said)} frames; copy it again, or leave it out")
    if not said or len(said) < said[-1] - 1:  # one more than there are is what many AVI files say
        raise PictureError(
            f"{file}: {len(said)} frames can be decoded, {said[-1] if said else 'at least 1'} should be there; "
            "copy it again, or leave it out"
        )
    return len(said)


def _video_frames(files: Sequence[Path], numbers: Sequence[int]) -> Iterator[Iterable[Tensor]]:
    return (_rgb_frames(files[number]) for number in numbers)


def _rgb_frames(file: Path) -> Iterator[Tensor]:
    for _, frame in _decode(file):
        yield rearrange(torch.from_numpy(frame.to_ndarray(format="rgb24")), "h w c -> c h w")


def _decode(file: Path) -> Iterator[tuple[int, av.VideoFrame]]:
    """(how many frames the file says it has, 0 where it does not; a frame)."""
    number = 0
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise PictureError(f"{file}: holds no video stream; leave it out")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise PictureError(f"{file}: frame {number} is damaged; copy it again, or leave it out")
                yield stream.frames, frame
                number += 1
    except av.FFmpegError as error:
        raise PictureError(
            f"{file}: not a readable video at frame {number} ({error.strerror}); copy it again, or leave it out"
        ) from error
