"""Speculative Jacobi decoding: whole sequences of a table model against their exact law; couplings against closed forms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.record import UnknownName
from sampling.sampler import inverse_cdf
from sampling.speculative import jacobi
from sampling.speculative.acceptance import total_variation

V, LENGTH, WINDOW, DRAWS = 3, 4, 3, 200_000
CRITICAL = 124.8  # of chi-square at 80 degrees of freedom: a true rule fails once in 1000 seeds, the seed is fixed


def table(seed: int) -> Tensor:
    """Laws (V + 1, V, V) of a token given the two before it; row V where there is none."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V + 1, V + 1, V, generator=generator, dtype=torch.float64).mul(1.2).softmax(-1)


def laws_of(model: Tensor, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T + 1, V): the law of each token and of the one after, given those before it."""
    padded = torch.cat((torch.full((len(tokens), 2), V), tokens), dim=1)
    return model[padded[:, :-1], padded[:, 1:]]


def decode(model: Tensor, draws: int, coupling: str, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, LENGTH) by ragged SJD, and the calls of each sample. Committed tokens are kept in one padded row."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows, n = draws, WINDOW - 1
    total = LENGTH + WINDOW
    tokens, known = torch.zeros(rows, total, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    gumbel = -(-uniform(rows, total, V).log()).log()
    draft = torch.randint(V, (rows, n), generator=generator)
    q = torch.nn.functional.one_hot(draft, V).double()
    calls = torch.zeros_like(known)
    place = torch.arange(WINDOW)
    while bool((known < LENGTH).any()):
        busy = known < LENGTH
        calls += busy
        at = known[:, None] + place
        p = laws_of(model, tokens.scatter(1, at[:, :n], draft))
        p = p.gather(1, at[..., None].expand(-1, -1, V))
        u, redraw = uniform(rows, n), uniform(rows, WINDOW)
        if coupling == "maximal":
            step = jacobi.iterate_maximal(p, q, draft, u, redraw)
        else:
            if coupling == "gumbel":
                settled = jacobi.gumbel_token(p, gumbel.gather(1, at[..., None].expand(-1, -1, V)))
            else:
                settled = inverse_cdf(p, uniform(rows, WINDOW))
            step = jacobi.iterate(p, q, draft, settled, u, redraw[:, 0])
        count = torch.where(busy, step.count, 0)
        committed = place < count[:, None]
        old = tokens.gather(1, at)
        tokens = tokens.scatter(1, at, torch.where(committed, step.tokens, old))
        known = known + count
        fresh = step.drafts == jacobi.ABSENT
        new = torch.where(fresh, torch.randint(V, (rows, n), generator=generator), step.drafts)
        draft = torch.where(busy[:, None], new, draft)
        q = torch.where(fresh[..., None], torch.nn.functional.one_hot(draft, V).double(), step.laws)
        known = known.clamp_max(LENGTH)
    return tokens[:, :LENGTH], calls


def exact_law(model: Tensor) -> Tensor:
    sequences = torch.cartesian_prod(*[torch.arange(V)] * LENGTH)
    laws = laws_of(model, sequences)[:, :-1]
    return laws.gather(-1, sequences[..., None]).squeeze(-1).prod(1)


@pytest.mark.parametrize("coupling", ["none", "maximal", "gumbel"])
def test_whole_sequences_have_the_law_of_the_target(coupling: str) -> None:
    model = table(0)
    tokens, _ = decode(model, DRAWS, coupling, seed=1)
    number = (tokens * V ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    expected = exact_law(model) * DRAWS
    statistic = ((torch.bincount(number, minlength=V**LENGTH) - expected).square() / expected).sum()
    assert statistic < CRITICAL


def test_coupling_saves_calls_and_no_call_brings_nothing() -> None:
    calls = {name: decode(table(0), 4000, name, seed=2)[1].double() for name in ("none", "maximal", "gumbel")}
    assert all(bool((count <= LENGTH).all()) for count in calls.values())
    assert calls["maximal"].mean() < calls["none"].mean() and calls["gumbel"].mean() < calls["none"].mean()


def random_laws(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    p[1], q[3] = 0, 0
    return p / p.sum(), q / q.sum()


def test_the_maximal_coupling_is_its_joint_law() -> None:
    p, q = random_laws(0)
    joint = jacobi.maximal_joint(p, q)
    assert_close(joint.sum(1), q)
    assert_close(joint.sum(0), p)
    assert_close(joint.diagonal(), torch.minimum(p, q))
    grid = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    u, redraw = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    for old in (0, 1, 2, 4):
        draft = torch.full_like(u, old, dtype=torch.int64)
        token, kept = jacobi.keep_or_redraw(p.expand(len(u), -1), q.expand(len(u), -1), draft, u, redraw)
        assert_close(torch.bincount(token, minlength=5) / len(u), (joint[old] / q[old]).float(), atol=6e-3, rtol=0)
        assert bool((token[kept] == old).all())
    same, kept = jacobi.keep_or_redraw(p.expand(9, -1), p.expand(9, -1), torch.full((9,), 2), grid[:9], grid[:9])
    assert bool(kept.all()) and bool((same == 2).all())  # p == q


def test_shared_gumbel_noise_keeps_the_law_and_often_the_token() -> None:
    p, q = random_laws(1)
    generator = torch.Generator().manual_seed(0)
    g = -(-torch.rand(100_000, 5, generator=generator, dtype=torch.float64).log()).log()
    new, old = jacobi.gumbel_token(p, g), jacobi.gumbel_token(q, g)
    for token, law in ((new, p), (old, q)):
        count = torch.bincount(token, minlength=5)
        assert bool((count[law == 0] == 0).all())
        there = law > 0
        expected = law[there] * len(g)
        assert ((count[there] - expected).square() / expected).sum() < 16.27  # 3 degrees of freedom, 1 in 1000
    tv = total_variation(p, q)
    assert (new == old).double().mean() > (1 - tv) / (1 + tv) - 0.01


def test_an_iteration_moves_settled_tokens_to_the_front() -> None:
    p = torch.full((2, 3, V), 1 / V, dtype=torch.float64)
    q = p[:, :2].clone()
    q[1, 0] = torch.tensor([1.0, 0, 0])
    draft, settled = torch.tensor([[1, 2], [0, 2]]), torch.tensor([[0, 1, 2], [0, 1, 2]])
    step = jacobi.iterate(p, q, draft, settled, torch.full((2, 2), 0.9), torch.full((2,), 0.6, dtype=torch.float64))
    assert step.tokens.tolist() == [[1, 2, 2], [2, -1, -1]] and step.count.tolist() == [3, 1]
    assert step.drafts.tolist() == [[-1, -1], [1, 2]]
    assert_close(step.laws, torch.stack((torch.zeros(2, V).double(), p[1, 1:])))


@pytest.mark.parametrize(
    "scheme,expected",
    [
        ("random", [[9, 9, 9, 9], [9, 9, 9, 9]]),
        ("repeat_horizon", [[9, 2, 2, 9], [6, 9, 6, 6]]),
        ("sample_horizon", [[9, 12, 12, 9], [16, 9, 16, 16]]),
        ("repeat_vertical", [[0, 1, 2, 2], [4, 5, 6, 6]]),
        ("sample_vertical", [[10, 11, 12, 12], [14, 15, 16, 16]]),
    ],
)
def test_initial_drafts_copy_from_their_neighbour(scheme: str, expected: list[list[int]]) -> None:
    """Rows of 3 tokens; the samples know 3 and 5 tokens (of seven held, from 0 on in the first, from 2 on in the second)."""
    tokens = torch.stack((torch.arange(7), torch.arange(2, 9)))
    random, known = torch.full((2, 4), 9), torch.tensor([3, 5])
    assert jacobi.initial_drafts(scheme, tokens, tokens + 10, known, random, row=3).tolist() == expected


def test_the_first_row_has_nothing_above_it_and_unknown_schemes_are_named() -> None:
    tokens, random = torch.arange(6)[None], torch.full((1, 3), 9)
    drafts: Callable[..., Tensor] = jacobi.initial_drafts
    assert drafts("repeat_vertical", tokens, tokens, torch.tensor([3]), random, row=3, start=1).tolist() == [[9, 1, 2]]
    with pytest.raises(UnknownName, match="repeat_horizon"):
        drafts("repeat_horizont", tokens, tokens, torch.tensor([3]), random, row=3)
