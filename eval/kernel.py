"""Kernel distances between two sets of features: the squared maximum mean discrepancy, unbiased (KID) and biased (CMMD).

Sources: Gretton et al. 2012, lemma 6; as a score of image generators Bińkowski et al. 2018 (KID, arXiv:1801.01401) with
a cubic kernel, Jayasumana et al. 2024 (CMMD, arXiv:2401.09603) with a Gaussian one.

Axes: n, m rows of two sets, d features, T subsets of S rows each.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]  # symmetric; (n, d), (m, d) -> (n, m)
BLOCK = 2048  # rows and columns of a kernel matrix that are made at once


def polynomial_kernel(x: Tensor, y: Tensor, degree: int = 3, gamma: float | None = None, shift: float = 1.0) -> Tensor:
    """(gamma x.y + shift)^degree; gamma None: 1 / d. x (n, d), y (m, d) -> (n, m)."""
    return _products(x, y).mul_(1 / x.shape[1] if gamma is None else gamma).add_(shift).pow_(degree)


def gaussian_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2)). x (n, d), y (m, d) -> (n, m)."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * _products(x, y)
    return torch.exp(-squared.clamp_min(0) / (2 * sigma**2))


def mmd_unbiased(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) over pairs of different rows; its mean is 0 for equal laws, so it may be < 0.

    x (n, d), y (m, d), any float dtype; float64 scalar. Raises ValueError for sets of one row and for unequal widths.
    """
    _check("mmd_unbiased", x, y, least=2)
    x, y = x.double(), y.double()
    within = []
    for rows in (x, y):
        total, trace = _within(rows, kernel)
        within.append((total - trace) / (len(rows) * (len(rows) - 1)))
    return within[0] + within[1] - 2 * _across(x, y, kernel) / (len(x) * len(y))


def mmd_biased(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """The same with the means over all pairs, a row with itself too: never below 0, and 0 for equal sets.

    x (n, d), y (m, d), any float dtype; float64 scalar. Raises ValueError for empty sets and for unequal widths.
    """
    _check("mmd_biased", x, y, least=1)
    x, y = x.double(), y.double()
    within = [_within(rows, kernel)[0] / len(rows) ** 2 for rows in (x, y)]
    return within[0] + within[1] - 2 * _across(x, y, kernel) / (len(x) * len(y))


def kid(fake: Tensor, real: Tensor, rows_fake: Tensor, rows_real: Tensor, kernel: Kernel = polynomial_kernel) -> Tensor:
    """The unbiased distance of every pair of subsets, float64 (T,): report its mean and its population deviation.

    fake (n, d), real (m, d); rows_fake, rows_real int64 (T, S): the rows that each subset takes (`draw_subsets`).
    Raises ValueError for unequal numbers of subsets, and as `mmd_unbiased` does.
    """
    if len(rows_fake) != len(rows_real):
        raise ValueError(f"kid: {len(rows_fake)} subsets of the samples, {len(rows_real)} of the reference")
    pairs = zip(rows_fake, rows_real, strict=True)
    return torch.stack([mmd_unbiased(fake[ours], real[theirs], kernel) for ours, theirs in pairs])


def draw_subsets(
    fake: int, real: int, rng: np.random.RandomState, subsets: int = 100, size: int = 1000
) -> tuple[Tensor, Tensor]:
    """Rows of both sets for `kid`, int64 (T, S) each, without replacement within a subset, those of `fake` drawn first.

    fake, real: how many rows there are. torch-fidelity's numbers come from RandomState(2020) and the default sizes.
    Raises ValueError for subsets larger than a set.
    """
    if size > min(fake, real):
        raise ValueError(f"draw_subsets: subsets of {size} rows from sets of {fake} and {real}; make them smaller")
    drawn = [[rng.choice(count, size, replace=False) for count in (fake, real)] for _ in range(subsets)]
    rows = torch.from_numpy(np.array(drawn, dtype=np.int64).reshape(subsets, 2, size))
    return rows[:, 0], rows[:, 1]


def cmmd(fake: Tensor, real: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """scale x the biased squared discrepancy with a Gaussian kernel; on unit CLIP ViT-L/14-336 embeddings it is CMMD.

    fake (n, d), real (m, d). The kernel of unit vectors is within 2 % of 1, which float32 does not resolve: all is
    float64. Raises ValueError as `mmd_biased` does.
    """
    return scale * float(mmd_biased(fake, real, lambda x, y: gaussian_kernel(x, y, sigma)))


def _check(name: str, x: Tensor, y: Tensor, least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"{name}: features must be (n, d) and (m, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(len(x), len(y)) < least:
        raise ValueError(f"{name}: sets of {len(x)} and {len(y)} rows, each needs at least {least}")


def _products(x: Tensor, y: Tensor) -> Tensor:
    """x y'. On a CPU by numpy, which multiplies a matrix with its own transpose in half the time."""
    return torch.from_numpy(x.numpy() @ y.numpy().T) if x.device.type == "cpu" else x @ y.T


def _across(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    """The sum of k(x, y) over pairs of rows, block by block."""
    return torch.stack([kernel(ours, theirs).sum() for ours in x.split(BLOCK) for theirs in y.split(BLOCK)]).sum()


def _within(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The sums of k(x, x') over pairs of rows, and over rows with themselves. Of two blocks across the diagonal one is made."""
    total = trace = x.new_zeros(())
    for start in range(0, len(x), BLOCK):
        rows, later = x[start : start + BLOCK], x[start + BLOCK :]
        own = kernel(rows, rows)
        total = total + own.sum() + 2 * _across(rows, later, kernel)
        trace = trace + own.trace()
    return total, trace
