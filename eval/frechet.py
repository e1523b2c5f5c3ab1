"""The Fréchet distance between two Gaussians, and the statistics it needs, gathered batch by batch.

Source: Dowson and Landau 1982; as a score of image generators Heusel et al. 2017 (TTUR, arXiv:1706.08500).

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

The last trace is the sum of the singular values of F'G, where A = F F' and B = G G'. Taking it there, and not from the
eigenvalues of the product A B, keeps the rounding noise of null directions at its own size: through the product it
becomes its square root, and scores of few samples come out too low.

The factors are those of a Cholesky decomposition with pivots, which ends at the rank of a singular covariance. They leave
F'G without null directions as a rule, and then its singular values are the roots of the eigenvalues of a symmetric
matrix, which cost a third.

Axes: n pictures, d features.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import LinAlgError, eigh
from scipy.linalg.lapack import dpstrf
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """mean (d,) and cov (d, d), float64. rows (r, d), where few pictures were seen: rows' rows is cov exactly."""

    mean: Tensor
    cov: Tensor
    rows: Tensor | None = None


class FeatureStatistics:
    """Running sums of features: count, total (d,) and outer (d, d) in float64, so memory is O(d^2) for any n.

    Sums of several processes are added up with `merge`, or by all-reducing the three. The rows themselves are kept only
    while there are at most d of them, which costs no more and gives rank-deficient covariances an exact factor.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.rows: list[Tensor] | None = []

    def update(self, features: Tensor) -> None:
        """features (B, d), any float dtype and device. Raises ValueError for another shape, and for NaN or infinity."""
        dim = len(self.total)
        if features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(f"FeatureStatistics: made for features (B, {dim}), got {tuple(features.shape)}")
        rows = features.to(self.total)
        broken = ~rows.isfinite().all(1)
        if broken.any():
            number = self.count + int(broken.nonzero()[0])
            raise ValueError(f"FeatureStatistics: the features of picture {number} are NaN or infinite")
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)
        self._keep(len(rows), [rows])

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another has gathered. Raises ValueError where the widths differ."""
        if len(other.total) != len(self.total):
            raise ValueError(f"FeatureStatistics: {len(self.total)} features here, {len(other.total)} in the other")
        self.total += other.total.to(self.total)
        self.outer += other.outer.to(self.outer)
        self._keep(other.count, other.rows)

    def mean(self) -> Tensor:
        """(d,). Raises ValueError before the first picture."""
        if self.count < 1:
            raise ValueError("FeatureStatistics: no features yet, so no mean")
        return self.total / self.count

    def cov(self) -> Tensor:
        """(d, d), divisor n - 1. Raises ValueError for fewer than two pictures."""
        if self.count < 2:
            raise ValueError(f"FeatureStatistics: a covariance needs at least 2 pictures, got {self.count}")
        mean = self.mean()
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def gaussian(self, divisor: str = "n - 1") -> Gaussian:
        """What `frechet_distance` compares. Raises ValueError for fewer than two pictures, and for another divisor.

        divisor: of the covariance, "n - 1", or "n" as StyleGAN's statistics and the FVD of StyleGAN-V and LARP have it.
        """
        if divisor not in ("n - 1", "n"):
            raise ValueError(f'FeatureStatistics: the covariance is divided by "n - 1" or "n", not by {divisor!r}')
        mean, cov = self.mean(), self.cov()
        over = self.count - (divisor == "n - 1")
        if self.rows is None:
            return Gaussian(mean, cov * ((self.count - 1) / over))
        centred = (torch.cat(self.rows) - mean) / over**0.5  # n rows of sum 0, turned into n - 1 and one of zeros
        rows = centred[1:] + centred[0] / (self.count**0.5 - 1)
        return Gaussian(mean, rows.T @ rows, rows)

    def _keep(self, count: int, rows: list[Tensor] | None) -> None:
        self.count += count
        if self.rows is not None and rows is not None and self.count <= len(self.total):
            self.rows += [part.to(self.total) for part in rows]
        else:
            self.rows = None


def frechet_distance(a: Gaussian, b: Gaussian, compat: str | None = None) -> float:
    """The squared distance, raw: rounding may leave a few 1e-13 of the traces below zero, and nothing is clamped.

    compat: "eigvals" takes the route of torch-fidelity and gives its every digit, its error of a few 1e-3 for
    covariances near a singular one included. Raises ValueError for unequal widths and for another compat.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"frechet_distance: {len(a.mean)} features on one side, {len(b.mean)} on the other")
    if compat == "eigvals":
        return _by_eigenvalues_of_the_product(a, b)
    if compat is not None:
        raise ValueError(f'frechet_distance: compat is "eigvals" or None, not {compat!r}')
    roots = _roots(a, b)
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.cov.trace() + b.cov.trace() - 2 * roots.sum())


def _by_eigenvalues_of_the_product(a: Gaussian, b: Gaussian) -> float:
    """In numpy, whose BLAS and order of additions decide the last digits."""
    (mean_a, cov_a), (mean_b, cov_b) = ((side.mean.cpu().numpy(), side.cov.cpu().numpy()) for side in (a, b))
    roots = np.sqrt(np.linalg.eigvals(cov_a.dot(cov_b)).astype(np.complex128)).real
    shift = mean_a - mean_b
    return float(shift.dot(shift) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sum(roots))


def _factor(gaussian: Gaussian) -> Tensor:
    """F (d, r) of full rank r with F F' = cov."""
    if gaussian.rows is not None:
        return gaussian.rows.T
    lower, order, rank, _ = dpstrf(gaussian.cov.cpu().numpy(), lower=1)  # order counts from 1
    factor = np.empty((len(lower), rank))
    factor[order - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(factor).to(gaussian.cov)


def _roots(a: Gaussian, b: Gaussian) -> Tensor:
    """The singular values of F'G: roots of the eigenvalues of A B, by one Cholesky factor where both have full rank."""
    if a.rows is None and b.rows is None:
        try:
            squares = eigh(a.cov.cpu().numpy(), b.cov.cpu().numpy(), type=2, eigvals_only=True)
        except LinAlgError:  # B is singular
            squares = np.zeros(1)
        if _stand_out(squares := torch.from_numpy(squares)):
            return squares.sqrt()
    matrix = _factor(a).T @ _factor(b)
    narrow = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = torch.linalg.eigvalsh(narrow @ narrow.T)
    return squares.sqrt() if _stand_out(squares) else torch.linalg.svdvals(matrix)


def _stand_out(squares: Tensor) -> bool:
    """Whether all eigenvalues, ascending, are above their rounding, which the root would magnify."""
    noise = len(squares) * torch.finfo(squares.dtype).eps
    return bool((squares[:1] > noise * squares[-1:]).all())
