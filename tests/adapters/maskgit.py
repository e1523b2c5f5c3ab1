"""Calls of the `maskgit` cases: logits, the masked loss, and decoding, greedy or under given uniforms."""

from dataclasses import dataclass

import torch
from torch import Tensor

import generators
from generators.masked import Masked
from generators.protocol import Prediction
from layers.noise import Noise
from layers.spec import Condition
from sampling.confidence import Confidence, gumbel
from sampling.decode import generate as decode
from sampling.guidance import Guidance
from sampling.sampler import Sampler, SamplerDraw
from tests.goldens import Case, Check

DECAYS = {0: ("constant", "muse"), 1: ("titok_linear", "muse"), 2: ("power_cosine", "standard")}


def _model(case: Case) -> Masked:
    return generators.from_published("maskgit", case.weights(), case.config)


def _condition(label: Tensor, model: Masked) -> Condition:
    known = label < model.condition.num_classes
    return Condition(label=torch.where(known, label, 0), keep=known)


def _hidden(check: Check, model: Masked) -> tuple[Tensor, Tensor]:
    """Tokens, and where the original's mask id stands."""
    mask = check.inputs["tokens"] == model.spec.vocab_size
    return torch.where(mask, 0, check.inputs["tokens"]), mask


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    tokens, mask = _hidden(check, model)
    with torch.inference_mode():
        return {"logits": model.logits(tokens, _condition(check.inputs["condition"], model), mask)}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    condition = _condition(check.inputs["condition"], model)
    with torch.inference_mode():
        found, _ = model.loss(check.inputs["targets"], condition, mask=check.inputs["mask"], keep=condition.keep)
    return {"loss": found}


def generate(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    given = {name: tensor.item() for name, tensor in check.inputs.items() if tensor.dim() == 0}
    schedule, rule = DECAYS[given["guidance_decay"]]
    power = {"power": given["guidance_scale_pow"]} if schedule == "power_cosine" else {}
    confidence = Confidence(
        given["randomize_temperature"],
        "logit",
        anneal_tokens=True,
        anneal_logits=given["softmax_temperature_annealing"],
    )
    sampler = Recorded(
        guidance=Guidance(given["guidance_scale"], schedule, rule, **power),
        confidence=confidence,
        rounds=given["num_steps"],
        u_tokens=check.inputs.get("u_tokens"),
        u_confidence=check.inputs.get("u_confidence"),
    )
    condition = _condition(check.inputs["condition"], model)
    return {"tokens": decode(model, condition, sampler, Noise(0, torch.arange(condition.rows))).tokens}


@dataclass(frozen=True)
class Recorded(Sampler):
    """A sampler whose draws are made with the given uniforms: u_tokens (S, B, L, V), u_confidence (S, B, L)."""

    u_tokens: Tensor | None = None
    u_confidence: Tensor | None = None

    def draw(self, prediction: Prediction, noise: Noise, round: int) -> SamplerDraw:
        if self.u_tokens is None:
            return super().draw(prediction, noise, round)
        step = int(prediction.index[0, 0])
        return RecordedDraw(self, prediction, Uniforms(self.u_confidence[step]), round)


@dataclass(frozen=True)
class Uniforms:
    """Numbers by their place alone: u (B, L)."""

    u: Tensor

    def uniform(self, use: str, place: Tensor, part: int) -> Tensor:
        return self.u.gather(1, place)


class RecordedDraw(SamplerDraw):
    def pick(self, law: Tensor, part: int) -> Tensor:
        """The largest of the perturbed log-probabilities, as the original draws."""
        u = self.sampler.u_tokens[int(self.prediction.index[0, 0])]
        places = self.prediction.positions[..., None].expand_as(law)
        return (law.log() + gumbel(u.gather(1, places))).argmax(-1)


CALLS = {"logits": logits, "loss": loss, "generate": generate, "generate_greedy": generate}
