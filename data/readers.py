"""Readers of pictures on disk: class folders, tars, WebDataset shards, parquet, CIFAR-10, ImageNet.

Each gives a Source with random access, so that any number can be read at any time by any process: nothing is
streamed, no file handle is shared. Class names are ordered as text everywhere (n10 before n2), as torchvision does.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from pyarrow import ArrowInvalid
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from webdataset.tariterators import base_plus_ext

from data.errors import DataError, check_name
from data.source import ArrayPictures, Source, existing, split_files, split_folder

UNKNOWN_LICENCE = "not stated: ask the owner of the files"
IMAGENET_CLASSES = 1000
PARQUET_PICTURES, PARQUET_LABELS = ("image", "img"), ("label", "labels")  # names of the columns, first found


@dataclass(frozen=True)
class FilePictures:
    paths: Sequence[str]

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


def open_folder(root: str | Path, split: str) -> Source:
    """root/<split>/<class>/**: pictures in one folder a class; root/<class>/** with split "all"."""
    return _folder("folder", split_folder(root, split, "folder"), split, UNKNOWN_LICENCE)


def open_imagenet(root: str | Path, split: str) -> Source:
    """ImageNet-1k: root/train/<wnid>/ and root/val/<wnid>/, 1,000 of them, so that labels are the published class ids.

    Raises DataError for a flat validation folder, and for another number of classes.
    """
    folder = split_folder(root, split, "imagenet")
    if any(path.suffix == ".JPEG" for path in folder.iterdir()):
        raise DataError(
            f"imagenet: {folder} is flat, its pictures must be sorted into one folder a wnid. "
            f"torchvision.datasets.ImageNet({str(root)!r}, split='val') does it, given ILSVRC2012_img_val.tar and "
            "ILSVRC2012_devkit_t12.tar.gz there"
        )
    source = _folder("imagenet", folder, split, "ImageNet terms of access: non-commercial research and education")
    strange = [name for name in source.classes if not re.fullmatch(r"n\d{8}", name)]
    if len(source.classes) != IMAGENET_CLASSES or strange:
        raise DataError(
            f"imagenet: {folder} has {len(source.classes)} class folders, {len(strange)} of them no wnid; expected "
            f"{IMAGENET_CLASSES} named like n01440764. For a subset or other classes take the set 'folder'"
        )
    return source


def _folder(name: str, folder: Path, split: str, licence: str) -> Source:
    if not any(folder.iterdir()):
        raise DataError(f"{name}: {folder} is empty; put pictures there, one folder a class")
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # no class folder, or one without a picture: torchvision names it
        raise DataError(f"{name}: {error}. Put pictures into {folder}/<class>/, or remove the empty folder") from error
    paths = [path for path, _ in found.samples]
    return Source(
        name=name,
        split=split,
        licence=licence,
        path=folder,
        classes=found.classes,
        labels=np.array(found.targets, dtype=np.int64),
        names=[str(Path(path).relative_to(folder)) for path in paths],
        pictures=FilePictures(paths),
    )


@dataclass(frozen=True)
class Member:
    """Where a file lies inside a tar: its name there, and the bytes of its content."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class MemberPictures:
    members: Sequence[Member]

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.members[index].read()))


def members_of(archive: Path) -> list[Member]:
    """Every file in an uncompressed tar; of a tar inside it (as ImageNet ships) the files, below its name.

    Only headers are read. Raises DataError for a compressed or truncated archive.
    """
    try:
        with tarfile.open(archive, "r:") as file:
            members = list(_walk(archive, file, "", 0))
            last = file.getmembers()[-1] if file.getmembers() else tarfile.TarInfo()
            blocks = -(-last.size // tarfile.BLOCKSIZE) if last.isreg() else 0
            file.fileobj.seek(last.offset_data + blocks * tarfile.BLOCKSIZE)
            if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile itself does not mind
                raise tarfile.ReadError("the mark of its end is missing")
            return members
    except tarfile.TarError as error:
        raise DataError(f"{archive}: not a whole uncompressed tar ({error}); unpack .gz, or copy it again") from error


def _walk(archive: Path, file: tarfile.TarFile, above: str, start: int) -> Iterator[Member]:
    for entry in file:
        name = above + entry.name.removeprefix("./")
        if entry.isfile() and name.endswith(".tar"):
            with tarfile.open(fileobj=file.extractfile(entry), mode="r:") as inner:
                yield from _walk(archive, inner, f"{name.removesuffix('.tar')}/", start + entry.offset_data)
        elif entry.isfile():
            yield Member(archive, name, start + entry.offset_data, entry.size)


def open_tar(root: str | Path, split: str) -> Source:
    """One tar, or many: the class is the last folder of a picture's name, or the tar's own name where there is none."""
    archives = split_files(root, split, "tar", "tar")
    pictures = [m for archive in archives for m in members_of(archive) if _suffix(m.name) in IMG_EXTENSIONS]
    class_names = [Path(member.name).parent.name or member.archive.stem for member in pictures]
    classes = sorted(set(class_names))
    number = {name: i for i, name in enumerate(classes)}
    return _members("tar", Path(root), split, pictures, classes, [number[name] for name in class_names])


def open_wds(root: str | Path, split: str) -> Source:
    """WebDataset shards on disk: files that share a key are one sample, its picture (.jpg, .png, ...) and its .cls.

    Classes have no names there: they are "0", "1", ... up to the largest.
    Raises DataError for a sample without a picture or without a class.
    """
    pictures, labels = [], []
    for archive in split_files(root, split, "tar", "wds"):
        samples: dict[str, dict[str, Member]] = {}
        for member in members_of(archive):
            key, extension = base_plus_ext(member.name)
            if key is not None:
                samples.setdefault(key, {})[f".{extension.lower()}"] = member
        for key, parts in samples.items():
            picture = next((parts[suffix] for suffix in IMG_EXTENSIONS if suffix in parts), None)
            if picture is None or ".cls" not in parts:
                raise DataError(f"wds: {archive}: sample {key} has {sorted(parts)}, needs a picture and a .cls file")
            label = parts[".cls"].read()
            if not label.strip().isdigit():
                raise DataError(f"wds: {archive}: {parts['.cls'].name} says {label[:20]!r}, must be a class number")
            pictures.append(picture)
            labels.append(int(label))
    return _members("wds", Path(root), split, pictures, _numbered(labels), labels)


def _members(
    name: str, root: Path, split: str, pictures: list[Member], classes: list[str], labels: list[int]
) -> Source:
    return Source(
        name=name,
        split=split,
        licence=UNKNOWN_LICENCE,
        path=root,
        classes=classes,
        labels=np.array(labels, dtype=np.int64),
        names=[f"{member.archive.name}:{member.name}" for member in pictures],
        pictures=MemberPictures(pictures),
    )


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _numbered(labels: Sequence[int]) -> list[str]:
    return [str(label) for label in range(max(labels, default=-1) + 1)]


@dataclass
class ParquetPictures:
    """Pictures in row groups of parquet files: `starts` (G + 1,) are the numbers of the groups' first rows.

    The last group read is kept, so reading in order is fast; shuffled reading decodes one group a picture.
    """

    column: str
    groups: Sequence[tuple[Path, int]]
    starts: np.ndarray
    kept: tuple[int, list] | None = field(default=None, repr=False)

    def __getitem__(self, index: int) -> Image.Image:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        if self.kept is None or self.kept[0] != group:
            path, number = self.groups[group]
            self.kept = group, pq.ParquetFile(path).read_row_group(number, [self.column])[self.column]
        picture = self.kept[1][index - int(self.starts[group])].as_py()
        return Image.open(io.BytesIO(picture["bytes"] if isinstance(picture, dict) else picture))


def open_parquet(root: str | Path, split: str) -> Source:
    """Parquet files with a column of encoded pictures (bytes, or struct with `bytes`) and one of integer labels.

    Class names come from the `huggingface` entry of the schema where there is one, else they are "0", "1", ...
    """
    groups, sizes, labels, names = [], [], [], []
    for path in split_files(root, split, "parquet", "parquet"):
        try:
            file = pq.ParquetFile(path)
        except ArrowInvalid as error:
            raise DataError(f"parquet: {path} is not a whole parquet file ({error}); copy it again") from error
        picture_column, label_column = (
            _column(path, file.schema_arrow.names, wanted) for wanted in (PARQUET_PICTURES, PARQUET_LABELS)
        )
        labels += file.read([label_column])[label_column].to_pylist()
        names += [f"{path.name}:row {row}" for row in range(file.metadata.num_rows)]
        groups += [(path, group) for group in range(file.num_row_groups)]
        sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    hub = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    described = hub.get("info", {}).get("features", {}).get(label_column, {})
    return Source(
        name="parquet",
        split=split,
        licence=UNKNOWN_LICENCE,
        path=Path(root),
        classes=described.get("names") or _numbered(labels),
        labels=np.array(labels, dtype=np.int64),
        names=names,
        pictures=ParquetPictures(picture_column, groups, np.cumsum([0, *sizes])),
    )


def _column(path: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    found = [name for name in wanted if name in names]
    if not found:
        raise DataError(f"parquet: {path} has the columns {names}, needs one named {' or '.join(wanted)}")
    return found[0]


def open_cifar10(root: str | Path, split: str) -> Source:
    """CIFAR-10 (Krizhevsky 2009): 50,000 / 10,000 pictures 32x32, 10 classes; "val" is its test set.

    Nothing is downloaded: when files are missing or damaged, DataError names the URL, the md5 and the folder.
    """
    check_name(split, ("train", "val"), "cifar10: split")
    root = existing(root, "cifar10")
    try:
        found = CIFAR10(root, train=split == "train")
    except RuntimeError as error:
        raise DataError(
            f"cifar10: {root / CIFAR10.base_folder} is missing or damaged; download {CIFAR10.url} "
            f"(md5 {CIFAR10.tgz_md5}) and unpack it in {root}"
        ) from error
    return Source(
        name="cifar10",
        split=split,
        licence="not stated by its authors; cite Krizhevsky 2009",
        path=root / CIFAR10.base_folder,
        classes=found.classes,
        labels=np.array(found.targets, dtype=np.int64),
        names=[f"{split} {row}" for row in range(len(found.targets))],
        pictures=ArrayPictures(found.data),
    )
