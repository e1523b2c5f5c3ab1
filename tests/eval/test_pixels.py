"""The uint8 rules: which levels each of them keeps, and what none of them takes."""

import pytest
import torch

from eval.pixels import from_uint8, to_uint8

LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)


@pytest.mark.parametrize("rule", ["trunc_128", "round"])
def test_every_level_comes_back_as_it_was(rule: str) -> None:
    assert torch.equal(to_uint8(from_uint8(LEVELS), rule), LEVELS)


def test_truncation_without_an_offset_darkens_levels_by_one() -> None:
    lost = LEVELS.int() - to_uint8(from_uint8(LEVELS), "trunc").int()
    assert set(lost.unique().tolist()) == {0, 1}
    assert 50 < int(lost[0, 0].sum()) < 130


def test_values_between_and_beyond_the_levels() -> None:
    values = torch.tensor([-9.0, -1.0, -0.996, 0.0, 0.003, 0.9999, 1.0, 9.0])
    images = values.view(1, 1, 1, 8).expand(1, 3, 1, 8)
    expected = {  # 127.5 x + 128 and 127.5 x + 127.5 by hand
        "trunc_128": [0, 0, 1, 128, 128, 255, 255, 255],
        "round": [0, 0, 1, 128, 128, 255, 255, 255],
        "trunc": [0, 0, 0, 127, 127, 254, 255, 255],
    }
    for rule, levels in expected.items():
        assert to_uint8(images, rule)[0, 0, 0].tolist() == levels, rule


def test_a_tie_is_rounded_to_the_even_level() -> None:
    half = torch.full((1, 3, 1, 1), 2 * 20.5 / 255 - 1, dtype=torch.float64)
    assert int(to_uint8(half, "round")[0, 0, 0, 0]) == 20


def test_what_is_no_picture_is_refused() -> None:
    broken = torch.zeros(4, 3, 2, 2)
    broken[2, 1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="picture 2 of 4 holds NaN"):
        to_uint8(broken)
    with pytest.raises(ValueError, match="expected float pictures"):
        to_uint8(LEVELS)
    with pytest.raises(ValueError, match="expected float pictures"):
        to_uint8(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="unknown rule 'floor'; known: trunc_128, round, trunc"):
        to_uint8(torch.zeros(1, 3, 2, 2), "floor")
