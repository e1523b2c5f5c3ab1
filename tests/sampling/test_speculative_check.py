"""What measures exactness: it passes exact methods, fails others, and its one-step laws are the closed forms."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.decode import generate
from sampling.speculative import check
from sampling.speculative.acceptance import total_variation, weighted_law
from sampling.speculative.chain_decode import Chain
from sampling.speculative.drafting import EagleDrafter, ModelDrafter
from sampling.speculative.lantern import Relaxation, nearest_neighbours
from sampling.speculative.rules import Exact, Grouped, Weighted
from sampling.speculative.tree_decode import Dynamic, Lantern, Static

TARGET = check.small_generator(0)
DRAFT = ModelDrafter(check.small_generator(1))
DRAWS = 8000
TOO_FAR = 0.001  # a sound method is called unsound once in 1,000 seeds; the seed is fixed


def p_value(law: Tensor, counts: Tensor) -> float:
    """Pearson's, cells of less than 5 expected draws joined."""
    order = law.argsort()
    expected, seen = (law * counts.sum())[order], counts[order].double()
    few = int((expected < 5).sum())
    expected, seen = (torch.cat((part[:few].sum()[None], part[few:])) for part in (expected, seen))
    statistic = ((seen - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def test_the_enumerated_law_is_that_of_plain_decoding() -> None:
    law = check.sequence_law(TARGET, 1)
    assert_close(law.sum(), torch.ones((), dtype=torch.float64))
    counts = check.sequence_counts(lambda *given: generate(*given).tokens, TARGET, 1, DRAWS)
    assert counts.sum() == DRAWS and p_value(law, counts) > TOO_FAR
    assert p_value(check.sequence_law(TARGET, 0), counts) < 1e-6  # of another class


@pytest.mark.parametrize(("rule", "exact"), [(Exact(), True), (Weighted(2.0), False)])
def test_it_tells_exact_methods_from_others(rule: Exact, exact: bool) -> None:
    method = Chain(3, rule)
    counts = check.sequence_counts(lambda *given: method.generate(*given, DRAFT)[0].tokens, TARGET, 1, DRAWS)
    found = p_value(check.sequence_law(TARGET, 1), counts)
    assert found > TOO_FAR if exact else found < 1e-6


def some_laws(rows: int = 6, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    logits, other = torch.randn(2, rows, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, logits.softmax(-1), other.softmax(-1)


def step_laws(rule: Exact) -> Tensor:
    return torch.stack([check.step_law(rule, TARGET, *rows) for rows in zip(*some_laws(), strict=True)])


def test_one_step_laws_are_the_closed_forms() -> None:
    _, p, q = some_laws()
    assert_close(step_laws(Exact()), p)
    assert_close(step_laws(Weighted(2.5)), weighted_law(p, q, 2.5))
    grouped = step_laws(Grouped(half=2))
    assert_close(grouped.sum(-1), torch.ones(6, dtype=torch.float64))
    assert (total_variation(grouped, p) > 1e-3).all()


def test_the_recorder_changes_nothing_and_sees_every_round() -> None:
    recorded = check.Recorded(Weighted(2.0))
    condition = check.Condition(label=torch.zeros(5, dtype=torch.int64))
    given = (TARGET, condition, check.SAMPLER, check.Noise(0, torch.arange(5)), DRAFT)
    (state, trace), (plain, _) = Chain(3, recorded).generate(*given), Chain(3, Weighted(2.0)).generate(*given)
    assert torch.equal(state.tokens, plain.tokens) and len(recorded.seen) == trace.calls
    assert 0 < check.step_distance(recorded, TARGET) < 0.5


def relaxation(delta: float, k: int) -> Relaxation:
    codes = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    return Relaxation(nearest_neighbours(codes), k, delta=delta)


def tree_distance(drawn: bool, how: Relaxation) -> float:
    _, p, q = some_laws()
    siblings = q.topk(3).indices
    siblings[0, 2] = -1  # one less there
    recorded = check.RecordedTree(Static([(0,)]), [(p, q if drawn else siblings)], drawn)
    return check.tree_step_distance(recorded, how)


@pytest.mark.parametrize("drawn", [True, False])
def test_trees_are_exact_where_nothing_may_be_borrowed(drawn: bool) -> None:
    assert tree_distance(drawn, relaxation(0.0, 4)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_the_strict_rule_stays_within_its_bound(delta: float) -> None:
    assert 0 < tree_distance(True, relaxation(delta, 4)) <= delta  # one test
    assert 0 < tree_distance(False, relaxation(delta, 4)) <= 3 * delta  # three siblings


@pytest.mark.parametrize("shape", [Static([(0,), (1,), (0, 0)]), Dynamic(levels=1, beam=2, nodes=4)])
def test_recording_a_tree_changes_nothing(shape: Static) -> None:
    drafter = EagleDrafter(check.small_drafter(2, TARGET))
    codes = torch.tensor([[0.0], [1.0], [3.0]])
    condition = check.Condition(label=torch.zeros(5, dtype=torch.int64))
    given = (TARGET, condition, check.SAMPLER, check.Noise(0, torch.arange(5)), drafter)
    recorded = check.RecordedTree(shape)
    methods = [Lantern(k=1, delta=0.2, tree=tree, codebook=codes) for tree in (recorded, shape)]
    (state, trace), (plain, _) = (method.generate(*given) for method in methods)
    assert torch.equal(state.tokens, plain.tokens) and torch.equal(trace.committed, _.committed)
    assert len(recorded.seen) == trace.committed.shape[1] - 1  # the first token has no draft
    assert 0 <= check.tree_step_distance(recorded, methods[0].relaxation) <= 0.2 * recorded.width
