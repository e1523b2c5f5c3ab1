"""Trees of drafts: their shape, against walks written out; growth, against a search over whole paths."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.speculative import trees
from sampling.speculative.multi_draft import draw_without_replacement

COUNTS = {  # nodes at depths 1, 2, ... of the published trees
    "mc_sim_7b_63": [4, 8, 8, 3, 2],
    "mc_sim_7b_63_balanced": [3, 8, 9, 3, 2],
    "naive_extend_57": [5, 13, 16, 14, 9],
    "medusa_2_7b_63": [10, 23, 23, 7],
    "reverse_balanced_25": [3, 4, 6, 5, 7],
    "chain": [1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("name", trees.STATIC)
def test_published_trees_have_their_published_shape(name: str) -> None:
    parents, ranks = trees.static_tree(trees.choices(name))
    assert torch.bincount(trees.depths(parents)).tolist() == [1, *COUNTS[name]]
    ranked = torch.tensor([path[-1] for path in trees.choices(name)])
    assert torch.equal(ranks[1:], ranked)


def lines(parents: Tensor) -> list[list[int]]:
    """Nodes from the root down to every node, by walking up."""
    found = []
    for node in range(len(parents)):
        line = []
        while node >= 0:
            line.append(node)
            node = int(parents[node])
        found.append(line[::-1])
    return found


def test_mask_depth_children_and_paths_agree_with_walks() -> None:
    generator = torch.Generator().manual_seed(0)
    several = torch.stack([torch.tensor([-1, *(int(torch.randint(i, (), generator=generator)) for i in range(1, 12))])
                           for _ in range(5)])  # fmt: skip
    mask, depth = trees.ancestor_mask(several), trees.depths(several)
    table, paths = trees.children(several, 11), trees.paths(several, 11)
    for b, parents in enumerate(several):
        walks = lines(parents)
        below = [[child for child in range(12) if parents[child] == node] for node in range(12)]
        assert [row.nonzero().squeeze(1).tolist() for row in mask[b]] == [sorted(line) for line in walks]
        assert depth[b].tolist() == [len(line) - 1 for line in walks]
        assert [[child for child in row if child >= 0] for row in table[b].tolist()] == below
        expected = [[] if below[node] else walks[node] for node in range(12)]
        assert [[node for node in row if node >= 0] for row in paths[b].tolist()] == expected
    assert torch.equal(trees.depths(trees.chain(4)), torch.arange(5))


def test_a_static_tree_must_be_sorted_and_whole() -> None:
    with pytest.raises(ValueError, match="sorted by length"):
        trees.static_tree([(1,), (0,)])
    with pytest.raises(ValueError, match=r"the parent of \(1, 0\) is not in the tree"):
        trees.static_tree([(0,), (1, 0)])


class Bigrams:
    """A drafter whose law depends on the token before only, and that notes what it was asked."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(rows, vocab_size, vocab_size, generator=generator).mul(2).log_softmax(-1)
        self.first = torch.randn(rows, vocab_size, generator=generator).mul(2).log_softmax(-1)
        self.fed = [torch.full((rows, 1), -1)]
        self.above = [torch.full((rows, 1), -1)]

    def __call__(self, tokens: Tensor, parents: Tensor) -> Tensor:
        self.fed.append(tokens)
        self.above.append(parents)
        return self.table[torch.arange(len(tokens))[:, None], tokens]


def test_a_dynamic_tree_holds_the_most_probable_paths() -> None:
    """Width V: the search is then over all paths, and the tree must be the best of them, parents with their children."""
    drafter = Bigrams(3, 4)
    tokens, parents = trees.dynamic_tree(drafter.first, drafter, depth=1, width=4, total=9)
    for b in range(3):
        scores = {(x,): float(drafter.first[b, x]) for x in range(4)}
        scores |= {(x, y): scores[(x,)] + float(drafter.table[b, x, y]) for x, y in product(range(4), repeat=2)}
        best = sorted(scores, key=scores.get, reverse=True)[:8]
        found = [tuple(tokens[b, node].item() for node in line[1:]) for line in lines(parents[b])[1:]]
        assert sorted(found) == sorted(best)
        assert all(parent < node for node, parent in enumerate(parents[b].tolist()))
    fed, above = torch.cat(drafter.fed, 1), torch.cat(drafter.above, 1)
    assert torch.equal(above[:, 1:], torch.zeros(3, 4, dtype=torch.int64)) and fed.shape == (3, 5)


def test_a_deep_dynamic_tree_tells_the_drafter_whose_children_it_feeds() -> None:
    drafter = Bigrams(2, 6)
    tokens, parents = trees.dynamic_tree(drafter.first, drafter, depth=3, width=3, total=14)
    fed, above = torch.cat(drafter.fed, 1), torch.cat(drafter.above, 1)
    for b in range(2):
        walks = {tuple(fed[b, node].item() for node in line[1:]) for line in lines(above[b])}
        grown = {tuple(tokens[b, node].item() for node in line[1:]) for line in lines(parents[b])}
        inner = {path[:-1] for path in grown if path}
        assert inner <= walks  # what has children in the tree was fed, below the right parent
    with pytest.raises(ValueError, match="total is 50"):
        trees.dynamic_tree(drafter.first, drafter, depth=1, width=3, total=50)


def test_equal_scores_keep_parents_before_their_children() -> None:
    certain = torch.tensor([[[0.0, -torch.inf], [0.0, -torch.inf]]]).expand(1, 2, 2)
    tokens, parents = trees.dynamic_tree(certain[:, 0], lambda tokens, _: certain[:, : tokens.shape[1]], 2, 2, 4)
    assert parents.tolist() == [[-1, 0, 1, 2]] and tokens.tolist() == [[0, 0, 0, 0]]


def test_a_static_tree_takes_ranks_or_draws_without_replacement() -> None:
    parents, ranks = trees.static_tree([(0,), (2,), (0, 0), (0, 1), (2, 0)])
    drafter = Bigrams(4, 6)
    tokens, cond, laws = trees.fill_static_tree(drafter.first, drafter, parents, ranks)
    order = drafter.first.argsort(dim=-1, descending=True)
    assert torch.equal(tokens[:, 1:3], order[:, [0, 2]]) and bool((cond == 1).all())
    row = torch.arange(4)
    below = drafter.table[row, tokens[:, 1]].argsort(dim=-1, descending=True)
    assert torch.equal(tokens[:, 3:5], below[:, :2])
    assert torch.equal(tokens[:, 5], drafter.table[row, tokens[:, 2]].argmax(-1))
    assert_close(laws[:, 0], drafter.first.exp())
    assert_close(laws[:, 1], drafter.table[row, tokens[:, 1]].exp())
    u = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, cond, laws = trees.fill_static_tree(drafter.first, drafter, parents, ranks, u)
    drawn = draw_without_replacement(drafter.first.exp(), u[:, 0])
    assert torch.equal(tokens[:, 1:3], drawn[:, [0, 2]])
    q = laws[:, 0]
    before = q.gather(1, drawn[:, :2]).sum(1)
    assert_close(cond[:, 1], q.gather(1, tokens[:, 1:2]).squeeze(1))
    assert_close(cond[:, 2], q.gather(1, tokens[:, 2:3]).squeeze(1) / (1 - before))
