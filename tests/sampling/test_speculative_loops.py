"""Whole decodings by speculation: the law of sequences against enumeration, greedy identity, independence of the batch."""

from itertools import product

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from generators.rar import RAR
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition, Grid, Sequence, TokenSpec
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.speculative.chain_decode import Chain
from sampling.speculative.drafter import Drafter
from sampling.speculative.drafting import Drafting, EagleDrafter, ModelDrafter
from sampling.speculative.jacobi_decode import SJD
from sampling.speculative.rules import Grouped, Weighted
from sampling.speculative.tree_decode import Dynamic, Lantern, Static, Tree

V, L = 3, 4
DRAWS, ROWS = 200_000, 20_000
ERROR_RATE = 1e-3  # of a chi-square test of a method that is exact; the seeds are fixed
PLAIN, GUIDED = Sampler(), Sampler(Filter(temperature=1.1), Guidance(scale=1.7))
SMALL = TokenSpec(Grid(1, 2, 2), decoded=(1, 8, 8), vocab_size=V)
GRID = TokenSpec(Grid(1, 4, 5), decoded=(1, 16, 20), vocab_size=17)
LINE = TokenSpec(Sequence(20), decoded=(1, 16, 16), vocab_size=17)


def model(
    spec: TokenSpec, seed: int = 0, dim: int = 16, maker: type = NextToken, **settings: object
) -> NextToken | RAR:
    """Every parameter random, in float64."""
    torch.manual_seed(seed)
    made = maker(spec, dim, **{"depth": 1, "heads": dim // 4, "mlp_hidden": 8, "num_classes": 2, **settings})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.double().eval().requires_grad_(False)


def layer(target: NextToken) -> EagleDrafter:
    torch.manual_seed(7)
    dim = target.embed.weight.shape[1]
    made = Drafter(target.spec, dim, dim // 4, mlp_hidden=8, slots=target.condition.slots - 1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return EagleDrafter(made.to(target.embed.weight.dtype).requires_grad_(False))


def labels(rows: int) -> Condition:
    return Condition(label=torch.arange(rows) % 2)


def numbers(tokens: Tensor) -> Tensor:
    """Of sequences (..., L) to the base V, int64 (...)."""
    return (tokens * V ** torch.arange(L - 1, -1, -1)).sum(-1)


# ---- the law of whole sequences

TARGET = model(SMALL, dim=4).float()  # of fewer digits than so many draws can tell
SMALLER = ModelDrafter(model(SMALL, seed=1, dim=4).float())
LOSSLESS = {
    "chain, model": (Chain(2), SMALLER),
    "chain, layer": (Chain(2), layer(TARGET)),
    "static tree, layer": (Tree(Static([(0,), (1,), (0, 0)])), layer(TARGET)),
    "dynamic tree, layer": (Tree(Dynamic(levels=1, beam=2, nodes=4)), layer(TARGET)),
    "sjd": (SJD(3, "none"), None),
    "sjd, maximal": (SJD(4, "maximal"), None),
    "sjd, gumbel": (SJD(3, "gumbel", "sample_horizon"), None),
}


def enumerated(target: NextToken, sampler: Sampler) -> Tensor:
    """The probability of every sequence under the class 0, float64 (V ** L,)."""
    every = torch.tensor(list(product(range(V), repeat=L)))
    condition = Condition(label=torch.zeros(len(every), dtype=torch.int64))
    logits = target.logits(every, condition)
    if sampler.guidance.branches == 2:
        logits = torch.lerp(target.logits(every, condition.null()), logits, sampler.guidance.scale)
    law = (logits / sampler.filter.temperature).log_softmax(-1)
    return law.gather(-1, every[..., None]).sum((1, 2)).exp()


@pytest.mark.parametrize("sampler", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("name", LOSSLESS)
def test_sequences_have_the_law_of_plain_decoding(name: str, sampler: Sampler) -> None:
    """200,000 draws against enumeration: chi-square with 80 degrees of freedom."""
    method, drafter = LOSSLESS[name]
    assert method.exact
    found = torch.zeros(V**L)
    for index in torch.arange(DRAWS).split(ROWS):
        condition = Condition(label=torch.zeros_like(index))
        state, trace = method.generate(TARGET, condition, sampler, Noise(0, index), drafter)
        found += numbers(state.tokens).bincount(minlength=V**L)
        assert trace.accepted[0] > 0
    expected = enumerated(TARGET, sampler) * DRAWS
    assert ((found - expected).square() / expected).sum() < chi2.ppf(1 - ERROR_RATE, V**L - 1)


# ---- tokens, one by one

TREE = Static([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])
CODEBOOK = torch.randn(17, 4, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "grid": (GRID, {}),
    "line, learned": (LINE, {"positions": "learned"}),
    "text": (GRID, {"num_classes": None, "text_dim": 8, "text_slots": 6}),
    "rar": (GRID, {"maker": RAR}),
}
METHODS = {  # name -> the method, and what drafts
    "chain, model": (Chain(4), "model"),
    "chain, layer": (Chain(3), "layer"),
    "weighted": (Chain(4, Weighted(2.0, 0.7)), "model"),
    "grouped": (Chain(4, Grouped(half=2)), "model"),
    "static tree, model": (Tree(TREE), "model"),
    "static tree, layer": (Tree(TREE), "layer"),
    "dynamic tree, model": (Tree(Dynamic(levels=2, beam=3, nodes=12)), "model"),
    "dynamic tree, layer": (Tree(Dynamic(levels=2, beam=3, nodes=12)), "layer"),
    "lantern, static": (Lantern(5, delta=0.2, tree=TREE, codebook=CODEBOOK), "layer"),
    "lantern++": (Lantern(5, factor=3.0, released=True, tree=TREE, codebook=CODEBOOK), "model"),
    "lantern, dynamic": (Lantern(5, 0.2, released=True, tree=Dynamic(2, 3, 12), codebook=CODEBOOK), "layer"),
    "sjd": (SJD(6, "none", "repeat_horizon"), None),
    "sjd, maximal": (SJD(6, "maximal"), None),
    "sjd, gumbel": (SJD(6, "gumbel"), None),
    "grouped sjd": (SJD(6, "none", rule=Grouped(half=2)), None),
}
EXACT = [name for name, (method, _) in METHODS.items() if method.exact]


def conditions(kind: str, rows: int) -> Condition:
    """Of text: six slots, padded on the left by a different amount in every row."""
    if kind != "text":
        return labels(rows)
    text = torch.randn(rows, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(6) >= torch.arange(rows)[:, None] % 6
    return Condition(text=text * mask[..., None], text_mask=mask)


def cast(kind: str, name: str) -> tuple[NextToken, Drafting | None]:
    """The target, and the drafter of a method: a smaller generator with half of the target's read-out, or a layer."""
    spec, settings = SETTINGS[kind]
    target, drafts = model(spec, **settings), METHODS[name][1]
    if drafts == "layer":
        return target, layer(target)
    smaller = model(spec, seed=1, dim=8, **settings)
    return target, ModelDrafter(smaller) if drafts == "model" else None


def served(names: list[str]) -> list[tuple[str, str]]:
    """Methods with kinds of target: a layer drafts for NextToken alone."""
    return [(name, kind) for name, kind in product(names, SETTINGS) if kind != "rar" or METHODS[name][1] != "layer"]


@pytest.mark.parametrize(("name", "kind"), served(EXACT))
def test_greedy_tokens_are_those_of_plain_decoding(name: str, kind: str) -> None:
    """Rows need different numbers of rounds; `length` cuts the last ones short."""
    target, drafter = cast(kind, name)
    sampler = Sampler(guidance=Guidance(scale=2.0), greedy=True)
    for length in (None, 5, 1):
        plain = generate(target, conditions(kind, 5), sampler, Noise(0, torch.arange(5)), length=length)
        state, _ = METHODS[name][0].generate(
            target, conditions(kind, 5), sampler, Noise(0, torch.arange(5)), drafter, length=length
        )
        assert torch.equal(state.tokens, plain.tokens) and torch.equal(state.known, plain.known)


ELSEWHERE = served(["chain, model", "static tree, layer", "dynamic tree, model", "sjd, maximal"])


@pytest.mark.parametrize(("name", "kind"), sorted({*product(METHODS, ["grid"]), *ELSEWHERE}))
def test_a_sample_does_not_depend_on_its_batch(name: str, kind: str) -> None:
    """Tokens and what they took, in a batch of 16 and alone; and the numbers of a trace agree with each other."""
    target, drafter = cast(kind, name)
    sampler = Sampler(Filter(temperature=1.2, top_k=12, top_p=0.95), Guidance(scale=2.0, schedule="linear"))
    method, condition, index = METHODS[name][0], conditions(kind, 16), torch.arange(16)
    state, whole = method.generate(target, condition, sampler, Noise(3, index), drafter)
    assert torch.equal(whole.committed.sum(1), torch.full((16,), 20)) and whole.calls == whole.committed.shape[1]
    assert torch.equal((whole.committed > 0).sum(1), whole.rounds) and int(whole.rounds.max()) == whole.calls
    assert len(whole.rounds.unique()) > 1  # a ragged batch
    assert (whole.accepted <= whole.tested).all() and (whole.tested[1:] <= whole.accepted[:-1]).all()
    for row in (0, 5, 10, 15):
        only = slice(row, row + 1)
        alone, trace = method.generate(target, condition.select(only), sampler, Noise(3, index[only]), drafter)
        assert torch.equal(alone.tokens, state.tokens[only])
        assert torch.equal(trace.committed, whole.committed[only, : trace.calls])


@pytest.mark.parametrize(
    ("name", "kind"), served(["chain, layer", "static tree, model", "dynamic tree, layer", "sjd, maximal"])
)
def test_what_the_cache_holds_is_what_decoding_from_scratch_leaves(name: str, kind: str) -> None:
    """The last hidden state of a finished decoding, read from its cache, against teacher forcing: every accepted node and
    every row written again must be right."""
    target, drafter = cast(kind, name)
    condition, index = conditions(kind, 6), torch.arange(6)
    sampler = Sampler(guidance=Guidance(scale=2.0))
    state, _ = METHODS[name][0].generate(target, condition, sampler, Noise(0, index), drafter)
    expected = torch.stack([target.hidden(state.tokens, branch) for branch in (condition, condition.null())])
    for place in (19, 11, 4):
        with torch.inference_mode():
            target.rewind(state, torch.full((6,), place))
            assert_close(target.step(state).z[:, :, 0], expected[:, :, place])


def test_a_drafter_that_is_the_target_has_every_draft_accepted() -> None:
    target = model(GRID)
    for n in (1, 3, 6):
        _, trace = Chain(n).generate(target, labels(4), Sampler(), Noise(0, torch.arange(4)), ModelDrafter(target))
        assert trace.calls == -(-20 // (n + 1)) and torch.equal(trace.accepted, trace.tested)


def test_calls_fall_from_plain_decoding_to_jacobi_to_coupled_jacobi() -> None:
    target = model(TokenSpec(Grid(1, 6, 6), decoded=(1, 24, 24), vocab_size=17))
    for parameter in target.trunk.parameters():
        parameter.data *= 0.7  # laws that a few wrong tokens do not change altogether
    calls = {}
    for coupling in ("none", "maximal", "gumbel"):
        _, trace = SJD(16, coupling).generate(target, labels(32), Sampler(), Noise(0, torch.arange(32)))
        calls[coupling] = trace.rounds.double().mean().item()
    assert calls["none"] < 0.5 * 36
    assert calls["maximal"] < 0.75 * calls["none"] and calls["gumbel"] < 0.75 * calls["none"]


@pytest.mark.parametrize("name", METHODS)
def test_weights_laid_out_for_decoding_serve(name: str) -> None:
    """As scripts do on a CPU, in float32: the rows of a batch get tokens, whichever way they are drafted and tested."""
    target, drafter = cast("grid", name)
    target, drafting = pack_linears(target.float()), drafter
    for network in (getattr(drafter, "generator", None), getattr(drafter, "drafter", None)):
        if network is not None:
            pack_linears(network.float())
    state, _ = METHODS[name][0].generate(target, labels(3), PLAIN, Noise(0, torch.arange(3)), drafting)
    assert state.known.all()


def test_what_cannot_serve_is_refused() -> None:
    target = model(GRID)
    noise = Noise(0, torch.arange(2))
    for method in (Chain(2), Tree(TREE)):
        with pytest.raises(ValueError, match="drafter"):
            method.generate(target, labels(2), Sampler(), noise)
    with pytest.raises(ValueError, match="give no drafter"):
        SJD(4).generate(target, labels(2), Sampler(), noise, ModelDrafter(target))
    with pytest.raises(ValueError, match="must share their tokens"):
        Chain(2).generate(target, labels(2), Sampler(), noise, ModelDrafter(model(LINE)))
    rar = model(GRID, maker=RAR)
    with pytest.raises(ValueError, match="not of RAR"):
        Chain(2).generate(rar, labels(2), Sampler(), noise, layer(target))
    with pytest.raises(ValueError, match="row above"):
        SJD(4, "none", "repeat_vertical").generate(model(LINE), labels(2), Sampler(), noise)
    with pytest.raises(ValueError, match="rounds is not read"):
        SJD(4).generate(target, labels(2), Sampler(rounds=3), noise)
    with pytest.raises(ValueError, match="codebook"):
        Lantern(3, 0.1, tree=TREE).generate(target, labels(2), Sampler(), noise, layer(target))
    with pytest.raises(ValueError, match="without a gap"):
        Static([(0,), (2,)])
