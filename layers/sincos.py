"""Fixed sine and cosine positions: one axis, a grid of rows and columns, frames of such grids.

Source: Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; in two dimensions as MAE (He et al. 2022, arXiv:2111.06377)
lays them out. Channel pair i of the m = D/2 of an axis turns by place * period^(-i/m), in radians. Tables are computed
in float64 and rounded once, as MAE and LARP do.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from layers.spec import Grid


def sincos(
    place: Tensor,
    dim: int,
    period: float = 10_000.0,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """place (...), any numbers -> (..., dim), by default all sines, then all cosines.

    interleaved: sine at even and cosine at odd channels, the layout of the original transformer.
    Raises ValueError for an odd dim.
    """
    if dim % 2:
        raise ValueError(f"sincos: dim is {dim}, must be even (pairs of sine and cosine)")
    ladder = period ** -(torch.arange(dim // 2, dtype=torch.float64, device=place.device) / (dim // 2))
    angle = place.double()[..., None] * ladder  # (..., D/2)
    pairs = torch.stack((angle.sin(), angle.cos()), dim=-1).to(dtype)
    return rearrange(pairs, "... i trig -> ... (i trig)" if interleaved else "... i trig -> ... (trig i)")


def sincos_2d(
    h: int,
    w: int,
    dim: int,
    period: float = 10_000.0,
    column_first: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(h w, dim), cells in raster order: half the channels follow one axis, half the other.

    column_first: the column takes the first half (MAE and most after it), or else the row (FlexTok).
    Raises ValueError when dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_2d: dim is {dim}, must be a multiple of 4 (2 axes x pairs of sine and cosine)")
    row = repeat(sincos(torch.arange(h), dim // 2, period, dtype=dtype), "h d -> (h w) d", w=w)
    column = repeat(sincos(torch.arange(w), dim // 2, period, dtype=dtype), "w d -> (h w) d", h=h)
    return torch.cat((column, row) if column_first else (row, column), dim=-1)


def sincos_3d(grid: Grid, dim: int, period: float = 10_000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(t h w, dim): the table of the cell in its frame plus that of the frame, each over all channels.

    Source: LARP (Wang et al. 2024, arXiv:2410.21264). Raises ValueError when dim is not a multiple of 4.
    """
    cell = sincos_2d(grid.h, grid.w, dim, period, dtype=torch.float64)
    frame = sincos(torch.arange(grid.t), dim, period, dtype=torch.float64)
    return rearrange(frame[:, None] + cell, "t cell d -> (t cell) d").to(dtype)
