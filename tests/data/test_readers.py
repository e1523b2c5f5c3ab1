"""Readers: the same pictures through a folder, tars, shards and parquet; and what they say of bad places."""

import hashlib
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from data.errors import DataError
from data.loader import evaluation_batches
from data.sets import PictureSet, open_set

NAMES = [f"{kind}/{number}.png" for kind in ("n10", "n2") for number in range(5)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """root/train: 10 pictures in the folders n10 and n2."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (33, 37, 3), dtype=np.uint8)).save(path)
    return tmp_path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def bytes_of(place: Path, names: list[str] = NAMES) -> dict[str, bytes]:
    return {name: (place / "train" / name).read_bytes() for name in names}


def assert_same_pictures(pictures: PictureSet, place: Path, classes: list[str]) -> None:
    """Whatever the reader: the pictures and labels of the folder, also through worker processes."""
    folder = open_set("folder", split="train", root=str(place))
    assert pictures.classes == classes and np.array_equal(pictures.labels, folder.labels)
    (found,), (wanted,) = (list(evaluation_batches(each, 16, workers=w)) for each, w in ((pictures, 2), (folder, 0)))
    assert torch.equal(found["image"], wanted["image"]) and torch.equal(found["label"], wanted["label"])


def test_one_tar_with_class_folders(place: Path, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "all.tar", {"readme.txt": b"no picture"} | bytes_of(place))
    pictures = open_set("tar", split="all", root=str(path))
    assert_same_pictures(pictures, place, ["n10", "n2"])
    assert pictures.filename(0).endswith("all.tar/all.tar:n10/0.png")


def test_a_tar_for_each_class_loose_or_in_another_tar(place: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose/train"
    for kind in ("n10", "n2"):
        files = {
            f"./{Path(name).name}": content for name, content in bytes_of(place).items() if name.startswith(f"{kind}/")
        }
        make_tar(loose / f"{kind}.tar", files)
    assert_same_pictures(open_set("tar", split="train", root=str(loose.parent)), place, ["n10", "n2"])
    nested = {path.name: path.read_bytes() for path in sorted(loose.iterdir())}
    path = make_tar(tmp_path / "nested/images_train.tar", nested)
    assert_same_pictures(open_set("tar", split="train", root=str(path.parent)), place, ["n10", "n2"])


def test_webdataset_shards(place: Path, tmp_path: Path) -> None:
    samples = list(bytes_of(place).items())
    for shard, chosen in enumerate((samples[:7], samples[7:])):
        files = {}
        for number, (name, content) in enumerate(chosen):
            files |= {f"{number:04}.png": content, f"{number:04}.cls": b"0" if name.startswith("n10") else b"1"}
            files[f"{number:04}.json"] = b"{}"
        make_tar(tmp_path / f"shards/set-train-{shard:02}.tar", files)
    assert_same_pictures(open_set("wds", split="train", root=str(tmp_path / "shards")), place, ["0", "1"])


def test_parquet_with_and_without_class_names(place: Path, tmp_path: Path) -> None:
    content = list(bytes_of(place).values())
    table = pa.table(
        {
            "image": [{"bytes": picture, "path": None} for picture in content],
            "label": [0] * 5 + [1] * 5,
        }
    )
    names = {"info": {"features": {"label": {"names": ["n10", "n2"], "_type": "ClassLabel"}}}}
    named = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(named.slice(0, 7), tmp_path / "hub/data/train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(named.slice(7), tmp_path / "hub/data/train-00001-of-00002.parquet")
    assert_same_pictures(open_set("parquet", split="train", root=str(tmp_path / "hub")), place, ["n10", "n2"])
    plain = pa.table({"img": content, "labels": [0] * 5 + [1] * 5})
    pq.write_table(plain, tmp_path / "one.parquet", row_group_size=4)
    pictures = open_set("parquet", split="all", root=str(tmp_path / "one.parquet"))
    assert_same_pictures(pictures, place, ["0", "1"])
    assert torch.equal(pictures[9]["image"], pictures[9]["image"])
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has the columns \['url'\], needs one named image or img"):
        open_set("parquet", split="all", root=str(tmp_path / "other.parquet"))


def test_files_that_are_damaged_or_of_another_kind_are_named(place: Path, tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", bytes_of(place)).read_bytes()
    second = whole.index(b"n10/1.png")  # cut between two members, in a header, in a picture
    for number, size in enumerate((second, second + 300, second + 1000)):
        (tmp_path / f"cut{number}.tar").write_bytes(whole[:size])
    (tmp_path / "zip.tar").write_bytes(b"PK\x03\x04" + bytes(600))
    for name in ("cut0.tar", "cut1.tar", "cut2.tar", "zip.tar"):
        with pytest.raises(DataError, match=rf"{name}: not a whole uncompressed tar"):
            open_set("tar", split="all", root=str(tmp_path / name))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet is not a whole parquet file"):
        open_set("parquet", split="all", root=str(tmp_path / "x.parquet"))
    text = make_tar(tmp_path / "text.tar", {"a.txt": b"x"})
    with pytest.raises(DataError, match=r"text\.tar holds no pictures"):
        open_set("tar", split="all", root=str(text))
    for files, message in (
        ({"a.png": b""}, "sample a has"),
        ({"a.png": b"", "a.cls": b"cat"}, "b'cat', must be a class"),
    ):
        with pytest.raises(DataError, match=message):
            open_set("wds", split="all", root=str(make_tar(tmp_path / "bad.tar", files)))


def test_a_split_is_never_read_from_another_place(place: Path, tmp_path: Path) -> None:
    for name, looked in (
        ("folder", "no folder val/, valid/"),
        ("tar", r"val/\*\.tar"),
        ("parquet", r"val/\*\.parquet"),
    ):
        with pytest.raises(DataError, match=rf"{looked}.*split='all'"):
            open_set(name, split="val", root=str(place))
    undivided = open_set("folder", split="all", root=str(place / "train"))
    assert len(undivided) == 10


def test_empty_and_flat_folders_are_named(place: Path) -> None:
    (place / "val").mkdir()
    with pytest.raises(DataError, match="val is empty"):
        open_set("folder", split="val", root=str(place))
    (place / "val/n10").mkdir()
    with pytest.raises(DataError, match="n10"):
        open_set("folder", split="val", root=str(place))
    with pytest.raises(DataError, match="class folder"):
        open_set("folder", split="all", root=str(place / "train/n2"))


def test_imagenet_wants_a_thousand_wnids_and_no_flat_folder(place: Path) -> None:
    with pytest.raises(DataError, match="has 2 class folders, 2 of them no wnid; expected 1000"):
        open_set("imagenet", split="train", root=str(place))
    picture = (place / "train" / NAMES[0]).read_bytes()
    (place / "val").mkdir()
    (place / "val/ILSVRC2012_val_00000001.JPEG").write_bytes(picture)
    with pytest.raises(DataError, match=r"val is flat.*torchvision\.datasets\.ImageNet"):
        open_set("imagenet", split="val", root=str(place))
    root = place / "whole"
    for number in range(1000):
        folder = root / f"val/n{10_000_000 + 7 * number}"
        folder.mkdir(parents=True)
        (folder / "x.JPEG").write_bytes(picture)  # a PNG by content, as one file of ImageNet is
    pictures = open_set("imagenet", split="val", root=str(root))
    assert np.array_equal(pictures.labels, np.arange(1000)) and pictures[999]["image"].shape == (3, 32, 32)


def test_cifar10_missing_names_url_checksum_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        open_set("cifar10", split="train", root=str(tmp_path))
    for word in (CIFAR10.url, "c58f30108f718f92721af3b95e74349a", str(tmp_path / "cifar-10-batches-py")):
        assert word in str(raised.value)


def test_cifar10_rows_are_planes_of_red_green_and_blue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)

    def store(name: str, content: dict[str, object]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    test = store("test_batch", {"data": rows, "labels": [6, 9, 0]})
    meta = store("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "train_list", [test])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    pictures = open_set("cifar10", split="val", root=str(tmp_path))
    wanted = torch.tensor(rows[1].reshape(3, 32, 32)).float() / 127.5 - 1
    assert torch.equal(pictures[1]["image"], wanted) and pictures[1]["label"] == 9 and len(pictures.classes) == 10
