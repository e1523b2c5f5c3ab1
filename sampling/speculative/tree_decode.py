"""Trees of drafts: many continuations tested in one call of the target, exactly or by LANTERN's relaxed rule.

Sources: SpecInfer (arXiv:2305.09781), EAGLE (arXiv:2401.15077) and EAGLE-2 (arXiv:2406.16858) for trees; LANTERN (Jang et al.
2024, arXiv:2410.03355) and LANTERN++ (arXiv:2502.06352) for the relaxed rule. Under a greedy sampler drafts are chosen by
rank, and the path with the most accepted ones wins.

Letters: B samples, N nodes, W siblings, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from generators.next_token import NextTokenState
from generators.protocol import Generator
from layers.noise import Noise
from layers.record import look_up
from layers.spec import Condition
from sampling.sampler import Sampler
from sampling.speculative import trees
from sampling.speculative.drafting import Drafting
from sampling.speculative.lantern import Relaxation, nearest_neighbours, verify_tree, verify_tree_greedy
from sampling.speculative.loop import Rounds, Trace, joined, laws
from sampling.speculative.rules import Exactness
from sampling.speculative.trees import Expand


@dataclass(frozen=True)
class Grown:
    """tokens int64 (B, N), parents int64 (N,) or (B, N); drawn: laws (B, N, V) and probabilities (B, N) of
    lantern.verify_tree where the drafts were drawn, None where they were chosen."""

    tokens: Tensor
    parents: Tensor
    drawn: tuple[Tensor, Tensor] | None


class Shape(Protocol):
    """depth: levels below the root; width: siblings at most; nodes: with the root; fed: nodes that a drafter is fed at
    most, with the root."""

    depth: int
    width: int
    nodes: int
    fed: int

    def grow(self, first: Tensor, expand: Expand, rounds: Rounds) -> Grown: ...


@dataclass(frozen=True)
class Static:
    """A tree of one shape throughout, whose drafts are drawn without replacement. paths: the name of a published tree
    (trees.STATIC), or the path of sibling ranks to every node. A chain of n drafts is a path of zeros of each length to n.

    Raises UnknownName for a name that is not known, ValueError for paths that are no sorted tree.
    """

    paths: str | Sequence[Sequence[int]] = "naive_extend_57"

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            look_up(self.paths, trees.STATIC, "static tree")
        else:
            object.__setattr__(self, "paths", tuple(map(tuple, self.paths)))
        if self.depth < 1:
            raise ValueError("Static: a tree needs a path at least")

    @cached_property
    def _tree(self) -> tuple[Tensor, Tensor]:
        parents, ranks = trees.static_tree(trees.choices(self.paths) if isinstance(self.paths, str) else self.paths)
        if not torch.equal(trees.sibling_ranks(parents), ranks):
            raise ValueError("Static: siblings must have the ranks 0, 1, 2, ... without a gap")
        return parents, ranks

    @cached_property
    def depth(self) -> int:
        return int(trees.depths(self._tree[0]).max())

    @cached_property
    def width(self) -> int:
        return 1 + int(self._tree[1].max())

    @property
    def nodes(self) -> int:
        return len(self._tree[0])

    @property
    def fed(self) -> int:
        return self.nodes

    def grow(self, first: Tensor, expand: Expand, rounds: Rounds) -> Grown:
        parents, ranks = self._tree
        if rounds.sampler.greedy:
            tokens, _, _ = trees.fill_static_tree(first, expand, parents, ranks)
            return Grown(tokens, _parents(self, first.device), None)
        node = torch.arange(self.nodes, device=first.device)
        u = rounds.noise.uniform("tree", node, rounds.state.round, (self.width,))
        tokens, cond, drawn = trees.fill_static_tree(first, expand, parents, ranks, u)
        return Grown(tokens, _parents(self, first.device), (drawn, cond))


@lru_cache(maxsize=64)
def _parents(tree: Static, device: torch.device) -> Tensor:
    """Copied to the device once, not in every round."""
    return tree._tree[0].to(device)


@dataclass(frozen=True)
class Dynamic:
    """The `nodes` - 1 most probable drafts of a beam search of `beam` that is fed `levels` times: depth levels + 1.

    Raises ValueError for more nodes than the search finds.
    """

    levels: int = 4
    beam: int = 10
    nodes: int = 60

    def __post_init__(self) -> None:
        if not 1 < self.nodes <= 1 + self.beam + self.levels * self.beam**2:
            raise ValueError(
                f"Dynamic: a search of beam={self.beam}, levels={self.levels} cannot give nodes={self.nodes}"
            )

    @property
    def depth(self) -> int:
        return self.levels + 1

    @property
    def width(self) -> int:
        return self.beam

    @property
    def fed(self) -> int:
        return 1 + self.levels * self.beam

    def grow(self, first: Tensor, expand: Expand, rounds: Rounds) -> Grown:
        tokens, parents = trees.dynamic_tree(first, expand, self.levels, min(self.beam, first.shape[1]), self.nodes)
        return Grown(tokens, parents, None)


@dataclass(frozen=True)
class Tree:
    """Exact: the tokens have the law of plain decoding."""

    tree: Shape = field(default_factory=Static)
    exactness: Exactness = field(default="exact", init=False)
    exact: bool = field(default=True, init=False)

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
        return decode_trees(self.tree, None, target, condition, sampler, noise, drafter, length)


@dataclass(frozen=True)
class Lantern:
    """A draft may borrow the probability of its k nearest neighbours in the tokenizer's codebook: delta at most, or until it
    has `factor` times its own (LANTERN++). released: the published rule, which keeps no bound. codebook (V, C): as the
    tokenizer stores it, on the target's device, given beside the record; its table of neighbours is made once.

    With delta and without released each test moves the law by delta at most. Raises ValueError for none or both of delta
    and factor, and in `generate` without a codebook.
    """

    k: int = 1000
    delta: float | None = None
    factor: float | None = None
    released: bool = False
    tree: Shape = field(default_factory=Static)
    codebook: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.delta is None) == (self.factor is None):
            raise ValueError(f"Lantern: give delta or factor, got {self.delta} and {self.factor}")

    @property
    def exactness(self) -> Exactness:
        return "biased" if self.released or self.delta is None else "bounded"

    @property
    def exact(self) -> bool:
        return False

    @cached_property
    def relaxation(self) -> Relaxation:
        if self.codebook is None:
            raise ValueError("Lantern looks for neighbours in the tokenizer's codebook: give codebook (V, C)")
        k = min(self.k + self.released, len(self.codebook) - 1)
        table = nearest_neighbours(self.codebook, k)
        return Relaxation(table, min(self.k, k), self.delta, self.factor, self.released)

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
        """Decode B samples of `length` tokens, all when None. Raises ValueError without a drafter or a codebook."""
        return decode_trees(self.tree, self.relaxation, target, condition, sampler, noise, drafter, length)


@torch.inference_mode()
def decode_trees(
    shape: Shape,
    relaxation: Relaxation | None,
    target: Generator,
    condition: Condition,
    sampler: Sampler,
    noise: Noise,
    drafter: Drafting | None,
    length: int | None,
) -> tuple[NextTokenState, Trace]:
    """A tree a round, drafted by `drafter`, tested exactly or under a relaxation."""
    if drafter is None:
        raise ValueError("trees are grown by a drafter: give one (ModelDrafter, EagleDrafter)")
    rounds = Rounds(target, condition, sampler, noise, length, shape.depth, room=shape.nodes - 1)
    state, session = rounds.state, drafter.begin(rounds, max(shape.nodes, shape.fed))
    if session.reads:
        prediction = rounds.first()
        session.observe(prediction, torch.zeros_like(state.tokens[:, :1]), state.tokens[:, :1], state.length)
    while rounds.open():
        grown = shape.grow(*session.grow(), rounds)
        prediction = target.score(state, grown.tokens[:, 1:], grown.parents)
        parents = grown.parents.expand_as(grown.tokens)
        below = trees.children(parents, shape.width)
        found = laws(sampler, prediction)
        if sampler.greedy:
            leaves = trees.paths(parents, shape.depth)
            node, count, token = verify_tree_greedy(found.logits, grown.tokens, leaves, relaxation)
            path = trees.line_to(parents, node, shape.depth)
        else:
            tests = torch.arange(shape.depth * shape.width, device=state.length.device)
            u = noise.uniform("accept", tests, state.round)
            walk = verify_tree(found.p, grown.tokens, below, shape.depth, u, grown.drawn, relaxation)
            node, count, path = walk.node, walk.count, walk.path
            token = rounds.draw(walk.law, count)
        tokens = joined(grown.tokens.gather(1, path.clamp_min(0)), count, token)
        inner = below.gather(1, node[:, None, None].expand(-1, 1, below.shape[-1]))[:, 0, 0] >= 0
        entered = rounds.commit(tokens, count, count + inner, path=path)
        session.observe(prediction, F.pad(path.clamp_min(0), (1, 0)), tokens, entered)
    return state, rounds.trace(session.calls)
