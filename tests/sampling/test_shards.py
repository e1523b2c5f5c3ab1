"""Large sampling runs: resumed, shared out, each image once, nothing overwritten."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sampling.shards import SampleError, Shards, plan_labels

LABELS = torch.arange(23) % 5
SETTINGS = {"seed": 1, "sampler": {"top_k": 3}}


def picture(index: Tensor) -> Tensor:
    """A picture that tells its sample number."""
    return index[:, None, None, None].expand(-1, 4, 4, 3).to(torch.uint8)


def shards(out: Path, **settings: object) -> Shards:
    return Shards(out, LABELS, 4, {**SETTINGS, **settings})


def test_an_npz_holds_every_image_once_in_order_after_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    first = shards(out)
    first.begin()
    for index in list(first.missing())[:3]:
        first.write(index, picture(index))
    again = shards(out)
    left = list(again.missing())
    assert [int(index[0]) for index in left] == [12, 16, 20] and len(left[-1]) == 3
    with pytest.raises(SampleError, match=r"blocks \[3, 4, 5\] are missing"):
        again.finish({})
    for rank in (0, 1):  # two processes share the rest
        for index in again.missing(rank, 2):
            again.write(index, picture(index))
    again.finish({"protocol": "none"})
    made = np.load(out)
    assert np.array_equal(made["arr_0"], picture(torch.arange(23)).numpy()) and made["arr_0"].dtype == np.uint8
    assert made["arr_1"].tolist() == LABELS.tolist()
    assert json.loads((tmp_path / "samples.json").read_text()) == {"protocol": "none"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.json", "samples.npz"]


def test_a_folder_holds_a_png_a_sample(tmp_path: Path) -> None:
    made = shards(tmp_path / "pictures")
    made.begin()
    for index in made.missing():
        made.write(index, picture(index))
    made.finish({"seed": 1})
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(23)]
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "pictures/000017.png")), picture(torch.tensor([17]))[0].numpy()
    )
    assert json.loads((tmp_path / "pictures/labels.json").read_text()) == LABELS.tolist()


def test_clips_become_an_npz_or_a_folder_of_films(tmp_path: Path) -> None:
    for out in (tmp_path / "clips.npz", tmp_path / "clips"):
        made = Shards(out, LABELS, 4, SETTINGS, fps=5)
        made.begin()
        for index in made.missing():
            made.write(index, (10 * index)[:, None, None, None, None].expand(-1, 3, 16, 16, 3).to(torch.uint8))
        made.finish({})
    array = np.load(tmp_path / "clips.npz")["arr_0"]
    assert array.shape == (23, 3, 16, 16, 3) and array[:, 0, 0, 0, 0].tolist() == [10 * i for i in range(23)]
    for number in (0, 17):
        with av.open(tmp_path / f"clips/{number:06d}.mp4") as container:
            assert container.streams.video[0].average_rate == 5
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 3 and np.abs(np.stack(frames).astype(int) - 10 * number).max() <= 2
    odd = Shards(tmp_path / "odd", LABELS, 4, SETTINGS)
    with pytest.raises(SampleError, match=r"an MP4 has even sides, the clips are \(15, 16\); give NAME\.npz"):
        odd.write(torch.arange(4), torch.zeros(4, 3, 15, 16, 3, dtype=torch.uint8))


def test_other_settings_and_finished_files_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "samples.npz"
    shards(out).begin()
    with pytest.raises(SampleError, match="seed: 1 -> 2"):
        shards(out, seed=2)
    out.write_bytes(b"done")
    with pytest.raises(SampleError, match="exists already"):
        shards(out)


def test_label_plans() -> None:
    assert plan_labels(7, 3, "balanced", 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = plan_labels(30_000, 3, "random", 0)
    assert torch.equal(drawn[:100], plan_labels(100, 3, "random", 0))
    counts = torch.bincount(drawn)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 13.8  # chi-square, 2 degrees of freedom: 1 seed in 1,000 fails
    with pytest.raises(ValueError, match="'balanced' or 'random'"):
        plan_labels(3, 3, "all", 0)
