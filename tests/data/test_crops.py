"""Crops: which windows they cut, and that randomness is what was given."""

import numpy as np
import pytest
from PIL import Image

from data.crops import (
    TRANSFORMS,
    center_crop_arr,
    mirrored,
    random_crop_arr,
    ten_crop,
    var_center_crop,
    var_random_crop,
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_picture_whose_shorter_side_fits_is_only_cut_with_offsets_rounded_down() -> None:
    image = picture(32, 49)
    assert np.array_equal(center_crop_arr(image, 32), image[:, 8:40])  # margin 17
    assert np.array_equal(center_crop_arr(picture(32, 32), 32), picture(32, 32))


def test_halving_is_the_mean_of_two_by_two_which_bicubic_is_not() -> None:
    small = picture(32, 32)
    blocks = small.repeat(2, axis=0).repeat(2, axis=1)
    assert np.array_equal(center_crop_arr(blocks, 32), small)
    bicubic = np.asarray(Image.fromarray(blocks).resize((32, 32), Image.Resampling.BICUBIC))
    assert not np.array_equal(bicubic, small)


def test_small_and_colourless_pictures_are_enlarged_and_coloured() -> None:
    gray = Image.fromarray(picture(9, 20)[..., 0])
    crop = center_crop_arr(gray, 32)
    assert crop.shape == (32, 32, 3) and np.array_equal(crop[..., 0], crop[..., 2])


def test_random_crop_is_a_window_of_the_resized_picture_and_repeats_with_its_draws() -> None:
    image = picture(40, 53)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        edge = int(rng.integers(32, 41))
        scaled = Image.fromarray(image).resize((round(53 * edge / 40), edge), Image.Resampling.BICUBIC)
        top, left = int(rng.integers(edge - 31)), int(rng.integers(scaled.width - 31))
        window = np.asarray(scaled)[top : top + 32, left : left + 32]
        assert np.array_equal(random_crop_arr(image, 32, draws=(edge, top, left)), window)
        assert np.array_equal(random_crop_arr(image, 32, rng=np.random.default_rng(seed)), window)


def test_random_crop_refuses_no_randomness_twice_the_randomness_and_windows_outside() -> None:
    for given in ({}, {"draws": (32, 0, 0), "rng": np.random.default_rng(0)}):
        with pytest.raises(ValueError, match=r"draws=.* or rng"):
            random_crop_arr(picture(40, 40), 32, **given)
    with pytest.raises(ValueError, match="outside a picture"):
        random_crop_arr(picture(40, 40), 32, draws=(34, 3, 0))


def test_ten_crops_are_five_windows_and_those_of_the_mirror_picture() -> None:
    image = picture(40, 70)
    wide = center_crop_arr(image, 36)  # int(32 * 1.15)
    windows = [wide[y : y + 32, x : x + 32] for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
    crops = ten_crop(image, 32, 1.15)
    assert np.array_equal(crops[:5], windows)
    mirror_picture = mirrored(wide)
    assert np.array_equal(
        crops[5:], [mirror_picture[y : y + 32, x : x + 32] for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
    )


def test_var_crop_is_the_centre_of_a_lanczos_picture() -> None:
    image = picture(72, 72)
    scaled = np.asarray(Image.fromarray(image).resize((36, 36), Image.Resampling.LANCZOS))
    assert np.array_equal(var_center_crop(image, 32), scaled[2:34, 2:34])


def test_every_transform_makes_the_crops_it_says() -> None:
    for name, (crops, crop) in TRANSFORMS.items():
        made = crop(picture(50, 41), 32, np.random.default_rng(0), 1.1)
        assert made.shape == ((32, 32, 3) if crops == 1 else (crops, 32, 32, 3)), name
    first, second = TRANSFORMS["center_flip"][1](picture(50, 41), 32, np.random.default_rng(0), 1.1)
    assert np.array_equal(second, first[:, ::-1])


def test_vars_random_crop_is_a_part_of_the_same_resized_picture_at_every_place() -> None:
    image = np.random.default_rng(0).integers(
        0, 256, (36, 40, 3), dtype=np.uint8
    )  # 36 = 1.125 * 32: nothing is resized
    found = {var_random_crop(image, 32, np.random.default_rng(seed)).tobytes() for seed in range(400)}
    places = {image[top : top + 32, left : left + 32].tobytes() for top in range(5) for left in range(9)}
    assert found == places  # P(a place is missed) < 45 (44/45)^400 = 0.6 %, and the seeds are fixed
