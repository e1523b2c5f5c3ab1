"""Intervals: against repeated sampling of laws that are known, exact ones against closed forms.

Coverage is counted in T trials with fixed seeds. A true coverage of 95 % gives fewer than 0.95 T - 3.3 sqrt(0.0475 T)
hits once in 2000 (normal approximation), and so does a standard error that is right and off by 3.3 / sqrt(2 T).
"""

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest
import torch
from scipy.stats import t
from torch import Generator, Tensor

from eval import bootstrap
from eval.bootstrap import (
    FrechetInfluence,
    Interval,
    frechet_bias,
    frechet_interval,
    frechet_jackknife,
    inception_interval,
    jackknife_interval,
    kernel_interval,
    mean_interval,
    overlap_left_out,
    share_interval,
)
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.inception_score import equal_splits, inception_scores
from eval.kernel import draw_subsets, gaussian_kernel, kid, mmd_biased
from eval.manifold import Overlap, overlap


def rng(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def statistics(rows: Tensor) -> FeatureStatistics:
    made = FeatureStatistics(rows.shape[1])
    made.update(rows)
    return made


def gaussian(rows: Tensor) -> Gaussian:
    return statistics(rows).gaussian()


def check_coverage(intervals: list[Interval], widest: float) -> None:
    """Of the mean over all trials, with an error that is not too small, nor more than `widest` times too large."""
    trials = len(intervals)
    values = torch.tensor([it.value for it in intervals], dtype=torch.float64)
    truth, spread = float(values.mean()), float(values.std())
    hits = sum(it.low <= truth <= it.high for it in intervals)
    assert hits >= 0.95 * trials - 3.3 * sqrt(0.0475 * trials)
    ratio = sqrt(sum(it.standard_error**2 for it in intervals) / trials) / spread
    assert 1 - 3.3 / sqrt(2 * trials) < ratio < widest + 3.3 / sqrt(2 * trials)


MIX = torch.randn(16, 16, generator=rng(0), dtype=torch.float64) * torch.logspace(0, -1, 16, dtype=torch.float64)
WHITE = Gaussian(torch.zeros(16, dtype=torch.float64), MIX.T @ MIX)


def normal(count: int, generator: Generator, stretch: float = 1.0, shift: float = 0.0) -> Tensor:
    return stretch * torch.randn(count, 16, generator=generator, dtype=torch.float64) @ MIX + shift


@pytest.mark.parametrize(
    ("count", "stretch", "shift", "widest"),
    [
        (400, 1.2, 0.5, 1.2),  # two laws apart: the linear part is nearly all
        (400, 1.0, 0.0, sqrt(2)),  # the same law: none of it is, the error is too large by the root of 2
        (30, 1.2, 0.5, 1.4),  # less than two pictures a feature: the jackknife
        (12, 1.2, 0.5, 1.6),  # fewer than features: singular covariances
    ],
)
def test_frechet_interval_covers_the_average_of_such_samples(
    count: int, stretch: float, shift: float, widest: float
) -> None:
    draws = rng(1)
    found = []
    for _ in range(200):
        rows = normal(count, draws, stretch, shift)
        found.append(frechet_interval(rows.split(150), gaussian(rows), WHITE, count))
    check_coverage(found, widest)
    assert found[0].method.startswith("influence" if count == 400 else "jackknife")


def test_frechet_interval_of_features_that_are_not_gaussian() -> None:
    """As after a ReLU, with two features that are always 0 in the samples."""

    def draw(count: int, stretch: float) -> Tensor:
        rows = (normal(count, draws, stretch) - 0.3).relu()
        rows[:, :2] = 0
        return rows

    draws = rng(2)
    wide = draw(20_000, 1.0)
    wide[:, 0] = torch.randn(20_000, generator=draws)
    reference = gaussian(wide)
    found = []
    for _ in range(200):
        rows = draw(400, 1.15)
        found.append(frechet_interval([rows], gaussian(rows), reference, 400))
    check_coverage(found, 1.25)


def test_influence_is_the_derivative_to_the_weight_of_a_picture() -> None:
    rows, reference = normal(60, rng(3), 1.3, 0.2), gaussian(normal(300, rng(4)))
    own = gaussian(rows)
    own = Gaussian(own.mean, own.cov * 59 / 60)

    def moved(number: int, step: float) -> float:
        weights = torch.full((60,), (1 - step) / 60, dtype=torch.float64)
        weights[number] += step
        mean = weights @ rows
        cov = (weights[:, None] * (rows - mean)).T @ (rows - mean)
        return frechet_distance(Gaussian(mean, cov), reference)

    for number in (0, 7, 59):
        slope = (moved(number, 1e-5) - moved(number, -1e-5)) / 2e-5
        pull = FrechetInfluence(own, reference).of_rows(rows[number : number + 1])
        assert float(pull) == pytest.approx(slope, rel=1e-6)
    parts = [statistics(part) for part in rows.split(25)]
    influence = FrechetInfluence(own, reference)
    for part, sums in zip(rows.split(25), parts, strict=True):
        torch.testing.assert_close(influence.of_sums(sums), influence.of_rows(part).mean(), rtol=1e-9, atol=1e-12)
    assert float(influence.of_rows(rows).mean()) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="16 features on one side, 3 on the other"):
        FrechetInfluence(own, gaussian(rows[:, :3]))


@pytest.mark.parametrize("count", [60, 400])
def test_the_bias_is_what_more_pictures_take_away(count: int) -> None:
    """Average of 400 distances less that of the laws; 4 standard errors and 5 % (order 1 / N^2) of tolerance."""
    draws, law = rng(5), Gaussian(WHITE.mean + 0.5, WHITE.cov * 1.44)
    values = torch.tensor(
        [frechet_distance(gaussian(normal(count, draws, 1.2, 0.5)), WHITE) for _ in range(400)], dtype=torch.float64
    )
    expected = frechet_bias(law, WHITE) / count
    found = float(values.mean()) - frechet_distance(law, WHITE)
    assert abs(found - expected) < 4 * float(values.std()) / 20 + 0.05 * expected
    rows = normal(count, rng(6), 1.2, 0.5)
    assert frechet_interval([rows], gaussian(rows), WHITE, count).bias == pytest.approx(expected, rel=0.3)


def test_resampled_pictures_would_raise_the_distance_by_its_bias_once_more() -> None:
    """Why they are not used: nearly all resamples of a set lie above its value."""
    draws = rng(7)
    rows = normal(200, draws)
    value, bias = frechet_distance(gaussian(rows), WHITE), frechet_bias(WHITE, WHITE) / 200
    again = torch.stack([rows[torch.randint(200, (200,), generator=draws)] for _ in range(100)])
    values = torch.tensor([frechet_distance(gaussian(picked), WHITE) for picked in again])
    assert float(values.mean()) - value == pytest.approx(bias, rel=0.3)
    assert (values > value).double().mean() > 0.95


def test_jackknife_of_the_mean_is_its_standard_error() -> None:
    values = torch.randn(40, generator=rng(8), dtype=torch.float64)
    left = torch.stack([torch.cat((values[:i], values[i + 1 :])).mean() for i in range(40)])
    found, plain = jackknife_interval(float(values.mean()), left, 0.9), mean_interval(values, 0.9)
    assert found.standard_error == pytest.approx(plain.standard_error, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), rel=1e-12)
    expected = t.interval(0.9, 39, loc=float(values.mean()), scale=float(values.std()) / sqrt(40))
    assert (plain.low, plain.high) == pytest.approx(expected, rel=1e-9)


def test_frechet_jackknife_from_sums_is_that_from_rows() -> None:
    rows = normal(40, rng(9), 1.2)
    groups = [statistics(rows[number::20]) for number in range(20)]
    value = frechet_distance(gaussian(rows), WHITE)
    found = frechet_jackknife(groups, WHITE, value)
    other = frechet_interval([rows[:15], rows[15:]], gaussian(rows), WHITE, 40)
    for name in ("value", "standard_error", "low", "high"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=1e-9)


def test_wilson_covers_at_every_share() -> None:
    """Exact coverage of 199 shares from the binomial law: 95 % on average, and nowhere far below."""
    count = 50
    intervals = [share_interval(hits, count) for hits in range(count + 1)]
    shares = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    law = torch.distributions.Binomial(count, shares[:, None]).log_prob(torch.arange(count + 1.0)).exp()  # (199, 51)
    low, high = (torch.tensor([getattr(it, end) for it in intervals]) for end in ("low", "high"))
    covered = (law * ((low <= shares[:, None]) & (shares[:, None] <= high))).sum(1)
    assert covered.mean() == pytest.approx(0.95, abs=0.01) and covered.min() > 0.83
    assert (intervals[0].low, intervals[-1].high) == (0, 1) and intervals[0].high > 0.05
    assert intervals[25].value == 0.5 and intervals[25].low + intervals[25].high == pytest.approx(1)


def test_inception_interval_covers() -> None:
    draws, split = rng(10), equal_splits(600, 3, torch.randperm(600, generator=rng(11)))
    found = []
    for _ in range(200):
        logits = 2 * torch.randn(600, 10, generator=draws, dtype=torch.float64)
        made = inception_interval(logits, split)
        assert made.value == pytest.approx(float(inception_scores(logits, split).mean()), rel=1e-12)
        found.append(made)
    check_coverage(found, 1.1)
    with pytest.raises(ValueError, match=r"splits of \[1, 2\] pictures"):
        inception_interval(torch.zeros(3, 2), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(("shift", "widest"), [(0.5, 1.15), (0.0, sqrt(2))])
def test_kernel_interval_covers(shift: float, widest: float) -> None:
    draws, real = rng(12), torch.randn(300, 8, generator=rng(13), dtype=torch.float64)
    of_subsets, of_all = [], []
    for trial in range(120):
        fake = torch.randn(150, 8, generator=draws, dtype=torch.float64) + shift
        values = kid(fake, real, *draw_subsets(150, 300, np.random.RandomState(trial), 20, 50))
        scatter = float(values.std(correction=0)) / sqrt(20)
        of_subsets.append(kernel_interval(fake, real, float(values.mean()), scatter=scatter))
        value = float(mmd_biased(fake, real, gaussian_kernel))
        of_all.append(kernel_interval(fake, real, value, gaussian_kernel))
    check_coverage(of_subsets, widest)
    check_coverage(of_all, widest)


@pytest.mark.parametrize("closed", [True, False])
def test_a_group_left_out_is_as_if_it_had_never_been(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "BLOCK", 16)
    fake, real = torch.randn(50, 3, generator=rng(14)), torch.randn(45, 3, generator=rng(15))
    left = overlap_left_out(fake, real, 3, closed, groups=7)
    for out in range(7):
        kept = torch.arange(50) % 7 != out
        expected = overlap(fake[kept], real, 3, closed)
        assert (float(left.recall[out]), float(left.coverage[out])) == (expected.recall, expected.coverage)
    whole = overlap(fake, real, 3, closed)
    assert float((left.balls > 0).double().mean()) == whole.precision
    assert float(left.balls.double().mean() / 3) == pytest.approx(whole.density, rel=1e-12)
    with pytest.raises(ValueError, match="5 samples in 2 groups, neighbour 3"):
        overlap_left_out(fake[:5], real, 3, closed, groups=2)


def test_recall_and_coverage_intervals_cover() -> None:
    """Never too narrow; the jackknife may be wide where a score hangs on nearest neighbours."""
    draws, real = rng(16), torch.randn(100, 4, generator=rng(17))
    found: dict[str, list[Interval]] = {"recall": [], "coverage": []}
    for _ in range(100):
        fake = 0.8 * torch.randn(80, 4, generator=draws)
        whole: Overlap = overlap(fake, real, 3, True)
        left = overlap_left_out(fake, real, 3, True, groups=10)
        for name, them in found.items():
            them.append(jackknife_interval(getattr(whole, name), getattr(left, name)))
    for them in found.values():
        check_coverage(them, 1.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(torch.ones(1)), "of two at least"),
        (lambda: share_interval(3, 2), "3 hits of 2 pictures"),
        (lambda: jackknife_interval(0.0, torch.ones(1)), "each group left out"),
        (lambda: frechet_interval([torch.ones(3, 16)], WHITE, WHITE, 48), "3 rows for 48 samples"),
    ],
)
def test_what_cannot_have_an_interval(call: Callable[[], Interval], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
