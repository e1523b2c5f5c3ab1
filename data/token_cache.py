"""Token caches: what a tokenizer makes of every picture or clip of a set, made once, read by number.

A cache is a folder: what is stored of N pictures in the order of their set, A crops of each, in one of two kinds,

    codes.npy (N, A, T)            the ids of T discrete tokens a crop, uint16, or uint32 for more than 65,536 codes
    moments.npy (N, A, 2Z, h, w)   the Gaussian that a continuous token is drawn from, float16 or float32: the mean of
                                   the latent's Z channels, then the logarithm of their variance, before any scaling;
                                   of clips (N, A, 2Z, t, h, w)

beside labels.npy int32 (N,); done.npy uint8 (N,), which rows are written; header.json, which tokenizer made them of which
pictures. The arrays are memory-mapped: nothing is held in memory.

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

from data.clip_set import ClipSet
from data.errors import DataError
from data.loader import evaluation_batches, sample_rng
from data.sets import PictureSet

FORMAT = "arloom token cache 2"
UINT16_VOCABULARY = 65_536
Precision = Literal["float16", "float32"]


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer as plain values. sha256: of its weights; vocab_size: None where its tokens are continuous; record:
    how it was built; spec: what its tokens are."""

    name: str
    sha256: str
    vocab_size: int | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheHeader:
    """What a cache holds: `count` N pictures, `crops` A, and of each crop an array of `shape`, (T,) or (2Z, h, w).

    precision: of moments; codes have the type that their vocabulary needs. transform, crop_range: how pictures were
    cropped. order: what row i is. classes: the names of the labels. files_sha256: of the list of files, None where it is
    not known. pictures: what else is known of the set.
    """

    tokenizer: TokenizerFacts
    count: int
    crops: int
    shape: Sequence[int]
    transform: str
    classes: Sequence[str]
    crop_range: float | None = None
    order: str = "row i is sample i of the set"
    files_sha256: str | None = None
    pictures: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "float16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def kind(self) -> Literal["codes", "moments"]:
        return "moments" if self.tokenizer.vocab_size is None else "codes"

    @property
    def dtype(self) -> np.dtype:
        if self.kind == "moments":
            return np.dtype(self.precision)
        return np.dtype(np.uint16 if self.tokenizer.vocab_size <= UINT16_VOCABULARY else np.uint32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array, by the stem of its file."""
        return {
            self.kind: ((self.count, self.crops, *self.shape), self.dtype),
            "labels": ((self.count,), np.dtype(np.int32)),
            "done": ((self.count,), np.dtype(np.uint8)),
        }

    def record(self) -> dict[str, Any]:
        """The header as it is read back from JSON."""
        return json.loads(json.dumps({"kind": self.kind, "dtype": str(self.dtype), **asdict(self)}))


def picture_header(
    pictures: PictureSet | ClipSet,
    tokenizer: TokenizerFacts,
    shape: int | Sequence[int],
    precision: Precision = "float16",
) -> CacheHeader:
    """The header of a cache of a whole set of pictures or clips. shape: of one crop, as in CacheHeader; a number T is (T,)."""
    facts = pictures.describe()
    named = {key: facts.pop(key) for key in ("count", "transform", "crop_range", "classes", "files_sha256")}
    shape = (shape,) if isinstance(shape, int) else shape
    return CacheHeader(
        tokenizer=tokenizer, crops=pictures.crops, shape=shape, pictures=facts, precision=precision, **named
    )


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
        del content["kind"], content["dtype"]  # which follow from the rest; they are there to be read by people
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
        self.stored, self.labels, self.done = _open_arrays(self.folder, header, "r+")

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """The rows that process `rank` of `world` has still to write."""
        mine = np.arange(rank, self.header.count, world)
        return mine[self.done[mine] == 0].tolist()

    def write(self, rows: np.ndarray, made: np.ndarray, labels: np.ndarray) -> None:
        """rows int (n,); made (n, A, *shape), ids or moments; labels int (n,).

        Raises DataError for ids outside the vocabulary and for moments that the cache's precision cannot hold.
        """
        header, kind = self.header, self.header.kind
        place = f"in rows {rows.min()} .. {rows.max()}"
        wanted = (len(rows), header.crops, *header.shape)
        if made.shape != wanted:
            raise DataError(f"{self.folder}: {kind} are {made.shape}, the cache takes {wanted} (rows, crops, *shape)")
        limits = [("labels", labels, len(header.classes))]
        if kind == "codes":
            limits.append((kind, made, header.tokenizer.vocab_size))
        for what, values, limit in limits:
            if not 0 <= values.min() <= values.max() < limit:
                raise DataError(
                    f"{self.folder}: {what} {values.min()} .. {values.max()} {place}; the header allows 0 .. {limit - 1}"
                )
        if kind == "moments" and not (np.abs(made) <= np.finfo(header.dtype).max).all():
            raise DataError(
                f"{self.folder}: moments {made.min()} .. {made.max()} {place} do not fit {header.dtype}; "
                "look at these pictures, or take precision float32"
            )
        self.stored[rows] = made
        self.labels[rows] = labels
        self.stored.flush()  # the disk has the rows before it has the word that they are done
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
    pictures: PictureSet | ClipSet,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[int]:
    """Encode the pending rows of this process, saying after each batch how many were written.

    encode: images float (n, 3, S, S), or clips (n, 3, T, S, S) -> ids int (n, T), or moments (n, 2Z, h, w); it sees
    batch_size * A crops at once.
    Raises CorruptImage or CorruptVideo for what cannot be read: a cache has no holes.
    """
    mine = Subset(pictures, writer.pending(rank, world))
    for batch in evaluation_batches(mine, batch_size, workers=workers):
        rows = batch["index"].numpy()
        images = batch["image"].flatten(0, 1) if pictures.crops > 1 else batch["image"]  # (n A, 3, S, S)
        made = encode(images).cpu().numpy()
        writer.write(rows, made.reshape(len(rows), pictures.crops, *made.shape[1:]), batch["label"].numpy())
        yield len(rows)


class TokenCache(Dataset[dict[str, Any]]):
    """N samples {"tokens": int64 (T,), "label": int64 (), "index": int} of a complete cache of codes; one of moments has
    "latent": float32 (Z, h, w), of clips (Z, t, h, w), instead of tokens, to be scaled by the tokenizer.

    `sample` draws one of the A crops, and the latent from its Gaussian; cache[i] is the same at every call.
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
        self._stored, labels, done = _open_arrays(self.folder, self.header, "r")
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
        stored = self._stored[index, rng.integers(self.header.crops)]
        if self.header.kind == "codes":
            drawn = {"tokens": torch.from_numpy(stored.astype(np.int64))}
        else:
            mean, log_variance = np.split(stored.astype(np.float32), 2)  # (Z, h, w) each
            noise = rng.standard_normal(mean.shape, dtype=np.float32)
            drawn = {"latent": torch.from_numpy(mean + np.exp(log_variance / 2) * noise)}
        return {**drawn, "label": torch.tensor(int(self.labels[index])), "index": index}

    def describe(self) -> dict[str, Any]:
        """Plain values that say what is cached, to be kept with whatever is made from them."""
        return self.header.record()


def _open_arrays(folder: Path, header: CacheHeader, mode: Literal["r", "r+"]) -> list[np.ndarray]:
    """What is stored, labels, done: mapped. Raises DataError for a file that is missing or of the wrong size."""
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
