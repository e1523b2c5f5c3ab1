"""Clips as files: what is read back is what was written, in its order."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sampling.clip_files import LETTERS, save_clips


@pytest.fixture
def clips() -> torch.Tensor:
    """(3, 3, 5, 14, 17): each clip and frame of its own shade of grey."""
    shade = torch.arange(15).view(3, 1, 5, 1, 1) / 7 - 1
    return shade.expand(3, 3, 5, 14, 17).clone()


def grey(clips: torch.Tensor) -> np.ndarray:
    """uint8 (B, T)."""
    return (clips[:, 0, :, 0, 0] * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy()


def film(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("ending", "off"), [("mp4", 2), ("gif", 0)])
def test_films_play_all_clips_at_once_in_order(ending: str, off: int, clips: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"clips.{ending}"
    save_clips(path, clips, columns=2, gap=2, fps=5)
    frames = film(path)
    sides = (2 * (14 + 2) + 2, 2 * (17 + 2) + 2)
    assert frames.shape == (5, *sides, 3)
    for number in range(3):
        top, left = 2 + number // 2 * 16, 2 + number % 2 * 19
        inner = frames[:, top + 3 : top + 11, left + 3 : left + 14].astype(int)
        assert np.abs(inner - grey(clips)[number][:, None, None, None]).max() <= off
    assert frames[:, -12:, -12:].min() >= 255 - off  # the place of a fourth clip is white
    with av.open(path) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(5, rel=0.01)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_film_is_encoded_for_browsers_whatever_its_sides(clips: torch.Tensor, tmp_path: Path) -> None:
    save_clips(tmp_path / "odd.mp4", clips[:1, ..., :13, :], gap=0)
    with av.open(tmp_path / "odd.mp4") as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.height, codec.width) == ("h264", "yuv420p", 14, 18)
    content = (tmp_path / "odd.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # it plays before it is loaded


def test_a_filmstrip_is_a_row_a_clip_frames_from_left_to_right(tmp_path: Path) -> None:
    clips = torch.rand(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    save_clips(tmp_path / "strip.png", clips, gap=1, scale=2)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    assert strip.shape == (2 * 13 + 1, 4 * 11 + 1, 3)
    for row in range(2):
        for time in range(4):
            cell = strip[row * 13 + 1 : row * 13 + 13, time * 11 + 1 : time * 11 + 11]
            wanted = (clips[row, :, time] * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            assert np.array_equal(cell, wanted.repeat(2, 0).repeat(2, 1))
    assert (strip[::13] == 255).all() and (strip[:, ::11] == 255).all()


def test_names_are_written_above_the_frames_they_name(clips: torch.Tensor, tmp_path: Path) -> None:
    """In a filmstrip above every column, in a film one at a time; the pictures stay what they are."""
    names = [str(n) for n in range(5)]
    for ending in ("png", "gif"):
        save_clips(tmp_path / f"plain.{ending}", clips, scale=2)
        save_clips(tmp_path / f"named.{ending}", clips, scale=2, names=names)
    plain, named = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("plain", "named"))
    height = named.shape[0] - plain.shape[0]
    assert height > LETTERS and np.array_equal(named[height:], plain)
    written = named[:height, 2:].reshape(height, 5, 36, 3)
    assert all((written[:, place] < 128).any() for place in range(5)) and (written[:, :, 20:] == 255).all()
    assert len({written[:, place].tobytes() for place in range(5)}) == 5
    frames, films = film(tmp_path / "plain.gif"), film(tmp_path / "named.gif")
    assert np.array_equal(films[:, height:], frames) and len({frame[:height].tobytes() for frame in films}) == 5


def test_what_cannot_be_written_is_named_and_leaves_what_was_there(
    clips: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"ends in '\.webm'; give \.mp4, \.gif, or \.png"):
        save_clips(tmp_path / "clips.webm", clips)
    for wrong in (clips[0], clips[:0], clips[:, :1]):
        with pytest.raises(ValueError, match=r"must be \(B, 3, T, H, W\)"):
            save_clips(tmp_path / "clips.png", wrong)
    path = tmp_path / "clips.mp4"
    save_clips(path, clips)
    before = path.read_bytes()

    def fail(*given: object, **named: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail, raising=False)
    with pytest.raises(OSError, match="no space left"):
        save_clips(path, clips.flip(0))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
