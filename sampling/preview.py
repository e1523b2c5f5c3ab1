"""Previews: what a picture looks like while its tokens are generated, wherever a tokenizer decodes the first n of them.

    previews = Previews(tokenizer.decode, shown_lengths(tokenizer.prefixes))
    state = generate(generator, condition, sampler, noise, preview=previews)
    previews.pictures                                       # {n: (B, 3, H, W)}: the decode of the first n of state.tokens

The same for scales (VAR), groups of a diffusion's steps (D-AR) and tokens of any number (FlexTok): they differ in `prefixes`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from generators.protocol import State


def shown_lengths(prefixes: Sequence[int]) -> tuple[int, ...]:
    """The numbers of tokens that are worth a picture each: all of them; where any number decodes, the powers of two and the
    last.

    Raises ValueError for a tokenizer that decodes nothing but the whole.
    """
    if len(prefixes) == 1:
        raise ValueError(
            f"this tokenizer decodes all {prefixes[0]} tokens or none: there are no previews and no shorter lengths; take "
            "one whose first tokens decode by themselves (VAR's scales, D-AR, FlexTok)"
        )
    return tuple(n for n in prefixes if not any_number(prefixes) or n & (n - 1) == 0 or n == prefixes[-1])


def check_lengths(lengths: Sequence[int], prefixes: Sequence[int]) -> tuple[int, ...]:
    """The lengths in ascending order, each once. Raises ValueError naming those that do not decode, and those that do."""
    wrong = [n for n in lengths if n not in prefixes]
    if wrong:
        known = f"1 to {prefixes[-1]}" if any_number(prefixes) else ", ".join(map(str, prefixes))
        raise ValueError(f"this tokenizer does not decode {', '.join(map(str, wrong))} tokens; it decodes {known}")
    return tuple(sorted(set(lengths)))


def any_number(prefixes: Sequence[int]) -> bool:
    return len(prefixes) == prefixes[-1] > 1


class Previews:
    """Called after every round: decodes the first n tokens as soon as they are known, n each of `lengths` in turn.

    decode: tokens (B, n) or (B, n, C) -> pictures (B, 3, H, W). pictures: these by n; after decoding there is one of every
    length. An order that does not go from the first token to the last may have several to show at once.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], lengths: Sequence[int]) -> None:
        self.decode, self.lengths = decode, sorted(lengths)
        self.pictures: dict[int, Tensor] = {}

    def __call__(self, state: State) -> None:
        for n in self.lengths[len(self.pictures) :]:
            if not bool(state.known[:, :n].all()):
                return
            self.pictures[n] = self.decode(state.tokens[:, :n])
