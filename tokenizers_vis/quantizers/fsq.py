"""Finite scalar quantisation: every channel is bounded and rounded to one of a few levels. No codebook, no losses.

Source: Mentzer et al. 2023, FSQ (arXiv:2309.15505, sec. 3). The bound of even levels is shifted by atanh, as in the
published FSQ tokenizers; the listing in the paper has tan, which gives other codes for about 1 vector in 150.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tokenizers_vis.quantizers.protocol import Quantized, Quantizer, straight_through

SLACK = 1e-3  # the bound reaches a little beyond the outermost levels


class FSQ(Quantizer):
    """levels: L_i per channel, each at least 3; V is their product. Codes lie on a grid in [-1, 1]^D.

    ids: the level of the first channel varies fastest. The gradient passes straight through the rounding, and through
    the bound (tanh) as it is. Raises ValueError for fewer levels: the shifted bound saturates at 2.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if min(levels) < 3:
            raise ValueError(f"FSQ: levels are {list(levels)}, each must be at least 3; for 2 there is LFQ")
        self.dim, self.vocab_size = len(levels), prod(levels)
        sizes = torch.tensor(levels)
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("strides", torch.tensor([prod(levels[:i]) for i in range(self.dim)]), persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        half = self.sizes // 2
        return ((ids[..., None] // self.strides % self.sizes) - half) / half

    def codebook(self) -> Tensor:
        return self.embed(torch.arange(self.vocab_size, device=self.sizes.device))

    def _bounded(self, z: Tensor) -> Tensor:
        """Each channel into the interval that rounds to its L levels, -(L // 2) ... (L - 1) // 2."""
        reach = (self.sizes - 1) * (1 + SLACK) / 2
        offset = (self.sizes % 2 == 0) * 0.5
        return (z + (offset / reach).atanh()).tanh() * reach - offset

    def _ids(self, level: Tensor) -> Tensor:
        return ((level.long() + self.sizes // 2) * self.strides).sum(-1)

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        return self._ids(self._bounded(z).round())

    def _quantize(self, z: Tensor) -> Quantized:
        bounded = self._bounded(z)
        level, half = bounded.detach().round(), self.sizes // 2
        return Quantized(straight_through(bounded / half, level / half), self._ids(level), {})
