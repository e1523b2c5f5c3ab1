"""Calls of the `nar` and `nar-video` cases: the order, the mask, the read-outs, their mean, and greedy decoding."""

import torch
from torch import Tensor

import generators
from generators.neighboring import Neighboring
from layers.noise import Noise
from layers.spec import Condition
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check


def _model(case: Case) -> Neighboring:
    return generators.from_published(case.family, case.weights(), case.config)


def _condition(check: Check, model: Neighboring) -> Condition:
    given = check.inputs["condition"]
    if given.is_floating_point():
        slots = model.condition.slots  # the original cuts longer captions to its condition slots
        mask = check.inputs.get("condition_mask")
        return Condition(text=given[:, :slots], text_mask=None if mask is None else mask[:, :slots])
    return Condition(label=given.clamp_min(0), keep=given >= 0)  # a negative class is the null one


def order(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    return {"step": model.when[model.condition.slots :], "positions": model.order}


def attention_mask(case: Case, check: Check) -> dict[str, Tensor]:
    model, padding = _model(case), check.inputs.get("condition_mask")
    if padding is None:
        return {"mask": model.mask(Condition())[0, 0]}
    return {"mask": model.mask(Condition(text_mask=padding[:, : model.condition.slots]))[:, 0]}


@torch.inference_mode()
def head_logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    said = model.head.by_axis(model.states(check.inputs["tokens"], _condition(check, model)))
    return dict(zip(("right", "down", "next_frame"), said, strict=False))


@torch.inference_mode()
def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    return {"logits": model.logits(check.inputs["tokens"], _condition(check, model))}


@torch.inference_mode()
def loss(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    return {"loss": model.loss(check.inputs["tokens"], _condition(check, model))[0].reshape(1)}


@torch.inference_mode()
def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = _model(case)
    condition = _condition(check, model)
    scale = float(check.inputs.get("cfg_scale", torch.tensor(1.0)))
    interval = int(check.inputs.get("cfg_interval", torch.tensor(-1)))
    sampler, branches = Sampler(greedy=True), [condition]
    if scale > 1:  # in the rounds that begin with at most `interval` tokens made
        on = [1.0 if made == 0 or interval < 0 or made <= interval else 1 / scale for made in model.ends[:-1]]
        sampler = Sampler(guidance=Guidance(scale=scale, schedule="listed", values=tuple(on)), greedy=True)
        branches.append(condition.null())
    noise = Noise(0, torch.arange(condition.rows))
    state, seen = model.begin(branches, noise), []
    for _ in range(state.rounds):
        prediction = model.step(state)
        seen.append(sampler.guide(prediction, prediction.head.logits(prediction.z)))
        tokens = prediction.head.sample(prediction.z, sampler.draw(prediction, noise, state.round))
        model.commit(state, prediction.positions, tokens)
    return {"tokens": state.tokens, "logits": torch.cat(seen, dim=1)[:, model.order.argsort()]}


CALLS = {
    "order": order,
    "attention_mask": attention_mask,
    "head_logits": head_logits,
    "logits": logits,
    "loss": loss,
    "generate_greedy": generate_greedy,
}
