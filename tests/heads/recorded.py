"""A Draw that plays back recorded noise and guides with one scale."""

from collections.abc import Callable

import torch
from torch import Tensor


class Recorded:
    """normal: noise (B, m, *size) by part; scale: of the standard mix of two branches; u: of the inverse distribution
    function of tokens, (B, m)."""

    score = None

    def __init__(
        self,
        normal: Callable[[int], Tensor],
        scale: float = 1.0,
        temperature: float = 1.0,
        u: Tensor | None = None,
    ) -> None:
        self.recorded, self.scale, self.temperature, self.u = normal, scale, temperature, u
        self.parts: list[int] = []  # of the mixes, in order

    def mix(self, rows: Tensor, part: int = 0) -> Tensor:
        self.parts.append(part)
        return rows[0] if len(rows) == 1 else rows[1] + self.scale * (rows[0] - rows[1])

    def token(self, logits: Tensor, part: int = 0) -> Tensor:
        law = (self.mix(logits) / self.temperature).double().softmax(-1).cumsum(-1)
        return torch.searchsorted(law, self.u[..., None]).squeeze(-1).clamp_max(law.shape[-1] - 1)

    def normal(self, size: tuple[int, ...], part: int = 0) -> Tensor:
        noise = self.recorded(part)
        assert noise.shape[2:] == size
        return noise
