"""Self-attention through SDPA, its masks, and a static key/value cache that the caller owns.

Letters: b rows, l new positions, s cache slots or keys, h heads, g key/value heads, d channels of a head.
A mask is bool, True where a query may look.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from layers.rotary import rotate


@dataclass
class KVCache:
    """Keys and values (b, s, g, d) of one layer, allocated once. A slot holds what was written to it last."""

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, rows: int, slots: int, kv_heads: int, head_dim: int, like: Tensor) -> "KVCache":
        empty = like.new_zeros(rows, slots, kv_heads, head_dim)
        return cls(empty, torch.zeros_like(empty))

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """slots int64 (b, l), each row its own; keys, values (b, l, g, d)."""
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[rows, slots] = keys
        self.values[rows, slots] = values

    def write_from(self, start: int, keys: Tensor, values: Tensor) -> None:
        """keys, values (b, l, g, d) to the l slots from `start` on, the same in every row."""
        self.keys[:, start : start + keys.shape[1]] = keys
        self.values[:, start : start + values.shape[1]] = values

    def move(self, source: Tensor, target: Tensor) -> None:
        """What the slots `source` hold goes to the slots `target`, int64 (b, l) each."""
        rows = torch.arange(len(source), device=source.device)[:, None]
        self.write(target, self.keys[rows, source], self.values[rows, source])


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection (rows: queries, keys, values, each head-major).

    Source: Vaswani et al. 2017 (arXiv:1706.03762, sec. 3.2); kv_heads < heads: grouped queries (arXiv:2305.13245).
    Raises ValueError when heads does not divide dim, or kv_heads does not divide heads.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, bias: bool = False) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or heads % kv_heads:
            raise ValueError(f"Attention: heads={heads} must divide dim={dim}, kv_heads={kv_heads} must divide heads")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        """x (b, l, c); rotary (1 or b, l, d/2, 2) cos and sin; mask broadcast to (b, h, l, s) -> (b, l, c).

        With a cache the new keys go to `slots` and the queries look at the first `span` slots, as `mask` allows.
        """
        q, k, v = self.qkv(x).split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k, v = (rearrange(part, "b l (h d) -> b l h d", d=self.head_dim) for part in (q, k, v))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            cache.write(slots, k, v)
            k, v = cache.keys[:, :span], cache.values[:, :span]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (b, h, l, d), (b, g, s, d)
        grouped = self.kv_heads != self.heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


def causal_mask(queries: Tensor, span: int) -> Tensor:
    """queries int64 (..., l): the slot each query stands in -> bool (..., l, span), True up to its own slot."""
    return torch.arange(span, device=queries.device) <= queries[..., None]


def ancestor_mask(parents: Tensor) -> Tensor:
    """parents int64 (..., N) of the nodes of a tree, -1 of its root -> bool (..., N, N): node i may look at node j, an
    ancestor or itself."""
    nodes = parents.shape[-1]
    own = torch.eye(nodes, device=parents.device)
    reach = own + F.one_hot(parents + 1, nodes + 1)[..., 1:]
    for _ in range(ceil(log2(max(nodes, 2)))):  # reach of twice as many generations each time
        reach = (reach @ reach).clamp_max(1)
    return reach > 0


def tree_mask(first: Tensor, family: Tensor, span: int) -> Tensor:
    """first int64 (b,): the slot of node 0, the others follow it; family bool (1 or b, N, N) of `ancestor_mask` -> bool
    (b, N, span): a node looks at all slots before the tree, and within it at its family."""
    nodes = family.shape[-1]
    offset = torch.arange(span, device=first.device) - first[:, None]  # (b, span)
    own = offset.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1)
    related = family.expand(len(first), -1, -1).gather(2, own)
    return (offset < 0)[:, None] | related & (offset >= 0)[:, None] & (offset < nodes)[:, None]


def block_causal_mask(sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Blocks of `sizes` positions see themselves and all earlier blocks -> bool (l, l)."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)  # (l,)
    return block[None] <= block[:, None]


def window_mask(height: int, width: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """On a raster grid a cell sees the window x window cells around it, cut at the border -> bool (hw, hw).

    Raises ValueError for an even window, which has no centre.
    """
    if window % 2 == 0:
        raise ValueError(f"window_mask: window is {window}, must be odd")
    row = torch.arange(height * width, device=device) // width
    column = torch.arange(height * width, device=device) % width
    near = [(axis[:, None] - axis[None]).abs() <= window // 2 for axis in (row, column)]
    return near[0] & near[1]
