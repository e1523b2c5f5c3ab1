"""Relaxed acceptance: the exact law of every rule by walking all outcomes of its tests, and the bounds it keeps."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.speculative import trees
from sampling.speculative.acceptance import total_variation
from sampling.speculative.lantern import Relaxation, nearest_neighbours, verify_tree, verify_tree_greedy

V, K, DELTA = 24, 10, 0.15


def target(seed: int, temper: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, generator=generator, dtype=torch.float64).mul(temper).softmax(-1)


NEIGHBOURS = nearest_neighbours(torch.randn(V, 3, generator=torch.Generator().manual_seed(7)))


def siblings_law(
    p: Tensor, candidates: Tensor, relaxation: Relaxation | None, drawn: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Law of the token that one level of siblings gives, without sampling error: a uniform of 1 refuses the first i, then
    a grid of uniforms says how often the next is accepted."""
    n = len(candidates)
    parents = torch.tensor([trees.ROOT, *[0] * n])
    grid = 2000
    tokens = torch.cat((torch.zeros(1, dtype=torch.int64), candidates))
    out, left = torch.zeros(V, dtype=torch.float64), 1.0
    for i in range(n + 1):
        u = torch.ones(grid, n, dtype=torch.float64)
        if i < n:
            u[:, i] = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        laws = p.expand(grid, n + 1, V)
        given = None if drawn is None else tuple(x.expand(grid, *x.shape) for x in drawn)
        children = trees.children(parents, n).expand(grid, n + 1, n)
        walk = verify_tree(laws, tokens.expand(grid, -1), children, 1, u, given, relaxation)
        if i == n:
            return out + left * walk.law[0]
        share = float((walk.node == i + 1).double().mean())
        out[candidates[i]] += left * share
        left *= 1 - share
    return out


def test_neighbours_are_the_nearest_other_codes() -> None:
    codes = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    distance = (codes[:, None] - codes[None]).norm(dim=-1)
    expected = torch.stack([row[row != i] for i, row in enumerate(distance.argsort(dim=1))])
    assert torch.equal(nearest_neighbours(codes), expected)
    assert torch.equal(nearest_neighbours(codes, 5), expected[:, :5])
    with pytest.raises(ValueError, match="k is 40, a codebook of 40 has 1 to 39 others"):
        nearest_neighbours(codes, 40)


@pytest.mark.parametrize("bound", [{"delta": 0.2}, {"factor": 3.0}])
def test_what_is_borrowed_is_the_largest_prefix_within_the_bound(bound: dict[str, float]) -> None:
    rule = Relaxation(NEIGHBOURS, K, **bound)
    p = torch.stack([target(seed) for seed in range(V)])
    token = torch.arange(V)
    found = rule.borrow(p, token, torch.ones(V, dtype=torch.float64))
    for x in range(V):
        most = bound["delta"] if "delta" in bound else (bound["factor"] - 1) * p[x, x]
        mass, count = 0.0, 0
        for y in NEIGHBOURS[x, :K]:
            if mass + p[x, y] > most:
                break
            mass, count = mass + p[x, y], count + 1
        assert found.count[x] == count
        assert_close(found.prob[x], p[x, x] + mass)


def test_strict_chosen_drafts_stay_within_delta_a_test() -> None:
    rule = Relaxation(NEIGHBOURS, K, delta=DELTA)
    for seed in range(6):
        p = target(seed)
        for candidates in (torch.tensor([3]), torch.tensor([0, 5, 11])):
            law = siblings_law(p, candidates, rule)
            assert total_variation(law, p) <= len(candidates) * DELTA + 1e-3
    one = siblings_law(p, torch.tensor([3]), rule)
    borrowed = rule.borrow(p[None], torch.tensor([3]), torch.ones(1, dtype=torch.float64))
    assert_close(total_variation(one, p), borrowed.mass[0], atol=1e-3, rtol=0)  # the bound is what was borrowed


def test_the_released_rule_for_chosen_drafts_breaks_that_bound() -> None:
    p = target(1, temper=0.3)
    released = siblings_law(p, torch.tensor([3]), Relaxation(NEIGHBOURS, K, delta=0.05, released=True))
    strict = siblings_law(p, torch.tensor([3]), Relaxation(NEIGHBOURS, K, delta=0.05))
    assert total_variation(strict, p) <= 0.05 + 1e-3 < total_variation(released, p) - 0.1


def pairs(q: Tensor) -> list[tuple[Tensor, float, Tensor]]:
    """All ordered pairs drawn from q without replacement: tokens, their probability, and that of each given the first."""
    return [
        (torch.tensor(x), float(q[x[0]] * cond), torch.stack((torch.ones_like(cond), q[x[0]], cond)))
        for x in permutations(range(len(q)), 2)
        if (cond := q[x[1]] / (1 - q[x[0]])) > 0 and q[x[0]] > 0
    ]


@pytest.mark.parametrize("delta", [None, 0.1])
def test_drawn_siblings_are_exact_without_a_relaxation_and_within_delta_a_test_with_the_strict_one(
    delta: float | None,
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(5, 2, generator=generator)
    rule = None if delta is None else Relaxation(nearest_neighbours(codes), 3, delta=delta)
    p, q = torch.randn(2, 5, generator=generator, dtype=torch.float64).softmax(-1)
    grid = 4000
    parents = torch.tensor([trees.ROOT, 0, 0])
    children = trees.children(parents, 2).expand(grid, 3, 2)
    middle = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    out = torch.zeros(5, dtype=torch.float64)
    for candidates, chance, cond in pairs(q):
        tokens = torch.cat((torch.zeros(1, dtype=torch.int64), candidates)).expand(grid, -1)
        given = (q.expand(grid, 3, 5), cond.expand(grid, 3))
        left = chance
        for i in range(2):
            u = torch.ones(grid, 2, dtype=torch.float64)
            u[:, i] = middle
            walk = verify_tree(p.expand(grid, 3, 5), tokens, children, 1, u, given, rule)
            share = float((walk.node == i + 1).double().mean())
            out[candidates[i]] += left * share
            left *= 1 - share
        refused = verify_tree(
            p.expand(1, 3, 5), tokens[:1], children[:1], 1, torch.ones(1, 2), (given[0][:1], given[1][:1])
        )
        out += left * refused.law[0]  # the same for every rule but the released one
    bound = 0 if delta is None else 2 * delta
    assert total_variation(out, p) <= bound + 1e-3
    if delta is not None:
        assert total_variation(out, p) > 0.003  # and it does relax


def deep_tree(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Laws (rows, 8, V), tokens, children and uniforms of a tree with siblings at three depths."""
    generator = torch.Generator().manual_seed(3)
    parents, _ = trees.static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)])
    laws = torch.randn(rows, 8, V, generator=generator, dtype=torch.float64).mul(4).softmax(-1)
    tokens = torch.rand(rows, 8, V, generator=generator).argsort(-1)[..., 0]
    likely = torch.tensor([False, True, False, True, False, False, True, False])
    tokens = torch.where(likely, laws[:, parents.clamp_min(0)].argmax(-1), tokens)
    u = torch.rand(rows, 6, generator=generator, dtype=torch.float64)
    return laws, tokens, trees.children(parents, 2).expand(rows, 8, 2), u


def test_a_walk_goes_down_accepted_nodes_and_the_batch_changes_nothing() -> None:
    laws, tokens, children, u = deep_tree(64)
    relaxed = Relaxation(NEIGHBOURS, K, delta=0.3)
    for rule in (None, relaxed):
        walk = verify_tree(laws, tokens, children, 3, u, relaxation=rule)
        assert set(walk.count.tolist()) == {0, 1, 2, 3}
        for b in range(64):
            node = 0
            for child in [int(x) for x in walk.path[b] if x >= 0]:
                assert child in children[b, node].tolist()
                node = child
            assert node == walk.node[b]
            alone = verify_tree(*(x[b : b + 1] for x in (laws, tokens, children)), 3, u[b : b + 1], relaxation=rule)
            assert torch.equal(alone.path[0], walk.path[b]) and torch.equal(alone.law[0], walk.law[b])
        leaf = walk.count == 3
        assert torch.equal(walk.law[leaf], laws[torch.arange(64), walk.node][leaf])


def test_a_token_of_no_mass_is_refused_by_the_strict_rules() -> None:
    p = torch.zeros(1, 2, V, dtype=torch.float64)
    p[:, :, 5] = 1
    children = torch.tensor([[[1], [-1]]])
    tokens, u = torch.tensor([[0, 2]]), torch.zeros(1, 1)
    far = NEIGHBOURS[2].tolist().index(5)
    for rule in (None, Relaxation(NEIGHBOURS, min(far, K), delta=0.5)):
        walk = verify_tree(p, tokens, children, 1, u, relaxation=rule)
        assert walk.count.tolist() == [0] and torch.equal(walk.law, p[:, 0])
    q = p.new_full((1, 2, V), 1 / V)
    walk = verify_tree(p, tokens, children, 1, u, (q, torch.tensor([[1.0, 0.0]])))
    assert walk.count.tolist() == [0] and torch.equal(walk.law, p[:, 0])  # a draft of no probability is passed over


def test_greedy_takes_the_longest_path_of_argmaxes() -> None:
    generator = torch.Generator().manual_seed(5)
    parents, _ = trees.static_tree([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)])
    logits = torch.randn(1, 6, V, generator=generator)
    best = logits[0].argmax(-1)
    tokens = torch.stack((best[0], best[0] + 1, best[0], best[1], best[2], best[4] + 1))[None] % V
    paths = trees.paths(parents, 3)[None]
    node, count, token = verify_tree_greedy(logits, tokens, paths)
    assert (node.item(), count.item(), token.item()) == (4, 2, best[4].item())
    everything = Relaxation(NEIGHBOURS, V - 1, delta=1.0)
    node, count, token = verify_tree_greedy(logits, tokens, paths, everything)
    assert (node.item(), count.item(), token.item()) == (5, 3, best[5].item())


def test_a_relaxation_asks_for_one_bound_and_enough_neighbours() -> None:
    with pytest.raises(ValueError, match="give delta or factor"):
        Relaxation(NEIGHBOURS, K)
    with pytest.raises(ValueError, match="k=12 must be at least 1 and needs 13 neighbours, the table has 10"):
        Relaxation(NEIGHBOURS[:, :10], 12, delta=0.1, released=True)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        Relaxation(NEIGHBOURS, 0, delta=0.1)
