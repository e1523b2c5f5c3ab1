"""Clips before the FVD network: resizing against matrices written by hand, every rule, every choice of frames."""

import random

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from eval.clips import (
    CLIP_RULES,
    Place,
    centre_window,
    consecutive_clips,
    fit_shorter_side,
    larp_reference,
    random_windows,
    squeeze,
    to_network_input,
)

ROUNDING = 4e-5  # places of up to 320 pixels in float32, times a difference of neighbours of up to 2


def clips(height: int, width: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (2, 3, 4, height, width), generator=rng, dtype=dtype)
    return torch.rand(2, 3, 4, height, width, generator=rng, dtype=dtype)


def linear(old: int, new: int) -> Tensor:
    """(new, old): the shares of old pixels in new ones, by place (i + 1/2) old / new - 1/2 between pixel centres."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        place = min(max((row + 0.5) * old / new - 0.5, 0), old - 1)
        left = int(place)
        matrix[row, left] += 1 - (place - left)
        matrix[row, min(left + 1, old - 1)] += place - left
    return matrix


def by_hand(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return (rows @ values.double() @ columns.T).float()


EXPECTED = {  # what becomes of floats in [0, 1], and the resizing of 20 x 30 to 28
    "larp": (lambda x: x, "squeeze"),
    "common-metrics": (lambda x: x, "crop"),
    "videogpt": (lambda x: (255 * x).floor() / 255, "crop"),
    "seed-voken": (lambda x: (255 * x).floor() / 255, "squeeze"),
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_floats_under_a_rule_are_those_computed_by_hand(rule: str) -> None:
    values, fit = EXPECTED[rule]
    columns = linear(30, 28) if fit == "squeeze" else linear(30, 42)[7:35]
    x = clips(20, 30, torch.float32)
    assert_close(
        to_network_input(x, rule, 28), 2 * by_hand(values(x), linear(20, 28), columns) - 1, atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize("rule", CLIP_RULES)
def test_uint8_under_a_rule_are_those_computed_by_hand(rule: str) -> None:
    columns = linear(30, 28) if CLIP_RULES[rule].fit == "squeeze" else linear(30, 42)[7:35]
    x = clips(20, 30)
    assert_close(
        to_network_input(x, rule, 28), 2 * by_hand(x / 255, linear(20, 28), columns) - 1, atol=ROUNDING, rtol=0
    )


@pytest.mark.parametrize("upright", [False, True])
def test_the_longer_side_is_rounded_up_and_cropped_in_the_middle(upright: bool) -> None:
    """240 x 320 to 128: 320 becomes 170.67, so 171, and 43 columns go, 21 of them on the left."""
    x = clips(240, 320)[:1, :, :1]
    expected = by_hand(x / 255, linear(240, 128), linear(320, 171)[21:149])
    found = fit_shorter_side(x.mT, 128).mT if upright else fit_shorter_side(x, 128)
    assert_close(found, expected, atol=ROUNDING, rtol=0)


def test_a_division_that_does_not_come_out_even_gives_225_rows_as_in_the_published_code() -> None:
    """25 * (224 / 25) is just above 224 in floating point."""
    x = clips(25, 25)[:1, :, :1]
    assert_close(
        fit_shorter_side(x, 224), by_hand(x / 255, linear(25, 225)[:224], linear(25, 224)), atol=ROUNDING, rtol=0
    )


def test_square_clips_do_not_tell_the_resizers_apart() -> None:
    x = clips(20, 20)
    assert torch.equal(fit_shorter_side(x, 28), squeeze(x, 28))
    assert torch.equal(squeeze(x, 20), x.float() / 255)


def test_antialiasing_weighs_all_pixels_below_the_wider_triangle() -> None:
    """Pixels 1 and 2 of every four are white. Shrunk by four: 1 from the two in the middle, 1/2 of the triangle."""
    x = torch.tensor([0.0, 1, 1, 0]).repeat(8).expand(1, 3, 2, 32, 32)
    assert_close(fit_shorter_side(x, 8), torch.ones(1, 3, 2, 8, 8))
    inner = fit_shorter_side(x, 8, antialias=True)[..., 1:-1]
    assert_close(inner, torch.full_like(inner, 0.5))


@pytest.mark.parametrize("rule", CLIP_RULES)
def test_clips_and_frames_are_prepared_one_by_one(rule: str) -> None:
    x = clips(20, 30)
    together = to_network_input(x, rule, 28)
    one_by_one = [to_network_input(x[b : b + 1, :, t : t + 1], rule, 28) for b in range(2) for t in range(4)]
    assert torch.equal(torch.cat(one_by_one).unflatten(0, (2, 4)).squeeze(3).transpose(1, 2), together)


def wrong(value: float) -> Tensor:
    x = torch.full((3, 3, 4, 8, 8), 0.5)
    x[1, 0, 2, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("x", "rule", "message"),
    [
        (clips(8, 8), "fvd", "unknown rule 'fvd'; known: larp, stylegan-v"),
        (clips(8, 8, torch.float32), "stylegan-v", "'stylegan-v' takes uint8 clips"),
        (clips(8, 8).long(), "larp", "int64"),
        (clips(8, 8)[0], "larp", r"expected clips \(B, 3, T, H, W\).*\(3, 4, 8, 8\)"),
        (clips(8, 8).transpose(1, 2), "larp", r"\(2, 4, 3, 8, 8\)"),
        (wrong(-0.01), "larp", "clip 1 of 3 has values from -0.01 to 0.5.*clamp"),
        (wrong(200.0), "videogpt", "clip 1 of 3 has values from 0.5 to 200"),
        (wrong(float("nan")), "common-metrics", "clip 1 of 3"),
    ],
)
def test_what_is_no_clip_is_refused(x: Tensor, rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_network_input(x, rule, 8)


def test_consecutive_clips_lie_end_to_end_and_leave_the_rest_of_a_video() -> None:
    places = consecutive_clips([33, 15, 16])
    assert places == [Place(0, range(16)), Place(0, range(16, 32)), Place(2, range(16))]


def test_the_larp_reference_is_the_sample_of_seed_42() -> None:
    """Python's generator of seed 42 draws 1, 0, 4 of ten."""
    places = larp_reference([80, 80], count=3)
    assert places == [Place(0, range(16, 32)), Place(0, range(16)), Place(0, range(64, 80))]
    everything = larp_reference([80, 80], count=10)
    assert sorted(everything, key=lambda place: (place.video, place.frames.start)) == consecutive_clips([80, 80])
    with pytest.raises(ValueError, match="10 clips of 16 frames in these videos, 11 wanted"):
        larp_reference([80, 80], count=11)


@pytest.mark.parametrize(("stride", "starts"), [(1, 16), (2, 1)])
def test_random_windows_have_every_start_that_fits_and_no_other(stride: int, starts: int) -> None:
    """31 frames: 16 starts of 16 frames, one of every second frame. A start is missed with probability 16 (15/16)^500,
    below 1e-12."""
    rng = random.Random(0)
    drawn = {random_windows([31], rng, 16, stride)[0].frames for _ in range(500)}
    assert drawn == {range(start, start + 15 * stride + 1, stride) for start in range(starts)}
    assert all(len(frames) == 16 and frames[-1] <= 30 for frames in drawn)


def test_random_windows_come_from_the_first_videos_that_are_long_enough() -> None:
    assert [place.video for place in random_windows([16, 15, 40, 16], random.Random(0), count=2)] == [0, 2]
    assert [place.video for place in random_windows([16, 15, 40, 16], random.Random(0))] == [0, 2, 3]
    with pytest.raises(ValueError, match="3 videos have 16 frames, 4 wanted"):
        random_windows([16, 15, 40, 16], random.Random(0), count=4)


def test_the_centre_window_is_centred_on_the_middle_frame() -> None:
    assert list(centre_window(40)) == list(range(12, 29))
    assert centre_window(17) == range(17)
    with pytest.raises(ValueError, match="17 frames around the middle of a video of 16"):
        centre_window(16)
