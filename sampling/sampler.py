"""The sampler: guidance, filters and one uniform a token, made into the Draw that a head asks.

A token is drawn by inverse CDF of the guided, filtered law in float64, from the uniform that belongs to (seed, sample,
position): whatever the batch, the token of a sample is the same as long as its law is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from generators.protocol import Prediction
from heads.categorical import Categorical
from layers.noise import Noise
from sampling.filters import Filter
from sampling.guidance import Guidance, mix


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """probs (..., V) float64, any positive sum; u (...) in [0, 1) -> int64 (...): the first token whose cumulative mass
    exceeds u. A token of no mass is never drawn."""
    cdf = probs.cumsum(-1)
    aim = u[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, aim, right=True).squeeze(-1).clamp_max(probs.shape[-1] - 1)


@lru_cache(maxsize=64)
def _scales(guidance: Guidance, total: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The schedule as a tensor on the device: copied there once, not at every step."""
    return guidance.scales(total).to(device, dtype)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    filter: temperature and truncation, in one family's order of operations. guidance: scale, schedule and mix.
    greedy: take the most probable token of the guided law instead of drawing.
    """

    filter: Filter = field(default_factory=Filter)
    guidance: Guidance = field(default_factory=Guidance)
    greedy: bool = False

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Sampler":
        """From plain values, as the section `sampler` of a configuration keeps them."""
        return cls(Filter(**values["filter"]), Guidance(**values["guidance"]), values["greedy"])

    def draw(self, prediction: Prediction, noise: Noise, round: int) -> "SamplerDraw":
        return SamplerDraw(self, prediction, noise, round)

    def guide(self, prediction: Prediction, rows: Tensor) -> Tensor:
        """rows (R, B, m, ...) -> (B, m, ...): the scale of each position follows its place on the schedule."""
        if len(rows) == 1:
            return rows[0]
        scales = _scales(self.guidance, prediction.total, rows.device, rows.dtype)[prediction.index]
        return mix(rows[0], rows[1], scales, self.guidance.rule)

    def law(self, logits: Tensor) -> Tensor:
        """Guided logits (..., V) -> filtered probabilities (..., V), float64."""
        return self.filter(logits).double().softmax(-1)

    def probs(self, prediction: Prediction) -> Tensor:
        """The guided, filtered law (B, m, V) that acceptance rules call p. Raises ValueError without a categorical head."""
        if not isinstance(prediction.head, Categorical):
            raise ValueError(f"probs: {type(prediction.head).__name__} has no law over a vocabulary")
        return self.law(self.guide(prediction, prediction.head.logits(prediction.z)))


class SamplerDraw:
    """All that one prediction's head may ask. See heads.protocol.Draw."""

    def __init__(self, sampler: Sampler, prediction: Prediction, noise: Noise, round: int) -> None:
        self.sampler, self.prediction, self.noise, self.round = sampler, prediction, noise, round
        self.temperature = sampler.filter.temperature
        self.score: Tensor | None = None

    def mix(self, rows: Tensor, part: int = 0) -> Tensor:
        return self.sampler.guide(self.prediction, rows)

    def token(self, logits: Tensor, part: int = 0) -> Tensor:
        guided = self.mix(logits, part)
        if self.sampler.greedy:
            token = guided.argmax(-1)
        else:
            u = self.noise.uniform("token", self.prediction.positions, part)
            token = inverse_cdf(self.sampler.law(guided), u)
        self.score = guided.log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)
        return token

    def normal(self, size: tuple[int, ...], part: int = 0) -> Tensor:
        return self.noise.normal("head", self.prediction.positions, part, size)

    def keep(self, prediction: Prediction) -> Tensor | None:
        """Which of the drawn tokens enter: all of them (None), or the `prediction.keep` of highest score, ties by index."""
        m = prediction.positions.shape[1]
        if prediction.keep >= m:
            return None
        order = self.score.argsort(dim=-1, descending=True, stable=True)[:, : prediction.keep]
        return torch.zeros_like(self.score, dtype=torch.bool).scatter_(1, order, True)
