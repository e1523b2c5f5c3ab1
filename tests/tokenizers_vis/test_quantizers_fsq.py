"""FSQ: the grid, its ids, the bound, and the gradient through it."""

import pytest
import torch
from torch.testing import assert_close
from vector_quantize_pytorch import FSQ as TheirFSQ

from tokenizers_vis.quantizers import FSQ

LEVELS = [[8, 8, 8, 5, 5, 5], [7, 5, 5, 5, 5], [6, 3, 4], [4]]


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_ids_and_gradients_are_those_of_vector_quantize_pytorch(levels: list[int]) -> None:
    theirs, ours = TheirFSQ(levels), FSQ(levels)
    z = (torch.randn(1, 2000, len(levels)) * 2).requires_grad_()
    wanted, wanted_ids = theirs(z)
    found = ours(z)
    assert torch.equal(found.z_q, wanted)
    assert torch.equal(found.ids, wanted_ids.long())
    weight = torch.randn_like(z)
    assert_close(*(torch.autograd.grad((codes * weight).sum(), z)[0] for codes in (found.z_q, wanted)))


@pytest.mark.parametrize("levels", LEVELS)
def test_every_id_is_reached_and_comes_back(levels: list[int]) -> None:
    """Vectors put in the middle of every cell by the inverse of the bound."""
    quantizer = FSQ(levels)
    ids = torch.arange(quantizer.vocab_size)
    level = quantizer.embed(ids) * (torch.tensor(levels) // 2)
    reach = (torch.tensor(levels) - 1) * (1 + 1e-3) / 2
    offset = torch.tensor([0.0 if size % 2 else 0.5 for size in levels])
    z = ((level + offset) / reach).atanh() - (offset / reach).atanh()
    assert torch.equal(quantizer.assign(z), ids)


def test_the_first_level_varies_fastest_over_a_grid_in_the_unit_cube() -> None:
    first, second = FSQ([3, 4]).codebook().t().tolist()
    assert first == [-1, 0, 1] * 4
    assert second == [-1] * 3 + [-0.5] * 3 + [0] * 3 + [0.5] * 3


def test_two_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"levels are \[4, 2\], each must be at least 3; for 2 there is LFQ"):
        FSQ([4, 2])
