"""Reading sets of pictures: the same pixels from every container, and an error that names the place otherwise."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.pictures import PictureError, PictureSet, PixelDigest, from_batches, from_tensor, read_pictures
from eval.pixels import from_uint8
from eval.provenance import Origin

RNG = torch.Generator().manual_seed(0)
PICTURES = torch.randint(0, 256, (11, 3, 12, 16), generator=RNG, dtype=torch.uint8)
LABELS = torch.arange(11) % 4
ARRAY = PICTURES.movedim(1, -1).numpy()


def digest(pictures: PictureSet, batch_size: int) -> str:
    digest = PixelDigest(pictures.name)
    for batch in pictures.batches(batch_size):
        digest.update(batch)
    return digest.record(pictures.origin).sha256


def whole(pictures: PictureSet, batch_size: int = 4) -> Tensor:
    return torch.cat(list(pictures.batches(batch_size)))


def write_folder(path: Path) -> Path:
    path.mkdir()
    for number, picture in enumerate(ARRAY):
        Image.fromarray(picture).save(path / f"{number:06d}.png")
    (path / "labels.json").write_text(json.dumps(LABELS.tolist()))
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_npz(save: Callable[..., None], batch_size: int, tmp_path: Path) -> None:
    save(tmp_path / "samples.npz", ARRAY, LABELS.numpy())
    (tmp_path / "samples.json").write_text(json.dumps({"seed": 5, "count": 11}))
    pictures = read_pictures(tmp_path / "samples.npz")
    assert torch.equal(whole(pictures, batch_size), PICTURES)
    assert torch.equal(whole(pictures, batch_size), PICTURES)  # afresh at every call
    assert torch.equal(pictures.labels, LABELS)
    assert pictures.origin.seed == 5 and pictures.origin.guidance == "not recorded"


def test_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "samples")
    (folder / "samples.json").write_text(json.dumps({"seed": 6}))
    pictures = read_pictures(folder)
    assert torch.equal(whole(pictures), PICTURES)
    assert torch.equal(pictures.labels, LABELS)
    assert pictures.origin.seed == 6


def test_a_checksum_is_of_the_pixels_and_not_of_the_container(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", ARRAY)
    loader = [{"image": from_uint8(part)} for part in PICTURES.split(3)]
    sets = [
        read_pictures(tmp_path / "samples.npz"),
        read_pictures(write_folder(tmp_path / "samples")),
        from_tensor("memory", PICTURES, Origin.unknown()),
        from_batches("loader", 11, lambda size, start, stop: loader, {}),
    ]
    assert len({digest(pictures, size) for pictures in sets for size in (1, 4, 11)}) == 1
    others = [PICTURES.flip(0), PICTURES[:-1], PICTURES.mT, PICTURES.flip(1)]
    sums = {digest(from_tensor("other", pictures, Origin.unknown()), 4) for pictures in others}
    assert len(sums) == 4 and digest(sets[0], 4) not in sums


def test_gray_files_become_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(ARRAY[0, :, :, 0]).save(tmp_path / "0.png")
    assert torch.equal(whole(read_pictures(tmp_path)), PICTURES[:1, :1].expand(1, 3, -1, -1))


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"arr_1": LABELS.numpy()}, r"has no array arr_0.*it holds \['arr_1'\]"),
        ({"arr_0": ARRAY / 255}, r"must be uint8 \(N, H, W, 3\), channels last; it is float64.*under a stated rule"),
        ({"arr_0": PICTURES.numpy()}, r"it is uint8 \(11, 3, 12, 16\)"),
        ({"arr_0": ARRAY[0]}, r"it is uint8 \(12, 16, 3\)"),
        ({"arr_0": np.asfortranarray(ARRAY)}, "columns first"),
        ({"arr_0": ARRAY, "arr_1": LABELS[:9].numpy()}, "11 pictures, but 9 labels"),
        ({"arr_0": ARRAY, "arr_1": np.eye(11)}, "must be integer labels"),
        ({"arr_0": np.array([object()])}, "it is object"),
        ({"arr_0": ARRAY, "arr_1": np.array([object()])}, "Object arrays cannot be loaded"),
    ],
)
def test_npz_of_another_kind(arrays: dict[str, np.ndarray], fault: str, tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(PictureError, match=fault) as caught:
        read_pictures(path)
    assert str(path) in str(caught.value)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, ARRAY)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"samples\.npz: not a whole npz file"):
        read_pictures(path)
    place = content.index(ARRAY[6].tobytes())
    path.write_bytes(content[:place] + bytes(50) + content[place + 50 :])
    with pytest.raises(PictureError, match=r"samples\.npz: damaged at picture \d+ of 11 .*CRC"):
        whole(read_pictures(path))


def test_a_record_that_counts_otherwise(tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", ARRAY)
    beside = tmp_path / "samples.json"
    faults = {'{"count": 12}': "holds 11 pictures, its record says 12", "{": "not valid JSON", "3": "a JSON object"}
    for content, fault in faults.items():
        beside.write_text(content)
        with pytest.raises(PictureError, match=fault):
            read_pictures(tmp_path / "samples.npz")


def test_damaged_folders(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "samples")
    bad = folder / "000007.png"
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"000007\.png: not a readable picture"):
        whole(read_pictures(folder))
    bad.write_bytes(b"")
    with pytest.raises(PictureError, match=r"000007\.png: not a readable picture"):
        whole(read_pictures(folder))
    Image.fromarray(ARRAY[7, :, :12]).save(bad)
    with pytest.raises(PictureError, match=r"000007\.png: is 12x12, .*000000\.png is 12x16"):
        whole(read_pictures(folder))
    Image.fromarray(ARRAY[7]).convert("RGBA").save(bad)
    with pytest.raises(PictureError, match=r"000007\.png: its mode is RGBA"):
        whole(read_pictures(folder))
    bad.unlink()
    with pytest.raises(PictureError, match="10 pictures, but 11 labels"):
        read_pictures(folder)
    (folder / "labels.json").write_text('["a"]')
    with pytest.raises(PictureError, match=r"labels\.json: not a JSON list of integers"):
        read_pictures(folder)


def test_places_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="holds no pictures"):
        read_pictures(tmp_path)
    with pytest.raises(PictureError, match="no such file or folder"):
        read_pictures(tmp_path / "none.tar")
    with pytest.raises(PictureError, match=r"none\.npz: not a whole npz file"):
        read_pictures(tmp_path / "none.npz")


def test_a_digest_takes_pictures_of_one_kind() -> None:
    digest = PixelDigest("set")
    with pytest.raises(PictureError, match="set: holds no pictures"):
        digest.record(Origin.unknown())
    with pytest.raises(PictureError, match="expected uint8 pictures"):
        digest.update(from_uint8(PICTURES))
    digest.update(PICTURES)
    with pytest.raises(PictureError, match="picture 11 is 12x12, those before are"):
        digest.update(PICTURES[..., :12])
