"""What a head is asked, and what it may ask while it draws."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Draw(Protocol):
    """Made by the sampler for one prediction: all the randomness and guidance that a head may ask for."""

    temperature: float
    score: Tensor | None  # (B, m) log-probability of the tokens drawn last, under the guided unfiltered law

    def mix(self, rows: Tensor, part: int = 0) -> Tensor:
        """Guidance: rows (R, B, m, ...) -> (B, m, ...)."""
        ...

    def token(self, logits: Tensor, part: int = 0) -> Tensor:
        """logits (R, B, m, V) -> tokens int64 (B, m): mixed, filtered, drawn."""
        ...

    def normal(self, size: tuple[int, ...], part: int = 0) -> Tensor:
        """Standard normal noise (B, m, *size)."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """Tokens drawn by a chain of Gaussian steps, and the law of the last of them: (B, m, C) each.

    mean, std: of the last step (std includes the temperature); logstd_sum: the log standard deviations of all steps before
    it, summed, without the temperature. Two models fed the same noise compare their densities by these.
    """

    sample: Tensor
    mean: Tensor
    std: Tensor
    logstd_sum: Tensor


class Head(nn.Module, ABC):
    """From a hidden state to a token. Constructors take (width, spec) first: the generator calls them so.

    states: how many hidden states it reads of a position; more than one come as z (..., states, D).
    """

    states: int = 1

    @abstractmethod
    def loss(self, z: Tensor, target: Tensor, **given: Any) -> Tensor:
        """z (B, L, D), target (B, L) or (B, L, C) -> (B, L)."""

    @abstractmethod
    def sample(self, z: Tensor, draw: Draw, **extra: Any) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m) or (B, m, C)."""
