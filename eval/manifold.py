"""Precision and recall, density and coverage: how two sets of features lie in the balls around each other's rows.

A ball reaches from a row to its k-th nearest other row of the same set. Sources: Kynkäänniemi et al. 2019
(arXiv:1904.06991, k = 3, closed balls), Naeem et al. 2020 (arXiv:2002.09797, k = 5, open balls). The ADM evaluator
(Dhariwal and Nichol 2021) has the former, with squared distances in half precision.

Distances are made block by block, so memory is O(BLOCK^2) beyond the features, whatever their number.

Axes: n reference rows, m samples, d features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Squared = Callable[[Tensor, Tensor], Tensor]  # (n, d), (m, d) -> squared distances (n, m)
BLOCK = 2048


@dataclass(frozen=True)
class Overlap:
    """precision: share of samples in some reference ball; recall: share of reference rows in some sample ball.

    density: reference balls around a sample, mean over samples, over k; coverage: share of reference balls that hold a
    sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float

    @property
    def f_score(self) -> float:
        """The harmonic mean of precision and recall; 0 where both are."""
        return 2 * self.precision * self.recall / max(1e-5, self.precision + self.recall)


def squared_double(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 in float64. x (n, d), y (m, d) -> (n, m)."""
    x, y = x.double(), y.double()
    return (x.square().sum(1)[:, None] - 2 * (x @ y.T) + y.square().sum(1)).clamp_min(0)


def squared_half(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 as the ADM evaluator has it, float16 (n, m); float32 where that overflows somewhere in the block.

    Products are added up in float32 and rounded to half, then u.u - 2 u.v + v.v in half, at least 0. x (n, d), y (m, d).
    """
    u, v = x.half().float(), y.half().float()
    uu, vv, uv = u.square().sum(1)[:, None].half(), v.square().sum(1).half(), (u @ v.T).half()
    squared = (uu - 2 * uv + vv).clamp_min(0)
    if squared.isfinite().all():
        return squared
    x, y = x.float(), y.float()
    return (x.square().sum(1)[:, None] - 2 * (x @ y.T) + y.square().sum(1)).clamp_min(0)


def squared_radii(features: Tensor, k: int, squared: Squared = squared_double) -> Tensor:
    """The squared distance of every row (n, d) to its k-th nearest other row, (n,).

    Raises ValueError for k below 1, and for k rows or fewer.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"squared_radii: neighbour {k} of {len(features)} rows; k must be from 1 to n - 1")
    radii = []
    for rows in features.split(BLOCK):
        best = torch.empty(len(rows), 0, dtype=torch.float16, device=features.device)
        for others in features.split(BLOCK):
            both = torch.cat((best, squared(rows, others)), dim=1)  # in the wider of the two dtypes
            best = both.topk(min(k + 1, both.shape[1]), largest=False).values  # a row itself is among its nearest
        radii.append(best[:, k])
    return torch.cat(radii)


def overlap(fake: Tensor, real: Tensor, k: int, closed: bool, squared: Squared = squared_double) -> Overlap:
    """All four of sample features fake (m, d) beside reference features real (n, d), float.

    closed: whether a ball holds its border (Kynkäänniemi, ADM) or not (Naeem). squared: how distances are made.
    Raises ValueError for unequal widths, features that are not finite, and k that `squared_radii` refuses.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"overlap: samples {tuple(fake.shape)}, reference {tuple(real.shape)}; both must be rows of d")
    for name, rows in (("samples", fake), ("reference", real)):
        broken = ~rows.isfinite().all(1)
        if broken.any():
            raise ValueError(f"overlap: row {int(broken.nonzero()[0])} of the {name} is NaN or infinite")
    holds = torch.le if closed else torch.lt
    radii_real, radii_fake = squared_radii(real, k, squared), squared_radii(fake, k, squared)
    around_fake = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # reference balls that hold a sample
    held, around_real = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for i in range(0, len(real), BLOCK):
        ours = slice(i, i + BLOCK)
        for j in range(0, len(fake), BLOCK):
            theirs = slice(j, j + BLOCK)
            distance = squared(real[ours], fake[theirs])
            inside = holds(distance, radii_real[ours, None])
            around_fake[theirs] += inside.sum(0)
            held[ours] |= inside.any(1)
            around_real[ours] |= holds(distance, radii_fake[theirs]).any(1)
    return Overlap(
        precision=float((around_fake > 0).double().mean()),
        recall=float(around_real.double().mean()),
        density=float(around_fake.double().mean() / k),
        coverage=float(held.double().mean()),
    )


def precision_recall(fake: Tensor, real: Tensor, k: int = 3) -> Overlap:
    """As Kynkäänniemi et al. define them."""
    return overlap(fake, real, k, closed=True)


def precision_recall_adm(fake: Tensor, real: Tensor, k: int = 3) -> Overlap:
    """As the ADM evaluator computes them; its rounding moves about one sample in 300."""
    return overlap(fake, real, k, closed=True, squared=squared_half)


def density_coverage(fake: Tensor, real: Tensor, k: int = 5) -> Overlap:
    """As Naeem et al. define them, precision and recall with open balls beside."""
    return overlap(fake, real, k, closed=False)
