"""What a generator is asked. One step is one forward round; `commit` is the only way tokens enter a state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from heads.protocol import Head
from layers.noise import Noise
from layers.spec import Condition, TokenSpec

Field = Callable[[Tensor, Tensor], Tensor]  # velocity(x_t, t) -> (R, B, m, C)


@dataclass
class State:
    """One decoding of B samples, owned by the caller. Families add caches, orders, memories.

    tokens (B, L) or (B, L, C), 0 where unknown; known bool (B, L); length int64 (B,): committed tokens of each row in the
    generator's order; round, rounds: rounds done and rounds a plain loop needs (numbers on the host); nfe: forwards of the
    network so far; fixed: (tokens, mask) imposed from outside, or None.
    """

    tokens: Tensor
    known: Tensor
    length: Tensor
    rounds: int
    fixed: tuple[Tensor, Tensor] | None = None
    round: int = 0
    nfe: int = 0


@dataclass
class Prediction:
    """What one step says of m positions of each of B samples.

    head: the head to draw with; z (R, B, m, D), or a Field; positions int64 (B, m): where in the layout; index int64
    (B, m) and total: where on the guidance schedule; keep: how many of the m to commit; extra: named arguments for
    this head's `sample`.
    """

    head: Head
    z: Tensor | Field
    positions: Tensor
    index: Tensor
    total: int
    keep: int
    extra: dict[str, Any] = field(default_factory=dict)


class Generator(nn.Module, ABC):
    """An order of prediction over the tokens of `spec`. Constructors take spec first and refuse one they cannot serve.

    Where ids are not enough to feed on, the constructor asks for `reader`: a frozen module that a tokenizer makes
    (`tokenizer.reader()`), kept and saved with the generator's own weights.
    undecayed: parts of names of the parameters that no weight decay may touch, beside vectors.
    """

    spec: TokenSpec
    undecayed: tuple[str, ...] = ()

    def curriculum(self, step: int, steps: int) -> dict[str, Any]:
        """What `loss` is given in step `step` of `steps`, where training goes through stages."""
        return {}

    @abstractmethod
    def loss(self, tokens: Tensor, condition: Condition, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (B, L) -> scalar, and its parts by name. Every random quantity can be given; drawn otherwise."""

    @abstractmethod
    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
    ) -> State:
        """R conditions of B rows, the full one first -> a state with nothing known but `fixed` to be imposed."""

    @abstractmethod
    def step(self, state: State, ahead: int | None = None) -> Prediction:
        """One forward round; reveals nothing: called twice it says the same."""

    @abstractmethod
    def commit(self, state: State, positions: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
        """positions, tokens, keep (B, m): tokens enter where keep is True (everywhere when None)."""


def one_state(generator: Generator, head: Head) -> Head:
    """`head`, for an order that has one hidden state a position. Raises ValueError for one that reads more."""
    if head.states != 1:
        raise ValueError(
            f"{type(generator).__name__} has one state a position, {type(head).__name__} reads {head.states}: one an axis"
        )
    return head
