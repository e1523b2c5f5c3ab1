"""Rotary positions over any number of axes, as tables of (cos, sin) that are looked up by slot.

Source: RoPE (Su et al. 2021, arXiv:2104.09864, sec. 3.2). The D/2 channel pairs of a head are shared out evenly over the
axes, first axis first; pair i of the m of an axis turns by place * theta^(-i/m). Pairs are interleaved: (2j, 2j + 1).
"""

import torch
from torch import Tensor

from layers.spec import Grid, Layout


def rotary_table(places: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """places (l, axes), in cells -> (l, D/2, 2) cos and sin, float32.

    Raises ValueError when the channel pairs cannot be shared out evenly.
    """
    axes = places.shape[-1]
    if head_dim % (2 * axes):
        raise ValueError(f"rotary_table: head_dim is {head_dim}, must be a multiple of {2 * axes} for {axes} axes")
    pairs = head_dim // 2 // axes
    ladder = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)  # (m,) rad per cell
    angle = (places.float()[..., None] * ladder).flatten(-2)  # (l, D/2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def layout_places(layout: Layout) -> Tensor:
    """Where each token of a layout lies, int64 (l, axes): a Grid by row and column (frame first when t > 1), others in order.

    Raises ValueError for a Pyramid, whose families place scales in their own ways.
    """
    match layout:
        case Grid(t, h, w):
            axes = (torch.arange(t), torch.arange(h), torch.arange(w)) if t > 1 else (torch.arange(h), torch.arange(w))
            return torch.cartesian_prod(*axes)
        case _ if hasattr(layout, "sizes"):
            raise ValueError(f"layout_places: {layout} has no single axis system")
        case _:
            return torch.arange(layout.length)[:, None]


def with_zero_slots(table: Tensor, slots: int) -> Tensor:
    """Put `slots` rows of cos = sin = 0 in front: queries and keys there become zero, so that such a slot looks evenly at
    all it may see, and is seen with logit 0. The condition slots of the LlamaGen family (arXiv:2406.06525) are so."""
    return torch.cat((table.new_zeros(slots, *table.shape[1:]), table))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (b, l, h, D), table (l, D/2, 2) or (b, l, D/2, 2) -> x turned, computed in float32 at least, in the dtype of x."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = table.unsqueeze(-3).unbind(-1)  # (..., l, 1, D/2)
    a, b = pairs.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)
