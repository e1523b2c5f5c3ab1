"""How a drafted token is tested: the rules that a chain, or a Jacobi window, can be given.

Letters: B samples, n drafts, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from generators.protocol import Generator
from sampling.speculative.acceptance import Verdict, falling_weights, verify_chain
from sampling.speculative.grouped import embedding_distance, rank_windows, verify_grouped
from sampling.speculative.loop import Laws

Exactness = Literal["exact", "bounded", "biased"]


class Rule(Protocol):
    """exactness: of the law of the tokens. exact: it is the target's; bounded: within a stated distance of it; biased: a
    stated one-step law."""

    @property
    def exactness(self) -> Exactness: ...

    def test(self, target: Generator, laws: Laws, q: Tensor, draft: Tensor, u: Tensor) -> Verdict:
        """laws of n + 1 places, q (B, n, V), draft int64 (B, n), u (B, n) uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class Exact:
    """min(1, p / q)."""

    exactness: Exactness = field(default="exact", init=False)

    def test(self, target: Generator, laws: Laws, q: Tensor, draft: Tensor, u: Tensor) -> Verdict:
        return verify_chain(laws.p, q, draft, u)


@dataclass(frozen=True)
class Weighted:
    """min(1, w_i p / q) with w_i = delta exp(-decay i) for draft i = 0, 1, ...: the plain amplified ratio at decay 0,
    Cool-SD's falling weights at its 0.7. Weights do not fall below 1: that would be exact too, and only reject more.

    Raises ValueError for a delta below 1 or a decay below 0.
    """

    delta: float
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.delta < 1 or self.decay < 0:
            raise ValueError(f"Weighted: delta={self.delta} must be at least 1, decay={self.decay} at least 0")

    @property
    def exactness(self) -> Exactness:
        return "exact" if self.delta == 1 else "biased"

    def weights(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """float64 (n,)."""
        return falling_weights(n, self.delta, self.decay, device=device).clamp_min(1)

    def test(self, target: Generator, laws: Laws, q: Tensor, draft: Tensor, u: Tensor) -> Verdict:
        return verify_chain(laws.p, q, draft, u, self.weights(draft.shape[1], q.device))


@dataclass(frozen=True)
class Grouped:
    """GSD: the ratio of the masses of a window of ranks around the draft. half: tokens below it, half - 1 above; p_near:
    how far from its probability; d_near: how far from its row in the target's table of embeddings, squared (None: however
    far). The published value of d_near, 0.5, belongs to one model."""

    half: int = 7
    p_near: float = 0.15
    d_near: float | None = None

    @property
    def exactness(self) -> Exactness:
        return "biased"

    def test(self, target: Generator, laws: Laws, q: Tensor, draft: Tensor, u: Tensor) -> Verdict:
        distance = None if self.d_near is None else embedding_distance(target.embed.weight)
        near = torch.inf if self.d_near is None else self.d_near
        logits, p = laws.logits[:, :-1], laws.p[:, :-1]
        return verify_grouped(
            laws.p, q, draft, u, rank_windows(logits, p, draft, distance, self.half, self.p_near, near)
        )
