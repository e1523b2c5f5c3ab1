"""Single calls of a generator or a drafter, as functions without arguments, for whoever times them.

What a call costs as it reads more positions says which way of decoding can be faster on a machine: a call over L positions
costs a CPU up to L times one over a single position, a GPU that waits for memory hardly more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from generators.protocol import Generator
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import guided
from sampling.sampler import Sampler
from sampling.speculative.drafter import Drafter
from training.samplers import Models

LENGTHS = (1, 2, 4, 8, 16, 32, 64)  # new positions of a call
Call = Callable[[], object]


@torch.inference_mode()
def calls(
    generator: Generator, condition: Condition, sampler: Sampler, lengths: Sequence[int] = LENGTHS
) -> dict[tuple[int, int], Call]:
    """(cached tokens, new positions) -> one call with its read-out, for the one image of `condition` under guidance.

    A causal generator is asked for the laws of a draft, one of any order for so many tokens, drawn. Cached are a quarter, a
    half and three quarters of the tokens.
    """
    total, noise = generator.spec.length, Noise(0, torch.zeros_like(next(iter(condition.fields().values()))[:1]).long())
    branches = guided(condition, sampler)
    found: dict[tuple[int, int], Call] = {}
    for cached in dict.fromkeys(max(1, quarters * total // 4) for quarters in (1, 2, 3)):
        state = generator.begin(branches, noise)
        if hasattr(generator, "score"):
            generator.step(state)
            positions = torch.arange(cached, device=state.tokens.device)[None]
            generator.commit(state, positions, torch.zeros_like(positions))
            make = _score
        else:
            prediction = generator.step(state, ahead=cached)
            generator.commit(state, prediction.positions, torch.zeros_like(state.tokens[:, :cached]))
            make = _ahead
        found |= {
            (cached, length): make(generator, state, length, sampler, noise) for length in lengths if length <= total
        }
    return found


def _score(generator: Generator, state: Any, length: int, sampler: Sampler, noise: Noise) -> Call:
    draft = torch.zeros_like(state.tokens[:, :1]).expand(-1, length - 1)

    @torch.inference_mode()
    def call() -> object:
        prediction = generator.score(state, draft)
        return prediction.head.logits(prediction.z)

    return call


def _ahead(generator: Generator, state: Any, length: int, sampler: Sampler, noise: Noise) -> Call:
    @torch.inference_mode()
    def call() -> object:
        prediction = generator.step(state, ahead=length)
        return prediction.head.sample(prediction.z, sampler.draw(prediction, noise, 0), **prediction.extra)

    return call


def drafter_step(models: Models) -> Call:
    """One input of the EAGLE drafter, halfway through an image, and the target's read-out of what follows."""
    drafter: Drafter = models.network("eagle")
    branches, like = models.sampler.guidance.branches, drafter.embed.weight
    state = drafter.begin(1, branches, room=1)
    features = like.new_zeros(branches, 1, like.shape[1])
    tokens = torch.zeros(branches, 1, dtype=torch.int64, device=like.device)
    half = torch.full_like(state.length, drafter.spec.length // 2)

    @torch.inference_mode()
    def call() -> object:
        state.length = half
        drafter.observe(state, features, tokens)
        return models.target.head.logits(state.root)

    return call
