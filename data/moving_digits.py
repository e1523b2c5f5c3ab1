"""Videos that need no download: handwritten digits that fly over a black square and bounce off its walls.

After Moving MNIST (Srivastava et al. 2015, arXiv:1502.04681); here all digits of a video are of one class, its label. A
video is a function of its split and number alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from einops import repeat

from data.builtin import open_digits
from data.source import Source

CANVAS, DIGIT, FRAMES = 64, 28, 20
ROOM = CANVAS - DIGIT  # a digit's corner moves in 0 .. ROOM
SPEEDS = (2.0, 5.0)  # pixels a frame
COUNTS = {"train": 10_000, "val": 1_000, "all": 11_000}
STREAM = {"train": 0, "val": 1, "all": 2}


def flight(start: np.ndarray, velocity: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Where digits are at these frames, int64 (T, D, 2): corners (y, x) in pixels, rounded, reflected at the walls.

    start (D, 2) in 0 .. ROOM; velocity (D, 2) in pixels a frame; frames (T,).
    """
    straight = start + velocity * frames[:, None, None]
    return np.rint(ROOM - np.abs(straight % (2 * ROOM) - ROOM)).astype(np.int64)


@dataclass(frozen=True)
class MovingDigits:
    """Videos by number, drawn when asked. pictures: uint8 (10, P, 28, 28), P of each class; each: digits of a video."""

    pictures: np.ndarray
    split: str
    each: int

    def counts(self) -> np.ndarray:
        return np.full(COUNTS[self.split], FRAMES)

    def scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The digits of a video (D, 28, 28), their corners at frame 0 (D, 2) and velocities (D, 2), both (y, x)."""
        rng = np.random.default_rng((STREAM[self.split], index))
        chosen = rng.integers(self.pictures.shape[1], size=self.each)
        start = rng.uniform(0, ROOM, (self.each, 2))
        angle, speed = rng.uniform(0, 2 * np.pi, self.each), rng.uniform(*SPEEDS, self.each)
        velocity = speed[:, None] * np.stack((np.sin(angle), np.cos(angle)), 1)
        return self.pictures[index % 10, chosen], start, velocity

    def read(self, index: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        digits, start, velocity = self.scene(index)
        corners = flight(start, velocity, choose(FRAMES))
        canvas = np.zeros((len(corners), CANVAS, CANVAS), dtype=np.uint8)
        for frame, places in zip(canvas, corners, strict=True):
            for digit, (top, left) in zip(digits, places, strict=True):
                window = frame[top : top + DIGIT, left : left + DIGIT]
                np.maximum(window, digit, out=window)
        return repeat(canvas, "t h w -> t h w 3")


def open_moving_digits(split: str, each: int = 2) -> Source:
    """64x64, 20 frames, `each` digits of one class a video, brightest on top: 10,000 videos for training, 1,000 to
    validate; class index % 10. No digit's picture is in both splits (400 of each class, 100).

    Every digit starts uniformly, flies in a uniform direction at 2 to 5 pixels a frame. Raises DataError as open_digits.
    """
    digits = open_digits(split)
    count = COUNTS[split]
    inside = (digits.pictures.array.shape[-1] - DIGIT) // 2  # without the border that open_digits adds
    pictures = digits.pictures.array[:, inside:-inside, inside:-inside].reshape(10, -1, DIGIT, DIGIT)
    return Source(
        name="moving_digits" if each == 2 else "moving_digit",
        split=split,
        licence=digits.licence,
        path=digits.path,
        classes=digits.classes,
        labels=np.arange(count) % 10,
        names=[f"video {index}" for index in range(count)],
        pictures=MovingDigits(pictures, split, each),
        sha256=digits.sha256,
        chiral=digits.chiral,
    )


open_moving_digit = partial(open_moving_digits, each=1)
