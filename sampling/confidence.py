"""Which tokens of a round stay, where more are drawn than enter: the most confident, under noise that dies away.

Sources: MaskGIT (Chang et al. 2022, arXiv:2202.04200, sec. 3.2) and the sampler of TiTok (Yu et al. 2024,
arXiv:2406.07550). Step i of n has the ratio r = (i + 1) / n; its noise has the temperature T (1 - r), none at the end.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from generators.protocol import Prediction

FROZEN = 1e-12  # what a falling temperature ends at: the most probable token is taken
SMALLEST = 1e-20  # of what a logarithm is taken


def gumbel(u: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones in [0, 1)."""
    return -(-u.clamp_min(SMALLEST).log()).clamp_min(SMALLEST).log()


@dataclass(frozen=True)
class Confidence:
    """The default is the bare rule: tokens drawn at the filter's temperature, the most probable stay.

    temperature: T, at least 0. score: what noise is added to, the log_prob of the token drawn, its logit (TiTok), or
    random: nothing, so that the order is uniform over all orders. anneal_tokens: tokens themselves are drawn at
    T (1 - r), beside the filter's temperature. anneal_logits: logits are divided by 0.5 + 0.8 (1 - r) before all this.
    Raises ValueError for a temperature below 0, or an unknown score.
    """

    temperature: float = 0.0
    score: Literal["log_prob", "logit", "random"] = "log_prob"
    anneal_tokens: bool = False
    anneal_logits: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"confidence: temperature is {self.temperature}, must be at least 0")
        if self.score not in ("log_prob", "logit", "random"):
            raise ValueError(f"confidence: score is {self.score!r}, must be log_prob, logit or random")

    def falling(self, prediction: Prediction) -> Tensor:
        """T (1 - r) at each position, float64 (B, m)."""
        return self.temperature * left(prediction)

    def sharpened(self, prediction: Prediction, logits: Tensor) -> Tensor:
        """Guided logits (B, m, V) as the whole round reads them."""
        if not self.anneal_logits:
            return logits
        return logits / (0.5 + 0.8 * left(prediction)).to(logits.dtype)[..., None]

    def tempered(self, prediction: Prediction, logits: Tensor) -> Tensor:
        """Sharpened logits (B, m, V) as tokens are drawn from."""
        if not self.anneal_tokens:
            return logits
        return logits / self.falling(prediction).clamp_min(FROZEN).to(logits.dtype)[..., None]


def left(prediction: Prediction) -> Tensor:
    """1 - r at each position, float64 (B, m)."""
    return 1 - (prediction.index.to(torch.float64) + 1) / prediction.total
