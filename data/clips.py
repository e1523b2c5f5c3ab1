"""Clips out of videos, as the papers cut them: which frames are taken, and how frames become squares.

A video of n frames, a clip of `length` frames. Frame numbers are int64 (length,); a video that is too short gives its last
frame again and again, as LARP's reader does (Wang et al. 2024, arXiv:2410.21264). Frames are uint8 (T, H, W, 3), a clip is
float32 (3, T, S, S) in [0, 1].
"""

import random
from collections.abc import Callable
from math import floor
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.transforms import functional

LARP_SEED = 42  # of the clips that LARP and NAR are scored on


def random_window(n: int, length: int, rng: np.random.Generator, stride: int = 1) -> np.ndarray:
    """Every stride-th frame from a uniform start in 0 .. n - span, span = (length - 1) * stride + 1.

    Stride 1: LARP's training and reconstruction, Open-MAGVIT2's training (17 frames). Also StyleGAN-V's clips
    (arXiv:2112.14683), strides 1 and 8. One number is drawn whatever n is.
    """
    span = (length - 1) * stride + 1
    start = floor(rng.random() * max(1, n - span + 1))
    return _within(start + np.arange(length) * stride, n)


def random_stride(n: int, length: int, rng: np.random.Generator, stride: int = 8) -> np.ndarray:
    """A window with a stride drawn from 1 .. `stride`, as far as the video reaches (CV-VAE, arXiv:2405.20279)."""
    longest = max(1, min(stride, (n - 1) // max(1, length - 1)))
    return random_window(n, length, rng, 1 + floor(rng.random() * longest))


def uniform(n: int, length: int) -> np.ndarray:
    """Frames floor(j * n / length), spread over the whole video: LARP's option of this name."""
    taken = min(n, length)
    return _within(np.array([int(j * n / taken) for j in range(taken)] + [n] * (length - taken)), n)


def center(n: int, length: int, stride: int = 1) -> np.ndarray:
    """The frames around n // 2: Open-MAGVIT2's validation takes n // 2 - 8 .. n // 2 + 8."""
    return _within(np.maximum(n // 2 - length // 2 * stride, 0) + np.arange(length) * stride, n)


def first(n: int, length: int, stride: int = 1) -> np.ndarray:
    """The first frames: Phenaki's reader."""
    return _within(np.arange(length) * stride, n)


def index_all_clips(counts: np.ndarray, length: int) -> np.ndarray:
    """All clips that lie end to end from frame 0, the rest of a video dropped: int64 (N, 2), rows (video, first frame).

    counts (V,): frames of each video, in the order of their paths. LARP samples and scores these (`use_all_frames`).
    """
    rows = [(video, start) for video, n in enumerate(counts) for start in range(0, int(n) - length + 1, length)]
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def sample_order(clips: int, count: int, seed: int = LARP_SEED) -> list[int]:
    """`count` of so many clips, none twice: LARP's choice of real clips, whose classes condition the generated ones.

    Raises ValueError where there are fewer.
    """
    if count > clips:
        raise ValueError(f"sample_order: {count} clips wanted, there are {clips}; give more videos, or ask for fewer")
    return random.Random(seed).sample(range(clips), count)


def _within(frames: np.ndarray, n: int) -> np.ndarray:
    return np.minimum(frames, n - 1).astype(np.int64)


class Rule(Protocol):
    def __call__(self, n: int, length: int, rng: np.random.Generator, stride: int) -> np.ndarray: ...


WINDOWS: dict[str, Rule] = {  # one clip a video and visit; "consecutive", many clips a video, is index_all_clips
    "random": random_window,
    "random_stride": random_stride,
    "uniform": lambda n, length, rng, stride: uniform(n, length),
    "center": lambda n, length, rng, stride: center(n, length, stride),
    "first": lambda n, length, rng, stride: first(n, length, stride),
}


def center_clip(frames: np.ndarray, size: int) -> Tensor:
    """LARP: shorter side to `size` by antialiased bilinear (the other rounded down), then torchvision's centre crop."""
    return functional.center_crop(functional.resize(_as_floats(frames), [size], antialias=True), [size, size])


def random_clip(frames: np.ndarray, size: int, rng: np.random.Generator) -> Tensor:
    """Open-MAGVIT2: shorter side to `size` by bilinear without antialiasing, then one random crop for all frames."""
    clip = functional.resize(_as_floats(frames), [size], antialias=False)
    top, left = (int(rng.integers(side - size + 1)) for side in clip.shape[-2:])
    return clip[..., top : top + size, left : left + size]


def _as_floats(frames: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(frames), "t h w c -> c t h w").float() / 255


def _with_mirror(clip: Tensor) -> Tensor:
    return torch.stack((clip, clip.flip(-1)))


CLIP_TRANSFORMS: dict[str, tuple[int, Callable[[np.ndarray, int, np.random.Generator], Tensor]]] = {
    # name: (A, clips of one window; (frames, size, rng) -> (3, T, S, S), or (A, 3, T, S, S) where A > 1)
    "center": (1, lambda frames, size, rng: center_clip(frames, size)),
    "random": (1, random_clip),
    "center_flip": (2, lambda frames, size, rng: _with_mirror(center_clip(frames, size))),
}
