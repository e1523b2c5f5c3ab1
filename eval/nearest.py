"""The nearest pictures of a training set to given ones: whether a generator copies what it was shown."""

from collections.abc import Iterable

import torch
from torch import Tensor


def nearest(queries: Tensor, bank: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of the bank nearest to each query in Euclidean distance, nearest first, ties by lower index.

    queries (Q, ...), pictures or features, float; bank: blocks (B, ...) of the same kind, in order. Differences are
    squared as such, not through a matrix product, so an exact copy has distance 0.
    Returns distance (Q, count) and index int64 (Q, count), counted over all blocks.
    Raises ValueError for rows of another shape and for a bank of fewer than `count` rows.
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    seen = 0
    for block in bank:
        if block.shape[1:] != queries.shape[1:]:
            raise ValueError(f"nearest: queries {tuple(queries.shape[1:])}, but the bank has {tuple(block.shape[1:])}")
        distance = torch.cdist(
            queries.flatten(1), block.to(queries).flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )  # (Q, B)
        places = torch.arange(seen, seen + len(block), device=queries.device).expand(len(queries), -1)
        best, order = torch.cat((best, distance), dim=1).sort(dim=1, stable=True)
        index = torch.cat((index, places), dim=1).gather(1, order)[:, :count]
        best = best[:, :count]
        seen += len(block)
    if seen < count:
        raise ValueError(f"nearest: {count} neighbours asked of a bank of {seen}")
    return best, index
