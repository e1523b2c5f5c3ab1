"""Calls of the `mvar` cases: those of `var`, but that guidance at exactly 1 is off."""

import torch
from torch import Tensor

import generators
from sampling.guidance import Guidance
from tests.adapters.var import filter_probs, greedy, logits, smooth_embed
from tests.goldens import Case, Check


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = generators.from_published(case.family, case.weights(), case.config)
    scale = float(check.inputs.get("cfg_scale", torch.tensor(1.5)))
    return greedy(model, check, Guidance() if scale == 1.0 else Guidance(scale=scale, schedule="ramp", rule="var"))


CALLS = {
    "logits": logits,
    "generate_greedy": generate_greedy,
    "filter_probs": filter_probs,
    "smooth_embed": smooth_embed,
}
