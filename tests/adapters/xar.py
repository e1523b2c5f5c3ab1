"""Calls of the `xar` cases: the order, the mask, velocities, the loss, the solver, the whole sampler."""

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

import generators
from generators.next_entity import XAR
from heads.flow import FieldHead
from layers.noise import Noise
from layers.spec import Condition, Sequence, TokenSpec
from sampling.decode import generate as decode
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check
from tests.heads.recorded import Recorded


@dataclass(frozen=True)
class Playback(Noise):
    """Recorded noise (parts, B, L, C) by place."""

    recorded: Tensor = None

    def normal(self, use: str, place: Tensor, part: int | Tensor = 0, size: tuple[int, ...] = ()) -> Tensor:
        return self.recorded[part].gather(1, repeat(place, "b m -> b m c", c=size[0]))


def model_of(case: Case, **config: int) -> XAR:
    given = {name: value for name, value in {**case.config, **config}.items() if name != "note"}
    return generators.from_published("xar", case.weights(), given).requires_grad_(False)


def labelled(check: Check, model: XAR) -> Condition:
    """The null class is given by its id, one beyond the last."""
    label = check.inputs["condition"].long()
    keep = label < model.condition.num_classes
    return Condition(label=torch.where(keep, label, 0), keep=keep)


def value(check: Check, name: str, default: float) -> float:
    found = check.inputs.get(name, check.params.get(name, default))
    return float(found)


def entity_positions(case: Case, check: Check) -> dict[str, Tensor]:
    model = model_of(case)
    return {"positions": model.order.view(len(model.lengths), -1)}


def attention_mask(case: Case, check: Check) -> dict[str, Tensor]:
    return {"mask": model_of(case).mask}


def velocity(case: Case, check: Check) -> dict[str, Tensor]:
    model = model_of(case)
    return {"velocity": model.velocity(check.inputs["x_t"], check.inputs["t"], labelled(check, model))}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    model, given = model_of(case), {name: check.inputs[name] for name in ("t", "noise")}
    found = model.loss(check.inputs["target"], labelled(check, model), **given)[0]
    return {"loss": found.reshape(check.outputs["loss"].shape)}


def denoise(case: Case, check: Check) -> dict[str, Tensor]:
    model, condition, x = model_of(case), labelled(check, model_of(case)), check.inputs["x_t"]
    state = model.begin([condition], Noise(0, torch.arange(condition.rows)))
    for entity in check.inputs["context"].unbind(1) if "context" in check.inputs else ():
        model.commit(state, model.step(state).positions, entity)
    field = model.step(state).z
    return {"velocity": field(x, check.inputs["t"])[0], "velocity_t1": field(x, torch.ones(()))[0]}


def sde_sample(case: Case, check: Check) -> dict[str, Tensor]:
    """The velocities of a call are those of the full condition, then of the null one."""
    start, noise, velocities = (check.inputs[name] for name in ("x1", "noise", "velocities"))
    spec = TokenSpec(Sequence(start.shape[1]), decoded=(1, 1, 1), channels=start.shape[2])
    head, asked = FieldHead(0, spec, steps=len(velocities)), []

    def field(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return velocities[len(asked) - 1].unflatten(0, (2, -1))

    scale = max(value(check, "cfg_scale", 1.0), 1.0)  # theirs guides above 1 alone
    draw = Recorded(lambda part: start if part == 0 else noise[part - 1], scale)
    return {"x0": head.sample(field, draw), "t": torch.stack(asked)}


def generate(case: Case, check: Check) -> dict[str, Tensor]:
    steps = int(value(check, "num_steps", 50))
    model, recorded = model_of(case, num_steps=steps), [check.inputs["init_noise"][None], check.inputs["step_noise"]]
    condition = labelled(check, model)
    scale = max(value(check, "cfg_scale", 1.0), 1.0)
    sampler = Sampler(guidance=Guidance(scale=1.0, schedule="linspace", end=scale))
    noise = Playback(0, torch.arange(condition.rows), torch.cat(recorded))
    return {"tokens": decode(model, condition, sampler, noise).tokens}


CALLS = {
    "entity_positions": entity_positions,
    "attention_mask": attention_mask,
    "velocity": velocity,
    "loss": loss,
    "denoise": denoise,
    "sde_sample": sde_sample,
    "generate": generate,
}
