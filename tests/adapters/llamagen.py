"""Calls of the `llamagen` cases: the generator's logits, greedy decoding, and its token filter."""

import torch
from torch import Tensor

import generators
from generators.next_token import NextToken
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check


def _condition(check: Check, model: NextToken) -> Condition:
    if check.inputs["condition"].is_floating_point():
        slots = model.condition.slots  # the original cuts longer captions to its condition slots
        mask = check.inputs.get("condition_mask")
        return Condition(text=check.inputs["condition"][:, :slots], text_mask=None if mask is None else mask[:, :slots])
    return Condition(label=check.inputs["condition"])


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = generators.from_published("llamagen", case.weights(), case.config)
    with torch.inference_mode():
        return {"logits": model.logits(check.inputs["tokens"], _condition(check, model))}


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = generators.from_published("llamagen", case.weights(), case.config)
    condition = _condition(check, model)
    scale = float(check.inputs.get("cfg_scale", torch.tensor(1.0)))
    interval = int(check.inputs.get("cfg_interval", torch.tensor(-1)))
    guidance = Guidance(scale=max(scale, 1.0), schedule="interval", interval=interval)
    noise = Noise(0, torch.arange(condition.rows))
    return {"tokens": generate(model, condition, Sampler(guidance=guidance, greedy=True), noise).tokens}


def filter_probs(case: Case, check: Check) -> dict[str, Tensor]:
    settings = {name: check.inputs[name].item() for name in ("temperature", "top_k", "top_p") if name in check.inputs}
    return {"probs": Filter(**settings, convention="llamagen").probs(check.inputs["logits"])}


CALLS = {"logits": logits, "generate_greedy": generate_greedy, "filter_probs": filter_probs}
