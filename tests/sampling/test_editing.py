"""Which tokens are made anew, what the generator is given of a picture, and what stays of it."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.next_scale import NextScale
from layers.noise import Noise
from layers.pyramid import ScaleReader
from layers.spec import Condition, Grid, Pyramid, Sequence, TokenSpec
from sampling.editing import box_mask, cells_to_make, edit, hide, keep_first
from sampling.sampler import Sampler

SIZES = ((1, 1), (2, 2), (4, 4))


def test_cells_are_made_anew_by_the_share_of_them_that_is_hidden() -> None:
    hidden = box_mask(8, 8, (0, 4, 8, 3))  # columns 4 to 6 of 8
    right = torch.tensor([[False, False, True, True]] * 4)
    assert torch.equal(cells_to_make(Grid(1, 4, 4), hidden), right.flatten())
    touched = [[True], [False, True] * 2, right.flatten().tolist()]
    assert cells_to_make(Pyramid(SIZES), hidden).tolist() == [cell for scale in touched for cell in scale]
    half = cells_to_make(Pyramid(SIZES), hidden, overlap=0.5)  # the last column is hidden by half, the whole by 3 / 8
    assert half.tolist() == [False] + [False, True] * 2 + [False, False, True, False] * 4


def test_a_place_or_a_share_that_is_none_is_refused() -> None:
    hidden = box_mask(8, 8, (0, 0, 2, 2))
    with pytest.raises(ValueError, match=r"Sequence\(length=4\) have no place in a picture"):
        cells_to_make(Sequence(4), hidden)
    with pytest.raises(ValueError, match=r"overlap is 1.0, must be in \[0, 1\)"):
        cells_to_make(Grid(1, 2, 2), hidden, overlap=1.0)
    with pytest.raises(ValueError, match="not within a picture of 8 x 8 pixels"):
        box_mask(8, 8, (4, 0, 5, 2))


class Coder:
    """A token is the brightness of its cell, on each scale."""

    def encode(self, images: Tensor) -> Tensor:
        self.seen = images
        grey = images.mean(1, keepdim=True)
        cells = [torch.nn.functional.adaptive_avg_pool2d(grey, size).flatten(1) for size in SIZES]
        return ((torch.cat(cells, 1) + 1) * 7.5).round().long()

    def decode(self, tokens: Tensor) -> Tensor:
        fine = tokens[:, -16:].reshape(-1, 1, 4, 4) / 7.5 - 1
        return fine.repeat_interleave(2, -1).repeat_interleave(2, -2).expand(-1, 3, -1, -1)


def test_an_edit_keeps_the_pixels_outside_and_sees_nothing_of_those_inside() -> None:
    torch.manual_seed(0)
    reader = ScaleReader(SIZES, 16, 4)
    reader.codebook.normal_()
    spec = TokenSpec(Pyramid(SIZES), decoded=(1, 8, 8), vocab_size=16)
    model, coder = NextScale(spec, reader, dim=16, depth=1, heads=2, num_classes=3).double().eval(), Coder()
    images, hidden = torch.rand(2, 3, 8, 8) * 2 - 1, box_mask(8, 8, (2, 2, 4, 4))
    given = model, coder, images, hidden, Condition(label=torch.tensor([0, 2])), Sampler(), Noise(0, torch.arange(2))
    made = edit(*given)
    assert torch.equal(made[..., ~hidden], images[..., ~hidden])
    assert not torch.equal(made[..., hidden], images[..., hidden])
    assert_close(coder.seen[..., hidden], images[..., ~hidden].mean(-1, keepdim=True).expand(-1, -1, 16))
    other = torch.where(hidden, torch.rand(2, 3, 8, 8), images)
    assert torch.equal(edit(model, coder, other, *given[3:]), made)
    assert torch.equal(hide(images, hidden)[..., ~hidden], images[..., ~hidden])


def test_the_first_tokens_of_a_picture_stay_and_the_others_are_drawn_after_them() -> None:
    torch.manual_seed(0)
    reader = ScaleReader(SIZES, 16, 4)
    reader.codebook.normal_()
    spec = TokenSpec(Pyramid(SIZES), decoded=(1, 8, 8), vocab_size=16)
    model, coder = NextScale(spec, reader, dim=16, depth=1, heads=2, num_classes=3).double().eval(), Coder()
    coder.decode = lambda tokens: tokens
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    about = Condition(label=torch.tensor([0, 2])), Sampler(), Noise(0, torch.arange(2))
    tokens = coder.encode(images)
    assert torch.equal(keep_first(model, coder, images, 21, *about), tokens)
    some = keep_first(model, coder, images, 5, *about)
    assert torch.equal(some[:, :5], tokens[:, :5])
    assert not torch.equal(some[:, 5:], tokens[:, 5:])
    with pytest.raises(ValueError, match="22 first tokens are to stay, a picture has 21"):
        keep_first(model, coder, images, 22, *about)
