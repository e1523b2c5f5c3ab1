"""Which frames make a clip, and how they are cropped: closed forms of the published rules."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import functional

from data.clips import (
    CLIP_TRANSFORMS,
    WINDOWS,
    center,
    center_clip,
    index_all_clips,
    random_clip,
    random_stride,
    random_window,
    sample_order,
    uniform,
)


class Grid:
    """A generator whose numbers are given: tests with it have no sampling error."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = iter(numbers)

    def random(self) -> float:
        return next(self.numbers)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("n", "length", "stride"), [(29, 16, 1), (200, 16, 8), (128, 16, 8), (16, 16, 1), (121, 16, 8)]
)
def test_random_windows_start_everywhere_they_fit_equally_often(n: int, length: int, stride: int) -> None:
    starts = n - length * stride + stride  # StyleGAN-V: offset in 0 .. n - length * stride + stride - 1
    grid = (np.arange(starts * 50) + 0.5) / (starts * 50)
    windows = [random_window(n, length, Grid(u), stride) for u in grid]
    assert Counter(int(window[0]) for window in windows) == dict.fromkeys(range(starts), 50)
    assert all((np.diff(window) == stride).all() and window[-1] < n for window in windows)


def test_a_short_video_gives_its_last_frame_again_under_every_rule() -> None:
    rng = np.random.default_rng(0)
    for name, rule in WINDOWS.items():
        assert rule(5, 8, rng, 1).tolist() == [0, 1, 2, 3, 4, 4, 4, 4], name
        assert rule(1, 3, rng, 1).tolist() == [0, 0, 0], name


def test_every_rule_gives_ascending_frames_of_the_video() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 7, 16, 17, 18, 130, 331):
        for length in (1, 16, 17):
            for name, rule in WINDOWS.items():
                window = rule(n, length, rng, 1 if name == "uniform" else 3)
                assert window.dtype == np.int64 and window.shape == (length,), name
                assert window[0] >= 0 and window[-1] < n and (np.diff(window) >= 0).all(), name


def test_uniform_and_center_are_the_published_formulas() -> None:
    assert uniform(100, 16).tolist() == [int(j * 100 / 16) for j in range(16)]
    for n in (17, 18, 240):
        assert center(n, 17).tolist() == list(range(n // 2 - 8, n // 2 + 9))


def test_a_random_stride_goes_as_far_as_the_video_reaches() -> None:
    def stride(n: int, u: float) -> int:
        return int(np.diff(random_stride(n, 17, Grid(u, 0.0), 8))[0])

    grid = (np.arange(80) + 0.5) / 80
    assert Counter(stride(500, u) for u in grid) == dict.fromkeys(range(1, 9), 10)
    assert {stride(49, u) for u in grid} == {1, 2, 3}  # 16 steps of 3 are 48
    assert {stride(20, u) for u in grid} == {1}


def test_all_clips_lie_end_to_end_and_the_rest_is_dropped() -> None:
    counts = np.array([34, 7, 8, 0, 23])
    rows = index_all_clips(counts, 8)
    assert rows.tolist() == [[0, 0], [0, 8], [0, 16], [0, 24], [2, 0], [4, 0], [4, 8]]
    assert np.bincount(rows[:, 0], minlength=5).tolist() == (counts // 8).tolist()
    assert index_all_clips(np.array([7, 3]), 8).shape == (0, 2)


def test_the_reference_clips_are_drawn_by_pythons_generator_without_replacement() -> None:
    order = sample_order(300, 120)
    assert order == random.Random(42).sample(range(300), 120) and len(set(order)) == 120
    assert sample_order(300, 120, seed=1) != order
    with pytest.raises(ValueError, match="301 clips wanted, there are 300"):
        sample_order(300, 301)


def test_the_centre_crop_is_that_of_every_frame_alone_and_antialiased() -> None:
    frames = noise(3, 50, 67)
    clip = center_clip(frames, 20)
    for number, frame in enumerate(frames):
        picture = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
        resized = torch.nn.functional.interpolate(picture[None], (20, 26), mode="bilinear", antialias=True)[0]
        assert_close(clip[:, number], functional.center_crop(resized, [20, 20]), atol=1e-6, rtol=0)
    same = noise(2, 24, 24)
    assert torch.equal(center_clip(same, 24), torch.from_numpy(same).permute(3, 0, 1, 2) / 255)


def test_one_random_crop_is_taken_of_all_frames() -> None:
    still = np.repeat(noise(1, 30, 45), 4, 0)
    seen = [random_clip(still, 16, np.random.default_rng(seed)) for seed in range(30)]
    assert all(torch.equal(clip, clip[:, :1].expand_as(clip)) for clip in seen)
    assert len({clip.numpy().tobytes() for clip in seen}) > 5 and seen[0].shape == (3, 4, 16, 16)


def test_two_crops_are_the_clip_and_its_mirror_image() -> None:
    crops, transform = CLIP_TRANSFORMS["center_flip"]
    made = transform(noise(3, 20, 30), 12, np.random.default_rng(0))
    assert crops == 2 and made.shape == (2, 3, 3, 12, 12) and torch.equal(made[1], made[0].flip(-1))
