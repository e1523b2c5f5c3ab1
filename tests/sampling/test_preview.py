"""Previews are decodes of prefixes of the final tokens, whatever the order and the tokenizer; lengths that are shown."""

from collections.abc import Callable

import pytest
import torch

from generators.masked import Masked
from generators.next_scale import NextScale
from generators.next_token import NextToken
from generators.protocol import Generator, State
from layers.noise import Noise
from layers.record import build
from layers.spec import Condition
from sampling.decode import generate
from sampling.preview import Previews, check_lengths, shown_lengths
from sampling.sampler import Sampler
from tests.tokenizers_vis.test_d_ar import small as d_ar
from tests.tokenizers_vis.test_flextok import small as flextok
from tests.training.test_scale_scores import RECORD
from tokenizers_vis.protocol import Tokenizer
from training.run import CLASSES


def over_line(kind: Callable[..., Generator], make: Callable[[], Tokenizer] = flextok) -> tuple[Tokenizer, Generator]:
    tokenizer = make()
    return tokenizer, kind(tokenizer.spec, 16, 1, 2, num_classes=3).double()  # random weights: all kinds of tokens


def over_scales() -> tuple[Tokenizer, Generator]:
    torch.manual_seed(0)
    tokenizer = build(RECORD, CLASSES).double().eval()
    return tokenizer, NextScale(tokenizer.spec, tokenizer.reader(), 16, 1, 2, num_classes=3).double()


ORDERS = {
    "next token": lambda: over_line(NextToken),
    "next token, in groups": lambda: over_line(NextToken, d_ar),
    "masked, in any order": lambda: over_line(Masked),
    "scales": over_scales,
}


@pytest.mark.parametrize("order", ORDERS)
def test_previews_are_decodes_of_the_beginning_of_the_final_tokens(order: str) -> None:
    """Each as soon as its tokens are known."""
    tokenizer, generator = ORDERS[order]()
    previews = Previews(tokenizer.decode, shown_lengths(tokenizer.prefixes))
    shown: list[tuple[int, int]] = []

    def watched(state: State) -> None:
        previews(state)
        known = [n for n in previews.lengths if bool(state.known[:, :n].all())]
        shown.append((len(previews.pictures), len(known)))

    about, noise = Condition(label=torch.tensor([0, 2])), Noise(5, torch.arange(2))
    state = generate(generator.eval(), about, Sampler(), noise, preview=watched)
    assert tuple(previews.pictures) == shown_lengths(tokenizer.prefixes)
    assert all(have == could for have, could in shown) and len(shown) == state.rounds
    with torch.inference_mode():
        for n, pictures in previews.pictures.items():
            assert torch.equal(pictures, tokenizer.decode(state.tokens[:, :n]))


def test_lengths_that_are_shown() -> None:
    assert shown_lengths(range(1, 257)) == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert shown_lengths(range(1, 7)) == (1, 2, 4, 6)
    assert shown_lengths((32, 64, 96, 128)) == (32, 64, 96, 128)  # groups
    assert shown_lengths((1, 5, 14, 30, 55)) == (1, 5, 14, 30, 55)  # scales
    with pytest.raises(
        ValueError, match="decodes all 256 tokens or none: there are no previews and no shorter lengths"
    ):
        shown_lengths((256,))


def test_lengths_that_are_asked_for() -> None:
    assert check_lengths([8, 1, 8], range(1, 257)) == (1, 8)
    with pytest.raises(ValueError, match="does not decode 0, 300 tokens; it decodes 1 to 256"):
        check_lengths([0, 4, 300], range(1, 257))
    with pytest.raises(ValueError, match="does not decode 4 tokens; it decodes 1, 5, 14"):
        check_lengths([4, 5], (1, 5, 14))
    with pytest.raises(ValueError, match="does not decode 64 tokens; it decodes 256"):
        check_lengths([64], (256,))
