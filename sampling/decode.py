"""The decoding loop, written once for every order of prediction."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from generators.protocol import Generator, State
from layers.noise import Noise
from layers.spec import Condition
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
    """
    state = generator.begin(guided(condition, sampler), noise, fixed=fixed, length=length)
    for _ in range(state.rounds):
        prediction = generator.step(state)
        draw = sampler.draw(prediction, noise, state.round)
        tokens = prediction.head.sample(prediction.z, draw, **prediction.extra)
        tokens = impose(state.fixed, prediction.positions, tokens)
        generator.commit(state, prediction.positions, tokens, draw.keep(prediction))
        if preview is not None:
            preview(state)
    return state
