"""Calls of the `rar` cases: logits and loss in any order, greedy decoding, and the schedule of guidance."""

import torch
from torch import Tensor

import generators
from generators.rar import RAR
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check


def _model(case: Case) -> RAR:
    return generators.from_published("rar", case.weights(), case.config)


def _condition(check: Check, model: RAR) -> Condition:
    label = check.inputs["condition"]
    known = label < model.condition.num_classes
    return Condition(label=torch.where(known, label, 0), keep=known)


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model, tokens, orders = _model(case), check.inputs["tokens"], check.inputs.get("orders")
    with torch.inference_mode():
        found = model.logits(tokens, _condition(check, model), orders)
    return {"logits": found, "labels": tokens if orders is None else tokens.gather(1, orders)}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    condition = _condition(check, model)
    with torch.inference_mode():
        found, _ = model.loss(check.inputs["tokens"], condition, check.inputs.get("orders"), keep=condition.keep)
    return {"loss": found}


def _guidance(check: Check) -> Guidance:
    scale, power = (check.inputs[f"guidance_scale{end}"].item() for end in ("", "_pow"))
    return Guidance(scale, "power_cosine", power=power)


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    condition = _condition(check, model)
    guidance = _guidance(check) if check.inputs["guidance_scale"] else Guidance()  # theirs: 0 is no second branch
    noise = Noise(0, torch.arange(condition.rows))
    return {"tokens": generate(model, condition, Sampler(guidance=guidance, greedy=True), noise).tokens}


def guidance_schedule(case: Case, check: Check) -> dict[str, Tensor]:
    return {"scale": _guidance(check).scales(int(check.inputs["num_steps"]))[check.inputs["step"]]}


CALLS = {
    "logits": logits,
    "loss": loss,
    "generate_greedy": generate_greedy,
    "guidance_schedule": guidance_schedule,
}
