"""The decoding loop, written once for every order of prediction."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from generators.protocol import Generator, State
from layers.noise import Noise
from layers.spec import Condition
from sampling.confidence import Confidence
from sampling.filters import Filter
from sampling.sampler import Sampler


def impose(fixed: tuple[Tensor, Tensor] | None, positions: Tensor, tokens: Tensor) -> Tensor:
    """Put the given tokens where the mask says so. fixed: (tokens (B, L, ...), mask bool (B, L)); positions (B, m)."""
    if fixed is None:
        return tokens
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    given, mask = fixed[0][rows, positions], fixed[1][rows, positions]
    return torch.where(mask.reshape(mask.shape + (1,) * (tokens.dim() - 2)), given, tokens)


def guided(condition: Condition, sampler: Sampler) -> Sequence[Condition]:
    """The branches that the sampler's guidance needs: the condition, and its null where anything is to be guided."""
    return (condition,) if sampler.guidance.branches == 1 else (condition, condition.null())


@torch.inference_mode()
def generate(
    generator: Generator,
    condition: Condition,
    sampler: Sampler,
    noise: Noise,
    *,
    fixed: tuple[Tensor, Tensor] | None = None,
    length: int | None = None,
    preview: Callable[[State], None] | None = None,
) -> State:
    """Decode B samples; the tokens are `state.tokens` (B, L).

    fixed: (tokens, mask) to impose; length: how many leading tokens to make; preview: called after every round.
    Raises ValueError for a sampler that this generator has no use for.
    """
    asked = _asked(generator, sampler)
    state = generator.begin(guided(condition, sampler), noise, fixed=fixed, length=length, **asked)
    for _ in range(state.rounds):
        prediction = generator.step(state)
        draw = sampler.draw(prediction, noise, state.round)
        tokens = prediction.head.sample(prediction.z, draw, **prediction.extra)
        tokens = impose(state.fixed, prediction.positions, tokens)
        soft = {} if draw.soft is None else {"soft": draw.soft}
        generator.commit(state, prediction.positions, tokens, draw.keep(prediction), **soft)
        if preview is not None:
            preview(state)
    return state


def _asked(generator: Generator, sampler: Sampler) -> dict[str, Any]:
    """What the sampler asks of `begin`. Raises ValueError where a setting would change nothing here."""
    name = type(generator).__name__
    if sampler.smooth is not None and "soft" not in signature(generator.commit).parameters:
        raise ValueError(f"sampler.smooth mixes codes, {name} feeds on tokens; leave it out")
    if generator.spec.vocab_size is None:
        plain = Sampler(Filter(temperature=sampler.filter.temperature, convention=sampler.filter.convention))
        for setting in ("filter", "greedy", "confidence"):
            if getattr(sampler, setting) != getattr(plain, setting):
                raise ValueError(
                    f"sampler.{setting} chooses by the probabilities of ids, {name} draws continuous tokens; "
                    f"leave it out{', but for the temperature' * (setting == 'filter')}"
                )
    chosen = signature(generator.begin).parameters
    asked = {key: value for key in ("rounds", "reveal") if (value := getattr(sampler, key)) is not None}
    for key in asked.keys() - chosen.keys():
        raise ValueError(f"sampler.{key} is {asked[key]}, but {name} lets no one choose it; leave it out")
    if sampler.confidence != Confidence() and "rounds" not in chosen:
        raise ValueError(f"sampler.confidence chooses what enters of a round, {name} keeps all it draws; leave it out")
    return asked
