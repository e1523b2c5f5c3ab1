"""Guidance: the mixes and their conversion, every schedule against its formula, and which settings belong together."""

from collections.abc import Callable
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.record import UnknownName
from sampling.guidance import NEUTRAL, RULES, SCHEDULES, Guidance, mar_linear, mix, to_standard

FORMULAS: list[tuple[str, dict[str, Any], Callable[[int, int], float]]] = [  # (schedule, settings, (i, n) -> scale)
    ("constant", {"scale": 4.0}, lambda i, n: 4.0),
    ("interval", {"scale": 4.0, "interval": 2}, lambda i, n: 4.0 if i <= 3 else 1.0),
    ("interval", {"scale": 4.0, "interval": 0}, lambda i, n: 4.0 if i <= 1 else 1.0),
    ("interval", {"scale": 4.0, "interval": -1}, lambda i, n: 4.0),
    ("interval", {"scale": 3.0, "interval": 5, "rule": "muse"}, lambda i, n: 3.0 if i <= 6 else 0.0),
    ("ramp", {"scale": 1.5, "rule": "var"}, lambda i, n: 1.5 * i / (n - 1)),
    ("linear", {"scale": 12.0, "rule": "muse"}, lambda i, n: 1 + 11 * (i + 1) / n),
    ("cosine", {"scale": 12.0, "power": 2.0}, lambda i, n: 1 + 11 * (1 - cos(pi * ((i + 1) / n) ** 2)) / 2),
    ("flipped_cosine", {"scale": 12.0, "power": 0.5}, lambda i, n: 1 + 11 * cos(pi * ((i + 1) / n) ** 0.5) / 2),
    ("power_cosine", {"scale": 16.0, "power": 2.75}, lambda i, n: 1 + 15 * (1 - cos(pi * (i / n) ** 2.75)) / 2),
    ("power_cosine", {"scale": 16.0, "power": 0.0}, lambda i, n: 16.0),
    ("titok_linear", {"scale": 4.5, "rule": "muse"}, lambda i, n: 4.5 * i / n),
    ("listed", {"scale": 2.0, "values": (0.5, 1.5, 3.0)}, lambda i, n: (1.0, 3.0, 6.0)[min(i, 2)]),
    ("linspace", {"scale": 1.2, "end": 8.0}, lambda i, n: 1.2 + 6.8 * i / (n - 1)),
]


def branches(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """cond, uncond (B=2, m=3, V=11)."""
    return tuple(torch.randn(2, 2, 3, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("schedule", "settings", "formula"), FORMULAS)
@pytest.mark.parametrize("steps", [2, 9, 256])
def test_a_schedule_is_its_formula(
    schedule: str, settings: dict[str, Any], formula: Callable[[int, int], float], steps: int
) -> None:
    expected = torch.tensor([formula(i, steps) for i in range(steps)], dtype=torch.float64)
    assert_close(Guidance(schedule=schedule, **settings).scales(steps), expected)


def test_every_schedule_has_its_formula_here() -> None:
    assert {schedule for schedule, _, _ in FORMULAS} | {"mar_linear"} == set(SCHEDULES)


def test_mar_linear_follows_the_tokens_still_masked() -> None:
    # 4 cos(pi/8 * (1, 2, 3, 4)) = 3.7, 2.8, 1.5, 0 -> 3, 2, 1, and at least 1 masked
    assert mar_linear(4, 5.0, 4).tolist() == [2.0, 3.0, 4.0, 4.0]
    # 8 steps over 4 tokens: 3.9 -> 3, then at most one fewer each step
    assert mar_linear(8, 5.0, 4).tolist() == [2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    scales = mar_linear(64, 2.9, 256)
    assert bool((scales.diff() >= 0).all()) and scales[-1] == 1 + 1.9 * 255 / 256


@pytest.mark.parametrize(("schedule", "settings", "formula"), FORMULAS)
def test_one_step_is_a_schedule_too(schedule: str, settings: dict[str, Any], formula: object) -> None:
    scales = Guidance(schedule=schedule, **settings).scales(1)
    assert scales.shape == (1,) and scales.dtype == torch.float64 and bool(scales.isfinite().all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_neutral_scale_is_the_conditional_branch_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    cond, uncond = branches(dtype)
    assert torch.equal(mix(cond, uncond, NEUTRAL[rule], rule), cond)
    scales = torch.full((2, 3), NEUTRAL[rule], dtype=torch.float64)
    assert torch.equal(mix(cond, uncond, scales, rule), cond)


def test_the_standard_mix_is_its_formula() -> None:
    cond, uncond = branches()
    for scale in (-0.5, 0.0, 0.3, 1.0, 1.5, 7.5):
        assert_close(mix(cond, uncond, scale), uncond + scale * (cond - uncond))


def test_published_scales_convert_to_the_standard_mix() -> None:
    assert to_standard(1.5, "var") == 2.5 and to_standard(12.0, "muse") == 13.0 and to_standard(4.0, "standard") == 4.0
    cond, uncond = branches()
    for rule in RULES:
        for scale in (0.0, 0.7, 1.5, 12.0):
            assert_close(mix(cond, uncond, to_standard(scale, rule)), mix(cond, uncond, scale, rule))


@pytest.mark.parametrize("rule", RULES)
def test_every_position_has_its_own_scale(rule: str) -> None:
    cond, uncond = branches(torch.float32)
    scales = torch.linspace(-1, 8, 6, dtype=torch.float64).view(2, 3)  # float64, as schedules are
    together = mix(cond, uncond, scales, rule)
    assert together.dtype == torch.float32
    for b in range(2):
        for m in range(3):
            assert_close(together[b, m], mix(cond[b, m], uncond[b, m], scales[b, m].item(), rule))
    assert torch.equal(torch.stack((cond, uncond)), torch.stack(branches(torch.float32)))  # not in place


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (Guidance(), 1),
        (Guidance(1.5), 2),
        (Guidance(0.0), 2),  # the standard mix at 0 is the unconditional branch
        (Guidance(0.0, rule="var"), 1),
        (Guidance(1.0, rule="muse"), 2),
        (Guidance(0.0, "ramp", rule="var"), 1),
        (Guidance(1.5, "ramp", rule="var"), 2),
        (Guidance(1.0, "power_cosine", power=2.75), 1),
        (Guidance(16.0, "power_cosine", power=40.0), 2),
        (Guidance(1.0, "linspace", end=4.0), 2),
        (Guidance(3.0, "interval", interval=0), 2),
        (Guidance(1.0, "interval", interval=0), 1),
        (Guidance(2.9, "mar_linear", length=256), 2),
    ],
    ids=str,
)
def test_a_second_branch_is_run_only_where_it_can_matter(guidance: Guidance, expected: int) -> None:
    assert guidance.branches == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "power-cosine"}, "guidance schedule 'power-cosine' is not known; did you mean 'power_cosine'"),
        ({"rule": "standart"}, "guidance rule 'standart' is not known; did you mean 'standard'"),
        ({"schedule": "linspace"}, "guidance schedule 'linspace' needs end"),
        ({"schedule": "mar_linear"}, "guidance schedule 'mar_linear' needs length"),
        ({"schedule": "ramp", "power": 2.0}, "guidance schedule 'ramp' does not read power=2.0; it reads scale"),
        ({"interval": 3}, "guidance schedule 'constant' does not read interval=3; it reads scale"),
        ({"schedule": "interval", "interval": -2}, "interval is -2, must be -1 (always guided) or more"),
        ({"schedule": "mar_linear", "length": 0}, "length is 0, must be the number of tokens, at least 1"),
    ],
)
def test_settings_must_belong_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Guidance(**settings)
    assert str(error.value).startswith(message)


def test_unknown_rules_get_the_nearest_name() -> None:
    for call in (lambda: mix(*branches(), 1.0, "vax"), lambda: to_standard(1.0, "vax")):
        with pytest.raises(UnknownName, match="did you mean 'var'"):
            call()
