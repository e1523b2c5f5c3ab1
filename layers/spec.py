"""The handshake between the rooms: how tokens lie (layout), what they are (TokenSpec), what they show (Condition)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from layers.record import look_up


@dataclass(frozen=True)
class Grid:
    """Tokens in raster order over t frames of h rows and w columns."""

    t: int
    h: int
    w: int

    @property
    def length(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True)
class Sequence:
    """Tokens in one dimension, without a place in the picture."""

    length: int


@dataclass(frozen=True)
class Pyramid:
    """Tokens of several grids (h, w), coarse to fine, each in raster order."""

    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(tuple(size) for size in self.sizes))

    @property
    def length(self) -> int:
        return sum(prod(size) for size in self.sizes)


Layout = Grid | Sequence | Pyramid
LAYOUTS = {layout.__name__: layout for layout in (Grid, Sequence, Pyramid)}


@dataclass(frozen=True)
class TokenSpec:
    """What a tokenizer makes and a generator must serve.

    layout: where the L tokens lie. decoded: (T, H, W) in frames and pixels of what they decode to.
    Exactly one of vocab_size (discrete tokens, int64 (B, L)) and channels (continuous tokens, float (B, L, C)).
    """

    layout: Layout
    decoded: tuple[int, int, int]
    vocab_size: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.channels is None):
            raise ValueError(
                f"TokenSpec: give vocab_size or channels, not both or neither: got {self.vocab_size}, {self.channels}"
            )
        object.__setattr__(self, "decoded", tuple(self.decoded))

    @property
    def length(self) -> int:
        return self.layout.length

    def read_as(self, layout: Layout | None) -> "TokenSpec":
        """The same tokens under an explicit layout of equal length. Raises ValueError naming both lengths."""
        if layout is None:
            return self
        if layout.length != self.length:
            raise ValueError(f"layout={layout} has {layout.length} tokens, the tokenizer makes {self.length}: {self}")
        return replace(self, layout=layout)

    def record(self) -> dict[str, Any]:
        """Plain JSON values; `TokenSpec.from_record` reads them back."""
        layout = {type(self.layout).__name__: asdict(self.layout)}
        return {
            "layout": layout,
            "decoded": list(self.decoded),
            "vocab_size": self.vocab_size,
            "channels": self.channels,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "TokenSpec":
        ((name, arguments),) = record["layout"].items()
        return cls(**{**record, "layout": look_up(name, LAYOUTS, "layout")(**arguments)})


@dataclass(frozen=True)
class Condition:
    """What the pictures of a batch of B are about. Every field is optional; a generator names the ones it reads.

    label int64 (B,); text float (B, S, D) with text_mask bool (B, S), True at real text; clip: the tokens of given
    frames; keep bool (B,): where False the generator puts its own null condition.
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    clip: Tensor | None = None
    keep: Tensor | None = None

    def fields(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def rows(self) -> int:
        """B, asked of any field that is given. Raises ValueError for an empty condition or fields that disagree."""
        rows = {name: len(value) for name, value in self.fields().items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"Condition: the fields must agree on the batch size, and one must be given: got {rows}")
        return next(iter(rows.values()))

    def null(self) -> "Condition":
        """The same rows with the condition dropped: the second branch of guidance."""
        rows = self.rows
        some = next(iter(self.fields().values()))
        return replace(self, keep=torch.zeros(rows, dtype=torch.bool, device=some.device))

    def select(self, rows: Tensor | slice) -> "Condition":
        return Condition(**{name: value[rows] for name, value in self.fields().items()})

    def to(self, device: torch.device | str) -> "Condition":
        return Condition(**{name: value.to(device) for name, value in self.fields().items()})


def stack(branches: "list[Condition] | tuple[Condition, ...]") -> Condition:
    """R conditions of B rows -> one of R * B rows, branch by branch: the order (R, B) of guidance.

    `keep` may be given in some branches only (missing means kept). Raises ValueError where other fields differ, or B.
    """
    if len({branch.rows for branch in branches}) != 1:
        raise ValueError(f"stack: the branches need one batch size, got {[branch.rows for branch in branches]}")
    given = [set(branch.fields()) - {"keep"} for branch in branches]
    if any(fields != given[0] for fields in given):
        raise ValueError(f"stack: the branches carry different fields: {[sorted(fields) for fields in given]}")
    joined = {name: torch.cat([getattr(branch, name) for branch in branches]) for name in given[0]}
    if any(branch.keep is not None for branch in branches):
        some = next(iter(joined.values()), None)
        device = branches[0].keep.device if some is None else some.device
        joined["keep"] = torch.cat(
            [
                torch.ones(branch.rows, dtype=torch.bool, device=device) if branch.keep is None else branch.keep
                for branch in branches
            ]
        )
    return Condition(**joined)
