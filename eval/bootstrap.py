"""How far a score would move with another draw of the samples: standard errors and intervals, one method a kind of score.

The reference is held fixed, and N too: an interval of fid@N covers what fid@N is on average over sample sets of N, bias
included. Samples count as independent draws, so for balanced classes it is too wide.

Pictures are not resampled with replacement. Such a set repeats pictures, so it is poorer than the set it comes from: its
Fréchet distance lies above the value by about the bias once more, its Inception Score, recall and coverage lie below,
and the interval misses what it should cover. Instead:

- a mean over pictures (density, LPIPS, PSNR, ...): its standard error; a share of pictures (accuracy, precision):
  Wilson's interval (Wilson 1927);
- a smooth function of means (Fréchet distance, Inception Score, kernel distance): the standard error of its
  linearisation, the mean of one influence value per picture (Hampel 1974; infinitesimal jackknife, Jaeckel 1972).
  Where the two laws are nearly equal it is too wide by up to sqrt(2), never too narrow;
- anything else (recall, coverage, Fréchet distance of few pictures): the jackknife over groups, whose variance is not
  too small on average whatever the statistic (Efron and Stein 1981).

Axes: n samples, m reference rows, d features, K classes, G groups.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import hypot, sqrt
from typing import Any

import torch
from scipy.special import ndtri, stdtrit
from torch import Tensor

from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.kernel import Kernel, polynomial_kernel
from eval.manifold import BLOCK, Squared, squared_double

LEVEL = 0.95
GROUPS = 20  # of the jackknife
PER_FEATURE = 3  # pictures for each feature from which on a Fréchet distance is linearised
OTHERS = 2048  # rows of each set that stand for it in the mean kernel of a picture


@dataclass(frozen=True)
class Interval:
    """low .. high holds the average score of such samples in `level` of all cases. method: how it was made, in words.

    bias: of a Fréchet distance, how far the value lies above that of endless samples, about as 1 / N (`frechet_bias`).
    """

    value: float
    standard_error: float
    low: float
    high: float
    level: float
    method: str
    bias: float | None = None

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


# ---- means and shares


def mean_interval(values: Tensor, level: float = LEVEL) -> Interval:
    """Of the mean of one value per picture (n,), such as PSNR, LPIPS, or balls around a sample over k (density).

    Raises ValueError for fewer than two values.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"mean_interval: one value per picture, of two at least; got {tuple(values.shape)}")
    values = values.double()
    error = float(values.std()) / sqrt(len(values))
    return _student(float(values.mean()), error, len(values) - 1, level, "standard error of a mean")


def share_interval(hits: int, count: int, level: float = LEVEL) -> Interval:
    """Of the share hits / count of pictures (accuracy, precision): Wilson's, which stays in [0, 1] and is right near both.

    Raises ValueError where hits is not within 0 .. count, or count is 0.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"share_interval: {hits} hits of {count} pictures")
    share, z = hits / count, float(ndtri((1 + level) / 2))
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    error = sqrt(share * (1 - share) / count)
    return Interval(share, error, max(0.0, middle - half), min(1.0, middle + half), level, "Wilson")


# ---- linearised: Fréchet distance, Inception Score, kernel distance


class FrechetInfluence:
    """By how much each picture of `a` pulls at frechet_distance(a, b), to first order.

    With T the optimal map from N(0, A) to N(0, B), the derivative is 2 (mean_a - mean_b) to the mean and 1 - T to the
    covariance, so a picture x has 2 (mean_a - mean_b).(x - mean_a) + (x - mean_a)'(1 - T)(x - mean_a), less its mean.
    Where A is singular (features that no sample moves), T is the map of the directions that it has. The influences of
    b's pictures are those of the two exchanged. Raises ValueError for unequal widths.
    """

    def __init__(self, a: Gaussian, b: Gaussian) -> None:
        if a.mean.shape != b.mean.shape:
            raise ValueError(f"FrechetInfluence: {len(a.mean)} features on one side, {len(b.mean)} on the other")
        values, vectors = torch.linalg.eigh(a.cov)
        kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        root = (vectors * values.sqrt()) @ vectors.T
        inverse = (vectors / values.sqrt()) @ vectors.T
        squares, axes = torch.linalg.eigh(root @ b.cov @ root)
        transport = inverse @ (axes * squares.clamp_min(0).sqrt()) @ axes.T @ inverse
        self.mean = a.mean
        self.slope = 2 * (a.mean - b.mean)  # (d,)
        self.curve = torch.eye(len(a.mean), dtype=a.cov.dtype, device=a.cov.device) - transport  # (d, d)
        self.centre = (self.curve * a.cov).sum()

    def of_rows(self, features: Tensor) -> Tensor:
        """features (B, d), any float dtype -> (B,), float64."""
        x = features.to(self.mean) - self.mean
        return x @ self.slope + ((x @ self.curve) * x).sum(1) - self.centre

    def of_sums(self, sums: FeatureStatistics) -> Tensor:
        """The mean influence of the pictures that were added up, a scalar: for sums of groups, where no rows are kept."""
        mean = sums.total.to(self.mean) / sums.count
        square = sums.outer.to(self.mean) / sums.count
        square = (
            square - torch.outer(mean, self.mean) - torch.outer(self.mean, mean) + torch.outer(self.mean, self.mean)
        )
        return (mean - self.mean) @ self.slope + (self.curve * square).sum() - self.centre


def frechet_interval(
    rows: Iterable[Tensor],
    samples: Gaussian,
    reference: Gaussian,
    count: int,
    value: float | None = None,
    level: float = LEVEL,
) -> Interval:
    """Of frechet_distance(samples, reference), with its bias. rows: blocks (B, d) of the samples' features, once.

    count: how many samples, n. value: the distance, where it is known already, by whatever route. For n below
    PER_FEATURE x d the jackknife over at most GROUPS groups, G more distances; else from the influence of every picture,
    in one pass of O(n d^2). Raises ValueError where the rows are not n in number, and for fewer than four.
    """
    dim = len(samples.mean)
    value = frechet_distance(samples, reference) if value is None else value
    bias = frechet_bias(samples, reference) / count
    if count >= PER_FEATURE * dim:
        influence = FrechetInfluence(samples, reference)
        pulls = torch.cat([influence.of_rows(block) for block in rows])
        _same_count(len(pulls), count)
        made = _student(value, float(pulls.std()) / sqrt(count), count - 1, level, "influence of every picture")
        return replace(made, bias=bias)
    groups = [FeatureStatistics(dim, samples.mean.device) for _ in range(min(GROUPS, count // 2))]
    seen = 0
    for block in rows:
        place = torch.arange(seen, seen + len(block)) % max(1, len(groups))
        for number, group in enumerate(groups):
            group.update(block[(place == number).to(block.device)])
        seen += len(block)
    _same_count(seen, count)
    return replace(frechet_jackknife(groups, reference, value, level), bias=bias)


def frechet_jackknife(
    groups: Sequence[FeatureStatistics], reference: Gaussian, value: float, level: float = LEVEL
) -> Interval:
    """The same from sums of equal groups of the samples, each left out once: G Fréchet distances.

    value: that of all samples. Raises ValueError for fewer than two groups.
    """
    left = []
    for out in range(len(groups)):
        rest = FeatureStatistics(len(reference.mean), reference.mean.device)
        for number, group in enumerate(groups):
            if number != out:
                rest.merge(group)
        left.append(frechet_distance(rest.gaussian(), reference))
    return jackknife_interval(value, torch.tensor(left, dtype=torch.float64), level)


def frechet_bias(samples: Gaussian, reference: Gaussian) -> float:
    """b such that fid@N is above the distance of the two laws by about b / N: how a score moves with N.

    Second order, for Gaussian features (Chong and Forsyth 2020, arXiv:1911.07023, find the 1 / N; the constant is from
    the second derivative of the trace of the root):

        tr A + 1/2 sum_ij s_i s_j / (s_i + s_j) + 1/4 sum_i s_i,   s the roots of the eigenvalues of A B
    """
    values, vectors = torch.linalg.eigh(samples.cov)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    s = torch.linalg.eigvalsh(root @ reference.cov @ root).clamp_min(0).sqrt()
    pairs = s[:, None] * s / (s[:, None] + s).clamp_min(torch.finfo(s.dtype).tiny)
    return float(samples.cov.trace() + pairs.sum() / 2 + s.sum() / 4)


def inception_interval(
    logits: Tensor, split: Tensor, dtype: torch.dtype = torch.float64, level: float = LEVEL
) -> Interval:
    """Of the mean Inception Score of the splits. logits (n, K); split int64 (n,); dtype: of the softmax.

    The influence of a picture on its split's score is the score times what its own divergence KL(p, q) exceeds the
    split's mean by. Where only the scores of ten splits were kept, `mean_interval` of these serves, more widely.
    Raises ValueError for a split of fewer than two pictures.
    """
    counts = split.bincount()
    if not len(counts) or counts.min() < 2:
        raise ValueError(f"inception_interval: splits of {counts.tolist()} pictures, each needs two")
    _same_count(len(logits), len(split))
    blocks = [
        (part, where.to(logits.device)) for part, where in zip(logits.split(BLOCK), split.split(BLOCK), strict=True)
    ]
    total = torch.zeros(len(counts), logits.shape[1], dtype=torch.float64, device=logits.device)
    for part, where in blocks:
        total.index_add_(0, where, part.to(dtype).softmax(1).double())
    q = (total / counts.to(total)[:, None]).log()
    divergence = []
    for part, where in blocks:
        p = part.to(dtype).softmax(1).double()
        divergence.append((torch.special.xlogy(p, p) - torch.where(p > 0, p * q[where], 0)).sum(1))
    divergence = torch.cat(divergence).cpu()
    parts = [divergence[split == number] for number in range(len(counts))]
    scores = [float(part.mean().exp()) for part in parts]
    variance = sum(score**2 * float(part.var()) / len(part) for score, part in zip(scores, parts, strict=True))
    error = sqrt(variance) / len(parts)
    return _student(sum(scores) / len(parts), error, len(split) - len(parts), level, "influence of every picture")


def kernel_interval(
    fake: Tensor,
    real: Tensor,
    value: float,
    kernel: Kernel = polynomial_kernel,
    scatter: float = 0.0,
    level: float = LEVEL,
) -> Interval:
    """Of a squared maximum mean discrepancy, KID or CMMD, over draws of the samples fake (n, d); real (m, d) is fixed.

    The influence of a sample is twice its mean kernel with the samples less that with the reference, each over at most
    OTHERS rows spread evenly. scatter: the standard error that drawing subsets adds, their deviation over the root of
    their number (`eval.kernel.kid`).
    """
    near, far = (rows[:: -(-len(rows) // OTHERS)].double() for rows in (fake, real))
    pulls = torch.cat(
        [
            2 * (kernel(rows, near).mean(1) - kernel(rows, far).mean(1))
            for rows in (part.double() for part in fake.split(BLOCK))
        ]
    )
    error = hypot(float(pulls.std()) / sqrt(len(fake)), scatter)
    method = "influence of every picture" + (", and the scatter of subsets" if scatter else "")
    return _student(value, error, len(fake) - 1, level, method)


# ---- jackknife: recall, coverage, whatever is symmetric in the samples


def jackknife_interval(value: float, left_out: Tensor, level: float = LEVEL) -> Interval:
    """Of any statistic that is symmetric in the samples, from its values (G,) with each of G equal groups left out.

    Raises ValueError for fewer than two groups.
    """
    groups = len(left_out)
    if left_out.ndim != 1 or groups < 2:
        raise ValueError(f"jackknife_interval: values with each group left out, got {tuple(left_out.shape)}")
    spread = left_out.double() - left_out.double().mean()
    error = sqrt((groups - 1) / groups * float(spread.square().sum()))
    return _student(value, error, groups - 1, level, f"jackknife over {groups} groups")


@dataclass(frozen=True)
class LeftOut:
    """recall and coverage (G,), with each group of samples left out; balls int64 (n,), of the reference, around each."""

    recall: Tensor
    coverage: Tensor
    balls: Tensor


def overlap_left_out(
    fake: Tensor, real: Tensor, k: int, closed: bool, groups: int = GROUPS, squared: Squared = squared_double
) -> LeftOut:
    """What `eval.manifold.overlap` would give without each group of the samples, at the cost of one more such pass.

    Samples fake (n, d) are dealt to groups in turn; real (m, d) stays. k, closed, squared: as there.
    Raises ValueError where a group less leaves no k neighbours, or there are fewer than two groups.
    """
    if groups < 2 or len(fake) - -(-len(fake) // groups) <= k:
        raise ValueError(f"overlap_left_out: {len(fake)} samples in {groups} groups, neighbour {k}")
    holds = torch.le if closed else torch.lt
    members = [fake[number::groups] for number in range(groups)]
    around = _radii(real, [real], k, squared)[0]  # (m,)
    radii = [_radii(part, members, k, squared, own) for own, part in enumerate(members)]  # each (G, n / G)
    held = torch.zeros(groups, len(real), dtype=torch.bool, device=real.device)
    hits = torch.zeros(groups, len(real), dtype=torch.bool, device=real.device)  # a group alone reaches a ball
    balls = torch.zeros(len(fake), dtype=torch.int64, device=real.device)
    for start in range(0, len(real), BLOCK):
        ours = slice(start, start + BLOCK)
        for own, part in enumerate(members):
            for begin in range(0, len(part), BLOCK):
                theirs = slice(begin, begin + BLOCK)
                distance = squared(real[ours], part[theirs])
                inside = holds(distance, around[ours, None])
                hits[own, ours] |= inside.any(1)
                balls[own::groups][theirs] += inside.sum(0)
                for out in range(groups):
                    if out != own:
                        held[out, ours] |= holds(distance, radii[own][out, theirs]).any(1)
    others = hits.sum(0) - hits.long()  # (G, m): groups but one that reach a ball
    return LeftOut(held.double().mean(1).cpu(), (others > 0).double().mean(1).cpu(), balls.cpu())


def _radii(rows: Tensor, parts: Sequence[Tensor], k: int, squared: Squared, own: int = 0) -> Tensor:
    """Squared distance of every row to its k-th nearest in all parts but one, for each that is left out: (G, n).

    own: the part that the rows are in, where each row is its own nearest. With one part, over that part.
    """
    found = []
    for block in rows.split(BLOCK):
        nearest = []  # of every part, (B, k + 1)
        for part in parts:
            best = torch.empty(len(block), 0, dtype=torch.float16, device=rows.device)
            for others in part.split(BLOCK):
                both = torch.cat((best, squared(block, others)), dim=1)
                best = both.topk(min(k + 1, both.shape[1]), largest=False).values
            nearest.append(best)
        without = []
        for out in range(len(parts)):
            kept = [best for number, best in enumerate(nearest) if number != out or out == own]
            without.append(torch.cat(kept, dim=1).topk(k + 1, largest=False).values[:, k])
        found.append(torch.stack(without))
    return torch.cat(found, dim=1)


def _student(value: float, error: float, freedom: int, level: float, method: str) -> Interval:
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return Interval(value, error, value - half, value + half, level, method)


def _same_count(found: int, count: int) -> None:
    if found != count:
        raise ValueError(f"bootstrap: {found} rows for {count} samples; give all of them, once")
