"""The Fréchet distance against closed forms and other implementations; its statistics against the whole array."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.metric_fid import fid_statistics_to_metric

from eval.frechet import FeatureStatistics, Gaussian, frechet_distance


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim: int, rank: int, seed: int) -> Tensor:
    factor = normal(dim, rank, seed=seed)
    return factor @ factor.T / rank


def gathered(features: Tensor, batch: int) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("rank", [12, 5])
def test_covariances_that_commute_leave_the_roots_apart(rank: int) -> None:
    """With common eigenvectors the distance is |shift|^2 + sum (sqrt a - sqrt b)^2, for eigenvalues a and b."""
    basis = torch.linalg.qr(normal(12, 12))[0]
    a, b = normal(2, 12, seed=1).square()
    a[rank:] = 0
    b[: 12 - rank] = 0  # where rank is 5, not one direction is common
    mean_a, mean_b = normal(2, 12, seed=2)
    value = frechet_distance(Gaussian(mean_a, basis @ a.diag() @ basis.T), Gaussian(mean_b, basis @ b.diag() @ basis.T))
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert value == pytest.approx(float(expected), abs=1e-10)


def test_lines_in_space() -> None:
    """Two covariances of rank 1, u u' and v v', leave tr (A B)^(1/2) = |u.v|."""
    u, v = normal(2, 30)
    value = frechet_distance(Gaussian(u * 0, torch.outer(u, u)), Gaussian(v * 0, torch.outer(v, v)))
    assert value == pytest.approx(float(u @ u + v @ v - 2 * (u @ v).abs()), abs=1e-9)


def test_a_gaussian_has_no_distance_from_itself() -> None:
    for rank in (40, 13):
        cov = covariance(40, rank, seed=3)
        assert abs(frechet_distance(Gaussian(normal(40), cov), Gaussian(normal(40), cov))) < 1e-10 * float(cov.trace())


@pytest.mark.parametrize("ranks", [(40, 40), (40, 7), (7, 7)])
def test_it_is_symmetric_and_does_not_know_the_axes(ranks: tuple[int, int]) -> None:
    a, b = (Gaussian(normal(40, seed=rank), covariance(40, rank, seed=i)) for i, rank in enumerate(ranks))
    turn = torch.linalg.qr(normal(40, 40, seed=5))[0]
    turned = [Gaussian(turn @ it.mean, turn @ it.cov @ turn.T) for it in (a, b)]
    value = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(*turned) == pytest.approx(value, rel=1e-10)


def test_agreement_with_scipy_and_torch_fidelity() -> None:
    one, two = normal(500, 64) @ normal(64, 64, seed=1), normal(400, 64, seed=2) @ normal(64, 64, seed=3) + 0.3
    value = frechet_distance(gathered(one, 100).gaussian(), gathered(two, 100).gaussian())
    stats = [{"mu": x.mean(0).numpy(), "sigma": np.cov(x.numpy(), rowvar=False)} for x in (one, two)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    root = scipy.linalg.sqrtm(stats[0]["sigma"] @ stats[1]["sigma"])
    shift = stats[0]["mu"] - stats[1]["mu"]
    textbook = shift @ shift + np.trace(stats[0]["sigma"] + stats[1]["sigma"] - 2 * root.real)
    assert value == pytest.approx(theirs, rel=1e-10)
    assert value == pytest.approx(float(textbook), rel=1e-10)


@pytest.mark.parametrize("count", [30, 500])  # fewer and more than the features
def test_compat_gives_every_digit_of_torch_fidelity(count: int) -> None:
    one, two = normal(count, 64), normal(count + 10, 64, seed=1) @ normal(64, 64, seed=2) + 0.2
    sides = [gathered(one, 7).gaussian(), gathered(two, 7).gaussian()]
    stats = [{"mu": side.mean.numpy(), "sigma": side.cov.numpy()} for side in sides]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*sides, compat="eigvals") == theirs
    assert frechet_distance(*sides) == pytest.approx(theirs, rel=1e-6)


def test_the_product_of_singular_covariances_loses_what_the_factors_keep() -> None:
    """A set of rank 20 in 200 dimensions against itself: 0 by factors, off by the root of the rounding by the product."""
    own = gathered(normal(21, 200), 21).gaussian()
    assert abs(frechet_distance(own, own)) < 1e-10
    assert abs(frechet_distance(own, own, compat="eigvals")) > 1e-6


@pytest.mark.parametrize("count", [40, 500])
def test_divisor_n_shrinks_the_covariance_alone(count: int) -> None:
    statistics = gathered(normal(count, 64) + 5, 13)
    sample, population = statistics.gaussian(), statistics.gaussian("n")
    assert_close(population.cov, sample.cov * (count - 1) / count, atol=1e-12, rtol=0)
    assert_close(population.mean, sample.mean, atol=0, rtol=0)
    shrunk = 1 - ((count - 1) / count) ** 0.5  # of every root of an eigenvalue
    expected = float(sample.cov.trace()) * shrunk**2
    assert frechet_distance(sample, population) == pytest.approx(expected, abs=1e-9)


def test_the_distance_of_spatial_features_does_not_know_their_layout() -> None:
    """sFID is this distance on flattened maps: channels first or last is one permutation of the features on both sides."""
    maps = [normal(80, 3, 4, 4, seed=i) for i in range(2)]
    first = [gathered(it.flatten(1), 20).gaussian() for it in maps]
    last = [gathered(it.movedim(1, -1).flatten(1), 20).gaussian() for it in maps]
    assert frechet_distance(*last) == pytest.approx(frechet_distance(*first), rel=1e-10)


def test_fewer_pictures_than_features() -> None:
    """The exact value comes from singular values of the centred rows; it is kept with and without the rows."""
    one, two = normal(30, 64), normal(40, 64, seed=1) + 0.2
    a, b = gathered(one, 7).gaussian(), gathered(two, 7).gaussian()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (one, two)]
    common = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    shift = (one.mean(0) - two.mean(0)).square().sum()
    exact = float(shift + sum(x.square().sum() for x in centred) - 2 * common)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)
    assert frechet_distance(Gaussian(a.mean, a.cov), Gaussian(b.mean, b.cov)) == pytest.approx(exact, rel=1e-7)


def test_many_pictures_of_dependent_features() -> None:
    """Features that repeat each other give singular covariances however many pictures there are: twice the distance."""
    one, two = normal(300, 20), 1.5 * normal(300, 20, seed=1)
    value = frechet_distance(gathered(one, 100).gaussian(), gathered(two, 100).gaussian())
    twice = [gathered(torch.cat((x, x), dim=1), 100).gaussian() for x in (one, two)]
    assert frechet_distance(*twice) == pytest.approx(2 * value, rel=1e-7)


@pytest.mark.parametrize("count", [40, 500])  # fewer and more than the features
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_batches_of_any_size_give_the_statistics_of_the_whole(count: int, batch: int) -> None:
    features = normal(count, 64) + 5
    statistics, whole = gathered(features, batch), gathered(features, count)
    assert_close(statistics.mean(), features.mean(0), atol=1e-10, rtol=0)
    assert_close(statistics.cov(), features.T.cov(), atol=1e-10, rtol=0)
    assert abs(frechet_distance(statistics.gaussian(), whole.gaussian())) < 1e-10
    other = gathered(normal(count, 64, seed=1), 100).gaussian()
    values = [frechet_distance(it.gaussian(), other) for it in (statistics, whole)]
    assert values[0] == pytest.approx(values[1], abs=1e-10)


@pytest.mark.parametrize("count", [40, 500])
def test_the_order_of_pictures_has_no_part(count: int) -> None:
    features = normal(count, 64)
    shuffled = features[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    other = gathered(normal(count, 64, seed=1), 9).gaussian()
    values = [frechet_distance(gathered(it, 9).gaussian(), other) for it in (features, shuffled)]
    assert values[0] == pytest.approx(values[1], abs=1e-10)


@pytest.mark.parametrize(("first", "second"), [(10, 20), (10, 100), (100, 10), (0, 30)])
def test_shares_of_two_processes_add_up(first: int, second: int) -> None:
    features = normal(first + second, 64)
    merged, whole = gathered(features[:first], 8), gathered(features, 8)
    merged.merge(gathered(features[first:], 8))
    assert merged.count == whole.count
    assert_close(merged.gaussian().cov, whole.gaussian().cov, atol=1e-12, rtol=0)
    assert (merged.gaussian().rows is None) == (whole.gaussian().rows is None)


def test_memory_does_not_grow_with_the_pictures() -> None:
    """After more pictures than features are left: a mean, a matrix and no row, as if there had been a tenth of them."""
    few, many = (gathered(normal(count, 48), 100) for count in (100, 1000))
    for statistics in (few, many):
        held = [it for it in vars(statistics).values() if isinstance(it, Tensor)]
        assert statistics.rows is None and sum(it.numel() for it in held) == 48 + 48 * 48
        assert all(it.untyped_storage().nbytes() == 8 * it.numel() for it in held)


def test_constant_features_and_few_pictures_at_full_accuracy() -> None:
    """Singular covariances against singular values of exact factors, to 1e-9; by the product of the two they are off."""
    for count, constant in ((400, 20), (60, 0)):
        one, two = normal(count, 100) @ normal(100, 100, seed=2), normal(count, 100, seed=1) @ normal(100, 100, seed=3)
        one[:, :constant], two[:, :constant] = 0.3, 0.3
        centred = [(x - x.mean(0)) / (count - 1) ** 0.5 for x in (one, two)]
        common = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
        shift = (one.mean(0) - two.mean(0)).square().sum()
        exact = float(shift + sum(x.square().sum() for x in centred) - 2 * common)
        sides = [gathered(x, 50).gaussian() for x in (one, two)]
        assert frechet_distance(*sides) == pytest.approx(exact, rel=1e-9)
        bare = [Gaussian(side.mean, side.cov) for side in sides]  # as a file of statistics has it
        assert frechet_distance(*bare) == pytest.approx(exact, rel=1e-9)
        assert frechet_distance(*bare, compat="eigvals") != pytest.approx(exact, rel=1e-9)


def test_half_precision_features_are_summed_in_double() -> None:
    features = normal(200, 16).half()
    assert_close(gathered(features, 13).cov(), features.double().T.cov(), atol=1e-12, rtol=0)


def test_what_cannot_be_summed_is_named() -> None:
    statistics = gathered(normal(5, 16), 5)
    broken = normal(4, 16)
    broken[3, 2] = float("inf")
    with pytest.raises(ValueError, match="picture 8 are NaN or infinite"):
        statistics.update(broken)
    with pytest.raises(ValueError, match=r"made for features \(B, 16\), got \(4, 8\)"):
        statistics.update(normal(4, 8))
    with pytest.raises(ValueError, match="16 features here, 8 in the other"):
        statistics.merge(FeatureStatistics(8))
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        gathered(normal(1, 16), 1).gaussian()
    with pytest.raises(ValueError, match="no features yet"):
        FeatureStatistics(16).mean()
    with pytest.raises(ValueError, match="not by 'm'"):
        statistics.gaussian("m")
    with pytest.raises(ValueError, match="\"eigvals\" or None, not 'sqrtm'"):
        frechet_distance(statistics.gaussian(), statistics.gaussian(), compat="sqrtm")
    with pytest.raises(ValueError, match="8 features on one side, 16 on the other"):
        frechet_distance(Gaussian(normal(8), covariance(8, 8, 0)), statistics.gaussian())
