"""LANTERN: a drafted token may borrow the probability of its nearest neighbours in the codebook. Lossy, within a bound.

Sources: LANTERN (Jang et al. 2024, arXiv:2410.03355), which borrows at most delta, on dynamic trees; LANTERN++ (Park et al.
2025, arXiv:2502.06352), which lets a token reach `factor` times its probability, on static trees.

For a draft x with target law p, c_m is the mass of its m nearest neighbours, m at most k. The largest m with c_m within the
bound is borrowed: x is accepted with probability min(1, (p(x) + c_m) / q(x)), where q(x) is 1 for drafts that were not
drawn but chosen. Two rules say what follows a rejection:

strict    Only what was tested and refused is removed: a chosen draft with the m neighbours that it borrowed from; of a
          drawn one max(p - q, 0) stays, and it borrows no more than delta q(x). Each test moves the law by delta at most
          in total variation, s siblings by s delta. A factor sets no such bound for drawn drafts.
released  As the published code has it, to reproduce its numbers. Once anything was borrowed, the k + 1 nearest neighbours
          go with a chosen draft, which can cost many times delta; for a drawn one they leave q, so that their mass in p
          is counted twice. A p without mass is replaced by the uniform law.

Letters: B samples, N nodes of a tree, V vocabulary, k neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sampling.speculative.acceptance import leading, normalised, pick
from sampling.speculative.multi_draft import without
from sampling.speculative.trees import ROOT

CHUNK = 1024  # rows of the distance table computed at once


def nearest_neighbours(codebook: Tensor, k: int | None = None) -> Tensor:
    """codebook (V, C) as it is stored -> int64 (V, k): the nearest other codes by Euclidean distance, nearest first; all
    V - 1 of them when k is None."""
    size = len(codebook)
    k = size - 1 if k is None else k
    if not 0 < k < size:
        raise ValueError(f"nearest_neighbours: k is {k}, a codebook of {size} has 1 to {size - 1} others")
    found = []
    for start in range(0, size, CHUNK):
        distance = torch.cdist(codebook[start : start + CHUNK], codebook)
        own = torch.arange(start, start + len(distance), device=codebook.device)[:, None]
        found.append(distance.scatter(1, own, torch.inf).topk(k, dim=1, largest=False).indices)
    return torch.cat(found)


@dataclass(frozen=True)
class Relaxation:
    """How much a draft may borrow, and from whom.

    neighbours int64 (V, K) with K > k where the rule is the released one; k: how many of them may be borrowed from. Exactly
    one of delta, the mass borrowed at most, and factor: a token of probability p is taken for factor p at most.
    released: see above. Raises ValueError for a k that the table does not have, or for none or both of the bounds.
    """

    neighbours: Tensor
    k: int
    delta: float | None = None
    factor: float | None = None
    released: bool = False

    def __post_init__(self) -> None:
        if (self.delta is None) == (self.factor is None):
            raise ValueError(f"Relaxation: give delta or factor, got {self.delta} and {self.factor}")
        needed = min(self.k + self.released, len(self.neighbours) - 1)
        if self.k < 1 or needed > self.neighbours.shape[1]:
            raise ValueError(
                f"Relaxation: k={self.k} must be at least 1 and needs {needed} neighbours, the table has "
                f"{self.neighbours.shape[1]}"
            )

    def bound(self, p_token: Tensor, q_token: Tensor) -> Tensor:
        """p and q of drafts (...) -> the mass they may borrow (...)."""
        if self.factor is not None:
            return (self.factor - 1) * p_token
        return self.delta * (torch.ones_like(q_token) if self.released else q_token)

    def borrow(self, p: Tensor, token: Tensor, q_token: Tensor) -> "Borrowed":
        """p (..., V), token int64 (...), q_token (...)."""
        near = self.neighbours[token, : self.k]  # (..., k)
        mass = p.gather(-1, near).cumsum(-1)
        own = pick(p, token)
        count = (mass <= self.bound(own, q_token)[..., None]).sum(-1)
        last = mass.gather(-1, (count - 1).clamp_min(0)[..., None]).squeeze(-1)
        taken = torch.where(count > 0, last, 0)
        return Borrowed(own + taken, count, taken)

    def cleared(self, law: Tensor, token: Tensor, reach: Tensor) -> Tensor:
        """law (B, V), token and reach int64 (B,) -> law without the mass of the token's `reach` nearest neighbours."""
        near = self.neighbours[token, : self.k + self.released]
        gone = torch.arange(near.shape[1], device=law.device) < reach[:, None]
        return law.scatter(1, near, torch.where(gone, 0, law.gather(1, near)))


@dataclass(frozen=True)
class Borrowed:
    """prob (...): p(x) + c_m; count int64 (...): m; mass (...): c_m, for a chosen draft also the total variation it costs."""

    prob: Tensor
    count: Tensor
    mass: Tensor


@dataclass(frozen=True)
class Walk:
    """How far down a tree a test came.

    path int64 (B, D): the accepted nodes below the root in order, -1 beyond; count int64 (B,): how many; node int64 (B,):
    the last of them, 0 if none; law (B, V): of the token that follows it.
    """

    path: Tensor
    count: Tensor
    node: Tensor
    law: Tensor


def verify_tree(
    p: Tensor,
    tokens: Tensor,
    children: Tensor,
    depth: int,
    u: Tensor,
    drawn: tuple[Tensor, Tensor] | None = None,
    relaxation: Relaxation | None = None,
) -> Walk:
    """Test a tree of drafts from the root down, siblings in turn; exact without a relaxation.

    p (B, N, V): filtered target law after each node; tokens int64 (B, N); children int64 (B, N, W) of trees.children; depth:
    of the tree; u (B, depth * W) uniform in [0, 1), used in order, one a test. drawn: None for drafts that were chosen
    without chance (a dynamic tree); else laws q (B, N, V) that each node drew its children from without replacement, and
    cond (B, N), the probability of each draft given its earlier siblings. A draft of no such probability is passed over.
    """
    row = torch.arange(len(p), device=p.device)
    node = torch.zeros_like(tokens[:, 0])
    used = torch.zeros_like(node)
    alive = torch.ones_like(node, dtype=torch.bool)
    law, path = p[:, 0], []
    for _ in range(depth):
        current, below = p[row, node], children[row, node]  # (B, V), (B, W)
        q = None if drawn is None else drawn[0][row, node]
        seen = torch.zeros_like(current, dtype=torch.bool)  # tokens of earlier siblings
        chosen = torch.full_like(node, ROOT)
        for w in range(children.shape[-1]):
            child = below[:, w].clamp_min(0)
            token = tokens[row, child]
            tried = alive & (below[:, w] >= 0) & (chosen < 0) & ~seen[row, token]
            q_token = torch.ones_like(current[:, 0]) if drawn is None else drawn[1][row, child].to(current.dtype)
            tested = tried & (q_token > 0)
            accepted, left = _test(current, q, token, q_token, u[row, used.clamp_max(u.shape[1] - 1)], relaxation)
            chosen = torch.where(tested & accepted, child, chosen)
            current = torch.where((tested & ~accepted)[:, None], left, current)
            q = None if q is None else without(q, token)
            seen = seen.scatter(1, token[:, None], True)
            used = used + tried
        went = chosen >= 0
        law = torch.where(alive[:, None], torch.where(went[:, None], p[row, chosen], current), law)
        node = torch.where(went, chosen, node)
        alive = alive & went
        path.append(chosen)
    path = torch.stack(path, dim=1)
    return Walk(path, (path >= 0).sum(1), node, law)


def _test(
    p: Tensor, q: Tensor | None, token: Tensor, q_token: Tensor, u: Tensor, relaxation: Relaxation | None
) -> tuple[Tensor, Tensor]:
    """One draft each: p, q (B, V), token, q_token, u (B,) -> accepted bool (B,), and what is left of p if not (B, V)."""
    others = p.scatter(1, token[:, None], 0)
    if relaxation is None:
        accepted = u * q_token < pick(p, token)
        rest = others if q is None else (p - q).clamp_min(0)
        return accepted, normalised(rest, p)
    borrowed = relaxation.borrow(p, token, q_token)
    if not relaxation.released:
        accepted = u * q_token < borrowed.prob
        rest = relaxation.cleared(others, token, borrowed.count) if q is None else (p - q).clamp_min(0)
        return accepted, normalised(rest, p)
    accepted = u <= borrowed.prob / q_token
    reach = torch.where(borrowed.count > 0, relaxation.k + 1, 0)
    cleared = relaxation.cleared(others if q is None else q, token, reach)
    rest = cleared if q is None else (p - cleared).clamp_min(0)
    return accepted, normalised(rest, torch.full_like(p, 1 / p.shape[-1]))


def verify_tree_greedy(
    logits: Tensor, tokens: Tensor, paths: Tensor, relaxation: Relaxation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature 0: a draft is accepted when it is the argmax once its probability includes what it borrows.

    logits (B, N, V) of the target after each node, tokens int64 (B, N), paths int64 (B, R, D + 1) of trees.paths. The path
    with the most accepted drafts wins, the first among equals. Returns the last accepted node int64 (B,), how many drafts
    were accepted (B,), and the token after them, which is the plain argmax there (B,).
    """
    row = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    before, after = paths[..., :-1].clamp_min(0), paths[..., 1:]
    drafted = tokens[row, after.clamp_min(0)]  # (B, R, D)
    best = logits.argmax(-1)
    if relaxation is None:
        accepted = drafted == best[row, before]
    else:
        parent = logits.softmax(-1)[row, before]  # (B, R, D, V)
        raised = relaxation.borrow(parent, drafted, torch.ones_like(parent[..., 0])).prob
        rivals = parent.scatter(-1, drafted[..., None], -1)
        rival = rivals.max(-1)
        accepted = (raised > rival.values) | (raised == rival.values) & (drafted < rival.indices)
    count, winner = leading(accepted & (after >= 0)).max(-1)
    node = (
        paths[row[:, 0, 0], winner].gather(1, count[:, None]).squeeze(1).clamp_min(0)
    )  # the root, if the winner is no leaf
    return node, count, best.gather(1, node[:, None]).squeeze(1)
