"""What drafts: a smaller generator, or a layer on the target's own hidden states. Both make chains and trees.

A drafter is a value that holds a network; `begin` makes a session, which holds the caches of one decoding, and reads how
far it is from the target's state. Letters: R branches of guidance, B samples, n drafts, V vocabulary, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count as counting
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from generators.next_token import NextToken
from generators.protocol import Generator, Prediction
from sampling.sampler import Sampler, inverse_cdf
from sampling.speculative.drafter import Drafter, ReadOut
from sampling.speculative.loop import Rounds, laws
from sampling.speculative.trees import ROOT, Expand


class Session(Protocol):
    """calls: forwards of the drafter so far. reads: whether it drafts from hidden states of the target, which must then
    have made the first token, and be shown to `observe` after every round."""

    calls: int
    reads: bool

    def propose(self, n: int) -> tuple[Tensor, Tensor]:
        """A chain for the next n places: draft int64 (B, n), and the laws q (B, n, V) it was drawn from."""
        ...

    def grow(self) -> tuple[Tensor, Expand]:
        """What trees.dynamic_tree and trees.fill_static_tree ask: log-probabilities (B, V), and the function for a level."""
        ...

    def observe(self, prediction: Prediction, nodes: Tensor, tokens: Tensor, count: Tensor) -> None:
        """After a round: nodes int64 (B, m) of the prediction (0: the newest token before it), tokens int64 (B, m) that
        were committed after each, the first count int64 (B,) of them."""
        ...


class Drafting(Protocol):
    def begin(self, rounds: Rounds, room: int) -> Session:
        """room: the largest number of nodes of a draft, the newest token among them."""
        ...


@dataclass(frozen=True)
class ModelDrafter:
    """A smaller generator of the same tokens under the same conditions, filtered and guided by the same sampler."""

    generator: Generator

    def begin(self, rounds: Rounds, room: int) -> "ModelSession":
        """Raises ValueError for a generator of other tokens than the target's."""
        if self.generator.spec != rounds.target.spec:
            raise ValueError(
                f"target and drafter must share their tokens: {rounds.target.spec} and {self.generator.spec}"
            )
        return ModelSession(self.generator, rounds, room)


class ModelSession:
    """state: of the drafter. Of the target's tokens it lacks at most the newest, which is fed when drafting begins; the
    one before is fed again, since a draft that ends a round was never fed."""

    reads = False

    def __init__(self, generator: Generator, rounds: Rounds, room: int) -> None:
        self.generator, self.rounds = generator, rounds
        self.state = generator.begin(rounds.branches, rounds.noise, length=rounds.state.rounds, room=room)

    @property
    def calls(self) -> int:
        return self.state.nfe

    def propose(self, n: int) -> tuple[Tensor, Tensor]:
        u = self.rounds.uniform("draft", self.rounds.place(n))
        prediction, tokens, q = self._next(), [], []
        for i in range(n):
            q.append(laws(self.rounds.sampler, prediction).p)
            tokens.append(inverse_cdf(q[-1].double(), u[:, i : i + 1]))
            self.generator.commit(self.state, prediction.positions, tokens[-1])
            if i < n - 1:
                prediction = self.generator.step(self.state)
        return torch.cat(tokens, dim=1), torch.cat(q, dim=1)

    def grow(self) -> tuple[Tensor, Expand]:
        rows = len(self.state.tokens)
        first = log_laws(self.rounds.sampler, self._next()).squeeze(1)
        tokens = self.state.tokens[:, :0]
        parents = torch.full((rows, 1), ROOT, device=tokens.device)

        def expand(level: Tensor, below: Tensor) -> Tensor:
            nonlocal tokens, parents
            tokens, parents = torch.cat((tokens, level), dim=1), torch.cat((parents, below), dim=1)
            prediction = self.generator.score(self.state, tokens, parents)
            return log_laws(self.rounds.sampler, last(prediction, level.shape[1]))

        return first, expand

    def _next(self) -> Prediction:
        """The law after the target's newest token, which is fed and committed."""
        own, target = self.state, self.rounds.state
        if target.round == 0:
            return self.generator.step(own)
        self.generator.rewind(own, target.length - 1)
        own.reach = target.reach
        newest = target.tokens.gather(1, target.length[:, None] - 1)
        prediction = self.generator.score(own, newest)
        self.generator.commit(own, prediction.positions[:, :1], newest)
        return last(prediction, 1)

    def observe(self, prediction: Prediction, nodes: Tensor, tokens: Tensor, count: Tensor) -> None:
        """Nothing: it reads the target's tokens when it drafts."""


def last(prediction: Prediction, m: int) -> Prediction:
    """Of a prediction the last m places."""
    return replace(
        prediction,
        z=prediction.z[:, :, -m:],
        positions=prediction.positions[:, -m:],
        index=prediction.index[:, -m:],
    )


def log_laws(sampler: Sampler, prediction: Prediction) -> Tensor:
    """Log-probabilities (B, m, V) of the guided, filtered law; of the unfiltered one under a greedy sampler, which ranks."""
    if sampler.greedy:
        return sampler.guide(prediction, prediction.head.logits(prediction.z)).log_softmax(-1)
    return laws(sampler, prediction).p.log()


@dataclass(frozen=True)
class EagleDrafter:
    """A layer that continues the target's hidden states, and reads them out as the target does."""

    drafter: Drafter

    def begin(self, rounds: Rounds, room: int) -> "EagleSession":
        """Raises ValueError for a target of another kind, other tokens, or other condition slots than the drafter's."""
        own, target = self.drafter, rounds.target
        if not isinstance(target, NextToken):
            raise ValueError(f"EagleDrafter continues the hidden states of NextToken, not of {type(target).__name__}")
        if (own.spec.length, own.spec.vocab_size) != (target.spec.length, target.spec.vocab_size):
            raise ValueError(f"target and drafter must share their tokens: {target.spec} and {own.spec}")
        slots = target.condition.slots - 1
        if own.slots != slots:
            raise ValueError(f"this target needs a drafter with slots={slots}, one less than its own: got {own.slots}")
        return EagleSession(own, rounds, room)


class EagleSession:
    reads = True

    def __init__(self, drafter: Drafter, rounds: Rounds, room: int) -> None:
        self.drafter, self.rounds, self.calls = drafter, rounds, 0
        self.state = drafter.begin(len(rounds.state.tokens), len(rounds.branches), room)

    def propose(self, n: int) -> tuple[Tensor, Tensor]:
        law, expand = self.drafter.grow(
            self.state, self._reader(lambda prediction: laws(self.rounds.sampler, prediction).p)
        )
        u = self.rounds.uniform("draft", self.rounds.place(n))
        tokens, q = [], []
        for i in range(n):
            q.append(law)
            tokens.append(inverse_cdf(law[:, None].double(), u[:, i : i + 1]))
            if i < n - 1:
                self.calls += 1
                law = expand(tokens[-1], torch.full_like(tokens[-1], i)).squeeze(1)
        return torch.cat(tokens, dim=1), torch.stack(q, dim=1)

    def grow(self) -> tuple[Tensor, Expand]:
        first, expand = self.drafter.grow(
            self.state, self._reader(lambda prediction: log_laws(self.rounds.sampler, prediction))
        )

        def counted(tokens: Tensor, parents: Tensor) -> Tensor:
            self.calls += 1
            return expand(tokens, parents)

        return first, counted

    def observe(self, prediction: Prediction, nodes: Tensor, tokens: Tensor, count: Tensor) -> None:
        branches = len(self.rounds.branches)
        at = repeat(nodes, "B m -> R B m d", R=branches, d=prediction.z.shape[-1])
        features = rearrange(prediction.z.gather(2, at), "R B m d -> (R B) m d")
        tokens = tokens.repeat(branches, 1)
        if self.calls == 0:  # the condition comes first, under tokens of number 0
            told = self.rounds.state.told
            features = torch.cat((told, features), dim=1)
            tokens = torch.cat((tokens.new_zeros(told.shape[:2]), tokens), dim=1)
            count = count + told.shape[1]
        self.calls += 1
        self.drafter.observe(self.state, features, tokens, count)

    def _reader(self, read: Callable[[Prediction], Tensor]) -> ReadOut:
        """As the target reads out what comes one level of nodes after another, the root first."""
        state, head, level = self.rounds.state, self.rounds.target.head, counting()

        def at_level(x: Tensor) -> Tensor:
            place = (state.length[:, None] + next(level)).clamp_max(state.rounds - 1).expand(-1, x.shape[2])
            return read(Prediction(head, x, place, place, state.rounds, keep=1))

        return at_level
