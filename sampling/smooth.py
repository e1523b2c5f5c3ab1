"""Soft codes in place of drawn tokens: what a next-scale generator feeds on may be a mean over the codebook.

Source: VAR's `more_smooth` (Tian et al. 2024, arXiv:2404.02905, its released sampler), a Gumbel softmax (Jang et al.
2017, arXiv:1611.01144) that sharpens from scale to scale. Pictures to look at only: no published number is made so.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Smooth:
    """Temperature of the Gumbel softmax at a share r of the scales: max(start (1 - decay r), floor).

    sharpen: logits are times 1 + sharpen r. Raises ValueError for a temperature that would be 0 or less.
    """

    start: float = 0.27
    decay: float = 0.95
    floor: float = 0.005
    sharpen: float = 1.0

    def __post_init__(self) -> None:
        if self.floor <= 0 or self.start <= 0:
            raise ValueError(f"Smooth: start is {self.start}, floor is {self.floor}; both must be above 0")

    def temperature(self, ratio: float) -> float:
        return max(self.start * (1 - self.decay * ratio), self.floor)


def smooth_law(logits: Tensor, gumbel: Tensor, ratio: float, smooth: Smooth = Smooth()) -> Tensor:
    """logits (..., V), filtered (dropped ones at -inf); gumbel (..., V) noise; ratio in [0, 1]: scale k / (K - 1).

    -> (..., V): the weights of the codes, summing to 1.
    """
    return ((logits * (1 + smooth.sharpen * ratio) + gumbel) / smooth.temperature(ratio)).softmax(-1)
