"""Testing a chain of drafted tokens: exact, greedy, and with the ratio weighted.

Sources: Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318) for the exact rule; Cool-SD
(arXiv:2601.09212) for weights and the residual that belongs to them. With all weights k >= 1 the rule is the plain
amplified ratio, the control that every lossy method must beat.

A draft d_i was drawn from q_i; p_i is the target's law at its place, both after guidance and filters; p_{n+1} is the law
after all n drafts. Letters: B samples, n drafts, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Verdict:
    """What testing a chain says.

    accept_prob (B, n): of every draft, whatever happened before it. count int64 (B,): drafts accepted before the first
    rejection. law (B, V): of the token that follows them, corrected if there was a rejection.
    """

    accept_prob: Tensor
    count: Tensor
    law: Tensor


def pick(law: Tensor, token: Tensor) -> Tensor:
    """law (..., V), token int64 (...) -> (...)."""
    return law.gather(-1, token[..., None]).squeeze(-1)


def ratio(p: Tensor, q: Tensor) -> Tensor:
    """min(1, p / q), which is 0 wherever p is 0, and 1 where only q is."""
    return torch.where(p > 0, (p / q).clamp_max(1), 0)


def normalised(mass: Tensor, otherwise: Tensor) -> Tensor:
    """mass (..., V) over its sum; `otherwise` (..., V) where the sum is 0."""
    total = mass.sum(-1, keepdim=True)
    return torch.where(total > 0, mass / total, otherwise)


def residual(p: Tensor, kept: Tensor) -> Tensor:
    """Law of the token that replaces a rejected draft: norm(max(p - kept, 0)), (..., V).

    kept (..., V): q of every token times the probability that it is accepted; q itself gives the same under the exact
    rule. Where nothing is left (p == q up to rounding) it is p.
    """
    return normalised((p - kept).clamp_min(0), p)


def leading(accepted: Tensor) -> Tensor:
    """accepted bool (..., n) -> int64 (...): how many are True before the first False."""
    return accepted.long().cumprod(-1).sum(-1)


def row_after(rows: Tensor, count: Tensor) -> Tensor:
    """rows (B, n + 1, V), count int64 (B,) in [0, n] -> (B, V): row number `count` of each sample."""
    return rows.gather(1, count[:, None, None].expand(-1, 1, rows.shape[-1])).squeeze(1)


def verify_chain(p: Tensor, q: Tensor, draft: Tensor, u: Tensor, weights: Tensor | float = 1.0) -> Verdict:
    """p (B, n + 1, V), q (B, n, V), draft int64 (B, n), u (B, n) uniform in [0, 1): draft i is accepted while
    u_i < f_i = min(1, w_i p_i / q_i).

    weights w, a number or (n,): 1 is exact; above 1 more is accepted at a known cost in law (`one_step_law`). After all n
    drafts comes a token of p_{n+1}. Greedy decoding is the same with one-hot p.
    """
    n = draft.shape[1]  # filled on the device: no copy for it to wait for
    weights = (
        weights.to(p) if isinstance(weights, Tensor) else torch.full((n,), weights, dtype=p.dtype, device=p.device)
    )
    weights = weights.expand(n)
    accept_prob = ratio(weights * pick(p[:, :-1], draft), pick(q, draft))
    count = leading(u < accept_prob)
    target, drafted = (
        row_after(p, count),
        row_after(F.pad(q, (0, 0, 0, 1)), count),
    )  # nothing was drafted after the last
    weight = row_after(F.pad(weights, (0, 1), value=1.0).expand(len(p), -1)[..., None], count)
    return Verdict(accept_prob, count, residual(target, torch.minimum(drafted, weight * target)))


def verify_greedy(logits: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature 0. logits (B, n + 1, V), draft (B, n) -> accepted drafts int64 (B,), the token after them (B,)."""
    best = logits.argmax(-1)
    count = leading(best[:, :-1] == draft)
    return count, best.gather(1, count[:, None]).squeeze(1)


def acceptance_rate(p: Tensor, q: Tensor) -> Tensor:
    """Share of drafts from q that the exact rule accepts: sum min(p, q) = 1 - TV(p, q). (..., V) -> (...)."""
    return torch.minimum(p, q).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """(..., V), (..., V) -> (...)."""
    return (p - q).abs().sum(-1) / 2


def one_step_law(kept: Tensor, correction: Tensor) -> Tensor:
    """Law (..., V) of one tested token, for any rule: q f + (1 - sum q f) r.

    kept q f (..., V): the probability that a token is drafted and accepted; correction r (..., V): the law after a rejection.
    """
    return kept + (1 - kept.sum(-1, keepdim=True)).clamp_min(0) * correction


def weighted_law(p: Tensor, q: Tensor, weights: Tensor | float) -> Tensor:
    """Law (..., V) of one token tested by `verify_chain` under weights that broadcast to (...)."""
    weights = torch.as_tensor(weights, dtype=p.dtype, device=p.device)
    kept = torch.minimum(q, weights[..., None] * p)
    return one_step_law(kept, residual(p, kept))


def falling_weights(
    n: int, delta: float, decay: float = 0.7, mu: float = 0.0, device: torch.device | str | None = None
) -> Tensor:
    """Cool-SD's weights delta exp(-decay i - mu) of drafts i = 0 to n - 1: early ones are relaxed the most. float64 (n,)."""
    return delta * torch.exp(-decay * torch.arange(n, dtype=torch.float64, device=device) - mu)


def expected_tokens(alpha: Tensor, n: int) -> Tensor:
    """Tokens a target call brings when each of n drafts is accepted with alpha (...): 1 + alpha + ... + alpha^n."""
    return (alpha[..., None] ** torch.arange(n + 1, device=alpha.device)).sum(-1)


def expected_speedup(alpha: Tensor, n: int, cost: float) -> Tensor:
    """Over plain decoding, when a draft step costs `cost` target calls."""
    return expected_tokens(alpha, n) / (n * cost + 1)
