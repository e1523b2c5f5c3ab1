"""Every resizer by its own rule, against the library that has it and by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.resize import RESIZERS, resize


def pictures(height: int = 13, width: int = 17) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, height, width), generator=rng, dtype=torch.uint8)


SIZES = [(13, 17), (29, 40), (5, 6), (20, 7), (299, 299)]


@pytest.mark.parametrize("rule", RESIZERS)
def test_the_same_size_gives_the_same_picture(rule: str) -> None:
    assert_close(resize(pictures(), (13, 17), rule), pictures().float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", RESIZERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_flat_picture_stays_flat(rule: str, size: tuple[int, int]) -> None:
    flat = torch.full((1, 3, 13, 17), 93, dtype=torch.uint8)
    assert_close(resize(flat, size, rule), torch.full((1, 3, *size), 93.0), atol=1e-4, rtol=0)


def test_bilinear_rules_by_hand() -> None:
    """Levels 0 10 20 30 to 8 places: TensorFlow 1 has them at 0, 1/2, 1 ..., torch at -1/4, 1/4, 3/4 ..."""
    row = torch.tensor([0, 10, 20, 30], dtype=torch.uint8).expand(1, 3, 1, 4)
    assert_close(resize(row, (1, 8), "tf1")[0, 0, 0], torch.tensor([0.0, 5, 10, 15, 20, 25, 30, 30]))
    assert_close(resize(row, (1, 8), "torch")[0, 0, 0], torch.tensor([0.0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]))
    assert_close(resize(row, (1, 2), "tf1")[0, 0, 0], torch.tensor([0.0, 20]))  # every second one: no antialiasing


@pytest.mark.parametrize("size", SIZES)
def test_tensorflow_rule_is_that_of_torch_fidelity_to_the_last_digit(size: tuple[int, int]) -> None:
    wanted = interpolate_bilinear_2d_like_tensorflow1x(pictures().float(), size, align_corners=False)
    assert torch.equal(resize(pictures(), size, "tf1"), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_pil_rules_are_those_of_pil(size: tuple[int, int]) -> None:
    arrays, shape = pictures().movedim(1, -1).numpy(), (size[1], size[0])
    whole = [np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC)) for array in arrays]
    wanted = torch.from_numpy(np.stack(whole)).movedim(-1, 1).float()
    assert torch.equal(resize(pictures(), size, "pil_uint8"), wanted)

    channels = [Image.fromarray(channel.astype(np.float32)) for channel in pictures().flatten(0, 1).numpy()]
    single = [np.asarray(channel.resize(shape, Image.Resampling.BICUBIC)).clip(0, 255) for channel in channels]
    wanted = torch.from_numpy(np.stack(single)).view(2, 3, *size)
    assert_close(resize(pictures(), size, "clean"), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", RESIZERS)
def test_no_picture_sees_another(rule: str) -> None:
    together = resize(pictures(), (20, 7), rule)
    assert_close(resize(pictures()[1:], (20, 7), rule), together[1:], atol=1e-5, rtol=0)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8 pictures"):
        resize(pictures().float(), (5, 5), "pil_uint8")
    with pytest.raises(ValueError, match="expected uint8 pictures"):
        resize(pictures()[:, :1], (5, 5), "tf1")
    with pytest.raises(ValueError, match="unknown rule 'lanczos'; known: tf1, torch, clean, pil_uint8"):
        resize(pictures(), (5, 5), "lanczos")
