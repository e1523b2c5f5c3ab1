"""Lossy methods through whole decodings of one token, against their stated law or bound; and methods from records."""

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from generators.next_token import NextToken
from layers.noise import Noise
from layers.record import UnknownName, build
from layers.spec import Condition, Grid, TokenSpec
from sampling.filters import Filter
from sampling.sampler import Sampler
from sampling.speculative.acceptance import one_step_law, residual, weighted_law
from sampling.speculative.chain_decode import Chain
from sampling.speculative.drafting import ModelDrafter
from sampling.speculative.grouped import rank_windows, verify_grouped
from sampling.speculative.jacobi_decode import SJD
from sampling.speculative.methods import METHODS
from sampling.speculative.rules import Exact, Grouped, Weighted
from sampling.speculative.tree_decode import Dynamic, Lantern, Static, Tree

V, DRAWS = 12, 50_000
ERROR_RATE = 1e-3
SPEC = TokenSpec(Grid(1, 1, 2), decoded=(1, 4, 8), vocab_size=V)
SAMPLER = Sampler(Filter(temperature=1.3))


def model(seed: int) -> NextToken:
    torch.manual_seed(seed)
    made = NextToken(SPEC, 4, 1, 1, num_classes=2, mlp_hidden=4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made.double().eval().requires_grad_(False)


TARGET, SMALLER = model(0), model(1)


def first_law(generator: NextToken) -> Tensor:
    """Of the first token, (V,)."""
    logits = generator.logits(torch.zeros(1, 2, dtype=torch.int64), Condition(label=torch.tensor([0])))
    return (logits[0, 0] / 1.3).softmax(-1)


P, Q = first_law(TARGET), first_law(SMALLER)


def found(method: Chain | Tree | Lantern) -> Tensor:
    """How often each token came first, (V,)."""
    condition = Condition(label=torch.zeros(DRAWS, dtype=torch.int64))
    drafter = ModelDrafter(SMALLER)
    state, _ = method.generate(TARGET, condition, SAMPLER, Noise(0, torch.arange(DRAWS)), drafter, length=1)
    return state.tokens[:, 0].bincount(minlength=V)


def grouped_law(half: int) -> Tensor:
    draft = torch.arange(V)[:, None]
    p, q = P.expand(V, 2, V), Q.expand(V, 1, V)
    groups = rank_windows(p[:, :1].log(), p[:, :1], draft, half=half)
    accept = verify_grouped(p, q, draft, torch.zeros(V, 1), groups).accept_prob[:, 0]
    return one_step_law(Q * accept, residual(P, Q))


@pytest.mark.parametrize(
    ("rule", "law"),
    [
        (Weighted(1.8), weighted_law(P, Q, 1.8)),
        (Weighted(1.8, decay=0.7), weighted_law(P, Q, 1.8)),
        (Grouped(half=2), grouped_law(2)),
    ],
    ids=["amplified", "falling", "grouped"],
)
def test_a_lossy_chain_has_its_stated_law(rule: Weighted | Grouped, law: Tensor) -> None:
    """50,000 draws: chi-square with 11 degrees of freedom; and they are not of the target's law."""
    count = found(Chain(1, rule))
    statistics = [((count - expected * DRAWS).square() / (expected * DRAWS)).sum() for expected in (law, P)]
    assert statistics[0] < chi2.ppf(1 - ERROR_RATE, V - 1) < 100 < statistics[1]


@pytest.mark.parametrize(
    ("tree", "tests", "delta"),
    [(Static([(0,)]), 1, 0.3), (Static([(0,), (1,)]), 2, 0.3), (Dynamic(1, 2, 3), 2, 0.04)],
    ids=["chain", "static", "dynamic"],
)
def test_strict_lantern_stays_within_delta_for_each_test(tree: Static | Dynamic, tests: int, delta: float) -> None:
    """Total variation of 50,000 draws from the target's law, less what so many draws of that law itself differ by: the
    mean of it is at most sqrt(V / DRAWS) / 2, and that it exceeds the mean by t has probability exp(-2 DRAWS t^2) at most."""
    codebook = torch.randn(V, 3, generator=torch.Generator().manual_seed(4))
    noise = (V / DRAWS) ** 0.5 / 2 + (-torch.tensor(ERROR_RATE).log() / (2 * DRAWS)).sqrt()
    distance = (found(Lantern(3, delta, tree=tree, codebook=codebook)) / DRAWS - P).abs().sum() / 2
    assert noise < distance < tests * delta + noise
    exact = (found(Tree(tree)) / DRAWS - P).abs().sum() / 2
    assert exact < noise


def test_methods_are_built_from_records() -> None:
    record = {
        "class_path": "Chain",
        "init_args": {"drafts": 3, "rule": {"class_path": "Weighted", "init_args": {"delta": 2.0}}},
    }
    assert build(record, METHODS) == Chain(3, Weighted(2.0))
    record = {"class_path": "Tree", "init_args": {"tree": {"class_path": "Dynamic", "init_args": {"levels": 2}}}}
    assert build(record, METHODS) == Tree(Dynamic(levels=2))
    assert build({"class_path": "SJD", "init_args": {"coupling": "none"}}, METHODS) == SJD(coupling="none")
    with pytest.raises(UnknownName, match="did you mean 'delta'"):
        build({"class_path": "Weighted", "init_args": {"delt": 2.0}}, METHODS)


def test_every_method_says_how_exact_it_is() -> None:
    codebook = torch.randn(V, 3)
    said = {
        "exact": [Chain(), Chain(rule=Weighted(1.0)), SJD(), SJD(coupling="none"), Tree()],
        "bounded": [Lantern(3, delta=0.1, codebook=codebook)],
        "biased": [
            Chain(rule=Weighted(1.5)),
            SJD(coupling="none", rule=Grouped()),
            Lantern(3, delta=0.1, released=True, codebook=codebook),
            Lantern(3, factor=2.0, codebook=codebook),
        ],
    }
    for exactness, methods in said.items():
        assert all(method.exactness == exactness and method.exact == (exactness == "exact") for method in methods)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Chain(0)
    with pytest.raises(ValueError, match="at least 2"):
        SJD(1)
    with pytest.raises(ValueError, match="tests by itself"):
        SJD(4, "maximal", rule=Grouped())
    with pytest.raises(UnknownName, match="did you mean 'gumbel'"):
        SJD(4, "gumble")
    with pytest.raises(UnknownName, match="static tree"):
        Static("mc_sim")
    with pytest.raises(ValueError, match="give delta or factor"):
        Lantern(3)
    with pytest.raises(ValueError, match="cannot give nodes=50"):
        Dynamic(1, 2, 50)
    with pytest.raises(ValueError, match="at least 1, decay"):
        Weighted(0.5)
    assert Chain(3, Exact()).exact
