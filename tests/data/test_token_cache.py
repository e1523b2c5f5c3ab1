"""Token caches: whole or refused, whoever wrote them and however often they were interrupted."""

import json
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.errors import CorruptImage, DataError
from data.loader import batches, evaluation_batches, sample_rng
from data.sets import PictureSet, open_set
from data.token_cache import CacheHeader, CacheWriter, TokenCache, TokenizerFacts, fill_cache, picture_header

FACTS = TokenizerFacts("vq", "ab" * 32, vocab_size=1000, record={"class_path": "VQ"}, spec={"decoded": [1, 16, 16]})


def header(count: int = 50, vocab_size: int = 1000) -> CacheHeader:
    facts = replace(FACTS, vocab_size=vocab_size)
    return CacheHeader(facts, count, crops=2, shape=(6,), transform="center_flip", classes=["a", "b", "c"])


def content(count: int = 50, vocab_size: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, vocab_size, (count, 2, 6)), rng.integers(0, 3, count)


def write(folder: Path, rank: int = 0, world: int = 1, stop_after: int | None = None, count: int = 50) -> CacheWriter:
    writer = CacheWriter(folder, header(count))
    codes, labels = content(count)
    for row in writer.pending(rank, world)[:stop_after]:
        writer.write(np.array([row]), codes[[row]], labels[[row]])
    return writer


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    assert write(tmp_path / "cache").finish()
    return tmp_path / "cache"


def assert_whole(folder: Path, count: int = 50) -> None:
    codes, labels = content(count)
    cache = TokenCache(folder, FACTS.sha256)
    assert len(cache) == count and np.array_equal(cache.labels, labels) and cache.classes == ["a", "b", "c"]
    for index in range(count):
        sample = cache[index]
        assert sample["tokens"].dtype == torch.int64 and sample["label"] == labels[index] and sample["index"] == index
        assert any(torch.equal(sample["tokens"], torch.tensor(crop)) for crop in codes[index])


def test_what_is_written_is_read(cache: Path) -> None:
    assert_whole(cache)
    assert np.load(cache / "codes.npy", mmap_mode="r").dtype == np.uint16
    assert TokenCache(cache, FACTS.sha256).describe() == header().record()


def test_an_interrupted_cache_is_refused_then_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    assert not write(folder, stop_after=20).finish()
    with pytest.raises(DataError, match="unfinished, 20 of 50 rows"):
        TokenCache(folder, FACTS.sha256)
    before = (folder / "codes.npy").read_bytes()
    writer = CacheWriter(folder, header())
    assert writer.pending() == list(range(20, 50)) and writer.pending(1, 2) == list(range(21, 50, 2))
    assert not writer.finish() and (folder / "codes.npy").read_bytes() == before
    assert write(folder).finish()
    assert_whole(folder)
    assert CacheWriter(folder, header()).complete and not write(folder).pending()


def _write_share(folder: Path, rank: int, barrier: Callable[[], object]) -> None:
    barrier()
    write(folder, rank, world=2, count=400)


def test_two_writers_at_once_make_one_cache(tmp_path: Path) -> None:
    folder, processes = tmp_path / "cache", multiprocessing.get_context("fork")
    barrier = processes.Barrier(2)
    writers = [processes.Process(target=_write_share, args=(folder, rank, barrier.wait)) for rank in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert CacheWriter(folder, header(400)).finish()
    assert_whole(folder, 400)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # no draft is left


def test_a_cache_of_another_tokenizer_is_refused_naming_both(cache: Path) -> None:
    with pytest.raises(DataError) as raised:
        TokenCache(cache, "cd" * 32)
    assert FACTS.sha256 in str(raised.value) and "cd" * 32 in str(raised.value) and "vq" in str(raised.value)


def test_resuming_under_another_header_is_refused_naming_the_difference(tmp_path: Path) -> None:
    write(tmp_path / "cache", stop_after=3)
    other = replace(header(), tokenizer=replace(FACTS, sha256="cd" * 32), crop_range=1.05)
    with pytest.raises(DataError, match=r"crop_range: None, now 1\.05") as raised:
        CacheWriter(tmp_path / "cache", other)
    assert f"tokenizer.sha256: {FACTS.sha256}, now {'cd' * 32}" in str(raised.value)


@pytest.mark.parametrize("name", ["codes", "labels", "done"])
def test_truncated_padded_and_missing_files_are_refused(cache: Path, name: str) -> None:
    path = cache / f"{name}.npy"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], whole + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name}\.npy"):
            TokenCache(cache, FACTS.sha256)
        with pytest.raises(DataError, match=rf"{name}\.npy"):
            CacheWriter(cache, header())
        assert path.read_bytes() == damaged
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}\.npy: missing"):
        TokenCache(cache, FACTS.sha256)


def test_damaged_headers_and_other_folders_are_refused(cache: Path, tmp_path: Path) -> None:
    text = (cache / "header.json").read_text()
    fields = json.loads(text)
    for damaged in (text[:-30], "[]", json.dumps(fields | {"format": "x"}), json.dumps(fields | {"surprise": 1})):
        (cache / "header.json").write_text(damaged)
        with pytest.raises(DataError, match=r"header\.json"):
            TokenCache(cache, FACTS.sha256)
    with pytest.raises(DataError, match="holds no token cache"):
        TokenCache(tmp_path, FACTS.sha256)
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary/monday.txt").write_text("x")
    with pytest.raises(DataError, match="diary: exists and holds no token cache"):
        CacheWriter(tmp_path / "diary", header())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "diary"]


def test_a_full_disk_stops_before_the_first_row_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DataError, match=r"cache: cannot be made .*No space left"):
        CacheWriter(tmp_path / "cache", header())
    assert not list(tmp_path.iterdir())


def test_ids_outside_the_vocabulary_and_wrong_shapes_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", header())
    codes, labels = content()
    rows = np.arange(50)
    with pytest.raises(DataError, match=r"codes 0 \.\. 1000 .* allows 0 \.\. 999"):
        writer.write(rows, np.where(codes == codes.max(), 1000, np.where(codes == 5, 0, codes)), labels)
    with pytest.raises(DataError, match=r"labels -1 \.\. 2"):
        writer.write(rows, codes, np.where(labels == 0, -1, labels))
    with pytest.raises(DataError, match=r"codes are \(50, 1, 6\), the cache takes \(50, 2, 6\)"):
        writer.write(rows, codes[:, :1], labels)
    assert writer.pending() == rows.tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (2**18, np.uint32)])
def test_the_largest_id_survives(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    writer = CacheWriter(tmp_path / "cache", header(1, vocab_size))
    writer.write(np.array([0]), np.full((1, 2, 6), vocab_size - 1), np.array([0]))
    writer.finish()
    assert np.load(tmp_path / "cache/codes.npy").dtype == dtype
    assert (TokenCache(tmp_path / "cache", FACTS.sha256)[0]["tokens"] == vocab_size - 1).all()


def test_crops_are_drawn_by_seed_epoch_and_index_also_through_workers(cache: Path) -> None:
    tokens, codes = TokenCache(cache, FACTS.sha256), content()[0]
    taken = [
        [int((tokens.sample(i, sample_rng(0, epoch, i))["tokens"].numpy() == codes[i, 1]).all()) for epoch in range(20)]
        for i in range(50)
    ]
    assert 0.42 < np.mean(taken) < 0.58  # 1000 fair draws: 5 standard deviations
    alone, helped = (list(islice(batches(tokens, 8, seed=1, workers=workers), 15)) for workers in (0, 2))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(alone, helped, strict=True))
    moved = pickle.loads(pickle.dumps(tokens))
    assert torch.equal(moved[7]["tokens"], tokens[7]["tokens"])


def encode(images: Tensor) -> Tensor:
    """Four tokens a picture: the mean red of its quarters, 0 .. 255."""
    assert images.shape[1:] == (3, 16, 16)
    return ((images[:, 0].unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)) + 1) * 127.5).flatten(1).round().long()


def picture_cache(folder: Path, pictures: PictureSet) -> CacheWriter:
    return CacheWriter(folder, picture_header(pictures, replace(FACTS, vocab_size=256), 4))


def test_a_picture_set_is_encoded_crop_by_crop_by_many_processes(tmp_path: Path) -> None:
    pictures = open_set("emoji32", split="val", size=16, transform="center_flip")
    writer = picture_cache(tmp_path / "cache", pictures)
    assert sum(islice(fill_cache(writer, pictures, encode, 32, rank=0, world=2), 2)) == 64  # then it was interrupted
    for rank, world in ((0, 3), (1, 3), (2, 3)):
        share = picture_cache(tmp_path / "cache", pictures)
        missing = len(share.pending(rank, world))
        assert sum(fill_cache(share, pictures, encode, 32, rank, world)) == missing < 64
    assert writer.finish()
    stored = np.load(tmp_path / "cache/codes.npy")
    wanted = torch.cat([encode(batch["image"].flatten(0, 1)) for batch in evaluation_batches(pictures, 64)])
    assert np.array_equal(stored, wanted.reshape(190, 2, 4).numpy())
    cache = TokenCache(tmp_path / "cache", FACTS.sha256)
    assert np.array_equal(cache.labels, pictures.labels) and cache.classes == pictures.classes
    facts = pictures.describe()
    assert cache.header.files_sha256 == facts["files_sha256"] and cache.header.pictures["licence"] == facts["licence"]


def test_a_picture_that_cannot_be_read_leaves_no_hole(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"train/a/{number}.png")
    (tmp_path / "train/a/2.png").write_bytes(b"")
    pictures = open_set("folder", split="train", root=str(tmp_path), size=16)
    writer = picture_cache(tmp_path / "cache", pictures)
    with pytest.raises(CorruptImage, match=r"a/2\.png"):
        list(fill_cache(writer, pictures, encode, 1))
    assert writer.pending() == [2, 3] and not writer.finish()
