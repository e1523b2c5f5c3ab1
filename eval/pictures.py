"""Sets of pictures to be scored: from tensors, sample files (npz) and folders, always as uint8 in a fixed order.

Reading is strict, since a score of other pictures than one believes is worse than none: whatever is damaged, missing,
of another type or another size ends in a PictureError that names the file.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    """count pictures. batches(B) -> uint8 (<= B, 3, H, W) on the CPU, in order, afresh at every call; labels int64 (count,)."""

    name: str
    count: int
    batches: Callable[[int], Iterator[Tensor]]
    origin: Origin
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and len(self.labels) != self.count:
            raise PictureError(f"{self.name}: {self.count} pictures, but {len(self.labels)} labels")


class PixelDigest:
    """Count, size and sha256 of pictures as they pass, the same from whatever container or batch size they come.

    The sum is over the text "uint8 HxWx3" and then the pixels, picture by picture, row by row, channels last.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.size: tuple[int, int] | None = None
        self._digest = hashlib.sha256()

    def update(self, pictures: Tensor) -> None:
        """Raises PictureError for anything but uint8 (B, 3, H, W) of one size."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise PictureError(
                f"{self.name}: expected uint8 pictures (B, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}"
            )
        height, width = pictures.shape[-2:]
        if self.size is None:
            self.size = (height, width)
            self._digest.update(f"uint8 {height}x{width}x3".encode())
        if self.size != (height, width):
            raise PictureError(f"{self.name}: picture {self.count} is {height}x{width}, those before are {self.size}")
        self._digest.update(rearrange(pictures, "b c h w -> b h w c").cpu().contiguous().numpy())
        self.count += len(pictures)

    def record(self, origin: Origin) -> PicturesRecord:
        """Raises PictureError where no picture has passed."""
        if self.size is None:
            raise PictureError(f"{self.name}: holds no pictures")
        height, width = self.size
        return PicturesRecord(self.name, self._digest.hexdigest(), self.count, height, width, origin)


def from_tensor(name: str, pictures: Tensor, origin: Origin, labels: Tensor | None = None) -> PictureSet:
    """Pictures in memory, uint8 (N, 3, H, W)."""
    return PictureSet(name, len(pictures), lambda size: iter(pictures.split(size)), origin, labels)


def from_batches(
    name: str,
    count: int,
    batches: Callable[[int], Iterable[Mapping[str, Tensor]]],
    record: Mapping[str, Any],
    labels: Tensor | None = None,
    rule: str = "trunc_128",
) -> PictureSet:
    """Real pictures as a loader gives them: batches(B) of dicts whose "image" is float (<= B, 3, H, W) in [-1, 1].

    record: what the data set says of itself. rule: a key of UINT8_RULES, by which the pictures become uint8.
    """
    origin = Origin.of_data(UINT8_RULES[rule], record)
    return PictureSet(
        name, count, lambda size: (to_uint8(batch["image"], rule) for batch in batches(size)), origin, labels
    )


def read_pictures(path: str | Path) -> PictureSet:
    """A sample file NAME.npz with its record NAME.json, or a folder of pictures with samples.json and labels.json.

    npz: `arr_0` uint8 (N, H, W, 3) and, if labelled, `arr_1` int64 (N,); it is read in pieces, never as a whole.
    Folder: picture files in it and below, in the order of their paths, RGB or gray, all of one size.
    Raises PictureError for what is missing, damaged, of another type, shape or number than the record says.
    """
    path = Path(path)
    if path.is_dir():
        pictures, record = _read_folder(path), _read_beside(path / "samples.json")
    elif path.suffix == ".npz":
        pictures, record = _read_npz(path), _read_beside(path.with_suffix(".json"))
    else:
        raise PictureError(f"{path}: {'give NAME.npz or a folder' if path.exists() else 'no such file or folder'}")
    promised = record.get("count", pictures.count)
    if promised != pictures.count:
        raise PictureError(
            f"{path}: holds {pictures.count} pictures, its record says {promised}; finish or copy the samples again"
        )
    return replace(pictures, origin=Origin.of_samples(record))


def _read_beside(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise PictureError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise PictureError(f"{path}: expected a JSON object that says how the pictures were made")
    return record


def _read_npz(path: Path) -> PictureSet:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            if "mu" in names:
                raise PictureError(
                    f"{path}: holds the statistics (mu, sigma) of a feature network that it does not name; "
                    "give the pictures they were made from"
                )
            if "arr_0" not in names:
                raise PictureError(f"{path}: has no array arr_0, uint8 (N, H, W, 3); it holds {sorted(names)}")
            with archive.open("arr_0.npy") as file:
                shape, dtype, fortran = _array_header(file)
            labels = None
            if "arr_1" in names:
                with archive.open("arr_1.npy") as file:
                    labels = np.lib.format.read_array(file, allow_pickle=False)
    except UNREADABLE as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{path}: not a whole npz file ({error}); copy or make it again") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran:
        order = ", columns first" if fortran else ""
        raise PictureError(
            f"{path}: arr_0 must be uint8 (N, H, W, 3), channels last; it is {dtype} {shape}{order}. "
            "Floats must be brought to uint8 under a stated rule before they are saved"
        )
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise PictureError(f"{path}: arr_1 must be integer labels (N,), it is {labels.dtype} {labels.shape}")
    labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    return PictureSet(str(path), shape[0], lambda size: _npz_batches(path, shape, size), Origin.unknown(), labels)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, dtype, fortran


def _npz_batches(path: Path, shape: tuple[int, ...], size: int) -> Iterator[Tensor]:
    count, *picture = shape
    done = 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _array_header(file)
            while done < count:
                now = min(size, count - done)
                content = bytearray(file.read(now * int(np.prod(picture))))
                pictures = torch.frombuffer(content, dtype=torch.uint8).view(now, *picture)
                yield rearrange(pictures, "b h w c -> b c h w")
                done += now
            file.read()  # to the end, where the archive's own checksum is compared
    except (*UNREADABLE, RuntimeError) as error:
        raise PictureError(f"{path}: damaged at picture {done} of {count} ({error}); copy or make it again") from error


def _read_folder(path: Path) -> PictureSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise PictureError(f"{path}: holds no pictures ({', '.join(SUFFIXES)})")
    labels = None
    if (path / "labels.json").is_file():
        try:
            labels = torch.tensor(json.loads((path / "labels.json").read_text()), dtype=torch.int64)
        except (ValueError, TypeError) as error:
            raise PictureError(f"{path}/labels.json: not a JSON list of integers ({error})") from error
    return PictureSet(str(path), len(files), lambda size: _folder_batches(files, size), Origin.unknown(), labels)


def _folder_batches(files: list[Path], size: int) -> Iterator[Tensor]:
    first = None
    for start in range(0, len(files), size):
        pictures = []
        for file in files[start : start + size]:
            picture = _read_file(file)
            first = picture.shape if first is None else first
            if picture.shape != first:
                raise PictureError(
                    f"{file}: is {picture.shape[1]}x{picture.shape[2]}, {files[0]} is {first[1]}x{first[2]}; "
                    "a score needs one size: crop them by a stated rule first"
                )
            pictures.append(picture)
        yield torch.stack(pictures)


def _read_file(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            image.load()
            mode, pixels = image.mode, np.array(image.convert("RGB"))
    except UNREADABLE as error:
        raise PictureError(f"{file}: not a readable picture ({error}); replace it") from error
    if mode not in ("RGB", "L"):
        raise PictureError(f"{file}: its mode is {mode}; make it RGB by a stated rule first (transparency, palette)")
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")
