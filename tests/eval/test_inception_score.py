"""The Inception Score against closed forms and torch-fidelity; its running sums against the whole array."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.metric_isc import isc_features_to_metric

from eval.inception_score import SplitSums, chunks, equal_splits, inception_scores


def logits(count: int, classes: int = 12, seed: int = 0) -> Tensor:
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sure(classes: Tensor, of: int) -> Tensor:
    """Logits that leave no doubt: probabilities are exactly 0 and 1."""
    return torch.full((len(classes), of), -1e5).scatter_(1, classes[:, None], 1e5)


def test_sure_and_varied_pictures_score_the_number_of_classes() -> None:
    one_split = torch.zeros(30, dtype=torch.int64)
    for used in (1, 3, 10):
        scores = inception_scores(sure(torch.arange(30) % used, 10), one_split)
        assert_close(scores, torch.tensor([used], dtype=torch.float64))


def test_pictures_that_tell_nothing_score_one() -> None:
    same = logits(1).expand(20, -1)
    assert_close(inception_scores(same, torch.zeros(20, dtype=torch.int64)), torch.ones(1, dtype=torch.float64))


def test_two_pictures_by_hand() -> None:
    """p = (3/4, 1/4) and (1/4, 3/4), q = (1/2, 1/2): exp(3/4 log 3/2 + 1/4 log 1/2)."""
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert float(inception_scores(p.log(), torch.zeros(2, dtype=torch.int64))) == pytest.approx(1.5**0.75 * 0.5**0.25)


def test_pictures_sorted_by_class_score_low_until_they_are_shuffled() -> None:
    rows = sure(torch.arange(1000) // 100, 10)
    sorted_scores = inception_scores(rows, equal_splits(1000, 10))
    shuffled = equal_splits(1000, 10, torch.randperm(1000, generator=torch.Generator().manual_seed(0)))
    assert_close(sorted_scores, torch.ones(10, dtype=torch.float64))
    assert float(inception_scores(rows, shuffled).mean()) > 9


@pytest.mark.parametrize(("count", "splits"), [(240, 10), (247, 10), (10, 10), (33, 4), (33, 1)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_agreement_with_torch_fidelity(count: int, splits: int, shuffle: bool) -> None:
    rows = logits(count)
    permutation = torch.from_numpy(np.random.RandomState(2020).permutation(count)) if shuffle else None
    scores = inception_scores(rows, equal_splits(count, splits, permutation))
    theirs = isc_features_to_metric(rows, splits, shuffle, 2020)
    assert float(scores.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert float(scores.std(correction=0)) == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_chunks_of_the_adm_evaluator() -> None:
    """Each chunk is scored as if alone, the short one too, and they count the same in the mean."""
    rows = logits(23).float()
    scores = inception_scores(rows, chunks(23, 10), torch.float32)
    alone = [
        inception_scores(part, torch.zeros(len(part), dtype=torch.int64), torch.float32) for part in rows.split(10)
    ]
    assert len(scores) == 3
    assert_close(scores, torch.cat(alone), rtol=1e-12, atol=0)
    assert_close(scores, inception_scores(rows, chunks(23, 10)), rtol=1e-6, atol=0)


def test_order_within_a_split_and_names_of_classes_have_no_part() -> None:
    rows, split = logits(40), equal_splits(40, 4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    classes = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert_close(inception_scores(rows[order], split[order]), inception_scores(rows, split))
    assert_close(inception_scores(rows[:, classes], split), inception_scores(rows, split))


@pytest.mark.parametrize("batch", [1, 7, 100])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_batches_and_shares_of_processes_add_up(batch: int, shares: int) -> None:
    """Pictures dealt out to processes in turn, as a distributed sampler deals them, each told its place in the whole."""
    rows = logits(100)
    permutation = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    split = equal_splits(100, 10, permutation)
    parts = []
    for share in range(shares):
        sums = SplitSums(10, 12)
        for part, where in zip(rows[share::shares].split(batch), split[share::shares].split(batch), strict=True):
            sums.update(part.softmax(1), where)
        parts.append(sums)
    for other in parts[1:]:
        parts[0].merge(other)
    assert_close(parts[0].scores(), inception_scores(rows, split), rtol=1e-12, atol=0)


def test_every_picture_is_in_one_split_and_sizes_differ_by_one_at_most() -> None:
    permutation = torch.randperm(47, generator=torch.Generator().manual_seed(0))
    sizes = equal_splits(47, 10, permutation).bincount()
    assert len(sizes) == 10 and set(sizes.tolist()) == {4, 5}
    assert equal_splits(7, 3).tolist() == [0, 0, 1, 1, 2, 2, 2]  # bounds 0, 2, 4, 7
    assert equal_splits(4, 2, torch.tensor([3, 0, 1, 2])).tolist() == [0, 1, 1, 0]


def test_what_cannot_be_scored_is_named() -> None:
    sums = SplitSums(2, 3)
    uniform = torch.full((4, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"made for probabilities \(B, 3\), got \(4, 3\) in 2 splits"):
        sums.update(uniform, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"splits 0 .. 2, made for 2"):
        sums.update(uniform, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="row 1 of the batch holds NaN"):
        sums.update(torch.tensor([[1.0, 0.0, 0.0], [float("nan"), 0.0, 0.0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="split 0 has no picture"):
        sums.scores()
    with pytest.raises(ValueError, match=r"\(S, K\) \(2, 3\) here, \(2, 4\) in the other"):
        sums.merge(SplitSums(2, 4))
    with pytest.raises(ValueError, match="11 splits of 10 pictures"):
        equal_splits(10, 11)
    with pytest.raises(ValueError, match="a permutation of 3 for 10 pictures"):
        equal_splits(10, 2, torch.arange(3))
    with pytest.raises(ValueError, match="no pictures"):
        inception_scores(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
