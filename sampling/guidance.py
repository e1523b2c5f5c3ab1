"""Classifier-free guidance: how two branches are mixed, and how the scale moves from step to step.

Source: Ho and Salimans 2022, arXiv:2207.12598. Published models write the same mix in three ways; a configuration keeps
the standard one, `uncond + scale (cond - uncond)`, and `to_standard` converts (VAR's 1.5 is 2.5, MaskGen's 12 is 13).

Letters: S the scale asked for, n steps, i the step counted from 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from math import cos, floor, pi
from typing import Any

import torch
from torch import Tensor

from layers.record import look_up

# ---- mixes


def standard(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u); exactly c at s = 1 and u at s = 0."""
    return torch.lerp(uncond, cond, scale)


def var(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """(1 + s) c - s u; exactly c at s = 0. Source: VAR (arXiv:2404.02905)."""
    return (1 + scale) * cond - scale * uncond


def muse(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """c + s (c - u); exactly c at s = 0. Source: Muse (arXiv:2301.00704); TiTok and MaskGen write it so."""
    return cond + scale * (cond - uncond)


RULES: dict[str, Callable[[Tensor, Tensor, float | Tensor], Tensor]] = {"standard": standard, "var": var, "muse": muse}
NEUTRAL = {"standard": 1.0, "var": 0.0, "muse": 0.0}  # the scale at which only the conditional branch remains
PROBE = 256  # steps in which a schedule that guides at all is seen to


def mix(cond: Tensor, uncond: Tensor, scale: float | Tensor, rule: str = "standard") -> Tensor:
    """cond, uncond (B, m, ...) -> the same, in their dtype. scale: a number, or a tensor over their first axes, (B, m).

    Raises UnknownName (a ValueError) for a rule outside RULES.
    """
    if isinstance(scale, Tensor):
        scale = scale.to(cond.dtype).reshape(scale.shape + (1,) * (cond.dim() - scale.dim()))
    return look_up(rule, RULES, "guidance rule")(cond, uncond, scale)


def to_standard(scale: float, rule: str) -> float:
    """The scale of the standard mix that does what `scale` does under `rule`."""
    return scale + 1.0 - look_up(rule, NEUTRAL, "guidance rule")


# ---- schedules: the scale at every step, float64 (n,)


def constant(steps: int, scale: float) -> Tensor:
    """S. Source: LlamaGen, NAR, PAR, TiTok."""
    return torch.full((steps,), scale, dtype=torch.float64)


def interval(steps: int, scale: float, interval: int, neutral: float) -> Tensor:
    """S up to step interval + 1, the conditional branch alone afterwards; S throughout when interval is -1.

    Source: LlamaGen, `cfg_interval`: its count leaves out the first step, the prefill. Raises ValueError below -1.
    """
    if interval < -1:
        raise ValueError(f"interval is {interval}, must be -1 (always guided) or more")
    scales = constant(steps, scale)
    if interval > -1:
        scales[interval + 2 :] = neutral
    return scales


def ramp(steps: int, scale: float) -> Tensor:
    """S i / (n - 1): from 0 at the first scale of the pyramid to S at the last. Source: VAR, with its own mix."""
    return scale * counted(steps) / max(steps - 1, 1)


def linear(steps: int, scale: float) -> Tensor:
    """1 + (S - 1) (i + 1) / n: ends at S. Source: MaskGen, with the muse mix."""
    return 1 + (scale - 1) * (counted(steps) + 1) / steps


def cosine(steps: int, scale: float, power: float) -> Tensor:
    """1 + (S - 1) (1 - cos(pi r^power)) / 2 with r = (i + 1) / n: ends at S. Source: MaskGen, with the muse mix."""
    return raised_cosine((counted(steps) + 1) / steps, scale, power)


def flipped_cosine(steps: int, scale: float, power: float) -> Tensor:
    """1 + (S - 1) cos(pi r^power) / 2 with r = (i + 1) / n: falls, down to 1 - (S - 1) / 2, which may be negative.

    Source: MaskGen, as its code has it (the raised cosine would add 1 to the cosine).
    """
    return 1 + (scale - 1) * torch.cos(pi * ((counted(steps) + 1) / steps) ** power) / 2


def power_cosine(steps: int, scale: float, power: float) -> Tensor:
    """1 + (S - 1) (1 - cos(pi r^power)) / 2 with r = i / n: starts at 1, ends below S; constant S at power 0.

    Source: RAR (arXiv:2411.00776) over tokens, TiTok over steps, both with the standard mix.
    """
    return raised_cosine(counted(steps) / steps, scale, power)


def titok_linear(steps: int, scale: float) -> Tensor:
    """S i / n: 0 at the first step. Source: TiTok, with the muse mix."""
    return scale * counted(steps) / steps


def mar_linear(steps: int, scale: float, length: int) -> Tensor:
    """1 + (S - 1) (length - m_i) / length, m_i of `length` tokens being masked after step i.

    m_i = floor(length cos(pi/2 (i + 1) / n)), fewer than before and at least 1, so that the end stays below S.
    Source: MAR (arXiv:2406.11838), also MaskGen on continuous tokens. Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}, must be the number of tokens, at least 1")
    masked, scales = length, []
    for i in range(steps):
        masked = max(1, min(masked - 1, floor(length * cos(pi / 2 * (i + 1) / steps))))
        scales.append(1 + (scale - 1) * (length - masked) / length)
    return torch.tensor(scales, dtype=torch.float64)


def linspace(steps: int, scale: float, end: float) -> Tensor:
    """From S to `end` in equal strides. Source: D-AR (arXiv:2505.23660); where S is 1 its code starts at 1.001."""
    return torch.linspace(scale, end, steps, dtype=torch.float64)


def listed(steps: int, scale: float, values: Sequence[float]) -> Tensor:
    """S times the value of each step; the last one holds beyond the end of the list.

    For a pyramid, a scale for each of its K grids. Raises ValueError for an empty list.
    """
    if not values:
        raise ValueError("guidance schedule 'listed' needs values, one for each step")
    return scale * torch.tensor([values[min(i, len(values) - 1)] for i in range(steps)], dtype=torch.float64)


def counted(steps: int) -> Tensor:
    return torch.arange(steps, dtype=torch.float64)


def raised_cosine(ratio: Tensor, scale: float, power: float) -> Tensor:
    return 1 + (scale - 1) * (1 - torch.cos(pi * ratio**power)) / 2


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    schedule.__name__: schedule
    for schedule in (
        constant,
        interval,
        ramp,
        linear,
        cosine,
        flipped_cosine,
        power_cosine,
        titok_linear,
        mar_linear,
        linspace,
        listed,
    )
}


@dataclass(frozen=True)
class Guidance:
    """Scale, schedule and mix. The default never guides.

    schedule: a name of SCHEDULES; rule: standard, var or muse. power belongs to the three cosines, end to linspace,
    interval to the schedule of that name, length, the number of tokens, to mar_linear, and values to listed.
    Raises ValueError for an unknown schedule or rule (naming the nearest), a setting that the schedule lacks, one that
    it does not read, and one out of range.
    """

    scale: float = 1.0
    schedule: str = "constant"
    rule: str = "standard"
    power: float = 1.0
    interval: int = -1
    end: float | None = None
    length: int | None = None
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        look_up(self.rule, RULES, "guidance rule")
        wanted = self._arguments()
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if name in wanted and value is None:
                raise ValueError(f"guidance schedule {self.schedule!r} needs {name}")
            if name not in ("scale", "schedule", "rule", *wanted) and value != setting.default:
                raise ValueError(
                    f"guidance schedule {self.schedule!r} does not read {name}={value}; it reads {', '.join(wanted)}"
                )
        self.scales(1)  # a schedule refuses a setting out of range itself

    @property
    def neutral(self) -> float:
        """The scale at which the rule leaves the conditional branch alone."""
        return NEUTRAL[self.rule]

    @property
    def branches(self) -> int:
        """1 where the scale is neutral throughout, so that no second branch need be run; 2 otherwise."""
        return 1 if bool((self.scales(PROBE) == self.neutral).all()) else 2

    def scales(self, total: int) -> Tensor:
        """The scale at each of `total` steps, float64 (total,)."""
        return SCHEDULES[self.schedule](total, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        schedule = look_up(self.schedule, SCHEDULES, "guidance schedule")
        return {name: getattr(self, name) for name in signature(schedule).parameters if name != "steps"}
