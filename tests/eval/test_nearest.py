"""The nearest pictures against distances of all pairs."""

import pytest
import torch
from torch.testing import assert_close

from eval.nearest import nearest


@pytest.mark.parametrize("block", [1, 7, 64])
def test_neighbours_are_those_of_all_pairs(block: int) -> None:
    rng = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(5, 3, 4, 4, generator=rng), torch.randn(64, 3, 4, 4, generator=rng)
    pairs = (queries[:, None] - bank[None]).square().flatten(2).sum(-1).sqrt()
    distance, index = nearest(queries, bank.split(block), 6)
    expected = pairs.sort(dim=1)
    assert torch.equal(index, expected.indices[:, :6])
    assert_close(distance, expected.values[:, :6])


def test_a_copy_is_at_no_distance_and_the_first_of_two_comes_first() -> None:
    bank = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    bank[15] = bank[4]
    distance, index = nearest(bank[4:5], bank.split(6), 3)
    assert index[0, :2].tolist() == [4, 15]
    assert distance[0, :2].tolist() == [0, 0]
    assert distance[0, 2] > 0


def test_what_cannot_be_searched_is_named() -> None:
    with pytest.raises(ValueError, match="4 neighbours asked of a bank of 3"):
        nearest(torch.zeros(1, 5), [torch.zeros(3, 5)], 4)
    with pytest.raises(ValueError, match="the bank has"):
        nearest(torch.zeros(1, 5), [torch.zeros(3, 6)], 1)
