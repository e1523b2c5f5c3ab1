"""Speculative Jacobi decoding: the target's own last laws are the draft laws of its next call. No drafter, no training.

Sources: SJD (Teng et al. 2024, arXiv:2410.01699); maximal coupling and Gumbel sharing (coupled SJD, arXiv:2510.24211).

A window of length L is the newest committed token and L - 1 drafts; one call gives p_1 to p_L, the laws of the drafts and
of the token after them. `settled` tokens f_i ~ p_i are drawn for every place in the same step. What is accepted stays,
then comes one token, and the settled tokens beyond it are the next drafts, with p as their draft laws. They were computed
in a context that holds the rejected token, which makes them worse drafts and never biased ones.

How f_i is drawn decides how much is accepted next time: afresh (plain SJD), `keep_or_redraw` the old draft (maximal
coupling), or with the noise of the place shared between calls (`gumbel_token`). All three leave the law of the target.

Letters: B samples, L window, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from layers.record import look_up
from sampling.sampler import inverse_cdf
from sampling.speculative.acceptance import Verdict, leading, pick, ratio, residual, verify_chain

ABSENT = -1  # stands where a window holds no token


@dataclass(frozen=True)
class Step:
    """What one call of the target brings.

    tokens int64 (B, L): the first count (B,) are committed, 1 to L of them, ABSENT beyond. drafts int64 (B, L - 1) and
    laws (B, L - 1, V): of the places after them that are still in the window, ABSENT and 0 where new ones must begin.
    """

    tokens: Tensor
    count: Tensor
    drafts: Tensor
    laws: Tensor


def keep_or_redraw(p: Tensor, q: Tensor, draft: Tensor, u: Tensor, redraw: Tensor) -> tuple[Tensor, Tensor]:
    """A token of law p that equals the draft of law q as often as any coupling can: with probability 1 - TV(p, q).

    p, q (..., V); draft int64 (...); u, redraw (...) uniform in [0, 1), independent. Returns the token int64 (...), and
    whether the draft was kept, bool (...).
    """
    kept = u < ratio(pick(p, draft), pick(q, draft))
    return torch.where(kept, draft, inverse_cdf(residual(p, q).double(), redraw.double())), kept


def gumbel_token(p: Tensor, gumbel: Tensor) -> Tensor:
    """argmax(log p + g): a token of law p (..., V). Two laws with the same g (..., V) agree with probability at least
    (1 - TV) / (1 + TV). -> int64 (...)."""
    return (p.log() + gumbel).argmax(-1)


def iterate(p: Tensor, q: Tensor, draft: Tensor, settled: Tensor, u: Tensor, redraw: Tensor) -> Step:
    """Plain or Gumbel-sharing SJD. p (B, L, V); q (B, L - 1, V); draft (B, L - 1); settled int64 (B, L) of law p; u
    (B, L - 1) and redraw (B,) uniform in [0, 1).

    A rejected draft is replaced from norm(max(p - q, 0)); after L - 1 accepted drafts comes the last settled token.
    """
    verdict = verify_chain(p, q, draft, u)
    return settle(p, verdict, draft, settled, redraw[:, None].expand(-1, settled.shape[1]))


def settle(p: Tensor, verdict: Verdict, draft: Tensor, settled: Tensor, redraw: Tensor) -> Step:
    """What follows a test of the drafts by any rule. redraw (B, L) uniform in [0, 1), of every place; the others as in
    `iterate`."""
    length, accepted = settled.shape[1], verdict.count[:, None]
    drawn = inverse_cdf(verdict.law.double(), redraw.gather(1, accepted)[:, 0].double())
    after = torch.where(verdict.count == length - 1, settled[:, -1], drawn)
    place = torch.arange(length, device=p.device)
    tokens = torch.where(place < accepted, F.pad(draft, (0, 1)), after[:, None])
    return advance(p, tokens, settled, verdict.count + 1)


def iterate_maximal(p: Tensor, q: Tensor, draft: Tensor, u: Tensor, redraw: Tensor) -> Step:
    """SJD under maximal coupling: the test and the new drafts are one draw. redraw (B, L), the others as in `iterate`."""
    token, kept = keep_or_redraw(p[:, :-1], q, draft, u, redraw[:, :-1])
    last = inverse_cdf(p[:, -1].double(), redraw[:, -1].double())
    settled = torch.cat((token, last[:, None]), dim=1)
    return advance(p, settled, settled, leading(kept) + 1)


def advance(p: Tensor, tokens: Tensor, settled: Tensor, count: Tensor) -> Step:
    """Commit the first count (B,) of tokens (B, L), and move the settled ones (B, L) beyond them to the front."""
    length = settled.shape[1]
    place = torch.arange(length, device=p.device)
    source = place[:-1] + count[:, None]  # (B, L - 1)
    inside = source < length
    source = source.clamp_max(length - 1)
    laws = p.gather(1, source[..., None].expand(-1, -1, p.shape[-1]))
    return Step(
        torch.where(place < count[:, None], tokens, ABSENT),
        count,
        torch.where(inside, settled.gather(1, source), ABSENT),
        torch.where(inside[..., None], laws, 0),
    )


# ---- where new drafts begin

INITIALISERS = {  # name -> (which table is copied, along which axis)
    "random": (None, None),
    "repeat_horizon": ("token", "left"),
    "sample_horizon": ("top", "left"),
    "repeat_vertical": ("token", "up"),
    "sample_vertical": ("top", "up"),
}


def initial_drafts(
    scheme: str, tokens: Tensor, tops: Tensor, known: Tensor, random: Tensor, row: int, start: int = 0
) -> Tensor:
    """Drafts for the places after the known ones, int64 (B, m). Their draft laws are one-hot.

    scheme: random; or from the place on the left (horizon) or above (vertical), its token (repeat) or the most probable
    token of its law (sample). tokens, tops int64 (B, T): what each place holds, and its law's most probable token, right
    up to known int64 (B,); a place that is not known gives way to the last known one. random int64 (B, m): used by the
    scheme of that name, in the first column (horizon) and in the first row (vertical). row: tokens in a row of the
    picture, of which the first stands at `start`. Raises UnknownName for a scheme that is not known.
    """
    table, axis = look_up(scheme, INITIALISERS, "initialiser")
    if table is None:
        return random
    place = known[:, None] + torch.arange(random.shape[1], device=random.device)
    stride = 1 if axis == "left" else row
    source = torch.minimum(place - stride, known[:, None] - 1).clamp_min(0)
    begins = (place - start) % row == 0 if axis == "left" else place - start < row
    return torch.where(begins, random, (tokens if table == "token" else tops).gather(1, source))


def maximal_joint(p: Tensor, q: Tensor) -> Tensor:
    """Joint law (..., V, V) of (old token, new token) under `keep_or_redraw`: rows sum to q, columns to p, and the
    diagonal is min(p, q)."""
    shared = torch.minimum(p, q)
    return torch.diag_embed(shared) + (q - shared)[..., :, None] * residual(p, q)[..., None, :]
