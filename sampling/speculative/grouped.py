"""GSD: a drafted token is tested together with the tokens that stand next to it in probability. Lossy.

Source: Grouped speculative decoding (So et al. 2025, arXiv:2508.07747). The ratio of masses of a group is never worse on
average than the ratio of one token, since sum_C min(p(C), q(C)) >= sum_x min(p(x), q(x)).

Two kinds of groups: `rank_windows`, as published, centred on each draft, so that they overlap and neither tokens nor groups
keep their law; and `rank_blocks`, a partition, with which the law of the block is exact (`verify_partition`).

Letters: B samples, n drafts, V vocabulary, m = 2 `half` places of a window, E rows of an embedding table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sampling.speculative.acceptance import Verdict, leading, normalised, pick, ratio, residual, row_after

Distance = Callable[[Tensor, Tensor], Tensor]  # tokens int64 (...), others (..., m) -> (..., m)


def embedding_distance(embedding: Tensor) -> Distance:
    """Squared Euclidean distance of rows of a table (E, D), the generator's input embedding in GSD.

    A group that holds any token beyond the table is not restricted: all its distances are 0.
    """

    def distance(token: Tensor, others: Tensor) -> Tensor:
        size = len(embedding)
        apart = embedding[others.clamp_max(size - 1)] - embedding[token.clamp_max(size - 1)][..., None, :]
        beyond = (others >= size).any(-1, keepdim=True)
        return torch.where(beyond, 0, apart.square().sum(-1))

    return distance


@dataclass(frozen=True)
class Groups:
    """tokens int64 (B, n, m): those around each draft; kept bool (B, n, m): which of them count."""

    tokens: Tensor
    kept: Tensor


def rank_windows(
    logits: Tensor,
    p: Tensor,
    draft: Tensor,
    distance: Distance | None = None,
    half: int = 7,
    p_near: float = 0.15,
    d_near: float = 0.5,
) -> Groups:
    """The `half` tokens below each draft in the order of the target's logits, itself, and half - 1 above.

    logits, p (B, n, V): filtered, of the drafts' places; draft int64 (B, n). Of the window those count whose probability is
    within p_near of the draft's and whose distance from it is below d_near. Logits are compared in float32, equal ones by
    index; nothing is sorted, the nearest are selected. As in the published code a draft among the `half` lowest stands
    alone, or in a vocabulary smaller than a window has the one that ends at the top; at the top a window is cut off.
    """
    tokens, inside = _around(logits, draft, half)
    near = (p.gather(-1, tokens) - pick(p, draft)[..., None]).abs() < p_near
    if distance is not None:
        near = near & (distance(draft, tokens) < d_near)
    alone = ~inside.any(-1, keepdim=True) & (torch.arange(2 * half, device=p.device) == 0)
    return Groups(tokens, near & inside | alone)


def _around(logits: Tensor, draft: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 (..., 2 half) of a window, and which of these places it has, bool; the others hold the draft."""
    size = logits.shape[-1]
    bits = (logits.float() + 0.0).view(torch.int32)  # of one zero, not two
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the larger a negative number, the smaller its bits were
    key = bits.long().mul_(size).add_(torch.arange(size, device=logits.device))
    own = pick(key, draft)[..., None]  # keys are all different, and in the order of logits, then of index
    if size < 2 * half:
        order, rank = key.argsort(dim=-1), (key < own).sum(-1, keepdim=True)
        place = torch.where(rank < half, rank - half + size, rank - half).clamp_min(0)
        place = place + torch.arange(2 * half, device=logits.device)
        inside = place < (rank + half).clamp_max(size)
        tokens = order.gather(-1, place.clamp_max(size - 1))
    else:
        least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
        below = torch.where(key < own, key, least).topk(half, dim=-1).values
        above = torch.where(key >= own, key, most).topk(half, dim=-1, largest=False).values
        found = torch.cat((below, above), dim=-1)
        whole = below[..., -1:] > least  # fewer than `half` below: the window is empty
        inside = whole & (found < most)
        tokens = found % size
    return torch.where(inside, tokens, draft[..., None]), inside


def verify_grouped(p: Tensor, q: Tensor, draft: Tensor, u: Tensor, groups: Groups) -> Verdict:
    """As verify_chain, with the ratio of the groups' masses: p (B, n + 1, V), q (B, n, V), draft and u (B, n).

    A rejected draft is replaced from the token's own norm(max(p - q, 0)), which is not what this test leaves over. A group
    without mass in p rejects.
    """
    mass_p, mass_q = ((law.gather(-1, groups.tokens) * groups.kept).sum(-1) for law in (p[:, :-1], q))
    accept_prob = ratio(mass_p, mass_q)
    count = leading(u < accept_prob)
    return Verdict(accept_prob, count, residual(row_after(p, count), row_after(F.pad(q, (0, 0, 0, 1)), count)))


# ---- partitions


def rank_blocks(logits: Tensor, size: int) -> Tensor:
    """Cluster of every token, int64 (..., V): tokens of neighbouring rank in logits (..., V), `size` to a block from the
    largest down."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, rank) // size


def cluster_mass(law: Tensor, clusters: Tensor) -> Tensor:
    """law (..., V), clusters int64 (..., V) in [0, V) -> (..., V): entry c is the mass of cluster c."""
    return torch.zeros_like(law).scatter_add(-1, clusters, law)


def grouped_acceptance_rate(p: Tensor, q: Tensor, clusters: Tensor) -> Tensor:
    """sum_C min(p(C), q(C)), (..., V) -> (...)."""
    return torch.minimum(cluster_mass(p, clusters), cluster_mass(q, clusters)).sum(-1)


def verify_partition(p: Tensor, q: Tensor, draft: Tensor, u: Tensor, clusters: Tensor) -> Verdict:
    """As verify_chain, on disjoint clusters int64 (B, n, V): the law of the cluster is the target's, exactly.

    A rejected draft is replaced by a cluster from norm(max(p(C) - q(C), 0)) and a token of it from p. An accepted one
    keeps the drafter's law within its cluster.
    """
    mass_p, mass_q = (cluster_mass(law, clusters) for law in (p[:, :-1], q))
    cluster = pick(clusters, draft)
    accept_prob = ratio(pick(mass_p, cluster), pick(mass_q, cluster))
    count = leading(u < accept_prob)
    last = count == draft.shape[1]
    row = count.clamp_max(draft.shape[1] - 1)
    at = row_after(clusters, row)
    share = normalised((row_after(mass_p, row) - row_after(mass_q, row)).clamp_min(0), row_after(mass_p, row))
    target, inside = row_after(p, count), row_after(mass_p, row)
    corrected = torch.where(target > 0, share.gather(-1, at) * target / inside.gather(-1, at), 0)
    return Verdict(accept_prob, count, torch.where(last[:, None], target, corrected))
