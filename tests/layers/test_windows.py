"""Window attention against its dense mask, the window rule against its definition, the cost in the number of cells."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from layers.windows import attend_window, neighbourhood_mask, tiling


def test_a_window_is_always_whole_and_shifts_inward_at_the_border() -> None:
    mask = neighbourhood_mask(1 + 3, 5, 3)
    assert (mask.sum(1) == 9).all()
    rows, columns = [0, 0, 1, 1], [0, 0, 1, 2, 2]  # where the window of each row and column begins
    for cell in range(20):
        top, left = rows[cell // 5], columns[cell % 5]
        seen = {(top + i) * 5 + left + j for i in range(3) for j in range(3)}
        assert set(mask[cell].nonzero()[:, 0].tolist()) == seen


def drawn(cells: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, cells, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(
    ("size", "window"), [((5, 5), 3), ((16, 16), 3), ((13, 16), 7), ((24, 7), 5), ((9, 31), 1), ((32, 32), 7)]
)
def test_tiles_give_what_the_dense_mask_gives_with_its_gradients(size: tuple[int, int], window: int) -> None:
    given = drawn(size[0] * size[1])
    dense = F.scaled_dot_product_attention(*given, attn_mask=neighbourhood_mask(*size, window), scale=0.7)
    found = attend_window(*given, size, window, scale=0.7)
    assert_close(found, dense)
    weight = torch.randn_like(dense)
    assert_close(torch.autograd.grad((found * weight).sum(), given), torch.autograd.grad((dense * weight).sum(), given))


def products(side: int, window: int) -> int:
    """Query-key products of one head over a square grid."""
    tiles = tiling(side, side, window, torch.device("cpu"))
    return side**4 if tiles is None else tiles[0].numel() * tiles[1].shape[1]


def test_the_cost_is_linear_in_the_cells_where_tiles_are_used() -> None:
    assert products(7, 7) == 7**4  # one window covers the grid
    for side in (32, 64, 128):
        assert products(2 * side, 7) == 4 * products(side, 7)
        assert products(side, 7) == side**2 * 14**2  # a tile of 8 x 8 reads 14 x 14
    assert products(64, 7) < 64**4 / 16


@pytest.mark.parametrize(("size", "window"), [((6, 6), 7), ((8, 8), 4), ((8, 8), -1)])
def test_a_window_that_has_no_centre_or_no_room_is_refused(size: tuple[int, int], window: int) -> None:
    with pytest.raises(ValueError, match=f"window is {window}: must be odd, and no larger than the grid of"):
        neighbourhood_mask(*size, window)
