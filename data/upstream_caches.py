"""Token caches that others published, converted once into ours.

LlamaGen (Sun et al. 2024, arXiv:2406.06525): two folders, {i}.npy codes int (1, A, T) and {i}.npy label int (1,) of
picture i in the order of the sorted class folders. RAR (Yu et al. 2024, arXiv:2411.00776): one JSON line a crop,
{"class_id": int, "tokens": [T ints]}; which crops belong to one picture is not recorded, so each is a row with A = 1.
MAR (Li et al. 2024, arXiv:2406.11838), and xAR after it: class folders of {picture}.npz, in each the moments of the
picture and `moments_flip` of its mirror, float (2Z, h, w). An interrupted conversion goes on where it stopped.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from data.errors import DataError
from data.token_cache import CacheHeader, CacheWriter, Precision, TokenizerFacts

ROWS_AT_ONCE = 4096
LATENTS_AT_ONCE = 256
LOG_VARIANCES = (-30.0, 20.0)  # the range that LDM's posterior is held to when it is read


def convert_llamagen(
    codes: str | Path,
    labels: str | Path,
    out: str | Path,
    tokenizer: TokenizerFacts,
    classes: Sequence[str],
    transform: str,
    crop_range: float | None = None,
) -> CacheHeader:
    """codes, labels: the folders imagenet{S}_codes, imagenet{S}_labels. Raises DataError naming missing files."""
    codes, labels = Path(codes), Path(labels)
    count = sum(1 for _ in codes.glob("*.npy"))
    missing = [path for i in range(count) for path in (codes / f"{i}.npy", labels / f"{i}.npy") if not path.is_file()]
    if missing or not count:
        names = ", ".join(map(str, missing[:5])) or f"{codes}/0.npy"
        raise DataError(f"{codes}: of {count} files numbered from 0, {len(missing) or 1} are missing: {names}")
    _, crops, length = np.load(codes / "0.npy").shape
    header = CacheHeader(tokenizer, count, crops, (length,), transform, classes, crop_range)
    writer = CacheWriter(out, header)
    pending = iter(writer.pending())
    while rows := list(islice(pending, ROWS_AT_ONCE)):
        ids = np.concatenate([np.load(codes / f"{row}.npy") for row in rows])  # (n, A, T)
        writer.write(np.array(rows), ids, np.concatenate([np.load(labels / f"{row}.npy") for row in rows]))
    writer.finish()
    return header


def convert_rar(
    lines: str | Path,
    out: str | Path,
    tokenizer: TokenizerFacts,
    classes: Sequence[str],
    transform: str,
    crop_range: float | None = None,
) -> CacheHeader:
    """lines: the JSONL file. It is read line by line, twice. Raises DataError naming a line that is damaged."""
    lines = Path(lines)
    content = _rar_rows(lines)
    first = next(content, None)
    if first is None:
        raise DataError(f"{lines}: has no lines")
    count = 1 + sum(1 for _ in content)
    order = "row i is line i of the file: one crop of a picture that is not recorded"
    header = CacheHeader(tokenizer, count, 1, (len(first[1]),), transform, classes, crop_range, order)
    writer = CacheWriter(out, header)
    missing = (row for row in enumerate(_rar_rows(lines)) if not writer.done[row[0]])
    while chunk := list(islice(missing, ROWS_AT_ONCE)):
        rows, content = zip(*chunk, strict=True)
        labels, tokens = zip(*content, strict=True)
        writer.write(np.array(rows), np.array(tokens)[:, None], np.array(labels))
    writer.finish()
    return header


def convert_mar(
    folder: str | Path,
    out: str | Path,
    tokenizer: TokenizerFacts,
    classes: Sequence[str],
    transform: str = "center_flip",
    precision: Precision = "float16",
) -> CacheHeader:
    """folder: with a folder for each of `classes`, in sorted order. Crop 0 is the picture, crop 1 its mirror.

    Raises DataError for another number of class folders, and naming a file that is damaged or of another shape.
    """
    folder = Path(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(folders) != len(classes):
        raise DataError(f"{folder}: holds {len(folders)} class folders, {len(classes)} classes are named")
    files = [(path, label) for label, under in enumerate(folders) for path in sorted(under.rglob("*.npz"))]
    if not files:
        raise DataError(f"{folder}: its class folders hold no .npz files")
    shape = _mar_moments(files[0][0]).shape
    header = CacheHeader(tokenizer, len(files), shape[0], shape[1:], transform, classes, precision=precision)
    writer = CacheWriter(out, header)
    pending = iter(writer.pending())
    while rows := list(islice(pending, LATENTS_AT_ONCE)):
        paths, labels = zip(*(files[row] for row in rows), strict=True)
        moments = [_mar_moments(path) for path in paths]
        if odd := [path for path, found in zip(paths, moments, strict=True) if found.shape != shape]:
            raise DataError(f"{odd[0]}: its moments have another shape than the {shape[1:]} of {files[0][0]}")
        writer.write(np.array(rows), np.stack(moments), np.array(labels))
    writer.finish()
    return header


def _mar_moments(path: Path) -> np.ndarray:
    """(2, 2Z, h, w), log-variances as a posterior reads them."""
    try:
        with np.load(path) as file:
            moments = np.stack([file["moments"], file["moments_flip"]])
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path}: damaged ({error!r}); copy the file again") from error
    mean, log_variance = np.split(moments, 2, axis=1)
    return np.concatenate([mean, log_variance.clip(*LOG_VARIANCES)], axis=1)


def _rar_rows(path: Path) -> Iterator[tuple[int, list[int]]]:
    """(class, tokens) of every line."""
    with path.open() as file:
        length = None
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                label, tokens = row["class_id"], row["tokens"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(f"{path}: line {number} is damaged ({error!r}); copy the file again") from error
            length = length or len(tokens)
            if len(tokens) != length:
                raise DataError(f"{path}: line {number} has {len(tokens)} tokens, the first has {length}")
            yield label, tokens
