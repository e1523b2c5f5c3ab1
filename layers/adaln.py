"""Adaptive layer norm: a condition scales, shifts and gates what a block does.

Source: DiT (Peebles & Xie 2023, arXiv:2212.09748, sec. 3.2, adaLN-Zero); one projection shared by all blocks:
PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, adaLN-single), VAR-d36 (Tian et al. 2024, arXiv:2404.02905). Every
family stores its chunks in an order of its own, so a block names them where it unpacks them:

    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)
    x = x + gate_1 * self.attention(modulate(self.norm_1(x), scale_1, shift_1))
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (B, L, D) times (1 + scale) plus shift, each (B, 1, D) or (B, L, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class Modulation(nn.Module):
    """A condition, through SiLU and one linear layer, as `parts` tensors of the block's width.

    condition (B, C), one a sample -> (parts, B, 1, dim); (B, L, C), one a token -> (parts, B, L, dim).
    Starts at zero: gates closed, so that a residual block is the identity.
    """

    def __init__(self, condition_dim: int, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.project = nn.Linear(condition_dim, parts * dim)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, condition: Tensor) -> Tensor:
        chunks = self.project(functional.silu(condition))
        if chunks.dim() == 2:
            chunks = chunks[:, None]
        return rearrange(chunks, "b l (part d) -> part b l d", part=self.parts)


class SharedModulation(nn.Module):
    """A block's own offset on the output of one `Modulation` that all blocks share.

    shared (parts, B, L or 1, dim) -> the same shape. It stands where a block's own `Modulation` would; starts at zero.
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(parts, dim))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.offset[:, None, None]
