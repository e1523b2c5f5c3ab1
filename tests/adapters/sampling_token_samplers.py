"""Adapter of the cases `sampling-token-samplers`: filters, guidance mixes and schedules."""

from typing import Any

from torch import Tensor

from layers.record import look_up
from sampling.filters import Filter
from sampling.guidance import Guidance, mix
from tests.goldens import Case, Check

ALONE = {  # conventions of one filter on its own -> our setting, and the parameter that holds its value
    "typical": ("typical", "mass"),
    "min_p": ("min_p", "min_p"),
    "epsilon": ("epsilon", "epsilon"),
    "eta": ("eta", "epsilon"),  # transformers calls eta's argument epsilon
}
SCHEDULES = {  # theirs -> ours
    "constant": "constant",
    "maskgen_none": "constant",
    "interval": "interval",
    "var": "ramp",
    "rar": "power_cosine",
    "titok_power_cosine": "power_cosine",
    "titok_linear": "titok_linear",
    "maskgen_linear": "linear",
    "maskgen_cosine": "cosine",
    "maskgen_flipped": "flipped_cosine",
    "maskgen_flippedcosine": "flipped_cosine",
    "maskgen_flipped_cosine": "flipped_cosine",
    "mar_linear": "mar_linear",
    "dar": "linspace",
}
SETTINGS = {"cfg_interval": "interval", "seq_len": "length"}  # theirs -> ours; the others bear the same name


def filter_probs(case: Case, check: Check) -> dict[str, Tensor]:
    params = dict(check.params)
    convention = params.pop("convention")
    if convention in ALONE:
        ours, theirs = ALONE[convention]
        params = {ours: params.pop(theirs, None) or params.pop(ours), **params}
        return {"probs": Filter(**params).probs(check.inputs["logits"])}
    return {"probs": Filter(convention=convention, **params).probs(check.inputs["logits"])}


def guide(case: Case, check: Check) -> dict[str, Tensor]:
    rule, scale = check.params["convention"], check.params["scale"]
    return {"logits": mix(check.inputs["cond"], check.inputs["uncond"], scale, rule)}


def guidance_schedule(case: Case, check: Check) -> dict[str, Tensor]:
    settings: dict[str, Any] = {SETTINGS.get(name, name): value for name, value in check.params.items()}
    steps, theirs = settings.pop("steps"), settings.pop("schedule")
    guidance = Guidance(schedule=look_up(theirs, SCHEDULES, "guidance schedule of the case"), **settings)
    return {"scales": guidance.scales(steps).to(check.outputs["scales"].dtype)}


CALLS = {"filter_probs": filter_probs, "guide": guide, "guidance_schedule": guidance_schedule}
