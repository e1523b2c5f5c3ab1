"""Sets of pictures to be scored: from tensors, sample files (npz) and folders, always as uint8 in a fixed order.

Reading is strict, since a score of other pictures than one believes is worse than none: whatever is damaged, missing,
of another type or another size ends in a PictureError that names the file.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from eval.pixels import UINT8_RULES, to_uint8
from eval.provenance import Origin, PicturesRecord

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)


class PictureError(ValueError):
    """A set of pictures that cannot be read whole, or is not what it says it is."""


@dataclass(frozen=True)
class PictureSet:
    """count pictures, or clips. labels int64 (count,).

    read(B, start, stop): the pictures numbered start .. stop - 1 in batches of at most B, in order, afresh at every call:
    uint8 (B, 3, H, W) or clips (B, 3, T, H, W); or, where `floats`, float in [-1, 1], which a protocol's rule rounds.
    """

    name: str
    count: int
    read: Callable[[int, int, int], Iterator[Tensor]]
    origin: Origin
    labels: Tensor | None = None
    floats: bool = False

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != self.count:
            raise PictureError(f"{self.name}: {self.count} pictures, but {len(self.labels)} labels")

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """All pictures, or those from `start` to before `stop`. Raises PictureError where they turn out damaged."""
        return self.read(size, start, self.count if stop is None else stop)


def check_pictures(name: str, pictures: Tensor) -> None:
    """Raises PictureError for anything but uint8 (B, 3, H, W) or (B, 3, T, H, W)."""
    if pictures.dtype != torch.uint8 or pictures.ndim not in (4, 5) or pictures.shape[1] != 3 or not pictures.numel():
        raise PictureError(
            f"{name}: expected uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W), "
            f"got {pictures.dtype} {tuple(pictures.shape)}"
        )


def checksums(pictures: Tensor) -> list[bytes]:
    """sha256 of each picture or clip, (B, 3, ...) uint8 or float32: of the text "HxW" or "TxHxW", then its pixels, row by
    row, channels last."""
    size = hashlib.sha256("x".join(map(str, pictures.shape[2:])).encode())
    found = []
    for pixels in pictures.movedim(1, -1).cpu().contiguous().numpy():
        digest = size.copy()
        digest.update(pixels)
        found.append(digest.digest())
    return found


def content_sha256(in_order: bytes) -> str:
    """sha256 of a whole set, from the `checksums` of its pictures one after the other: whoever took them, in whatever
    batches, and from whatever container they came."""
    return hashlib.sha256(in_order).hexdigest()


class PixelDigest:
    """Count, size and checksum of pictures as they pass in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size: tuple[int, ...] | None = None  # (H, W), of clips (T, H, W)
        self._kept: list[bytes] = []

    @property
    def count(self) -> int:
        return len(self._kept)

    def update(self, pictures: Tensor) -> None:
        """Raises PictureError for anything but uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W) of one size."""
        check_pictures(self.name, pictures)
        size = tuple(pictures.shape[2:])
        self.size = size if self.size is None else self.size
        if self.size != size:
            found = "x".join(map(str, size))
            raise PictureError(f"{self.name}: picture {self.count} is {found}, those before are {self.size}")
        self._kept += checksums(pictures)

    def record(self, origin: Origin) -> PicturesRecord:
        """Raises PictureError where no picture has passed."""
        if self.size is None:
            raise PictureError(f"{self.name}: holds no pictures")
        *frames, height, width = self.size
        content = content_sha256(b"".join(self._kept))
        return PicturesRecord(self.name, content, self.count, height, width, origin, frames[0] if frames else 1)


def from_tensor(name: str, pictures: Tensor, origin: Origin, labels: Tensor | None = None) -> PictureSet:
    """Pictures in memory, uint8 (N, 3, H, W), or clips (N, 3, T, H, W); or float in [-1, 1]."""
    floats = pictures.is_floating_point()
    return PictureSet(
        name, len(pictures), lambda size, start, stop: iter(pictures[start:stop].split(size)), origin, labels, floats
    )


def from_batches(
    name: str,
    count: int,
    batches: Callable[[int, int, int], Iterable[Mapping[str, Tensor]]],
    record: Mapping[str, Any],
    labels: Tensor | None = None,
    rule: str = "trunc_128",
) -> PictureSet:
    """Real pictures as a loader gives them: batches(B, start, stop) of dicts whose "image" is float (<= B, 3, H, W) in
    [-1, 1].

    record: what the data set says of itself. rule: a key of UINT8_RULES, by which the pictures become uint8.
    """

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        for batch in batches(size, start, stop):
            yield rounded(name, batch["image"], rule, start)
            start += len(batch["image"])

    return PictureSet(name, count, read, Origin.of_data(UINT8_RULES[rule], record), labels)


def rounded(name: str, images: Tensor, rule: str, first: int) -> Tensor:
    """`to_uint8` of pictures or clips whose numbers begin with `first`. Raises PictureError for NaN, naming the picture."""
    broken = ~images.isfinite().flatten(1).all(1)
    if broken.any():
        number = first + int(broken.nonzero()[0])
        raise PictureError(f"{name}: picture {number} holds NaN or infinite pixels; look at what made it")
    if images.ndim == 5:
        return rearrange(to_uint8(rearrange(images, "b c t h w -> b t c h w"), rule), "b t c h w -> b c t h w")
    return to_uint8(images, rule)


def read_pictures(path: str | Path) -> PictureSet:
    """A sample file NAME.npz with its record NAME.json, or a folder of pictures with samples.json and labels.json.

    npz: `arr_0` uint8 (N, H, W, 3) and, if labelled, `arr_1` int64 (N,); it is read in pieces, never as a whole.
    Folder: picture files in it and below, in the order of their paths, RGB or gray, all of one size.
    Raises PictureError for what is missing, damaged, of another type, shape or number than the record says.
    """
    path = Path(path)
    if path.is_dir():
        pictures, record = _read_folder(path), read_record(path / "samples.json")
    elif path.suffix == ".npz":
        pictures, record = _read_npz(path), read_record(path.with_suffix(".json"))
    else:
        raise PictureError(f"{path}: {'give NAME.npz or a folder' if path.exists() else 'no such file or folder'}")
    promised = record.get("count", pictures.count)
    if promised != pictures.count:
        raise PictureError(
            f"{path}: holds {pictures.count} pictures, its record says {promised}; finish or copy the samples again"
        )
    return replace(pictures, origin=Origin.of_samples(record))


def read_record(path: Path) -> dict[str, Any]:
    """The JSON beside samples, {} where there is none. Raises PictureError for anything but a JSON object."""
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise PictureError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise PictureError(f"{path}: expected a JSON object that says how the samples were made")
    return record


def open_arrays(path: Path, shape: str) -> tuple[tuple[int, ...], np.dtype, bool, Tensor | None]:
    """Of an npz: shape, dtype and whether columns come first in arr_0, which is not read; arr_1, labels int64 (N,).

    shape: what arr_0 should be, in words. Raises PictureError for a damaged file, without arr_0, or with other labels.
    """
    labels = None
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" not in names:
                raise PictureError(f"{path}: has no array arr_0, uint8 {shape}; it holds {sorted(names)}")
            with archive.open("arr_0.npy") as file:
                found, dtype, fortran = array_header(file)
            if "arr_1" in names:
                with archive.open("arr_1.npy") as file:
                    labels = np.lib.format.read_array(file, allow_pickle=False)
    except UNREADABLE as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{path}: not a whole npz file ({error}); copy or make it again") from error
    if labels is None:
        return found, dtype, fortran, None
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise PictureError(f"{path}: arr_1 must be integer labels (N,), it is {labels.dtype} {labels.shape}")
    return found, dtype, fortran, torch.from_numpy(labels.astype(np.int64))


def read_labels(folder: Path) -> Tensor | None:
    """labels.json of a folder of samples, int64 (N,). Raises PictureError for anything but a list of integers."""
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        return torch.tensor(json.loads(path.read_text()), dtype=torch.int64)
    except (ValueError, TypeError) as error:
        raise PictureError(f"{path}: not a JSON list of integers ({error})") from error


def _read_npz(path: Path) -> PictureSet:
    shape, dtype, fortran, labels = open_arrays(path, "(N, H, W, 3)")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        order = ", columns first" if fortran else ""
        cure = "Floats must be brought to uint8 under a stated rule before they are saved"
        if len(shape) == 5:
            cure = "These are clips: score them under a protocol for clips"
        raise PictureError(
            f"{path}: arr_0 must be uint8 (N, H, W, 3), channels last; it is {dtype} {shape}{order}. {cure}"
        )
    return PictureSet(str(path), shape[0], partial(_npz_batches, path, shape), Origin.unknown(), labels)


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype and whether columns come first, read off an npy file up to where its numbers begin."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran


def _npz_batches(path: Path, shape: tuple[int, ...], size: int, start: int, stop: int) -> Iterator[Tensor]:
    count, *picture = shape
    bytes_each, done = int(np.prod(picture)), 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            array_header(file)
            while done < stop:  # those before `start` are read too: the archive's checksum is of all that passes
                now = min(size, (start if done < start else stop) - done)
                content = bytearray(file.read(now * bytes_each))
                pictures = torch.frombuffer(content, dtype=torch.uint8).view(now, *picture)
                if done >= start:
                    yield rearrange(pictures, "b h w c -> b c h w")
                done += now
            if stop == count:
                file.read()  # to the end, where the archive's own checksum is compared
    except (*UNREADABLE, RuntimeError) as error:
        raise PictureError(f"{path}: damaged at picture {done} of {count} ({error}); copy or make it again") from error


def _read_folder(path: Path) -> PictureSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise PictureError(f"{path}: holds no pictures ({', '.join(SUFFIXES)})")
    return PictureSet(str(path), len(files), partial(_folder_batches, files), Origin.unknown(), read_labels(path))


def _folder_batches(files: list[Path], size: int, start: int, stop: int) -> Iterator[Tensor]:
    shape = read_picture(files[0]).shape
    with ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's lock
        for place in range(start, stop, size):
            names = files[place : min(place + size, stop)]
            pictures = list(pool.map(read_picture, names))
            for file, picture in zip(names, pictures, strict=True):
                if picture.shape != shape:
                    raise PictureError(
                        f"{file}: is {picture.shape[1]}x{picture.shape[2]}, {files[0]} is {shape[1]}x{shape[2]}; "
                        "a score needs one size: crop them by a stated rule first"
                    )
            yield torch.stack(pictures)


def read_picture(file: Path) -> Tensor:
    """uint8 (3, H, W). Raises PictureError for a damaged file, and for another mode than RGB or grey."""
    try:
        with Image.open(file) as image:
            image.load()
            mode, pixels = image.mode, np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise PictureError(f"{file}: not a readable picture ({error}); replace it") from error
    if mode not in ("RGB", "L"):
        raise PictureError(f"{file}: its mode is {mode}; make it RGB by a stated rule first (transparency, palette)")
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")
