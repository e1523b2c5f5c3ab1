"""Converting the token caches of others: every row, in its order, or an error naming what is missing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.token_cache import CacheWriter, TokenCache, TokenizerFacts
from data.upstream_caches import convert_llamagen, convert_rar

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
    assert (header.count, header.crops, header.length, header.crop_range) == (12, 10, 9, 1.1)
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
    assert (header.count, header.crops, header.length) == (30, 1, 6)
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
