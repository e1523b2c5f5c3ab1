"""Overlap of two sets on a line by hand, against whole distance matrices, and against torch-fidelity."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.metric_prc import prc_features_to_metric

from eval import manifold
from eval.manifold import (
    Overlap,
    density_coverage,
    overlap,
    precision_recall,
    precision_recall_adm,
    squared_double,
    squared_half,
    squared_radii,
)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def line(*places: float) -> Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_balls_on_a_line() -> None:
    """k = 1. Reference 0 1 3 has radii 1 1 2, samples 2 5 9 have radii 3 3 4; 2 and 5 lie on borders of balls."""
    real, fake = line(0, 1, 3), line(2, 5, 9)
    assert_close(squared_radii(real, 1), torch.tensor([1, 1, 4], dtype=torch.float64))
    assert_close(squared_radii(fake, 1), torch.tensor([9, 9, 16], dtype=torch.float64))
    # closed: 2 is in the balls of 1 and 3, 5 in that of 3; all of the reference is in the ball of 2
    assert overlap(fake, real, 1, closed=True) == Overlap(2 / 3, 1.0, 1.0, 2 / 3)
    # open: 2 is in the ball of 3 alone, 5 in none
    assert overlap(fake, real, 1, closed=False) == Overlap(1 / 3, 1.0, 1 / 3, 1 / 3)


def test_radius_reaches_to_the_kth_other_row() -> None:
    places = line(0, 1, 3, 7)
    for k, radii in {1: (1, 1, 2, 4), 2: (3, 2, 3, 6), 3: (7, 6, 4, 7)}.items():
        assert_close(squared_radii(places, k), torch.tensor(radii, dtype=torch.float64) ** 2)


def test_copies_of_a_row_have_no_distance() -> None:
    places = line(0, 0, 0, 5)
    assert squared_radii(places, 2).tolist() == [0, 0, 0, 25]


def test_equal_sets_overlap_wholly_and_far_ones_not_at_all() -> None:
    real = normal(50, 8)
    same, far = precision_recall(real, real), precision_recall(real + 100, real)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert far == Overlap(0.0, 0.0, 0.0, 0.0) and far.f_score == 0


def test_samples_of_one_mode_are_precise_and_recall_little() -> None:
    modes = 20 * normal(10, 8)
    real, fake = modes.repeat(20, 1) + normal(200, 8, seed=1), modes[0] + normal(200, 8, seed=2)
    found = density_coverage(fake, real)
    assert found.precision > 0.8 and found.coverage <= 0.1 and found.recall <= 0.1


@pytest.mark.parametrize("block", [1, 7, 2048])
@pytest.mark.parametrize("closed", [False, True])
def test_blocks_of_any_size_give_what_whole_matrices_give(
    block: int, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifold, "BLOCK", block)
    real = torch.cat((normal(30, 3), normal(10, 3, seed=1) + 8))
    fake, k = torch.cat((normal(22, 3, seed=2), normal(8, 3, seed=3) - 8)), 5
    radii = [torch.cdist(x, x).kthvalue(k + 1).values for x in (real, fake)]
    between = torch.cdist(real, fake)
    holds = torch.le if closed else torch.lt
    in_real, in_fake = holds(between, radii[0][:, None]), holds(between, radii[1])
    wanted = Overlap(
        float(in_real.any(0).double().mean()),
        float(in_fake.any(1).double().mean()),
        float(in_real.double().sum() / (k * 30)),
        float(in_real.any(1).double().mean()),
    )
    assert 0 < wanted.precision < 1 and 0 < wanted.recall < 1
    found = overlap(fake, real, k, closed)
    assert vars(found) == pytest.approx(vars(wanted), rel=1e-12)


@pytest.mark.parametrize("whole", [False, True])
def test_agreement_with_torch_fidelity(whole: bool) -> None:
    """Its first argument is the samples."""
    real, fake = normal(150, 6), 0.7 * normal(120, 6, seed=1) + 0.4
    found = precision_recall(fake, real)
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=not whole, verbose=False
    )
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and found.precision != found.recall
    ours = {"precision": found.precision, "recall": found.recall, "f_score": found.f_score}
    assert ours == pytest.approx(theirs, abs=1e-6)  # its means are float32


def test_order_has_no_part_and_sides_swap_precision_and_recall() -> None:
    real, fake = normal(60, 4), 0.8 * normal(50, 4, seed=1) + 0.3
    found = precision_recall(fake, real)
    rng = torch.Generator().manual_seed(0)
    shuffled = precision_recall(fake[torch.randperm(50, generator=rng)], real[torch.randperm(60, generator=rng)])
    swapped = precision_recall(real, fake)
    assert shuffled == found
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_turning_and_scaling_the_features_has_no_part() -> None:
    real, fake = normal(60, 4), 0.8 * normal(50, 4, seed=1) + 0.3
    turn = 3 * torch.linalg.qr(normal(4, 4, seed=2))[0]
    assert density_coverage(fake @ turn, real @ turn) == density_coverage(fake, real)


def test_coverage_of_equal_laws_is_what_combinatorics_say() -> None:
    """1 - prod_{i<k} (n - 1 - i) / (2 n - 1 - i) for n rows a side (Naeem et al., lemma 2); density is 1 on average.

    30 draws, 4 standard errors.
    """
    n, k = 60, 5
    found = [density_coverage(normal(n, 4, seed=2 * i), normal(n, 4, seed=2 * i + 1), k) for i in range(30)]
    missed = 1.0
    for i in range(k):
        missed *= (n - i) / (2 * n - 1 - i)
    coverage = torch.tensor([it.coverage for it in found])
    density = torch.tensor([it.density for it in found])
    assert abs(float(coverage.mean()) - (1 - missed)) < 4 * float(coverage.std()) / 30**0.5
    assert abs(float(density.mean()) - 1) < 4 * float(density.std()) / 30**0.5


def test_half_precision_rounds_products_and_sums() -> None:
    """u.u = 2049 has no place among halves above 2048, which are even: 2048, and 2048 - 2 * 0 + 1 stays 2048."""
    u, v = torch.tensor([[45.0, 4.89897949, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert squared_half(u, v).dtype == torch.float16
    assert float(squared_half(u, v)) == 2048
    assert float(squared_double(u, v)) == pytest.approx(2050, abs=1e-4)
    near = torch.tensor([[10.0, 0.0]]), torch.tensor([[10.0, 0.01]])
    assert float(squared_half(*near)) == 0  # the rounding of 100 is wider than the distance


def test_half_precision_gives_way_where_it_overflows() -> None:
    far = torch.tensor([[0.0, 0.0], [300.0, 0.0]])  # 300^2 is beyond 65504
    found = squared_half(far, far)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0, 90000], [90000, 0]]
    assert squared_radii(torch.cat((far, far + 1)), 1, squared_half).tolist() == [2, 2, 2, 2]


def test_half_precision_moves_few_samples() -> None:
    real, fake = normal(600, 16), 0.9 * normal(500, 16, seed=1) + 0.1
    exact, half = precision_recall(fake, real), precision_recall_adm(fake, real)
    assert half.precision == pytest.approx(exact.precision, abs=0.02)
    assert half.recall == pytest.approx(exact.recall, abs=0.02)


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(ValueError, match=r"samples \(5, 3\), reference \(5, 4\)"):
        precision_recall(normal(5, 3), normal(5, 4))
    with pytest.raises(ValueError, match="neighbour 3 of 3 rows"):
        precision_recall(normal(5, 3), normal(3, 3))
    broken = normal(5, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(ValueError, match="row 2 of the samples is NaN or infinite"):
        precision_recall(broken, normal(5, 3))
