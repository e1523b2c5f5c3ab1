"""What all loops of speculation share: how a decoding begins, when it ends, and what is recorded of its rounds.

A round is one call of the target and one test. In a ragged batch each row commits its own number of tokens; a row that is
done idles, what a round brings beyond the last place is dropped. All noise is keyed by position and round: a row takes part
in every round until it is done, so that the round is its own, and the tokens of a sample do not depend on the batch.

Letters: R branches of guidance, B samples, n drafts of a round, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generators.next_token import NextTokenState
from generators.protocol import Generator, Prediction
from heads.categorical import Categorical
from layers.noise import Noise
from layers.spec import Condition
from sampling.confidence import Confidence
from sampling.decode import guided
from sampling.sampler import Sampler, inverse_cdf


@dataclass(frozen=True)
class Trace:
    """What a decoding of B samples took.

    rounds int64 (B,): calls of the target that a row took part in; calls: of the batch, drafter_calls: of what drafted.
    committed int64 (B, calls): tokens of a row in each, 0 once it is done. tested, accepted int64 (n,): summed over the
    batch by place in the draft (in a tree by depth); a place is tested once all before it were accepted.
    """

    rounds: Tensor
    calls: int
    drafter_calls: int
    committed: Tensor
    tested: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Laws:
    """What acceptance rules are told of the target: guided, filtered logits (B, m, V), and their law p (B, m, V), in the
    network's dtype, float32 at least."""

    logits: Tensor
    p: Tensor


def laws(sampler: Sampler, prediction: Prediction) -> Laws:
    """Under a greedy sampler p is one-hot."""
    guided = sampler.guide(prediction, prediction.head.logits(prediction.z))
    if sampler.greedy:
        return Laws(guided, one_hot(guided.argmax(-1), guided))
    filtered = sampler.filter(sampler.tempered(prediction, guided))
    return Laws(filtered, filtered.softmax(-1))


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """tokens int64 (B, m), like (B, m or more, V) -> (B, m, V) in its dtype."""
    return torch.zeros_like(like[:, : tokens.shape[1]]).scatter_(-1, tokens[..., None], 1.0)


class Rounds:
    """One decoding under way: its state, and what is recorded of it.

    Raises ValueError for a target that cannot test drafts, and for settings of the sampler that nothing here would read.
    """

    def __init__(
        self,
        target: Generator,
        condition: Condition,
        sampler: Sampler,
        noise: Noise,
        length: int | None,
        drafts: int,
        **room: Any,
    ) -> None:
        name = type(target).__name__
        if not hasattr(target, "score") or not isinstance(target.head, Categorical):
            raise ValueError(f"{name} with {type(target.head).__name__}: only a causal order over ids can test drafts")
        for setting, off in (("smooth", None), ("rounds", None), ("reveal", None), ("confidence", Confidence())):
            if getattr(sampler, setting) != off:
                raise ValueError(f"sampler: {setting} is not read by speculation; leave it out")
        self.branches: Sequence[Condition] = guided(condition, sampler)
        self.target, self.sampler, self.noise = target, sampler, noise
        self.state: NextTokenState = target.begin(self.branches, noise, length=length, **room)
        self.stride = 0  # the most tokens that a row committed in the last round
        self._committed: list[Tensor] = []
        self._tested, self._accepted = self.state.length.new_zeros(2, drafts).unbind()

    def open(self) -> bool:
        """Whether any row is not done. Asks the device, once a round."""
        if self.state.round == 0:
            return True
        numbers = (*self.state.length.aminmax(), self._committed[-1].max())
        least, self.state.reach, self.stride = torch.stack(numbers).tolist()
        return least < self.state.rounds

    def place(self, m: int) -> Tensor:
        """int64 (B, m): the next m positions of each row; those beyond the last are the last."""
        ahead = torch.arange(m, device=self.state.length.device)
        return (self.state.length[:, None] + ahead).clamp_max(self.state.rounds - 1)

    def uniform(self, use: str, positions: Tensor) -> Tensor:
        """Of this round, float64, as positions (B, m)."""
        return self.noise.uniform(use, positions, self.state.round)

    def draw(self, law: Tensor, ahead: Tensor) -> Tensor:
        """A token of law (B, V) for the place `ahead` (B,) of the next one -> int64 (B,)."""
        position = (self.state.length + ahead).clamp_max(self.state.rounds - 1)[:, None]
        return inverse_cdf(law.double(), self.uniform("token", position)[:, 0])

    def first(self) -> Prediction:
        """One call for the first token alone, for what drafts only after it."""
        prediction = self.target.step(self.state)
        token = self.draw(laws(self.sampler, prediction).p[:, 0], torch.zeros_like(self.state.length))
        self.commit(token[:, None], torch.zeros_like(token))
        return prediction

    def commit(self, tokens: Tensor, accepted: Tensor, tested: Tensor | None = None, **path: Tensor) -> Tensor:
        """tokens (B, m), of which the accepted int64 (B,) drafts and one more enter. tested (B,): how many places of the
        draft were tested; the accepted ones and one more when None. Returns how many tokens entered, int64 (B,)."""
        state, m = self.state, tokens.shape[1]
        before, place = state.length, torch.arange(len(self._tested), device=tokens.device)
        room = state.rounds - before
        tested = accepted + (m > 1) if tested is None else tested
        keep = torch.arange(m, device=tokens.device) <= accepted[:, None]
        self.target.commit(state, self.place(m), tokens, keep, **path)
        self._tested += (place < torch.minimum(tested, room)[:, None]).sum(0)
        self._accepted += (place < torch.minimum(accepted, room)[:, None]).sum(0)
        self._committed.append(state.length - before)
        return self._committed[-1]

    def trace(self, drafter_calls: int = 0) -> Trace:
        committed = torch.stack(self._committed, dim=1)
        return Trace((committed > 0).sum(1), self.state.nfe, drafter_calls, committed, self._tested, self._accepted)


def joined(draft: Tensor, count: Tensor, token: Tensor) -> Tensor:
    """draft (B, n), of which count (B,) are accepted, and the token (B,) after them -> (B, n + 1), its first count + 1."""
    place = torch.arange(draft.shape[1] + 1, device=draft.device)
    return torch.where(place < count[:, None], torch.nn.functional.pad(draft, (0, 1)), token[:, None])
