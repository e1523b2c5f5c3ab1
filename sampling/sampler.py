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
from sampling.confidence import Confidence, gumbel
from sampling.filters import Filter
from sampling.guidance import Guidance, mix
from sampling.smooth import Smooth, smooth_law

REDRAWN = 2**16  # parts of a token, of one round: the noise of the next begins there


def inverse_cdf(probs: Tensor, u: Tensor) -> Tensor:
    """probs (..., V) float64, any positive sum; u (...) in [0, 1) -> int64 (...): the first token whose cumulative mass
    exceeds u. A token of no mass is never drawn."""
    cdf = probs.cumsum(-1)
    aim = u[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, aim, right=True).squeeze(-1).clamp_max(probs.shape[-1] - 1)


@lru_cache(maxsize=64)
def _scales(guidance: Guidance, total: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The schedule as a tensor on the device: copied there once, not at every step."""
    if guidance.values and len(guidance.values) != total:
        raise ValueError(f"guidance.values has {len(guidance.values)} entries, this decoding has {total} steps")
    return guidance.scales(total).to(device, dtype)


@lru_cache(maxsize=64)
def _temperatures(values: tuple[float, ...], total: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if len(values) != total:
        raise ValueError(f"temperatures has {len(values)} entries, this decoding has {total} steps")
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    filter: temperature and truncation, in one family's order of operations. guidance: scale, schedule and mix.
    greedy: take the most probable token of the guided law instead of drawing. temperatures: one for each step of the
    guidance schedule (each grid of a pyramid), beside the filter's; none: 1 throughout. smooth: feed the generator on
    soft codes beside the tokens drawn, where it can; pictures then come from what it fed on, `state.memory`.
    confidence: which tokens stay, where a generator draws more of them than enter. rounds, reveal: how many rounds such
    a generator takes, and by what schedule (generators.masked.SCHEDULES); None: its own.
    Raises ValueError for a temperature that is not above 0.
    """

    filter: Filter = field(default_factory=Filter)
    guidance: Guidance = field(default_factory=Guidance)
    greedy: bool = False
    temperatures: tuple[float, ...] = ()
    smooth: Smooth | None = None
    confidence: Confidence = field(default_factory=Confidence)
    rounds: int | None = None
    reveal: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if any(not value > 0 for value in self.temperatures):
            raise ValueError(f"temperatures are {self.temperatures}, must be above 0")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "Sampler":
        """From plain values, as the section `sampler` of a configuration keeps them."""
        smooth = values.get("smooth")
        return cls(
            Filter(**values["filter"]),
            Guidance(**values["guidance"]),
            values["greedy"],
            values.get("temperatures", ()),
            None if smooth is None else Smooth(**smooth),
            Confidence(**values.get("confidence", {})),
            values.get("rounds"),
            values.get("reveal"),
        )

    def draw(self, prediction: Prediction, noise: Noise, round: int) -> "SamplerDraw":
        return SamplerDraw(self, prediction, noise, round)

    def guide(self, prediction: Prediction, rows: Tensor) -> Tensor:
        """rows (R, B, m, ...) -> (B, m, ...): the scale of each position follows its place on the schedule."""
        if len(rows) == 1:
            return rows[0]
        scales = _scales(self.guidance, prediction.total, rows.device, rows.dtype)[prediction.index]
        return mix(rows[0], rows[1], scales, self.guidance.rule)

    def tempered(self, prediction: Prediction, logits: Tensor) -> Tensor:
        """Guided, sharpened logits (B, m, V) over the temperature of each position's step."""
        logits = self.confidence.tempered(prediction, logits)
        if not self.temperatures:
            return logits
        values = _temperatures(self.temperatures, prediction.total, logits.device, logits.dtype)
        return logits / values[prediction.index][..., None]

    def law(self, logits: Tensor) -> Tensor:
        """Guided logits (..., V) -> filtered probabilities (..., V), float64."""
        return self.filter(logits).double().softmax(-1)

    def probs(self, prediction: Prediction) -> Tensor:
        """The guided, filtered law (B, m, V) that acceptance rules call p. Raises ValueError without a categorical head."""
        if not isinstance(prediction.head, Categorical):
            raise ValueError(f"probs: {type(prediction.head).__name__} has no law over a vocabulary")
        guided = self.guide(prediction, prediction.head.logits(prediction.z))
        return self.law(self.tempered(prediction, self.confidence.sharpened(prediction, guided)))


class SamplerDraw:
    """All that one prediction's head may ask. See heads.protocol.Draw."""

    def __init__(self, sampler: Sampler, prediction: Prediction, noise: Noise, round: int) -> None:
        self.sampler, self.prediction, self.noise, self.round = sampler, prediction, noise, round
        self.temperature = sampler.filter.temperature
        self.score: Tensor | None = None
        self.soft: Tensor | None = None  # (B, m, V) weights of the codes, where the sampler is smooth
        self.logit: Tensor | None = None  # (B, m) of the tokens drawn last

    def mix(self, rows: Tensor, part: int = 0) -> Tensor:
        return self.sampler.guide(self.prediction, rows)

    def token(self, logits: Tensor, part: int = 0) -> Tensor:
        guided = self.sampler.confidence.sharpened(self.prediction, self.mix(logits, part))
        if self.sampler.greedy:
            token = guided.argmax(-1)
        else:
            filtered = self.sampler.filter(self.sampler.tempered(self.prediction, guided))
            token = self.pick(filtered.double().softmax(-1), part)
            if self.sampler.smooth is not None:
                self.soft = self._soften(filtered)
        self.logit = guided.gather(-1, token[..., None]).squeeze(-1)
        self.score = self.logit - guided.logsumexp(-1)
        return token

    def pick(self, law: Tensor, part: int) -> Tensor:
        """law (B, m, V) -> (B, m). A place that this round may leave open has other noise in the next one."""
        if self.prediction.keep < law.shape[1]:
            part += REDRAWN * (self.round + 1)
        return inverse_cdf(law, self.noise.uniform("token", self.prediction.positions, part))

    def _soften(self, filtered: Tensor) -> Tensor:
        u = self.noise.uniform("smooth", self.prediction.positions, size=(filtered.shape[-1],))
        gumbel = -(-torch.log1p(-u)).log().to(filtered.dtype)  # minus the log of an exponential
        ratio = self.round / max(self.prediction.total - 1, 1)
        return smooth_law(filtered, gumbel, ratio, self.sampler.smooth)

    def normal(self, size: tuple[int, ...], part: int = 0) -> Tensor:
        return self.noise.normal("head", self.prediction.positions, part, size)

    def keep(self, prediction: Prediction) -> Tensor | None:
        """Which of the drawn tokens enter: all of them (None), or the `prediction.keep` of most confidence, ties by index."""
        m = prediction.positions.shape[1]
        if prediction.keep >= m:
            return None
        u = self.noise.uniform("confidence", prediction.positions, self.round)
        how = self.sampler.confidence
        if how.score == "random":
            confidence = u
        else:
            score = self.logit if how.score == "logit" else self.score
            confidence = score + how.falling(prediction) * gumbel(u)
        order = confidence.argsort(dim=-1, descending=True, stable=True)[:, : prediction.keep]
        return torch.zeros_like(prediction.positions, dtype=torch.bool).scatter_(1, order, True)
