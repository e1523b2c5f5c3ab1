"""Calls of the `mar` cases: tokens of latents, encoder, hidden states, loss, schedule, whole decodings with recorded noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

import generators
from generators.mar import MAR, unmasking
from layers.spec import Condition
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check
from tokenizers_vis import kl


@dataclass(frozen=True)
class RecordedNoise:
    """orders (B, L): theirs, whose first entries are masked the longest. parts (S, B, L, C): where a token's chain starts,
    then what each of its steps adds."""

    orders: Tensor
    parts: Tensor

    def uniform(self, use: str, place: Tensor) -> Tensor:
        assert use == "order"
        return self.orders.flip(1).argsort(dim=1) / self.orders.shape[1]

    def normal(self, use: str, place: Tensor, part: int, size: tuple[int, ...]) -> Tensor:
        noise = self.parts[part].to(torch.float64)
        return noise.gather(1, place[..., None].expand(-1, -1, *size))


def model_of(case: Case, check: Check) -> MAR:
    steps = check.params.get("num_sampling_steps", case.config.get("num_sampling_steps", "100"))
    config = {**case.config, "num_sampling_steps": str(steps)}
    return generators.from_published("mar", case.weights(), config).requires_grad_(False)


def condition_of(check: Check, rows: int) -> Condition:
    """Without labels, or where the call asks for none, the null class."""
    label = check.inputs.get("condition")
    if label is None or check.params.get("unconditional", False):
        return Condition(label=torch.zeros(rows, dtype=torch.int64)).null()
    return Condition(label=label)


def patch(case: Case) -> int:
    return case.config.get("patch_size", 1)


def patchify(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": kl.patchify(check.inputs["latents"], patch(case))}


def unpatchify(case: Case, check: Check) -> dict[str, Tensor]:
    return {"latents": kl.unpatchify(check.inputs["tokens"], patch(case), model_of(case, check).spec.layout)}


def encoder(case: Case, check: Check) -> dict[str, Tensor]:
    tokens, mask = check.inputs["tokens"], check.inputs["mask"]
    return {"encoder_out": model_of(case, check).encoded(tokens, mask, condition_of(check, len(tokens)))}


def hidden(case: Case, check: Check) -> dict[str, Tensor]:
    tokens, mask = check.inputs["tokens"], check.inputs["mask"]
    return {"hidden": model_of(case, check).hidden(tokens, mask, condition_of(check, len(tokens)))}


def hidden_uncond(case: Case, check: Check) -> dict[str, Tensor]:
    tokens, mask = check.inputs["tokens"], check.inputs["mask"]
    return {"hidden": model_of(case, check).hidden(tokens, mask, condition_of(check, len(tokens)).null())}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    tokens = kl.patchify(check.inputs["latents"], patch(case))
    rows, length, channels = tokens.shape
    given = {
        "t": check.inputs["t"].view(-1, rows, length),
        "noise": check.inputs["noise"].view(-1, rows, length, channels),
    }
    loss, _ = model_of(case, check).loss(tokens, condition_of(check, rows), mask=check.inputs["mask"], **given)
    return {"loss": loss}


def mask_schedule(case: Case, check: Check) -> dict[str, Tensor]:
    expected = check.outputs["mask_len"]
    rounds = check.params.get("num_iter", expected.numel())  # a case need not say it
    masked = unmasking(model_of(case, check).spec.length, rounds)
    return {"mask_len": torch.tensor(masked).view(expected.shape)}


def generate_latents(case: Case, check: Check) -> dict[str, Tensor]:
    model = model_of(case, check)
    start, steps = check.inputs["noise_init"], check.inputs["noise_steps"]
    noise = RecordedNoise(check.inputs["orders"].long(), torch.cat((start[None], steps)))
    linear = check.params.get("cfg_schedule", "linear") == "linear"
    schedule = {"schedule": "mar_linear", "length": model.spec.length} if linear else {"schedule": "constant"}
    guidance = Guidance(scale=check.params.get("cfg", 1.0), **schedule)
    temperature, rounds = check.params.get("temperature", 1.0), check.params.get("num_iter", 64)
    sampler = Sampler(Filter(temperature=temperature), guidance, rounds=rounds)
    tokens = generate(model, condition_of(check, len(start)), sampler, noise).tokens
    return {"latents": kl.unpatchify(tokens, patch(case), model.spec.layout)}


CALLS = {
    "patchify": patchify,
    "unpatchify": unpatchify,
    "encoder": encoder,
    "hidden": hidden,
    "hidden_uncond": hidden_uncond,
    "loss": loss,
    "mask_schedule": mask_schedule,
    "generate": generate_latents,
}
