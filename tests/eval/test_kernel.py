"""Kernel distances against sums over pairs, laws they must obey, and torch-fidelity and torchmetrics."""

from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import poly_mmd

from eval import kernel
from eval.kernel import Kernel, cmmd, draw_subsets, gaussian_kernel, kid, mmd_biased, mmd_unbiased, polynomial_kernel

KERNELS = [
    polynomial_kernel,
    partial(polynomial_kernel, degree=2, gamma=0.3, shift=0.5),
    partial(gaussian_kernel, sigma=2.0),
]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kernels_of_two_vectors() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])  # x.y = 1, |x - y|^2 = 13
    assert_close(polynomial_kernel(x, y), torch.tensor([[1.5**3]]))
    assert_close(polynomial_kernel(x, y, degree=2, gamma=2.0, shift=1.0), torch.tensor([[9.0]]))
    assert_close(gaussian_kernel(x, y, sigma=2.0), torch.tensor([[-13 / 8]]).exp())


@pytest.mark.parametrize("function", KERNELS)
@pytest.mark.parametrize("block", [1, 3, 2048])
def test_both_estimators_are_means_over_pairs(function: Kernel, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = normal(7, 5), normal(4, 5, seed=1)

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(float(function(a[None], b[None])) for a, b in pairs) / len(pairs)

    across = 2 * mean(list(product(x, y)))
    unbiased = mean(list(permutations(x, 2))) + mean(list(permutations(y, 2))) - across
    biased = mean(list(product(x, x))) + mean(list(product(y, y))) - across
    assert float(mmd_unbiased(x, y, function)) == pytest.approx(unbiased, rel=1e-12)
    assert float(mmd_biased(x, y, function)) == pytest.approx(biased, rel=1e-12)


def test_subsets_of_a_population_average_to_its_distance() -> None:
    """Unbiased: over all subsets of 3 of 6 rows each, the mean is what the 6 rows give, whichever they are paired with."""
    x, y = normal(6, 3), normal(6, 3, seed=1) + 1
    subsets = torch.combinations(torch.arange(6), 3)
    pairs = torch.cartesian_prod(torch.arange(len(subsets)), torch.arange(len(subsets)))
    values = kid(x, y, subsets[pairs[:, 0]], subsets[pairs[:, 1]])
    assert float(values.mean()) == pytest.approx(float(mmd_unbiased(x, y, polynomial_kernel)), rel=1e-12)


@pytest.mark.parametrize("function", KERNELS)
def test_order_and_sides_have_no_part(function: Kernel) -> None:
    x, y = normal(30, 8), normal(20, 8, seed=1) + 0.2
    shuffled = x[torch.randperm(30, generator=torch.Generator().manual_seed(2))]
    for estimator in (mmd_unbiased, mmd_biased):
        value = estimator(x, y, function)
        assert_close(estimator(shuffled, y, function), value, rtol=1e-10, atol=0)
        assert_close(estimator(y, x, function), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("function", KERNELS)
def test_a_set_has_no_biased_distance_from_itself(function: Kernel) -> None:
    x = normal(30, 8)
    assert abs(float(mmd_biased(x, x, function))) < 1e-12


def test_equal_laws_give_nothing_on_average() -> None:
    """400 independent pairs of sets: the mean is within 4 standard errors of 0 (fails once in 16 000 seeds)."""
    sets = normal(400, 2, 20, 4).unbind()
    values = torch.stack([mmd_unbiased(x, y, polynomial_kernel) for x, y in sets])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert float(values.min()) < 0


@pytest.mark.parametrize("name", ["poly", "rbf"])
def test_agreement_with_torch_fidelity(name: str) -> None:
    fake, real = normal(300, 32), normal(250, 32, seed=1) + 0.1
    theirs = kid_features_to_metric(
        fake, real, kid_subsets=7, kid_subset_size=100, kid_kernel=name, rng_seed=2020, verbose=False
    )
    rows = draw_subsets(300, 250, np.random.RandomState(2020), 7, 100)
    ours = kid(fake, real, *rows, {"poly": polynomial_kernel, "rbf": gaussian_kernel}[name])
    assert float(ours.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert float(ours.std(correction=0)) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_agreement_with_torchmetrics() -> None:
    x, y = normal(40, 16), normal(40, 16, seed=1) + 0.3
    assert_close(mmd_unbiased(x, y, polynomial_kernel), poly_mmd(x, y), rtol=1e-10, atol=0)


def test_subsets_have_no_row_twice_and_fall_anywhere() -> None:
    fake, real = draw_subsets(30, 50, np.random.RandomState(0), 200, 20)
    for rows, count in ((fake, 30), (real, 50)):
        assert rows.shape == (200, 20) and rows.dtype == torch.int64
        assert all(len(subset.unique()) == 20 for subset in rows)
        assert rows.unique().tolist() == list(range(count))


def test_cmmd_of_two_points() -> None:
    """Two unit vectors at a right angle have |x - y|^2 = 2: 1000 (1 + 1 - 2 exp(-2 / 200))."""
    x, y = torch.eye(2)[:1], torch.eye(2)[1:]
    assert cmmd(x, y) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)
    assert cmmd(x, y, sigma=1.0, scale=1.0) == pytest.approx(2 * (1 - np.exp(-1)), rel=1e-12)


def test_single_precision_features_are_summed_in_double() -> None:
    x, y = normal(50, 16).float(), normal(60, 16, seed=1).float()
    assert cmmd(x, y) == cmmd(x.double(), y.double())
    assert mmd_unbiased(x, y, polynomial_kernel).dtype == torch.float64


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(n, d\) and \(m, d\), got \(5, 3\) and \(5, 4\)"):
        mmd_unbiased(normal(5, 3), normal(5, 4), polynomial_kernel)
    with pytest.raises(ValueError, match="sets of 1 and 5 rows, each needs at least 2"):
        mmd_unbiased(normal(1, 3), normal(5, 3), polynomial_kernel)
    with pytest.raises(ValueError, match="sets of 0 and 5 rows"):
        cmmd(normal(0, 3), normal(5, 3))
    with pytest.raises(ValueError, match="subsets of 100 rows from sets of 200 and 50"):
        draw_subsets(200, 50, np.random.RandomState(0), 3, 100)
    with pytest.raises(ValueError, match="2 subsets of the samples, 1 of the reference"):
        rows = torch.arange(4).view(2, 2)
        kid(normal(5, 3), normal(5, 3), rows, rows[:1])
