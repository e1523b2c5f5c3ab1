"""Everything that fits together trains and draws; what does not says why; and the page that lists it is no older."""

import re

import pytest
import torch
from torch import Tensor

from generators.protocol import Generator
from layers.spec import Condition
from scripts import matrix as script
from scripts.matrix import GENERATORS, HEADS, SAMPLERS, TOKENIZERS, Matrix
from tests.goldens import ROOT
from tokenizers_vis.protocol import Tokenizer

STEPS, ROWS = 5, 6


@pytest.fixture(scope="module")
def found() -> Matrix:
    return script.matrix()


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {name: script.make_tokenizer(name) for name in TOKENIZERS}


def test_the_page_is_what_the_script_finds(found: Matrix) -> None:
    stated = (ROOT / "docs/matrix.md").read_text()
    assert stated == script.page(found), "docs/matrix.md is stale: python scripts/matrix.py --out docs/matrix.md"


def test_enough_fits_and_nothing_is_left_out(found: Matrix) -> None:
    assert len(found.fits) >= 30 and all(found.fits.values())
    for names, place in ((TOKENIZERS, 0), (GENERATORS, 1), (HEADS, 2)):
        assert {fit[place] for fit in found.fits} == set(names)
    assert {sampler for samplers in found.fits.values() for sampler in samplers} == set(SAMPLERS)
    for t in TOKENIZERS:
        for g in GENERATORS:
            for h in HEADS:
                pairs = {(t, g), (t, h), (g, h)} & found.refused.keys()
                assert bool(pairs) != ((t, g, h) in found.fits), (t, g, h, pairs)


def test_every_refusal_names_both_sides(found: Matrix) -> None:
    for pair, why in found.refused.items():
        for side in pair:
            named = side.split(",")[0]  # the class, without its variant
            if side in TOKENIZERS:
                named += "|the tokenizer makes .*TokenSpec"
            elif side in SAMPLERS:
                named = r"sampler\."
            assert re.search(named, why), f"{pair}: {why!r} does not name {side}"


def pictures() -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(ROWS, 3, script.PIXELS, script.PIXELS, generator=rng) * 2 - 1


def lesson(tokenizer: Tokenizer) -> Tensor:
    spec = tokenizer.spec
    if spec.channels is None:
        return tokenizer.encode(pictures())
    rng = torch.Generator().manual_seed(4)
    return tokenizer.encode(pictures(), noise=torch.randn(ROWS, spec.length, spec.channels, generator=rng))


def train(generator: Generator, tokens: Tensor) -> list[float]:
    """The loss under one and the same noise, before each of a few steps and after the last."""
    condition = Condition(label=torch.arange(ROWS) % script.LABELS)
    learning = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(learning, lr=3e-3), []
    generator.train()
    for _ in range(STEPS):
        torch.manual_seed(0)
        loss, _ = generator.loss(tokens, condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        torch.manual_seed(0)
        losses.append(generator.loss(tokens, condition)[0].item())
    generator.eval()
    return losses


@pytest.mark.parametrize("name", GENERATORS)
def test_what_fits_learns_and_draws(name: str, found: Matrix, tokenizers: dict[str, Tokenizer]) -> None:
    fitting = {fit: samplers for fit, samplers in found.fits.items() if fit[1] == name}
    assert fitting
    for (t, _, head), samplers in fitting.items():
        tokenizer, combination = tokenizers[t], f"{t} x {name} x {head}"
        spec, generator = tokenizer.spec, script.make_generator(tokenizer, name, head)
        losses = train(generator, lesson(tokenizer))
        assert all(torch.tensor(losses).isfinite()), f"{combination}: {losses}"
        assert losses[-1] < losses[0], f"{combination}: the loss does not fall: {losses}"
        still = [n for n, p in generator.named_parameters() if p.requires_grad and p.grad is None]
        assert not still, f"{combination}: nothing reaches {still}"
        for sampler in samplers:
            tokens = script.draw(generator, sampler)
            if spec.channels is None:
                assert tokens.shape == (2, spec.length) and tokens.dtype == torch.int64, f"{combination} x {sampler}"
                assert 0 <= tokens.min() <= tokens.max() < spec.vocab_size, f"{combination} x {sampler}"
            else:
                assert tokens.shape == (2, spec.length, spec.channels), f"{combination} x {sampler}: {tokens.shape}"
                assert tokens.is_floating_point() and tokens.isfinite().all(), f"{combination} x {sampler}"
                tokens = tokens.float()
            with torch.no_grad():
                images = tokenizer.decode(tokens)
            assert images.shape == (2, 3, script.PIXELS, script.PIXELS), f"{combination} x {sampler}"
            assert images.isfinite().all(), f"{combination} x {sampler}"
