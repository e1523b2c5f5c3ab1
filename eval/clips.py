"""Video clips on their way to the FVD network: which frames are taken, and the preprocessing rules in use, by name.

Axes: b clips, c = 3 channels, t frames. Clips are (b, c, t, H, W), either uint8 or float in [0, 1].
Sources: LARP (arXiv:2410.21264), StyleGAN-V (arXiv:2112.14683), VideoGPT (arXiv:2104.10157), SEED-Voken.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ClipRule:
    """values: floats are "kept", "floored" to uint8 by floor(255 x), or "refused": the protocol's clips are uint8.

    fit: "crop" as `fit_shorter_side` does, "squeeze" as `squeeze` does. All rules end in [-1, 1] by 2 x - 1.
    """

    values: Literal["kept", "floored", "refused"]
    fit: Literal["crop", "squeeze"]

    def __str__(self) -> str:
        floats = {"kept": "floats kept", "floored": "floats to uint8 by floor(255 x)", "refused": "uint8 only"}
        fits = {"crop": "shorter side resized, centre crop", "squeeze": "resized whatever the aspect"}
        return f"{floats[self.values]}, {fits[self.fit]}, bilinear without antialiasing, 2 x - 1"


CLIP_RULES = {
    "larp": ClipRule("kept", "squeeze"),  # LARP, NAR
    "stylegan-v": ClipRule("refused", "squeeze"),
    "common-metrics": ClipRule("kept", "crop"),  # common_metrics_on_video_quality, its "styleganv"
    "videogpt": ClipRule("floored", "crop"),  # VideoGPT, TATS, and common_metrics' "videogpt"
    "seed-voken": ClipRule("floored", "squeeze"),
}


def to_network_input(clips: Tensor, rule: str, size: int = 224) -> Tensor:
    """Clips -> float32 (b, c, t, size, size) in [-1, 1] under CLIP_RULES[rule].

    Raises ValueError for an unknown rule, another type, shape or range than the module states, and floats that the rule
    refuses; NaN is out of range.
    """
    if rule not in CLIP_RULES:
        raise ValueError(f"to_network_input: unknown rule {rule!r}; known: {', '.join(CLIP_RULES)}")
    values, fit = CLIP_RULES[rule].values, CLIP_RULES[rule].fit
    clips = _checked(clips)
    if clips.is_floating_point():
        if values == "refused":
            raise ValueError(f"to_network_input: {rule!r} takes uint8 clips, got {clips.dtype}; round by a stated rule")
        clips = (clips * 255).to(torch.uint8) if values == "floored" else clips.float()
    return (fit_shorter_side(clips, size) if fit == "crop" else squeeze(clips, size)) * 2 - 1


def fit_shorter_side(clips: Tensor, size: int, antialias: bool = False) -> Tensor:
    """Clips -> float32 (b, c, t, size, size) in [0, 1]: shorter side to `size`, the other rounded up, centre crop.

    Bilinear. With antialias at the resolution of the generator this is LARP's reader of real clips. The other side is
    rounded up after floating-point division, as in the published code: 48 of the heights below 600 become 225, not 224.
    """
    clips = _checked(clips)
    height, width = clips.shape[-2:]
    scale = size / min(height, width)
    shape = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return _resized(clips, shape, antialias)[..., top : top + size, left : left + size]


def squeeze(clips: Tensor, size: int) -> Tensor:
    """Clips -> float32 (b, c, t, size, size) in [0, 1], bilinear without antialiasing, the aspect not kept."""
    return _resized(_checked(clips), (size, size), antialias=False)


def _resized(clips: Tensor, shape: tuple[int, int], antialias: bool) -> Tensor:
    scaled = clips.float() / 255 if clips.dtype == torch.uint8 else clips.float()
    frames = rearrange(scaled, "b c t h w -> (b t) c h w")
    frames = F.interpolate(frames, shape, mode="bilinear", align_corners=False, antialias=antialias)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(clips))


def _checked(clips: Tensor) -> Tensor:
    if clips.ndim != 5 or clips.shape[1] != 3 or not (clips.is_floating_point() or clips.dtype == torch.uint8):
        raise ValueError(
            f"expected clips (B, 3, T, H, W), uint8 or float in [0, 1], got {clips.dtype} {tuple(clips.shape)}"
        )
    if clips.is_floating_point():
        outside = ~((clips >= 0) & (clips <= 1)).flatten(1).all(1)
        if outside.any():
            number = int(outside.nonzero()[0])
            low, high = clips[number].aminmax()
            raise ValueError(
                f"clip {number} of {len(clips)} has values from {low:.4g} to {high:.4g}, must lie in [0, 1]; "
                "clamp decoded clips, and bring [-1, 1] there by (x + 1) / 2"
            )
    return clips


class Place(NamedTuple):
    """A clip of a set of videos: the number of the video, and the frames."""

    video: int
    frames: range


def consecutive_clips(frame_counts: Sequence[int], length: int = 16) -> list[Place]:
    """All whole clips that lie end to end in the videos, in the order of the videos: floor(n / length) of each."""
    return [
        Place(video, range(start, start + length))
        for video, count in enumerate(frame_counts)
        for start in range(0, count - length + 1, length)
    ]


def larp_reference(frame_counts: Sequence[int], count: int = 10_000, length: int = 16, seed: int = 42) -> list[Place]:
    """The real clips of LARP's and NAR's generation FVD: `count` of all consecutive clips, without replacement.

    frame_counts: the videos sorted by path. Their classes, in this order, condition the generated clips.
    Raises ValueError where there are fewer clips.
    """
    clips = consecutive_clips(frame_counts, length)
    if len(clips) < count:
        raise ValueError(f"larp_reference: {len(clips)} clips of {length} frames in these videos, {count} wanted")
    return random.Random(seed).sample(clips, count)


def random_windows(
    frame_counts: Sequence[int], rng: random.Random, length: int = 16, stride: int = 1, count: int | None = None
) -> list[Place]:
    """Every stride-th frame from a uniform start: one clip from each of the first `count` videos that are long enough.

    count 2048: the real clips of StyleGAN-V (stride 1 or 8). None, all videos: LARP's reconstruction FVD.
    Raises ValueError where fewer than `count` videos are long enough.
    """
    span = (length - 1) * stride + 1
    long_enough = [video for video, frames in enumerate(frame_counts) if frames >= span][:count]
    if count is not None and len(long_enough) < count:
        raise ValueError(f"random_windows: {len(long_enough)} videos have {span} frames, {count} wanted")
    starts = [rng.randrange(frame_counts[video] - span + 1) for video in long_enough]
    return [Place(video, range(start, start + span, stride)) for video, start in zip(long_enough, starts, strict=True)]


def centre_window(frame_count: int, length: int = 17) -> range:
    """The frames around frame n // 2, as SEED-Voken takes 17 of them. Raises ValueError for a video that is too short."""
    start = frame_count // 2 - length // 2
    if start < 0 or start + length > frame_count:
        raise ValueError(f"centre_window: {length} frames around the middle of a video of {frame_count} do not fit")
    return range(start, start + length)
