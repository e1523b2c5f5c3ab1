"""Token caches: the tokens of every picture of a set, made once, read by number.

A cache is a folder: codes.npy (N, A, T), uint16, or uint32 for vocabularies above 65,536; labels.npy int32 (N,);
done.npy uint8 (N,), which rows are written; header.json, which tokenizer made them of which pictures. N pictures in the
order of their set, A crops of each, T tokens a crop. The arrays are memory-mapped: nothing is held in memory.

Any number of processes write one cache at once, process r of w the rows with index % w == r; interrupted, they go on
with the rows that are missing. A tokenizer is known here by plain values only.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from data.errors import DataError
from data.loader import evaluation_batches, sample_rng
from data.sets import PictureSet

FORMAT = "arloom token cache 1"
UINT16_VOCABULARY = 65_536


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer as plain values. sha256: of its weights; record: how it was built; spec: what its tokens are."""

    name: str
    sha256: str
    vocab_size: int
    record: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheHeader:
    """What a cache holds: `count` N pictures, `crops` A, `length` T.

    transform, crop_range: how pictures were cropped. order: what row i is. classes: the names of the labels.
    files_sha256: of the list of files, None where it is not known. pictures: what else is known of the set.
    """

    tokenizer: TokenizerFacts
    count: int
    crops: int
    length: int
    transform: str
    classes: Sequence[str]
    crop_range: float | None = None
    order: str = "row i is sample i of the set"
    files_sha256: str | None = None
    pictures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= UINT16_VOCABULARY else np.uint32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array, by the stem of its file."""
        return {
            "codes": ((self.count, self.crops, self.length), self.dtype),
            "labels": ((self.count,), np.dtype(np.int32)),
            "done": ((self.count,), np.dtype(np.uint8)),
        }

    def record(self) -> dict[str, Any]:
        """The header as it is read back from JSON."""
        return json.loads(json.dumps(asdict(self)))


def picture_header(pictures: PictureSet, tokenizer: TokenizerFacts, length: int) -> CacheHeader:
    """The header of a cache of a whole picture set, T = length tokens a crop."""
    facts = pictures.describe()
    named = {key: facts.pop(key) for key in ("count", "transform", "crop_range", "classes", "files_sha256")}
    return CacheHeader(tokenizer=tokenizer, crops=pictures.crops, length=length, pictures=facts, **named)


def read_header(folder: str | Path) -> tuple[CacheHeader, bool]:
    """What a cache holds, and whether it is complete. Raises DataError where none is, or a damaged header."""
    path = Path(folder) / "header.json"
    if not path.is_file():
        raise DataError(f"{folder}: holds no token cache (no header.json)")
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise DataError(f"{path}: not in the format {FORMAT!r}; make the cache anew")
        complete = content.pop("complete")
        return CacheHeader(**content | {"tokenizer": TokenizerFacts(**content["tokenizer"])}), complete
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged header ({error!r}); make the cache anew") from error


class CacheWriter:
    """Fills a cache, resuming the one that `folder` holds. Every process opens its own.

    The folder is made whole, with its full size on the disk, before the first row. Raises DataError when that does not
    fit on the disk, and when `folder` holds something else or a cache with another header.
    """

    def __init__(self, folder: str | Path, header: CacheHeader) -> None:
        self.folder = Path(folder)
        self.header = header
        self._create_if_absent()
        found, self.complete = read_header(self.folder)
        differing = list(_differences(found.record(), header.record()))
        if differing:
            raise DataError(
                f"{self.folder}: holds another token cache; give another folder, or remove it. It differs in\n  "
                + "\n  ".join(differing)
            )
        self.codes, self.labels, self.done = _open_arrays(self.folder, header, "r+")

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """The rows that process `rank` of `world` has still to write."""
        mine = np.arange(rank, self.header.count, world)
        return mine[self.done[mine] == 0].tolist()

    def write(self, rows: np.ndarray, codes: np.ndarray, labels: np.ndarray) -> None:
        """rows int (n,); codes int (n, A, T); labels int (n,). Raises DataError for ids outside the vocabulary."""
        vocabulary, classes = self.header.tokenizer.vocab_size, len(self.header.classes)
        shape = (len(rows), self.header.crops, self.header.length)
        if codes.shape != shape:
            raise DataError(f"{self.folder}: codes are {codes.shape}, the cache takes {shape} (rows, crops, tokens)")
        for what, values, limit in (("codes", codes, vocabulary), ("labels", labels, classes)):
            if not 0 <= values.min() <= values.max() < limit:
                raise DataError(
                    f"{self.folder}: {what} {values.min()} .. {values.max()} in rows {rows.min()} .. {rows.max()}; "
                    f"the header allows 0 .. {limit - 1}"
                )
        self.codes[rows] = codes
        self.labels[rows] = labels
        self.codes.flush()  # the disk has the rows before it has the word that they are done
        self.labels.flush()
        self.done[rows] = 1

    def finish(self) -> bool:
        """Mark the cache complete if every row is there. With many processes: after the last has written."""
        self.done.flush()
        if not self.complete and bool(self.done.all()):
            _write_header(self.folder, self.header, complete=True)
            self.complete = True
        return self.complete

    def _create_if_absent(self) -> None:
        taken = self.folder.is_file() or (self.folder.exists() and any(self.folder.iterdir()))
        if taken and not (self.folder / "header.json").is_file():
            raise DataError(f"{self.folder}: exists and holds no token cache; give another folder")
        if taken:
            return
        draft = self.folder.with_name(f".{self.folder.name}.{uuid4().hex}.tmp")
        try:
            draft.mkdir(parents=True)
            for stem, (shape, dtype) in self.header.arrays().items():
                path = draft / f"{stem}.npy"
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
                with path.open("rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            _write_header(draft, self.header, complete=False)
            draft.rename(self.folder)  # only onto nothing or an empty folder: of many processes one succeeds
        except OSError as error:
            if not (self.folder / "header.json").exists():
                raise DataError(
                    f"{self.folder}: cannot be made ({error}); free space, or give another place"
                ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def fill_cache(
    writer: CacheWriter,
    pictures: PictureSet,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[int]:
    """Encode the pending rows of this process, saying after each batch how many were written.

    encode: images float (n, 3, S, S) -> ids int (n, T); it sees batch_size * A crops at once.
    Raises CorruptImage for a picture that cannot be read: a cache has no holes.
    """
    mine = Subset(pictures, writer.pending(rank, world))
    for batch in evaluation_batches(mine, batch_size, workers=workers):
        rows = batch["index"].numpy()
        images = batch["image"].reshape(-1, *batch["image"].shape[-3:])  # (n A, 3, S, S)
        ids = encode(images).cpu().numpy()
        writer.write(rows, ids.reshape(len(rows), pictures.crops, -1), batch["label"].numpy())
        yield len(rows)


class TokenCache(Dataset[dict[str, Any]]):
    """N samples {"tokens": int64 (T,), "label": int64 (), "index": int} of a complete cache.

    `sample` draws one of the A crops; cache[i] is the same crop at every call.
    tokenizer_sha256: of the weights in use, which must be those that made the cache.
    Raises DataError for a cache of another tokenizer, an unfinished one, and files of the wrong size.
    """

    def __init__(self, folder: str | Path, tokenizer_sha256: str) -> None:
        self.folder = Path(folder)
        self.header, complete = read_header(self.folder)
        made_by = self.header.tokenizer
        if made_by.sha256 != tokenizer_sha256:
            raise DataError(
                f"{self.folder}: these tokens were made by the tokenizer {made_by.name} with weights sha256 "
                f"{made_by.sha256}; the tokenizer in use has sha256 {tokenizer_sha256}. Make a cache with it"
            )
        self._codes, labels, done = _open_arrays(self.folder, self.header, "r")
        if not complete:
            raise DataError(
                f"{self.folder}: unfinished, {int((done != 0).sum())} of {self.header.count} rows are written; "
                "run the same command that began it again"
            )
        self.classes = list(self.header.classes)
        self.labels = np.array(labels, dtype=np.int64)

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return TokenCache, (self.folder, self.header.tokenizer.sha256)  # another process maps the files itself

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, sample_rng(index=index))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        codes = self._codes[index, rng.integers(self.header.crops)].astype(np.int64)  # (T,)
        return {"tokens": torch.from_numpy(codes), "label": torch.tensor(int(self.labels[index])), "index": index}

    def describe(self) -> dict[str, Any]:
        """Plain values that say what these tokens are, to be kept with whatever is made from them."""
        return self.header.record()


def _open_arrays(folder: Path, header: CacheHeader, mode: Literal["r", "r+"]) -> list[np.ndarray]:
    """codes, labels, done, mapped. Raises DataError for a file that is missing or of the wrong size."""
    arrays = []
    for stem, (shape, dtype) in header.arrays().items():
        path = folder / f"{stem}.npy"
        try:
            found = np.lib.format.open_memmap(path, mode="r")  # "r+" would lengthen a truncated file
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: missing or truncated ({error}); make the cache anew") from error
        size = path.stat().st_size
        if found.shape != shape or found.dtype != dtype or size != found.offset + found.nbytes:
            raise DataError(
                f"{path}: holds {found.dtype} {found.shape} in {size} bytes, the header says {dtype} {shape}; "
                "make the cache anew"
            )
        arrays.append(found if mode == "r" else np.lib.format.open_memmap(path, mode=mode))
    return arrays


def _differences(theirs: Any, ours: Any, key: str = "") -> Iterator[str]:
    """Where two headers differ, key by key."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs | ours:
            yield from _differences(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
    elif theirs != ours:
        yield f"{key}: {str(theirs)[:80]}, now {str(ours)[:80]}"


def _write_header(folder: Path, header: CacheHeader, complete: bool) -> None:
    draft = folder / f".header.{uuid4().hex}.tmp"
    try:
        with draft.open("w") as file:
            json.dump({"format": FORMAT, "complete": complete, **header.record()}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / "header.json")
    finally:
        draft.unlink(missing_ok=True)
