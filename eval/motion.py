"""How something bright moves over a dark ground: its centre of brightness from frame to frame, in pixels.

Two sets of clips, seen by the same estimator, move alike where these numbers have one law; scipy.stats.ks_2samp asks that
of one number a clip, for the frames of a clip are not independent.

Axes: B clips, T frames.
"""

import torch
from torch import Tensor

DARK = 0.25  # of full brightness: what is below is the haze of a decoder


def centres(clips: Tensor, dark: float = DARK) -> Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] -> float64 (B, T, 2): the mean place (y, x) of brightness above `dark`.

    A frame without any has its centre in the middle. Raises ValueError for another shape.
    """
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(f"centres: clips are {tuple(clips.shape)}, must be (B, 3, T, H, W)")
    light = ((clips.double().mean(1) + 1) / 2 - dark).clamp_min(0)  # (B, T, H, W)
    mass = light.sum((-2, -1))
    height, width = light.shape[-2:]
    down, across = (torch.arange(size, dtype=torch.float64, device=clips.device) for size in (height, width))
    found = torch.stack((light.sum(-1) @ down, light.sum(-2) @ across), -1) / mass[..., None]
    middle = found.new_tensor([(height - 1) / 2, (width - 1) / 2])
    return torch.where(mass[..., None] > 0, found, middle)


def displacement(clips: Tensor, dark: float = DARK) -> Tensor:
    """(B, 3, T, H, W) -> float64 (B,): how far the centre moves between two frames, mean over those of a clip."""
    return centres(clips, dark).diff(dim=1).norm(dim=-1).mean(1)


def unevenness(clips: Tensor, dark: float = DARK) -> Tensor:
    """(B, 3, T, H, W) -> float64 (B,): how much the movement changes from one frame to the next, mean over a clip.

    0 for steady flight along a line; it grows with jitter, jumps, and bounces.
    """
    return centres(clips, dark).diff(n=2, dim=1).norm(dim=-1).mean(1)
