"""Any-subset speculative decoding: a model that can predict any places from any others drafts for itself. Lossless.

Source: Guo and Ermon 2025 (arXiv:2504.20456). In one round the model predicts the next k places of an order, blind to each
other; then it scores those drafts, each given the ones before it. The first has the same law in both calls, so that every
round of two calls brings two tokens at least. There is no bonus token. The exactness is that of a chain along the order.

rank int64 (B, L): the turn of each place, the prompt's first. A model is a function of tokens (B, L), with mask_token where
undecided, and blocked bool (B, L, L), True where a row may not look at a column -> logits (B, L, V). Letters: B samples, L
places, V vocabulary, k drafts a round, R rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sampling.sampler import inverse_cdf
from sampling.speculative.acceptance import leading, normalised, pick, ratio, residual

Model = Callable[[Tensor, Tensor], Tensor]


def joint_blocked(rank: Tensor, prompt: int) -> Tensor:
    """Who may not look at whom when drafts are scored, bool (B, L, L): a place sees those of lower rank; the prompt, the
    ranks below `prompt`, sees all of itself."""
    given = rank < prompt
    blocked = rank[..., :, None] <= rank[..., None, :]
    return blocked & ~(given[..., :, None] & given[..., None, :])


def parallel_blocked(rank: Tensor, prompt: int, decided: Tensor | int) -> Tensor:
    """The same when drafting: the ranks from decided (B,) on see all that is decided, and nobody sees them."""
    decided = torch.as_tensor(decided, device=rank.device).reshape(-1, 1)
    return joint_blocked(torch.where(rank < decided, rank, rank.shape[-1]), prompt)


def bigram_law(tokens: Tensor, decided: Tensor, order: Tensor, left: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Relative counts of what follows `left` int64 (B,) among the decided places; of all decided tokens if nothing does.

    tokens (B, L), decided bool (B, L), order int64 (B, L): when each place was decided. Returns law float64 (B, V), and when
    each token was first counted int64 (B, V), the order in which the published code lists them.
    """
    never = torch.iinfo(torch.int64).max
    latest = torch.maximum(order[:, :-1], order[:, 1:])
    begun = 2 * latest + (
        order[:, :-1] > order[:, 1:]
    )  # at a new token the pair that ends comes before the one it begins
    pair = decided[:, :-1] & decided[:, 1:] & (tokens[:, :-1] == left[:, None])
    tables = []
    for counted, token, time in ((pair, tokens[:, 1:], begun), (decided, tokens, order)):
        count = torch.zeros(len(tokens), vocab_size, dtype=torch.float64, device=tokens.device)
        count.scatter_add_(1, token, counted.double())
        first = torch.full_like(count, never, dtype=torch.int64)
        first.scatter_reduce_(1, token, torch.where(counted, time, never), "amin")
        tables.append((count, first))
    (count, first), (all_count, all_first) = tables
    follows = count.sum(1, keepdim=True) > 0
    count, first = torch.where(follows, count, all_count), torch.where(follows, first, all_first)
    return normalised(count, count), first


def draw_in_order(law: Tensor, time: Tensor, u: Tensor) -> Tensor:
    """Inverse CDF of law (B, V) with the tokens listed by time int64 (B, V) -> int64 (B,)."""
    order = time.argsort(dim=-1, stable=True)
    return pick(order, inverse_cdf(law.gather(-1, order), u.double()))


@dataclass(frozen=True)
class AnySubset:
    """k: drafts a round. draft: by the model itself, or by counting pairs of neighbouring tokens, at no call.

    temperature: of drafts and scores; with plain_oracle only of the drafts after the first of a round, the target being the
    model at temperature 1. slack: added to every acceptance probability; 0 is exact.
    """

    k: int = 5
    draft: Literal["self", "bigram"] = "self"
    temperature: float = 1.0
    plain_oracle: bool = False
    slack: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or not self.temperature > 0 or self.draft not in ("self", "bigram"):
            raise ValueError(
                f"AnySubset: k={self.k} must be at least 1, temperature={self.temperature} above 0, draft "
                f"{self.draft!r} self or bigram"
            )

    def decode(
        self,
        model: Model,
        tokens: Tensor,
        rank: Tensor,
        prompt: int,
        mask_token: int,
        vocab_size: int,
        u: Tensor,
        redraw: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """tokens int64 (B, L): the prompt, mask_token elsewhere. u (B, R, 2, k): for drafts and for tests; redraw (B, R):
        for corrections; uniform in [0, 1), R = L - prompt rounds are always enough. Returns tokens (B, L), and the calls of
        the model that each sample needed, int64 (B,).

        mask_token is never drawn. A finished sample idles.
        """
        length = tokens.shape[1]
        place_of = rank.argsort(dim=1)
        joint = joint_blocked(rank, prompt)
        from_left = torch.arange(length, device=tokens.device)
        order = torch.where(rank < prompt, from_left, length + rank)  # when each place was decided
        decided = torch.full_like(tokens[:, 0], prompt)
        calls = torch.zeros_like(decided)
        slot = torch.arange(self.k, device=tokens.device)
        for i in range(length - prompt):
            turn = decided[:, None] + slot  # (B, k)
            inside = turn < length
            if not bool(inside.any()):
                break
            places = place_of.gather(1, turn.clamp_max(length - 1))
            by_self = inside[:, 0] & ((places[:, 0] == 0) | (self.draft == "self"))
            draft, q = torch.zeros_like(places), torch.ones(())
            if self.draft == "self" or bool(by_self.any()):
                q = self._law(model(tokens, parallel_blocked(rank, prompt, decided)), places, mask_token, slot == 0)
                draft = inverse_cdf(q, u[:, i, 0].double())
                calls = calls + by_self
            if self.draft == "bigram":
                known = rank < decided[:, None]
                paired, law = bigram_drafts(tokens, known, order, places, u[:, i, 0], vocab_size)
                draft = torch.where(by_self[:, None], draft, paired)
                q = torch.where(by_self[:, None, None], q, law)
            tested = inside[:, 0] & ((decided < length - 1) | (self.draft == "bigram"))
            if bool(tested.any()):
                p = self._law(model(put(tokens, places, draft, inside), joint), places, mask_token, slot >= 0)
                calls = calls + tested
            else:
                p = q
            accept_prob = (ratio(pick(p, draft), pick(q, draft)) + self.slack).clamp_max(1)
            accepted = (u[:, i, 1] < accept_prob) | by_self[:, None] & (slot == 0)  # one law in both calls
            count = leading(accepted & inside)
            replaced = inside & (slot == count[:, None])
            correction = inverse_cdf(residual(p, q), redraw[:, i, None].double().expand_as(draft))
            new = torch.where(replaced, correction, draft)
            enters = inside & (slot <= count[:, None])
            tokens = put(tokens, places, new, enters)
            decided = decided + enters.sum(1)
        return tokens, calls

    def _law(self, logits: Tensor, places: Tensor, mask_token: int, plain: Tensor) -> Tensor:
        """Law float64 (B, k, V) of places (B, k), without the mask token. plain bool (k,): what a plain oracle leaves at
        temperature 1."""
        at = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])).double()
        heat = torch.full_like(plain, self.temperature, dtype=at.dtype)
        at = at / torch.where(plain & self.plain_oracle, 1.0, heat)[:, None]
        at[..., mask_token] = -torch.inf
        return at.softmax(-1)


def put(tokens: Tensor, places: Tensor, new: Tensor, enters: Tensor) -> Tensor:
    """tokens (B, L) with new (B, k) at places (B, k) where enters is True. Of places named twice the entering one counts."""
    spare = torch.where(enters, places, tokens.shape[1])
    return torch.cat((tokens, tokens[:, :1]), dim=1).scatter(1, spare, new)[:, :-1]


def bigram_drafts(
    tokens: Tensor, decided: Tensor, order: Tensor, places: Tensor, u: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Drafts for places (B, k) in turn, each from `bigram_law` after its left neighbour, decided or just drafted.

    Without such a neighbour all decided tokens count. Returns int64 (B, k), and their laws (B, k, V).
    """
    drafts, laws = [], []
    readable = torch.where(decided, tokens, -1)
    for s in range(places.shape[1]):
        place = places[:, s : s + 1]
        left = torch.where(place > 0, readable.gather(1, (place - 1).clamp_min(0)), -1).squeeze(1)
        law, time = bigram_law(tokens, decided, order, left, vocab_size)
        drafts.append(draw_in_order(law, time, u[:, s]))
        laws.append(law)
        readable = readable.scatter(1, place, drafts[-1][:, None])
    return torch.stack(drafts, 1), torch.stack(laws, 1)
