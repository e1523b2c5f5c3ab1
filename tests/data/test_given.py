"""First frames of videos: those that a set of clips would give, by file or by folder, and what is too short."""

from pathlib import Path

import pytest
import torch

from data.errors import CorruptVideo, DataError
from data.given import GivenFrames
from data.sets import open_set
from tests.small_clips import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, frames in enumerate((12, 9, 5)):
        write_video(tmp_path / f"videos/{number}.mp4", frames, seed=number, size=(24, 32))
    return tmp_path / "videos"


@pytest.mark.parametrize("stride", [1, 2])
def test_they_are_the_first_frames_of_the_clips_of_a_set(folder: Path, stride: int) -> None:
    given = GivenFrames(folder, 3, 16, stride)
    clips = open_set("videos", split="all", root=str(folder), size=16, frames=3, window="first", stride=stride)
    assert len(given) == 3
    for index in range(3):
        assert torch.equal(given[index], clips[index]["image"])
        assert torch.equal(GivenFrames(folder / f"{index}.mp4", 3, 16, stride)[0], given[index])
    assert given.describe()["videos"] == ["0.mp4", "1.mp4", "2.mp4"] and given.describe()["stride"] == stride


def test_what_cannot_be_given_is_named(folder: Path) -> None:
    given = GivenFrames(folder, 5, 16, 2)
    assert given[1].shape == (3, 5, 16, 16)  # 9 frames: just enough
    with pytest.raises(
        DataError, match=r"2\.mp4: has 5 frames, the first 9 are needed \(5 are given, one of every 2\)"
    ):
        given[2]
    (folder / "3.mp4").write_bytes(b"no video")
    with pytest.raises(CorruptVideo, match=r"3\.mp4: not a readable video"):
        GivenFrames(folder / "3.mp4", 2, 16)[0]
    with pytest.raises(DataError, match=r"nothing does not exist"):
        GivenFrames(folder / "nothing", 2, 16)
