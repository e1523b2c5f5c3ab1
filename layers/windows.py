"""Attention in a window around each cell of a raster grid, whose cost is linear in the number of cells.

Source: Neighborhood Attention (Hassani et al. 2023, arXiv:2204.07143): a window is always window x window cells; at the
border of the grid it is shifted inward, neither cut nor padded.

Letters: b rows, h heads, l = height * width cells in raster order, d channels of a head, t tiles of q queries that read
n keys each. A mask is bool, True where a query may look.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def check_window(height: int, width: int, window: int) -> None:
    """Raises ValueError for an even window, and for a grid that is smaller than it."""
    if window % 2 == 0 or window < 1 or min(height, width) < window:
        raise ValueError(f"window is {window}: must be odd, and no larger than the grid of {height} x {width} cells")


def starts(length: int, window: int) -> Tensor:
    """On an axis of `length` cells, where the window of each begins, int64 (length,)."""
    return (torch.arange(length) - window // 2).clamp(0, length - window)


def neighbourhood_mask(height: int, width: int, window: int) -> Tensor:
    """bool (l, l): whom each cell sees, `window` squared of them. Raises ValueError as `check_window`."""
    check_window(height, width, window)
    near = []
    for length in (height, width):
        begin, cell = starts(length, window)[:, None], torch.arange(length)[None]
        near.append((begin <= cell) & (cell < begin + window))
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).reshape(height * width, height * width)


@lru_cache(maxsize=64)
def tiling(height: int, width: int, window: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The grid cut into tiles of about window x window cells, each with all the keys that its cells see.

    queries int64 (t, q), keys int64 (t, n): cells; mask bool (t, q, n); place int64 (l,): where each cell stands in
    the flattened (t, q) (a cell may be in two tiles). None where the dense mask costs less than twice as many products:
    it is faster there.
    """
    axes = []
    for length in (height, width):
        tile = min(length, window + 1)
        halo = min(length, tile + window - 1)
        first = torch.arange(0, length, tile).clamp_max(length - tile)  # the last tile may overlap the one before
        begin = (first - window // 2).clamp(0, length - halo)
        cell, key = first[:, None] + torch.arange(tile), begin[:, None] + torch.arange(halo)  # (tiles, tile or halo)
        start = starts(length, window)[cell][..., None]
        near = (start <= key[:, None]) & (key[:, None] < start + window)  # (tiles, tile, halo)
        of = torch.arange(length) // tile
        axes.append((cell, key, near, of, torch.arange(length) - first[of]))
    (row, key_row, near_row, of_row, at_row), (col, key_col, near_col, of_col, at_col) = axes
    queries = (row[:, None, :, None] * width + col[None, :, None]).flatten(2).flatten(0, 1)
    keys = (key_row[:, None, :, None] * width + key_col[None, :, None]).flatten(2).flatten(0, 1)
    if 2 * queries.numel() * keys.shape[1] >= (height * width) ** 2:
        return None
    mask = near_row[:, None, :, None, :, None] & near_col[None, :, None, :, None, :]
    mask = mask.flatten(4).flatten(2, 3).flatten(0, 1)
    tile = of_row[:, None] * len(col) + of_col
    place = tile * queries.shape[1] + at_row[:, None] * col.shape[1] + at_col
    return tuple(part.to(device) for part in (queries, keys, mask, place.flatten()))


@lru_cache(maxsize=64)
def _dense(height: int, width: int, window: int, device: torch.device) -> Tensor:
    return neighbourhood_mask(height, width, window).to(device)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: tuple[int, int],
    window: int,
    scale: float | None = None,
    dropout_p: float = 0,
) -> Tensor:
    """q, k, v (b, h, l, d) over a grid of size (height, width) -> (b, h, l, d): each cell reads its window.

    Through the dense mask where the grid is so small that this is faster. Raises ValueError as `check_window`.
    """
    check_window(*size, window)
    tiles = tiling(*size, window, q.device)
    if tiles is None:
        mask = _dense(*size, window, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout_p)
    queries, keys, mask, place = tiles
    flat = [part.flatten(0, 1) for part in (q, k, v)]  # (b h, l, d)
    cut = [part[:, cells] for part, cells in zip(flat, (queries, keys, keys), strict=True)]  # (b h, t, q or n, d)
    y = F.scaled_dot_product_attention(*cut, attn_mask=mask[None], scale=scale, dropout_p=dropout_p)
    return y.flatten(1, 2)[:, place].unflatten(0, q.shape[:2])
