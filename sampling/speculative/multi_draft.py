"""Several candidates for one place: which is taken, and the law when none is.

Sources: k-SEQ and the optimal transport view (SpecTr, Sun et al. 2023, arXiv:2310.15141); recursive rejection with
replacement (SpecInfer, arXiv:2305.09781) and without (recursive speculative decoding, Jeon et al. 2024, arXiv:2402.14160).
All leave the law of the target. Letters: k candidates, V vocabulary; leading axes (...) are independent places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sampling.sampler import inverse_cdf
from sampling.speculative.acceptance import normalised, pick, ratio, residual

HALVINGS = 50  # of the interval that holds rho
NONE = -1


@dataclass(frozen=True)
class Choice:
    """index int64 (...): of the candidate taken, NONE when all were rejected. law (..., V): of the token drawn then.
    accept_prob (..., k): of each candidate when its turn comes."""

    index: Tensor
    law: Tensor
    accept_prob: Tensor


def first_true(accepted: Tensor) -> Tensor:
    """accepted bool (..., k) -> int64 (...): the first True, NONE without one."""
    return torch.where(accepted.any(-1), accepted.long().argmax(-1), NONE)


def k_seq_rho(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest rho in [1, k] that k-SEQ may use, with beta(rho) = sum min(q, p / rho), and 1 - (1 - beta)^k, the
    probability that one of k candidates is accepted. (..., V) -> (...) each."""

    def beta(rho: Tensor) -> Tensor:
        return torch.minimum(q, p / rho[..., None]).sum(-1)

    def serves(rho: Tensor) -> Tensor:
        b = beta(rho)
        return rho * b >= 1 - (1 - b) ** k

    low = torch.ones_like(p[..., 0])
    high = torch.full_like(low, float(k))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = serves(middle)
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    found = beta(high)
    return high, found, 1 - (1 - found) ** k


def k_seq(p: Tensor, q: Tensor, candidates: Tensor, u: Tensor) -> Choice:
    """Candidates int64 (..., k) drawn independently from q, tested in turn with u (..., k): accepted while
    u < min(1, p / (rho q)). Accepts at least 1 - 1/e as often as any rule for such candidates can."""
    p, q = p.double(), q.double()
    rho, beta, alpha = k_seq_rho(p, q, candidates.shape[-1])
    accept_prob = ratio(p.gather(-1, candidates) / rho[..., None], q.gather(-1, candidates))
    share = torch.where(beta > 0, alpha / beta, 0)[..., None]
    law = normalised((p - torch.minimum(q, p / rho[..., None]) * share).clamp_min(0), p)
    return Choice(first_true(u < accept_prob), law, accept_prob)


def optimal_acceptance(p: Tensor, q: Tensor, k: int) -> Tensor:
    """The largest probability with which any rule can give one of k independent candidates from q. (..., V) -> (...).

    By the duality of flows and cuts it is 1 + min_S p(S) - q(S)^k over sets S of tokens, and only sets of the smallest
    p / q can be minimal: a sort finds it. The smallest value over prefixes is at most 0, reached by the empty set.
    """
    p, q = p.double(), q.double()
    order = torch.where(q > 0, p / q, torch.inf).argsort(dim=-1)
    inside = p.gather(-1, order).cumsum(-1) - q.gather(-1, order).cumsum(-1) ** k
    return 1 + inside.amin(-1).clamp_max(0)


def recursive_rejection(p: Tensor, q: Tensor, candidates: Tensor, u: Tensor, replacement: bool = False) -> Choice:
    """Candidates int64 (..., k) of one place, tested in turn with u (..., k); after each failure the target is what the
    candidate's law left of it, norm(max(p - q, 0)).

    They were drawn from q without replacement, so that the law of a later one lacks those before it; or independently.
    """
    probs, accepted = [], []
    for i in range(candidates.shape[-1]):
        token = candidates[..., i]
        probs.append(ratio(pick(p, token), pick(q, token)))
        accepted.append(u[..., i] < probs[-1])
        p = residual(p, q)
        if not replacement:
            q = without(q, token)
    return Choice(first_true(torch.stack(accepted, -1)), p, torch.stack(probs, -1))


def without(q: Tensor, token: Tensor) -> Tensor:
    """q (..., V) given that it is not the token (...); 0 where nothing else has mass."""
    rest = q.scatter(-1, token[..., None], 0)
    return normalised(rest, torch.zeros_like(rest))


def gumbel_top_k(log_probs: Tensor, gumbel: Tensor, k: int) -> Tensor:
    """k draws without replacement, in the order of drawing: the k largest of log p + g. (..., V) -> int64 (..., k)."""
    return (log_probs + gumbel).topk(k, dim=-1).indices


def draw_without_replacement(q: Tensor, u: Tensor) -> Tensor:
    """k draws by inverse CDF, in the order of drawing: q (..., V), u (..., k) uniform in [0, 1) -> int64 (..., k)."""
    q, drawn = q.double(), []
    for i in range(u.shape[-1]):
        drawn.append(inverse_cdf(q, u[..., i]))
        q = q.scatter(-1, drawn[-1][..., None], 0)
    return torch.stack(drawn, dim=-1)


def conditional_probs(q: Tensor, drawn: Tensor) -> Tensor:
    """q (..., V), drawn int64 (..., k) without replacement -> (..., k): q of each given those before it, in [0, 1];
    0 where those before it left nothing."""
    probs = []
    for token in drawn.split(
        1, dim=-1
    ):  # the mass that is left is summed, not taken from 1: little of it has no digits there
        left = q.sum(-1, keepdim=True)
        probs.append(torch.where(left > 0, q.gather(-1, token) / left, 0))
        q = q.scatter(-1, token, 0)
    return torch.cat(probs, dim=-1)
