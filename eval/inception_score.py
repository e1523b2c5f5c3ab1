"""The Inception Score: how sure a classifier is of each picture, and how varied it finds all of them.

Source: Salimans et al. 2016, arXiv:1606.03498, sec. 4. Of one split, with p(c) per picture and q its mean over them,

    exp mean sum_c p log(p / q)  =  exp (mean sum_c p log p  -  sum_c q log q)

so the right-hand side needs running sums only. The score is the mean over splits, which must be drawn across the
classes: a split of pictures sorted by class has few classes and a low score.

Axes: n pictures, K classes, S splits.
"""

import torch
from torch import Tensor


class SplitSums:
    """Per split: how many pictures, sum of p (S, K) and sum of p log p (S,), in float64, so memory is O(S K).

    Sums of several processes are added up with `merge`, or by all-reducing the three. The split of a picture follows
    from its number in the whole set, so the share that a process sees has no part in the result.
    """

    def __init__(self, splits: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(splits, dtype=torch.int64, device=device)
        self.sure = torch.zeros(splits, dtype=torch.float64, device=device)
        self.total = torch.zeros(splits, classes, dtype=torch.float64, device=device)

    def update(self, probabilities: Tensor, split: Tensor) -> None:
        """probabilities (B, K), any float dtype; split int64 (B,) in [0, S).

        Raises ValueError for shapes that do not fit, for splits outside, and for NaN.
        """
        splits, classes = self.total.shape
        if probabilities.shape != (len(split), classes):
            raise ValueError(
                f"SplitSums: made for probabilities (B, {classes}), got {tuple(probabilities.shape)} in {len(split)} splits"
            )
        if len(split) and not 0 <= int(split.min()) <= int(split.max()) < splits:
            raise ValueError(f"SplitSums: splits {int(split.min())} .. {int(split.max())}, made for {splits}")
        p, split = probabilities.to(self.total), split.to(self.count)
        if p.isnan().any():
            raise ValueError(f"SplitSums: row {int(p.isnan().any(1).nonzero()[0])} of the batch holds NaN")
        self.count += split.bincount(minlength=splits)
        self.sure.index_add_(0, split, torch.special.xlogy(p, p).sum(1))
        self.total.index_add_(0, split, p)

    def merge(self, other: "SplitSums") -> None:
        """Add what another has gathered. Raises ValueError where splits or classes differ."""
        if other.total.shape != self.total.shape:
            raise ValueError(
                f"SplitSums: (S, K) {tuple(self.total.shape)} here, {tuple(other.total.shape)} in the other"
            )
        self.count += other.count.to(self.count)
        self.sure += other.sure.to(self.sure)
        self.total += other.total.to(self.total)

    def scores(self) -> Tensor:
        """Of every split, float64 (S,), from 1 to K: report their mean, and their population deviation.

        Raises ValueError where a split has no picture.
        """
        if not self.count.all():
            raise ValueError(
                f"SplitSums: split {int((self.count == 0).nonzero()[0])} has no picture; take fewer splits"
            )
        q = self.total / self.count[:, None]
        return torch.exp(self.sure / self.count - torch.special.xlogy(q, q).sum(1))


def equal_splits(count: int, splits: int, permutation: Tensor | None = None) -> Tensor:
    """The split of every picture, int64 (n,): bounds floor(i n / splits) along `permutation`, else in stored order.

    permutation int64 (n,): the picture at each place; torch-fidelity takes numpy's RandomState(2020).permutation(n).
    Raises ValueError for a permutation of another length, and for more splits than pictures.
    """
    if permutation is not None and len(permutation) != count:
        raise ValueError(f"equal_splits: a permutation of {len(permutation)} for {count} pictures")
    if not 0 < splits <= count:
        raise ValueError(f"equal_splits: {splits} splits of {count} pictures")
    bounds = torch.tensor([i * count // splits for i in range(1, splits)], dtype=torch.int64)
    along = torch.bucketize(torch.arange(count), bounds, right=True)
    return along if permutation is None else torch.empty_like(along).scatter_(0, permutation.cpu(), along)


def chunks(count: int, size: int) -> Tensor:
    """The split of every picture, int64 (n,): consecutive chunks of `size` in stored order, the last one short (ADM)."""
    return torch.arange(count) // size


def inception_scores(logits: Tensor, split: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The score of every split, float64 (S,). logits (n, K); split int64 (n,), from `equal_splits` or `chunks`.

    dtype: of the softmax; the ADM evaluator has float32, on logits without bias. Raises ValueError for no pictures.
    """
    if not len(logits):
        raise ValueError("inception_scores: no pictures")
    sums = SplitSums(int(split.max()) + 1, logits.shape[1], logits.device)
    sums.update(logits.to(dtype).softmax(1), split)
    return sums.scores()
