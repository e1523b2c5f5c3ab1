"""On a GPU: speculative decoding brings the tokens of the CPU, and waits for the device once a round."""

from dataclasses import replace

import pytest
import torch

from generators.next_token import NextToken
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.speculative.chain_decode import Chain
from sampling.speculative.drafter import Drafter
from sampling.speculative.drafting import Drafting, EagleDrafter, ModelDrafter
from sampling.speculative.jacobi_decode import SJD
from sampling.speculative.loop import Rounds
from sampling.speculative.rules import Grouped, Weighted
from sampling.speculative.tree_decode import Dynamic, Lantern, Static, Tree

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SAMPLER = Sampler(Filter(top_k=20), Guidance(scale=2.0))
SPEC = TokenSpec(Grid(1, 4, 5), decoded=(1, 16, 20), vocab_size=37)
CODEBOOK = torch.randn(37, 4, generator=torch.Generator().manual_seed(0))
TREE = Static([(0,), (1,), (0, 0), (0, 1)])
METHODS = {
    "chain": (Chain(3), "model"),
    "weighted": (Chain(3, Weighted(2.0, 0.7)), "layer"),
    "static": (Tree(TREE), "layer"),
    "dynamic": (Tree(Dynamic(2, 3, 10)), "model"),
    "lantern": (Lantern(5, delta=0.1, tree=TREE, codebook=CODEBOOK), "layer"),
    "sjd": (SJD(6, "none", rule=Grouped(half=2)), None),
    "maximal": (SJD(6), None),
    "gumbel": (SJD(6, "gumbel"), None),
}


def cast(drafts: str | None, dtype: torch.dtype, device: str) -> tuple[NextToken, Drafting | None]:
    torch.manual_seed(0)
    target, smaller = (NextToken(SPEC, dim, 1, dim // 8, num_classes=6) for dim in (32, 16))
    layer = Drafter(SPEC, 32, heads=4, mlp_hidden=32)
    for module in (target, smaller, layer):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        module.to(device, dtype).eval().requires_grad_(False)
    return target, {None: None, "model": ModelDrafter(smaller), "layer": EagleDrafter(layer)}[drafts]


@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_the_cpu_in_float64(name: str) -> None:
    method, drafts = METHODS[name]
    tokens = []
    for device in ("cpu", "cuda"):
        target, drafter = cast(drafts, torch.float64, device)
        index = torch.arange(8, device=device)
        if isinstance(method, Lantern):
            method = replace(method, codebook=CODEBOOK.to(device))
        state, _ = method.generate(target, Condition(label=index % 6), SAMPLER, Noise(0, index), drafter)
        tokens.append(state.tokens.cpu())
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_waits_for_the_device_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All waiting is in Rounds.open, of three numbers at once."""
    method, drafts = METHODS[name]
    if isinstance(method, Lantern):
        method = replace(method, codebook=CODEBOOK.cuda())
    target, drafter = cast(drafts, torch.float32, "cuda")
    index = torch.arange(4, device="cuda")
    given = target, Condition(label=index), SAMPLER, Noise(0, index), drafter
    method.generate(*given)  # warms up, and puts schedules and shapes on the device
    opened = Rounds.open

    def watched(rounds: Rounds) -> bool:
        torch.cuda.set_sync_debug_mode("default")
        found = opened(rounds)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(Rounds, "open", watched)
    try:
        method.generate(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
