"""Rejection sampling by a score: of several candidates for each picture the best is kept.

Source: VQ-VAE-2 (Razavi et al. 2019, arXiv:1906.00446, sec. 3.4) with a classifier; VAR (arXiv:2404.02905, table 1, "-re")
reports it for its largest model and does not say how many candidates it drew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Make = Callable[[Tensor, Tensor], Tensor]  # sample numbers (n,), labels (n,) -> images (n, 3, H, W)
Score = Callable[[Tensor, Tensor], Tensor]  # images (n, 3, H, W), labels (n,) -> (n,): larger is better


def class_probability(logits: Tensor, label: Tensor) -> Tensor:
    """A classifier's logits (n, classes), label int64 (n,) -> (n,): the probability of the picture's own class."""
    return logits.softmax(-1).gather(1, label[:, None])[:, 0]


def best_of(make: Make, score: Score, index: Tensor, label: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """index, label int64 (B,) -> images (B, 3, H, W), their scores (B,): for each sample the best of its candidates,
    the first of equals.

    Candidate c of sample i is made as sample number i * candidates + c, so the choice depends on no batch. Raises
    ValueError for candidates below 1, and for scores that are no numbers.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}, must be at least 1")
    best, kept = None, None
    for candidate in range(candidates):
        images = make(index * candidates + candidate, label)
        scores = score(images, label)
        if scores.isnan().any():
            raise ValueError(f"best_of: the score of candidate {candidate} is not a number")
        if best is None:
            best, kept = scores, images
            continue
        better = scores > best
        best = torch.where(better, scores, best)
        kept = torch.where(better[:, None, None, None], images, kept)
    return kept, best
