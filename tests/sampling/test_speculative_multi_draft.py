"""Several candidates for one place: exact laws by enumeration, and the optimum against a linear program."""

from itertools import permutations, product

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor
from torch.testing import assert_close

from sampling.speculative import multi_draft
from sampling.speculative.acceptance import acceptance_rate
from sampling.speculative.multi_draft import Choice

V = 4


def laws(seed: int) -> tuple[Tensor, Tensor]:
    """Two laws of V tokens; every third pair with a zero each, every fifth pair equal."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, V, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        p[1], q[2] = 0, 0
    if seed % 5 == 0:
        q = p
    return p / p.sum(), q / q.sum()


def output_law(p: Tensor, q: Tensor, weighted: list[tuple[tuple[int, ...], float]], rule: object) -> Tensor:
    """Sum over all tuples of candidates and their probabilities: each is tested with the chance the rule states."""
    out = torch.zeros(V, dtype=torch.float64)
    for candidates, probability in weighted:
        choice: Choice = rule(p, q, torch.tensor(candidates), torch.ones(len(candidates)))
        left = probability
        for token, accept in zip(candidates, choice.accept_prob.tolist(), strict=True):
            out[token] += left * accept
            left *= 1 - accept
        out += left * choice.law
    return out


def independent(q: Tensor, k: int) -> list[tuple[tuple[int, ...], float]]:
    return [(x, float(q[list(x)].prod())) for x in product(range(V), repeat=k) if q[list(x)].prod() > 0]


def distinct(q: Tensor, k: int) -> list[tuple[tuple[int, ...], float]]:
    found = []
    for x in permutations(range(V), k):
        chance, left = 1.0, 1.0
        for token in x:
            chance *= float(q[token]) / left if left > 1e-12 else 0.0
            left -= float(q[token])
        if chance > 0:
            found.append((x, chance))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_every_rule_gives_the_law_of_the_target(seed: int, k: int) -> None:
    p, q = laws(seed)

    def replaced(*given: Tensor) -> Choice:
        return multi_draft.recursive_rejection(*given, replacement=True)

    assert_close(output_law(p, q, independent(q, k), multi_draft.k_seq), p, atol=1e-9, rtol=0)
    assert_close(output_law(p, q, independent(q, k), replaced), p, atol=1e-12, rtol=0)
    assert_close(output_law(p, q, distinct(q, k), multi_draft.recursive_rejection), p, atol=1e-12, rtol=0)


def test_k_seq_lies_between_a_share_of_the_optimum_and_the_optimum() -> None:
    p, q = (torch.stack(x) for x in zip(*(laws(seed) for seed in range(40)), strict=True))
    assert_close(multi_draft.k_seq_rho(p, q, 1)[0], torch.ones(40, dtype=torch.float64))
    assert_close(multi_draft.optimal_acceptance(p, q, 1), acceptance_rate(p, q))
    for k in (2, 4):
        rho, _, alpha = multi_draft.k_seq_rho(p, q, k)
        best = multi_draft.optimal_acceptance(p, q, k)
        assert bool(((rho >= 1) & (rho <= k)).all())
        assert bool((alpha <= best + 1e-12).all()) and bool((alpha >= (1 - torch.exp(torch.tensor(-1.0))) * best).all())


@pytest.mark.parametrize("k", [2, 3])
def test_the_optimal_acceptance_solves_its_linear_program(k: int) -> None:
    """Over couplings of a tuple of candidates with the output token: as much mass as can be where they meet."""
    for seed in range(5):
        p, q = laws(seed)
        tuples = list(product(range(V), repeat=k))
        gain = [-1.0 if y in x else 0.0 for x in tuples for y in range(V)]
        rows = [[1.0 if i == j // V else 0.0 for j in range(len(gain))] for i in range(len(tuples))]
        columns = [[1.0 if j % V == y else 0.0 for j in range(len(gain))] for y in range(V)]
        sums = [float(q[list(x)].prod()) for x in tuples] + p.tolist()
        found = linprog(gain, A_eq=rows + columns, b_eq=sums)
        assert multi_draft.optimal_acceptance(p, q, k).item() == pytest.approx(-found.fun, abs=1e-8)


@pytest.mark.parametrize("way", ["gumbel", "inverse"])
def test_draws_without_replacement_have_their_law(way: str) -> None:
    """200,000 pairs against q(x) q(y) / (1 - q(x)): chi-square with 11 degrees of freedom, 1 in 1000."""
    _, q = laws(1)
    u = torch.rand(200_000, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if way == "gumbel":
        drawn = multi_draft.gumbel_top_k(q.log(), -(-u.log()).log(), 2)
    else:
        drawn = multi_draft.draw_without_replacement(q.expand(len(u), -1), u[:, :2])
    count = torch.bincount(drawn[:, 0] * V + drawn[:, 1], minlength=V * V).view(V, V)
    expected = q[:, None] * q / (1 - q[:, None]) * len(u)
    off = ~torch.eye(V, dtype=torch.bool)
    assert int(count.diagonal().sum()) == 0
    assert ((count - expected).square() / expected)[off].sum() < 31.26
    cond = multi_draft.conditional_probs(q.expand(len(drawn), -1), drawn)
    assert_close(cond, torch.stack((q[drawn[:, 0]], q[drawn[:, 1]] / (1 - q[drawn[:, 0]])), 1))


def test_the_batch_changes_nothing_and_no_candidate_of_no_mass_is_taken() -> None:
    p, q = (torch.stack(x) for x in zip(*(laws(seed) for seed in range(6)), strict=True))
    generator = torch.Generator().manual_seed(0)
    candidates, u = torch.randint(V, (6, 3), generator=generator), torch.rand(6, 3, generator=generator)
    for rule in (multi_draft.k_seq, multi_draft.recursive_rejection):
        together = rule(p, q, candidates, u)
        alone = [rule(*(x[i : i + 1] for x in (p, q, candidates, u))) for i in range(6)]
        assert torch.equal(together.index, torch.cat([choice.index for choice in alone]))
        assert torch.equal(together.law, torch.cat([choice.law for choice in alone]))
        zero = rule(
            torch.tensor([[0.0, 1, 0, 0]]), torch.full((1, V), 0.25), torch.tensor([[0, 2, 3]]), torch.zeros(1, 3)
        )
        assert zero.index.tolist() == [multi_draft.NONE] and zero.law.tolist() == [[0, 1, 0, 0]]
