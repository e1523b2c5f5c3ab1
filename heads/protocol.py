"""What a head is asked, and what it may ask while it draws."""

from abc import ABC, abstractmethod
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


class Head(nn.Module, ABC):
    """From a hidden state to a token. Constructors take (width, spec) first: the generator calls them so."""

    @abstractmethod
    def loss(self, z: Tensor, target: Tensor, **given: Any) -> Tensor:
        """z (B, L, D), target (B, L) or (B, L, C) -> (B, L)."""

    @abstractmethod
    def sample(self, z: Tensor, draw: Draw, **extra: Any) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m) or (B, m, C)."""
