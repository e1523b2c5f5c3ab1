"""Token filters: which tokens of a row may be drawn, and the order in which every family applies them.

Every filter is a pure function (logits (..., V) float32 or float64, value) -> logits (..., V) of the same dtype, the
dropped tokens at -inf. Nothing is written in place, nothing branches on the contents of a tensor, and at least one
token of every row survives. Rows may already hold -inf.

Sources: top-k (Fan et al. 2018, arXiv:1805.04833), top-p (Holtzman et al. 2019, arXiv:1904.09751), locally typical
(Meister et al. 2022, arXiv:2202.00666), epsilon and eta (Hewitt et al. 2022, arXiv:2210.15191), min-p (Nguyen et al.
2024, arXiv:2407.01082).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from layers.record import look_up

COLDEST = 1e-5  # what a temperature of 0 stands for, as in LlamaGen
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("[0, inf)", lambda value: 0 <= value < inf),
    "top_k": ("{0, 1, 2, ...}", lambda value: value >= 0 and value % 1 == 0),
    "top_p": ("[0, 1]", lambda value: 0 <= value <= 1),
    "min_p": ("[0, 1]", lambda value: 0 <= value <= 1),
    "typical": ("(0, 1]", lambda value: 0 < value <= 1),
    "epsilon": ("[0, 1]", lambda value: 0 <= value <= 1),
    "eta": ("[0, 1]", lambda value: 0 <= value <= 1),
}


def check(name: str, value: float) -> None:
    """Raises ValueError naming the setting, the value and its range."""
    interval, valid = RANGES[name]
    if not valid(value):
        raise ValueError(f"{name} is {value}, must be in {interval}")


def temper(logits: Tensor, temperature: float) -> Tensor:
    """Divide by max(temperature, 1e-5)."""
    check("temperature", temperature)
    return logits if temperature == 1 else logits / max(temperature, COLDEST)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep every token that is at least the k-th largest, ties included; k above V means V. Off at 0."""
    check("top_k", k)
    if k == 0 or k >= logits.shape[-1]:
        return logits
    kth = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < kth, -inf)


def top_p_descending(logits: Tensor, top_p: float) -> Tensor:
    """Drop a token when the mass strictly before it, counted from the largest down, exceeds top_p. Off at 1.

    The rule of LlamaGen: a token that begins exactly at the threshold stays. Ties are ordered by index, lowest first.
    """
    check("top_p", top_p)
    if top_p == 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    mass = ordered.softmax(-1).cumsum(-1)
    dropped = F.pad(mass[..., :-1] > top_p, (1, 0), value=False)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -inf)


def top_p_ascending(logits: Tensor, top_p: float) -> Tensor:
    """Drop a token when the mass up to and with it, counted from the smallest up, is at most 1 - top_p. Off at 1.

    The rule of transformers. The largest always stays. Ties are ordered by index, lowest dropped first.
    """
    check("top_p", top_p)
    if top_p == 1:
        return logits
    ordered, order = logits.sort(stable=True)
    mass = ordered.softmax(-1).cumsum(-1)
    dropped = F.pad(mass[..., :-1] <= 1 - top_p, (0, 1), value=False)
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -inf)


def top_p_ascending_or_off(logits: Tensor, top_p: float) -> Tensor:
    """The ascending rule, off at 0 too. Source: VAR (at 1 its filter drops tokens of no mass, which changes no law)."""
    return top_p_ascending(logits, top_p or 1.0)


def min_p(logits: Tensor, share: float) -> Tensor:
    """Keep the tokens at least `share` times as probable as the most probable one. Off at 0."""
    check("min_p", share)
    if share == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + log(share), -inf)


def typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprisal is closest to the entropy, up to and with the one whose mass reaches `mass`.

    Tokens as far from the entropy as the last one kept stay too. May drop the most probable token. Off at 1.
    """
    check("typical", mass)
    if mass == 1:
        return logits
    surprisal = -logits.log_softmax(-1)
    probs = logits.softmax(-1)
    distance = (surprisal - torch.special.entr(probs).sum(-1, keepdim=True)).abs()
    ordered, order = distance.sort(stable=True)
    last = (probs.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -inf)


def epsilon(logits: Tensor, floor: float) -> Tensor:
    """Keep the tokens of probability at least `floor`, and the most probable one whatever it has. Off at 0."""
    check("epsilon", floor)
    return logits if floor == 0 else drop_rare(logits, floor)


def eta(logits: Tensor, value: float) -> Tensor:
    """Epsilon with a floor that follows the entropy H of the row: min(eta, sqrt(eta) exp(-H)). Off at 0."""
    check("eta", value)
    if value == 0:
        return logits
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True)
    return drop_rare(logits, (sqrt(value) * torch.exp(-entropy)).clamp_max(value))


def drop_rare(logits: Tensor, floor: float | Tensor) -> Tensor:
    """Drop the tokens of probability below `floor`, a number or (..., 1), but never the largest."""
    rare = (logits.softmax(-1) < floor) & (logits < logits.amax(-1, keepdim=True))
    return logits.masked_fill(rare, -inf)


LATE = (("min_p", min_p), ("typical", typical), ("epsilon", epsilon), ("eta", eta))
CONVENTIONS: dict[str, tuple[tuple[str, Callable[[Tensor, float], Tensor]], ...]] = {
    "llamagen": (("temperature", temper), ("top_k", top_k), ("top_p", top_p_descending), *LATE),
    "var": (("temperature", temper), ("top_k", top_k), ("top_p", top_p_ascending_or_off), *LATE),
    "lantern": (("temperature", temper), ("top_p", top_p_ascending_or_off), ("top_k", top_k), *LATE),
    "transformers": (("temperature", temper), ("top_k", top_k), ("top_p", top_p_ascending), *LATE),
}


@dataclass(frozen=True)
class Filter:
    """Temperature and truncation in one family's order of operations; every setting is off by default.

    temperature in [0, inf), 0 standing for 1e-5; top_k a count, off at 0; top_p in [0, 1], off at 1 (for var and
    lantern at 0 too); min_p in [0, 1], off at 0; typical in (0, 1], off at 1; epsilon and eta in [0, 1], off at 0.
    convention: llamagen (temperature, top-k, descending top-p), var (the same with ascending top-p), lantern
    (temperature, ascending top-p, top-k) or transformers (as var, but a top_p of 0 keeps one token). The others follow.
    Raises ValueError naming the setting, its value and its range, or the nearest convention.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical: float = 1.0
    epsilon: float = 0.0
    eta: float = 0.0
    convention: str = "llamagen"

    def __post_init__(self) -> None:
        look_up(self.convention, CONVENTIONS, "filter convention")
        for name in RANGES:
            check(name, getattr(self, name))

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> logits (..., V), the dropped tokens at -inf."""
        for name, apply in CONVENTIONS[self.convention]:
            logits = apply(logits, getattr(self, name))
        return logits

    def probs(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> probabilities (..., V) that sum to 1, exactly 0 at the dropped tokens."""
        return self(logits).softmax(-1)
