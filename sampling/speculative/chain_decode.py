"""A chain of drafts a round: drafted one after another, tested in one call of the target.

Sources: Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318); the rules name their own.
"""

from dataclasses import dataclass, field

import torch

from generators.next_token import NextTokenState
from generators.protocol import Generator
from layers.noise import Noise
from layers.spec import Condition
from sampling.sampler import Sampler
from sampling.speculative.drafting import Drafting
from sampling.speculative.loop import Rounds, Trace, joined, laws
from sampling.speculative.rules import Exact, Exactness, Rule


@dataclass(frozen=True)
class Chain:
    """drafts: how many a round. rule: how they are tested; under `Exact` the tokens have the law of plain decoding.

    Raises ValueError for no drafts.
    """

    drafts: int = 4
    rule: Rule = field(default_factory=Exact)

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise ValueError(f"Chain: drafts is {self.drafts}, must be at least 1")

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
        """Decode B samples of `length` tokens, all when None. Raises ValueError without a drafter."""
        if drafter is None:
            raise ValueError("Chain tests what a drafter drafts: give one (ModelDrafter, EagleDrafter)")
        rounds = Rounds(target, condition, sampler, noise, length, self.drafts)
        state, session = rounds.state, drafter.begin(rounds, self.drafts + 1)
        nodes = torch.arange(self.drafts + 1, device=state.length.device).expand(len(state.tokens), -1)
        if session.reads:
            prediction = rounds.first()
            session.observe(prediction, nodes[:, :1], state.tokens[:, :1], state.length)
        while rounds.open():
            draft, q = session.propose(self.drafts)
            prediction = target.score(state, draft)
            found = laws(sampler, prediction)
            u = rounds.uniform("accept", rounds.place(self.drafts))
            verdict = self.rule.test(target, found, q, draft, u)
            tokens = joined(draft, verdict.count, rounds.draw(verdict.law, verdict.count))
            entered = rounds.commit(tokens, verdict.count)
            session.observe(prediction, nodes, tokens, entered)
        return state, rounds.trace(session.calls)
