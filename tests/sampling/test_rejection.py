"""The best of several candidates, whatever the batch."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.rejection import best_of, class_probability


def make(index: Tensor, label: Tensor) -> Tensor:
    """Sample number i is a picture of the value (7 i mod 11) + label."""
    return ((7 * index) % 11 + label).float()[:, None, None, None].expand(-1, 3, 2, 2)


def brightness(images: Tensor, label: Tensor) -> Tensor:
    return images.mean((1, 2, 3)) - label


def test_the_best_candidate_of_every_sample_is_kept() -> None:
    index, label = torch.arange(6), torch.tensor([0, 100, 0, 100, 0, 100])
    images, scores = best_of(make, brightness, index, label, candidates=4)
    expected = torch.tensor([max((7 * (4 * i + c)) % 11 for c in range(4)) for i in range(6)]).float()
    assert torch.equal(scores, expected) and torch.equal(images[:, 0, 0, 0], expected + label)
    alone = [best_of(make, brightness, index[i : i + 1], label[i : i + 1], 4)[0] for i in range(6)]
    assert torch.equal(torch.cat(alone), images)


def test_one_candidate_is_plain_sampling_and_ties_go_to_the_first() -> None:
    index, label = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    assert torch.equal(best_of(make, brightness, index, label, 1)[0], make(index, label))
    images, _ = best_of(make, lambda images, label: torch.zeros(len(images)), index, label, 3)
    assert torch.equal(images, make(3 * index, label))


def test_what_is_no_score_is_refused() -> None:
    index = label = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="candidates is 0, must be at least 1"):
        best_of(make, brightness, index, label, 0)
    with pytest.raises(ValueError, match="the score of candidate 0 is not a number"):
        best_of(make, lambda images, label: torch.full((2,), torch.nan), index, label, 2)


def test_the_class_probability_is_the_softmax_at_the_label() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert_close(class_probability(logits, torch.tensor([1, 1])), torch.tensor([1.0, -2.0]).sigmoid())
