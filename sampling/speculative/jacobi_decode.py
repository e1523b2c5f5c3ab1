"""Jacobi windows: the target drafts for itself. See jacobi.py for the step, its sources, and the couplings."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from generators.next_token import NextTokenState
from generators.protocol import Generator
from layers.noise import Noise
from layers.record import look_up
from layers.spec import Condition, Grid, TokenSpec
from sampling.confidence import gumbel
from sampling.sampler import Sampler, inverse_cdf
from sampling.speculative import jacobi
from sampling.speculative.drafting import Drafting
from sampling.speculative.loop import Laws, Rounds, Trace, laws, one_hot
from sampling.speculative.rules import Exact, Exactness, Rule

Coupling = Literal["none", "maximal", "gumbel"]


@dataclass(frozen=True)
class SJD:
    """window: tokens of a call, the newest and window - 1 drafts. coupling: how tokens of successive calls are coupled:
    not (plain SJD), by maximal coupling, or by sharing Gumbel noise. initialiser: of jacobi.INITIALISERS. rule: how drafts
    are tested; with `Grouped` and no coupling this is GSD as published.

    Raises UnknownName for an initialiser that is not known, ValueError for a window without drafts, an unknown coupling, or
    a rule under maximal coupling, which is a test of its own.
    """

    window: int = 16
    coupling: Coupling = "maximal"
    initialiser: str = "random"
    rule: Rule = field(default_factory=Exact)

    def __post_init__(self) -> None:
        look_up(self.initialiser, jacobi.INITIALISERS, "initialiser")
        look_up(self.coupling, dict.fromkeys(get_args(Coupling)), "coupling")
        if self.window < 2:
            raise ValueError(f"SJD: window is {self.window}, must be at least 2: the newest token and a draft")
        if self.coupling == "maximal" and not isinstance(self.rule, Exact):
            raise ValueError("SJD: maximal coupling tests by itself; for another rule take coupling none or gumbel")

    @property
    def exactness(self) -> Exactness:
        return self.rule.exactness

    @property
    def exact(self) -> bool:
        return self.exactness == "exact"

    @torch.inference_mode()
    def generate(
        self,
        target: Generator,
        condition: Condition,
        sampler: Sampler,
        noise: Noise,
        drafter: Drafting | None = None,
        *,
        length: int | None = None,
    ) -> tuple[NextTokenState, Trace]:
        """Decode B samples of `length` tokens, all when None. Raises ValueError for a drafter, which has no use here, and
        for an initialiser of rows of a picture that tokens do not have."""
        if drafter is not None:
            raise ValueError("SJD drafts from the target's own laws: give no drafter")
        row = self._row(target.spec)
        rounds = Rounds(target, condition, sampler, noise, length, self.window - 1)
        state, vocab_size = rounds.state, target.spec.vocab_size
        drafts = torch.full((len(state.tokens), self.window - 1), jacobi.ABSENT, device=state.tokens.device)
        q = target.embed.weight.new_zeros(*drafts.shape, vocab_size)
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        tops, entered, shared = torch.zeros_like(state.tokens), None, None
        while rounds.open():
            random = (rounds.uniform("initial draft", rounds.place(self.window - 1)) * vocab_size).long()
            begun = jacobi.initial_drafts(self.initialiser, state.tokens, tops, state.length, random, row)
            fresh = drafts == jacobi.ABSENT
            drafts = torch.where(fresh, begun, drafts)
            q = torch.where(fresh[..., None], one_hot(begun, q), q)
            if self.coupling == "gumbel":
                shared = self._shared(rounds, q, entered, shared)
            found = laws(sampler, target.score(state, drafts))
            step = self._step(target, rounds, found, q, drafts, shared)
            if jacobi.INITIALISERS[self.initialiser][0] == "top":
                offset = torch.arange(tops.shape[1], device=tops.device) - state.length[:, None]
                best = found.p.argmax(-1).gather(1, offset.clamp(0, self.window - 1))
                tops = torch.where((offset >= 0) & (offset < step.count[:, None]), best, tops)
            entered = rounds.commit(step.tokens, step.count - 1)
            drafts, q = step.drafts, step.laws
        return state, rounds.trace()

    def _step(
        self, target: Generator, rounds: Rounds, found: Laws, q: Tensor, drafts: Tensor, shared: Tensor | None
    ) -> jacobi.Step:
        place = rounds.place(self.window)
        u, redraw = rounds.uniform("accept", place[:, :-1]), rounds.uniform("token", place)
        if self.coupling == "maximal":
            return jacobi.iterate_maximal(found.p, q, drafts, u, redraw)
        if shared is not None:
            settled = jacobi.gumbel_token(found.p, shared)
        else:
            settled = inverse_cdf(found.p.double(), rounds.uniform("settled", place))
        verdict = self.rule.test(target, found, q, drafts, u)
        return jacobi.settle(found.p, verdict, drafts, settled, redraw)

    def _shared(self, rounds: Rounds, q: Tensor, moved: Tensor | None, before: Tensor | None) -> Tensor:
        """Gumbel noise of every place and token of the window (B, L, V), the same in every round. What a window had before it
        moved on by `moved` (B,) is kept."""
        place, size = rounds.place(self.window), q.shape[-1:]
        if before is None:
            return gumbel(rounds.noise.uniform("gumbel", place, size=size)).to(q.dtype)
        stay = self.window - rounds.stride
        source = torch.arange(stay, device=place.device) + moved[:, None]
        kept = before.gather(1, source[..., None].expand(-1, -1, *size))
        return torch.cat((kept, gumbel(rounds.noise.uniform("gumbel", place[:, stay:], size=size)).to(q.dtype)), dim=1)

    def _row(self, spec: TokenSpec) -> int:
        """Tokens in a row of the picture; of tokens without a place in it, all."""
        if isinstance(spec.layout, Grid):
            return spec.layout.w
        if jacobi.INITIALISERS[self.initialiser][1] == "up":
            raise ValueError(f"initialiser {self.initialiser!r} looks at the row above, these tokens have none: {spec}")
        return spec.length
