"""Trees of drafts: their shape, as tensors, and how a drafter grows them.

Sources: ancestor masks (SpecInfer, arXiv:2305.09781; Medusa, arXiv:2401.10774), static trees of sibling ranks (Medusa;
EAGLE, arXiv:2401.15077), dynamic trees (EAGLE-2, arXiv:2406.16858).

A tree of N nodes is its `parents` int64 (..., N): node 0 is the newest committed token, whose parent is -1; a parent comes
before its children, and siblings stand in the order in which they are tested. Letters: B samples, N nodes, W siblings,
V vocabulary, k width of the search.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from layers.attention import ancestor_mask
from sampling.speculative.multi_draft import conditional_probs, draw_without_replacement

ROOT = -1  # the parent of node 0; also the padding of paths and of tables of children

STATIC = {  # published trees: the path of sibling ranks to every node, by depth
    "mc_sim_7b_63": "0 1 2 3 / 00 01 02 10 11 20 21 30 / 000 001 002 010 011 020 021 100 / 0000 0001 0002 / 00000 00001",
    "mc_sim_7b_63_balanced": (
        "0 1 2 / 00 01 02 10 11 12 20 21 / 000 001 002 010 011 100 101 110 111 / 0000 0001 0002 / 00000 00001"
    ),
    "naive_extend_57": (
        "0 1 2 3 4 / 00 01 02 03 10 11 12 20 21 22 30 31 40 / "
        "000 001 002 003 010 011 012 020 021 022 030 031 100 101 110 200 / "
        "0000 0001 0002 0003 0010 0011 0012 0020 0021 0030 0100 0101 0110 0200 / "
        "00000 00001 00002 00010 00011 00100 00101 00110 00200"
    ),
    "medusa_2_7b_63": (
        "0 1 2 3 4 5 6 7 8 9 / 00 01 02 03 04 05 06 07 08 09 10 11 12 13 14 20 21 30 31 40 50 60 70 / "
        "000 001 002 003 004 005 006 007 008 010 011 012 013 020 021 030 040 050 100 101 102 110 200 / "
        "0000 0001 0002 0003 0010 0020 0100"
    ),
    "reverse_balanced_25": (
        "0 1 2 / 00 01 10 20 / 000 001 002 010 011 100 / 0000 0001 0002 0010 0011 / 00000 00001 00002 00003 00010 00011 00012"
    ),
    "chain": "0 / 00 / 000 / 0000 / 00000",
}


def choices(name: str) -> list[tuple[int, ...]]:
    """The paths of sibling ranks of a published static tree, node 1 first."""
    return [tuple(map(int, path)) for path in STATIC[name].split() if path != "/"]


def static_tree(paths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Paths of sibling ranks, sorted by length and then by rank -> parents and ranks int64 (N,), the root before them.

    Raises ValueError for a path whose parent is not there, or that stands in the wrong place.
    """
    paths = [(), *map(tuple, paths)]
    if paths != sorted(set(paths), key=lambda path: (len(path), path)):
        raise ValueError("static_tree: paths must differ, and be sorted by length, then by rank")
    number = {path: node for node, path in enumerate(paths)}
    orphans = [path for path in paths[1:] if path[:-1] not in number]
    if orphans:
        raise ValueError(f"static_tree: the parent of {orphans[0]} is not in the tree")
    parents = [ROOT, *(number[path[:-1]] for path in paths[1:])]
    return torch.tensor(parents), torch.tensor([0, *(path[-1] for path in paths[1:])])


def chain(n: int) -> Tensor:
    """n drafts in a row -> parents int64 (n + 1,)."""
    return torch.arange(-1, n)


# ---- shape


def depths(parents: Tensor) -> Tensor:
    """int64 (..., N): the root's is 0. The position of a node is the number of committed tokens, plus this, less one."""
    return ancestor_mask(parents).sum(-1) - 1


def sibling_ranks(parents: Tensor) -> Tensor:
    """int64 (..., N): how many siblings of a node come before it."""
    same = parents[..., :, None] == parents[..., None, :]
    return same.tril(-1).sum(-1)


def children(parents: Tensor, width: int) -> Tensor:
    """int64 (..., N, width): the children of each node in order, -1 beyond them. No node may have more than `width`."""
    nodes = parents.shape[-1]
    table = parents.new_full((*parents.shape[:-1], (nodes + 1) * width), ROOT)
    slot = (parents + 1) * width + sibling_ranks(parents)  # the root sits in the slots of a node before the first
    node = torch.arange(nodes, device=parents.device).expand_as(parents)
    return table.scatter(-1, slot, node).unflatten(-1, (nodes + 1, width))[..., 1:, :]


def paths(parents: Tensor, depth: int) -> Tensor:
    """int64 (..., N, depth + 1): row i holds the nodes from the root to leaf i, -1 beyond; all -1 if i is no leaf."""
    nodes = parents.shape[-1]
    mask = ancestor_mask(parents)
    leaf = ~F.one_hot(parents + 1, nodes + 1)[..., 1:].any(-2)
    place = torch.where(mask & leaf[..., None], depths(parents)[..., None, :], depth + 1)  # depth + 1 is cut off below
    table = parents.new_full((*parents.shape, depth + 2), ROOT)
    node = torch.arange(nodes, device=parents.device).expand_as(place)
    return table.scatter(-1, place, node)[..., :-1]


def line_to(parents: Tensor, node: Tensor, depth: int) -> Tensor:
    """parents int64 (B, N), node int64 (B,) -> int64 (B, depth): the nodes from below the root down to it, -1 beyond."""
    own = ancestor_mask(parents)[torch.arange(len(node), device=node.device), node]  # (B, N)
    place = torch.where(own, depths(parents), depth + 1)  # depth + 1 is cut off below
    table = parents.new_full((len(node), depth + 2), ROOT)
    return table.scatter(1, place, torch.arange(parents.shape[1], device=node.device).expand_as(place))[:, 1:-1]


# ---- growth

# tokens (B, m), parents int64 (B, m) into the nodes fed so far (node 0 was fed before) -> log-probabilities (B, m, V)
Expand = Callable[[Tensor, Tensor], Tensor]


def dynamic_tree(first: Tensor, expand: Expand, depth: int, width: int, total: int) -> tuple[Tensor, Tensor]:
    """EAGLE-2: the `total` - 1 most probable nodes that a beam search of `width` finds, `depth` levels below the first.

    first (B, V): log-probabilities after the newest committed token, already guided and filtered. Returns tokens int64
    (B, total) with 0 for node 0, which the caller knows, and parents (B, total). A child never outranks its parent: among
    equals the one found first stays. Raises ValueError when the search cannot find so many nodes.
    """
    if not 1 < total <= 1 + width + depth * width**2:
        raise ValueError(
            f"dynamic_tree: total is {total}, a search of width {width}, depth {depth} cannot give so many"
        )
    score, token = first.topk(width, dim=-1)  # (B, k)
    rows = len(first)
    found_scores, found_tokens = [score], [token]
    origin = torch.full_like(token, ROOT)  # of everything found: which found node it hangs below
    found_origins = [origin]
    frontier = torch.arange(width, device=token.device).expand(rows, -1)  # (B, k) numbers of found nodes
    fed = torch.zeros_like(token)  # (B, k) which fed node each one of the frontier hangs below; the root was fed first
    for level in range(depth):
        log_probs, options = expand(token, fed).topk(width, dim=-1)  # (B, k, k)
        sums = (score[..., None] + log_probs).flatten(1)
        number = sum(x.shape[1] for x in found_scores)
        found_scores.append(sums)
        found_tokens.append(options.flatten(1))
        found_origins.append(frontier.repeat_interleave(width, dim=1))
        best = _largest(sums, width)
        score, token = sums.gather(1, best), options.flatten(1).gather(1, best)
        frontier = number + best
        fed = 1 + level * width + best // width
    chosen = _largest(torch.cat(found_scores, 1), total - 1).sort(dim=-1).values
    origin = torch.cat(found_origins, 1).gather(1, chosen)
    parents = torch.where(origin == ROOT, 0, 1 + torch.searchsorted(chosen, origin.clamp_min(0)))
    tokens = torch.cat(found_tokens, 1).gather(1, chosen)
    return F.pad(tokens, (1, 0)), F.pad(parents, (1, 0), value=ROOT)


def _largest(scores: Tensor, n: int) -> Tensor:
    """Numbers of the n largest scores (B, m), ties by number -> int64 (B, n)."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :n]


def fill_static_tree(
    first: Tensor, expand: Expand, parents: Tensor, ranks: Tensor, u: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens for a static tree. parents, ranks (N,) on the host; first (B, V) as in `dynamic_tree`.

    Without u the child of rank r is the r-th best token of its parent's law. With u (B, N, W) uniform in [0, 1) the
    children of a node are draws without replacement, in this order. Returns tokens int64 (B, N) with 0 for node 0, cond
    (B, N): the probability of each draw given those before it (1 without u), and laws (B, N, V): what every node drew from,
    0 for leaves.
    """
    nodes, rows = len(parents), len(first)
    tokens = torch.zeros(rows, nodes, dtype=torch.int64, device=first.device)
    cond = torch.ones(rows, nodes, dtype=first.dtype, device=first.device)
    laws = torch.zeros(rows, nodes, first.shape[-1], dtype=first.dtype, device=first.device)
    log_probs = first[:, None]
    for level in _levels(tuple(parents.tolist()), tuple(ranks.tolist()), first.device):
        if level.above is not None:
            log_probs = expand(tokens[:, level.nodes], level.above.expand(rows, -1))
        laws[:, level.nodes] = law = log_probs.exp()
        if u is None:
            tokens[:, level.below] = log_probs.topk(level.most, dim=-1).indices[:, level.parent, level.rank]
        else:
            drawn = draw_without_replacement(law, u[:, level.nodes, : level.most])
            tokens[:, level.below] = drawn[:, level.parent, level.rank]
            cond[:, level.below] = conditional_probs(law, drawn)[:, level.parent, level.rank]
    return tokens, cond, laws


@dataclass(frozen=True)
class _Level:
    """Of a static tree: nodes (m,) that have children, and their parents' numbers among those fed, above (m,), None for the
    root; below (c,): their children, parent (c,): whose among nodes, rank (c,), and most: how many drafts a node needs."""

    nodes: Tensor
    above: Tensor | None
    below: Tensor
    parent: Tensor
    rank: Tensor
    most: int


@lru_cache(maxsize=64)
def _levels(parents: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> list[_Level]:
    """Made on the host and copied to the device once, not in every round."""
    parent, rank = torch.tensor(parents), torch.tensor(ranks)
    level = depths(parent)
    inner = torch.zeros_like(parent, dtype=torch.bool)
    inner[parent[1:]] = True
    fed, count, made = torch.zeros_like(parent), 1, []  # node -> its number among the fed ones
    for depth in range(int(level.max())):
        here = (inner & (level == depth)).nonzero().squeeze(1)
        above = None
        if depth > 0:
            above = fed[parent[here]]
            fed[here] = count + torch.arange(len(here))
            count += len(here)
        below = (level == depth + 1).nonzero().squeeze(1)
        found = (here, above, below, torch.searchsorted(here, parent[below]), rank[below])
        found = [None if x is None else x.to(device) for x in found]
        made.append(_Level(*found, most=1 + int(rank[below].max())))
    return made
