"""Converting the token caches of others: every row, in its order, or an error naming what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.token_cache import CacheWriter, TokenCache, TokenizerFacts
from data.upstream_caches import convert_llamagen, convert_mar, convert_rar

FACTS = TokenizerFacts("vq", "ab" * 32, vocab_size=16_384)
CLASSES = ["cat", "dog", "elk"]


@pytest.fixture
def llamagen(tmp_path: Path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 16_384, (12, 10, 9)), rng.integers(0, 3, 12)
    for name, rows in (("codes", codes), ("labels", labels)):
        (tmp_path / name).mkdir()
        for i, row in enumerate(rows):
            np.save(tmp_path / name / f"{i}.npy", row[None])
    return tmp_path / "codes", tmp_path / "labels", codes, labels


def test_llamagen_folders(llamagen: tuple[Path, Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, label_folder, codes, labels = llamagen
    header = convert_llamagen(folder, label_folder, tmp_path / "out", FACTS, CLASSES, "ten", 1.1)
    assert (header.count, header.crops, header.shape, header.crop_range) == (12, 10, (9,), 1.1)
    cache = TokenCache(tmp_path / "out", FACTS.sha256)
    assert np.array_equal(np.load(tmp_path / "out/codes.npy"), codes) and np.array_equal(cache.labels, labels)
    (folder / "3.npy").rename(folder / "12.npy")
    with pytest.raises(DataError, match=r"of 12 files numbered from 0, 1 are missing: .*codes/3\.npy"):
        convert_llamagen(folder, label_folder, tmp_path / "again", FACTS, CLASSES, "ten", 1.1)


def test_rar_lines_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    codes, labels = rng.integers(0, 1024, (30, 6)), rng.integers(0, 3, 30)
    lines = [json.dumps({"class_id": int(c), "tokens": t.tolist()}) for c, t in zip(labels, codes, strict=True)]
    path, facts = tmp_path / "rar.jsonl", replace(FACTS, vocab_size=1024)
    path.write_text("\n".join(lines))
    monkeypatch.setattr("data.upstream_caches.ROWS_AT_ONCE", 8)
    header = convert_rar(path, tmp_path / "out", facts, CLASSES, "ten")
    assert (header.count, header.crops, header.shape) == (30, 1, (6,))
    assert np.array_equal(np.load(tmp_path / "out/codes.npy")[:, 0], codes)
    assert np.array_equal(TokenCache(tmp_path / "out", FACTS.sha256).labels, labels)
    begun = CacheWriter(tmp_path / "begun", header)
    begun.write(np.arange(11), codes[:11, None], labels[:11])
    convert_rar(path, tmp_path / "begun", facts, CLASSES, "ten")
    assert (tmp_path / "begun/codes.npy").read_bytes() == (tmp_path / "out/codes.npy").read_bytes()
    for bad, message in ((lines[4][:-5], "line 5 is damaged"), (lines[4].replace("[", "[1, "), "line 5 has 7 tokens")):
        path.write_text("\n".join([*lines[:4], bad]))
        with pytest.raises(DataError, match=message):
            convert_rar(path, tmp_path / "third", facts, CLASSES, "ten")
    path.write_text("")
    with pytest.raises(DataError, match="has no lines"):
        convert_rar(path, tmp_path / "third", facts, CLASSES, "ten")


def test_mar_folders_of_moments_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    moments, labels = rng.normal(0, 3, (9, 2, 8, 3, 2)).astype(np.float32), np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    moments[:, :, 4:] *= 20  # log-variances, some outside of what a posterior reads
    files = [tmp_path / f"in/n0{label}/{label}_{i}.JPEG.npz" for i, label in enumerate(labels)]
    for file, (straight, mirrored) in zip(files, moments, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, moments=straight, moments_flip=mirrored)
    monkeypatch.setattr("data.upstream_caches.LATENTS_AT_ONCE", 4)
    facts = replace(FACTS, vocab_size=None)
    header = convert_mar(tmp_path / "in", tmp_path / "out", facts, CLASSES, precision="float32")
    assert (header.kind, header.count, header.crops, header.shape) == ("moments", 9, 2, (8, 3, 2))
    wanted = np.concatenate([moments[:, :, :4], moments[:, :, 4:].clip(-30, 20)], axis=2)
    assert np.array_equal(np.load(tmp_path / "out/moments.npy"), wanted)
    assert np.array_equal(TokenCache(tmp_path / "out", FACTS.sha256).labels, labels)
    begun = CacheWriter(tmp_path / "begun", header)
    begun.write(np.arange(5), wanted[:5], labels[:5])
    convert_mar(tmp_path / "in", tmp_path / "begun", facts, CLASSES, precision="float32")
    assert (tmp_path / "begun/moments.npy").read_bytes() == (tmp_path / "out/moments.npy").read_bytes()
    with pytest.raises(DataError, match="holds 3 class folders, 2 classes are named"):
        convert_mar(tmp_path / "in", tmp_path / "third", facts, CLASSES[:2])
    np.savez(files[6], moments=moments[6, 0, :, :2], moments_flip=moments[6, 1, :, :2])
    with pytest.raises(DataError, match=r"2_6\.JPEG\.npz: its moments have another shape than the \(8, 3, 2\)"):
        convert_mar(tmp_path / "in", tmp_path / "third", facts, CLASSES)
    for damaged in (b"", files[5].read_bytes()[:100]):
        files[6].write_bytes(damaged)
        with pytest.raises(DataError, match=r"2_6\.JPEG\.npz: damaged"):
            convert_mar(tmp_path / "in", tmp_path / "third", facts, CLASSES)
