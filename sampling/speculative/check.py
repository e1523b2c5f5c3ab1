"""What a method does to the law of the tokens, measured: whole sequences of a small model, and one test on real laws.

The small model is a next-token generator of three tokens on a grid of four places, so that the law of all its sequences is
known by enumeration; what drafts for it is as small. A method that is exact must not be told from that law by a chi-square
test; the one-step law of the others is a closed formula of p, q and the rule, and its distance from p is what speed costs.

Letters: B samples, L tokens, V vocabulary, K = V^L sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from generators.next_token import NextToken
from generators.protocol import Generator
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec
from sampling.decode import guided
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.speculative.acceptance import Verdict, one_step_law, total_variation
from sampling.speculative.drafter import Drafter
from sampling.speculative.lantern import Relaxation, verify_tree
from sampling.speculative.loop import Laws, Rounds, laws
from sampling.speculative.rules import Rule
from sampling.speculative.tree_decode import Grown, Shape
from sampling.speculative.trees import Expand, children

SPEC = TokenSpec(Grid(1, 2, 2), decoded=(1, 4, 4), vocab_size=3)
DIM, HEADS, CLASSES = 8, 2, 2
SAMPLER = Sampler(Filter(temperature=0.9), Guidance(scale=1.5))
BATCH = 5000

Decode = Callable[[NextToken, Condition, Sampler, Noise], Tensor]  # -> tokens int64 (B, L)


def small_generator(seed: int) -> NextToken:
    """Random weights in float64, far from uniform laws, in eval mode."""
    generator = NextToken(SPEC, dim=DIM, depth=1, heads=HEADS, mlp_hidden=16, num_classes=CLASSES)
    return _random(generator.double(), seed)


def small_drafter(seed: int, target: NextToken) -> Drafter:
    """An EAGLE drafter for a small generator, with random weights."""
    drafter = _random(Drafter(SPEC, DIM, HEADS, mlp_hidden=16).double(), seed)
    drafter.embed.load_state_dict(target.embed.state_dict())
    return drafter


def _random(module: nn.Module, seed: int) -> nn.Module:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):  # norms stay as they are
            parameter.data.copy_(0.7 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return module.eval()


def sequences(spec: TokenSpec = SPEC) -> Tensor:
    """All of them, int64 (K, L), in the order of their numbers to the base V."""
    return torch.cartesian_prod(*[torch.arange(spec.vocab_size)] * spec.length)


@torch.inference_mode()
def sequence_law(target: NextToken, label: int, sampler: Sampler = SAMPLER) -> Tensor:
    """The law of whole sequences under plain decoding, float64 (K,), by enumeration."""
    every = sequences(target.spec)
    condition = Condition(label=torch.full((len(every),), label))
    state = target.begin(guided(condition, sampler), Noise(0, torch.arange(len(every))))
    steps = sampler.probs(target.score(state, every[:, :-1]))  # (K, L, V)
    return steps.gather(-1, every[..., None]).squeeze(-1).prod(-1)


def sequence_counts(
    decode: Decode, target: NextToken, label: int, draws: int, seed: int = 0, sampler: Sampler = SAMPLER
) -> Tensor:
    """How often each sequence came in so many draws of `decode`, int64 (K,)."""
    spec = target.spec
    number = spec.vocab_size ** torch.arange(spec.length).flip(0)
    counts = torch.zeros(spec.vocab_size**spec.length, dtype=torch.int64)
    for index in torch.arange(draws).split(BATCH):
        condition = Condition(label=torch.full_like(index, label))
        tokens = decode(target, condition, sampler, Noise(seed, index))
        counts += (tokens * number).sum(1).bincount(minlength=len(counts))
    return counts


# ---- one test on real laws


@dataclass
class Recorded:
    """A rule that notes what it is asked about the first place of every draft: logits, p and q (B, V) each, on the host."""

    rule: Rule
    seen: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def exactness(self) -> str:
        return self.rule.exactness

    def test(self, target: Generator, laws: Laws, q: Tensor, draft: Tensor, u: Tensor) -> Verdict:
        self.seen.append((laws.logits[:, 0], laws.p[:, 0], q[:, 0]))
        return self.rule.test(target, laws, q, draft, u)


@torch.inference_mode()
def step_law(rule: Rule, target: Generator, logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The law (V,) of one token that q drafts and the rule tests: sum_d q(d) [a(d) at d + (1 - a(d)) r_d].

    logits, p, q (V,). Asks the rule about every token as the draft, refused where a refusal can be.
    """
    size = len(p)
    draft = torch.arange(size, device=p.device)[:, None]
    both = Laws(*(row.expand(size, 2, -1) for row in (logits, p)))
    refused = torch.full(draft.shape, 1 - torch.finfo(torch.float64).eps / 2, dtype=torch.float64, device=p.device)
    verdict = rule.test(target, both, q.expand(size, 1, -1), draft, refused)
    accept = verdict.accept_prob[:, 0].clamp(0, 1)
    left = q * (1 - accept)
    correction = (left[:, None] * verdict.law).sum(0) / left.sum().clamp_min(torch.finfo(p.dtype).tiny)
    return one_step_law(q * accept, correction)


def step_distance(recorded: Recorded, target: Generator, places: int = 1000) -> float:
    """The mean total variation between the one-step law and p, over so many of the recorded places, spread over them all."""
    logits, p, q = (torch.cat(rows) for rows in zip(*recorded.seen, strict=True))
    chosen = torch.linspace(0, len(p) - 1, min(places, len(p))).long()
    laws = torch.stack([step_law(recorded.rule, target, logits[i], p[i], q[i]) for i in chosen.tolist()])
    return float(total_variation(laws, p[chosen]).mean())


@dataclass
class RecordedTree:
    """A shape of trees that notes what is tested below the root: p (B, V), and the siblings int64 (B, W) where they were
    chosen, or the law q (B, V) that they were drawn from."""

    shape: Shape
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    drawn: bool = False

    def __getattr__(self, name: str) -> int:
        return getattr(self.shape, name)  # depth, width, nodes, fed

    def grow(self, first: Tensor, expand: Expand, rounds: Rounds) -> Grown:
        grown = self.shape.grow(first, expand, rounds)
        p = laws(rounds.sampler, rounds.target.step(rounds.state)).p[:, 0]
        self.drawn = grown.drawn is not None
        if self.drawn:
            self.seen.append((p, grown.drawn[0][:, 0]))
        else:
            below = children(grown.parents.expand_as(grown.tokens), self.shape.width)[:, 0]
            tokens = grown.tokens.gather(1, below.clamp_min(0))
            self.seen.append((p, torch.where(below >= 0, tokens, -1)))
        return grown


@torch.inference_mode()
def tree_step_distance(recorded: RecordedTree, relaxation: Relaxation, places: int = 1000) -> float:
    """The mean total variation between p and the law of the token below the root, over so many recorded places.

    Of siblings that were chosen all are tested; of drawn ones the first alone, whose law is a sum over all that it may be.
    """
    p, other = (torch.cat(rows) for rows in zip(*recorded.seen, strict=True))
    chosen = torch.linspace(0, len(p) - 1, min(places, len(p))).long()
    if recorded.drawn:
        found = torch.stack([_drawn_law(p[i], other[i], relaxation) for i in chosen.tolist()])
    else:
        found = _chosen_law(p[chosen], other[chosen], relaxation)
    return float(total_variation(found, p[chosen]).mean())


def _chosen_law(p: Tensor, siblings: Tensor, relaxation: Relaxation) -> Tensor:
    """p (B, V), siblings int64 (B, W), -1 beyond -> (B, V): each in turn is taken, or what is left of p passed on."""
    law, reach, current = torch.zeros_like(p), torch.ones_like(p[:, 0]), p
    for token in siblings.unbind(1):
        there = token >= 0
        token = token.clamp_min(0)
        accept, left = _tested(current, token, None, relaxation)
        taken = reach * torch.where(there, accept, 0)
        law = law.scatter_add(1, token[:, None], taken[:, None])
        reach, current = reach - taken, torch.where(there[:, None], left, current)
    return law + reach[:, None] * current


def _drawn_law(p: Tensor, q: Tensor, relaxation: Relaxation) -> Tensor:
    """p, q (V,) -> (V,)."""
    size = len(p)
    accept, left = _tested(p.expand(size, -1), torch.arange(size, device=p.device), q, relaxation)
    refused = q * (1 - accept)
    return q * accept + (refused[:, None] * left).sum(0)


def _tested(p: Tensor, token: Tensor, q: Tensor | None, relaxation: Relaxation) -> tuple[Tensor, Tensor]:
    """One draft each, chosen, or drawn from q (V,): how probably it is accepted (B,), and the law if it is not (B, V)."""
    rows = len(p)
    q_token = torch.ones_like(p[:, 0]) if q is None else q.gather(0, token)
    accept = (relaxation.borrow(p, token, q_token).prob / q_token).nan_to_num(0, posinf=1).clamp(0, 1)
    both = torch.stack((p, p), dim=1)
    tokens = torch.stack((torch.zeros_like(token), token), dim=1)
    below = torch.tensor([[1], [-1]], device=p.device).expand(rows, -1, -1)
    u = torch.full((rows, 1), 1 - torch.finfo(torch.float64).eps / 2, dtype=torch.float64, device=p.device)
    drawn = None if q is None else (q.expand(rows, 2, -1), torch.stack((torch.ones_like(q_token), q_token), dim=1))
    walk = verify_tree(both, tokens, below, 1, u, drawn, relaxation)
    return accept, walk.law
