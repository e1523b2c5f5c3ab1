"""Calls of the `var` cases: the generator's logits, greedy decoding, its token filter, and the smoothed embedding."""

import torch
from torch import Tensor

import generators
from generators.next_scale import NextScale
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.smooth import smooth_law
from tests.goldens import Case, Check


def labelled(check: Check, model: NextScale) -> Condition:
    """The null class is given by its id, one beyond the last."""
    label = check.inputs["condition"]
    keep = label < model.condition.num_classes
    return Condition(label=torch.where(keep, label, 0), keep=keep)


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = generators.from_published(case.family, case.weights(), case.config)
    with torch.inference_mode():
        return {"logits": model.logits(check.inputs["tokens"], labelled(check, model))}


def greedy(model: NextScale, check: Check, guidance: Guidance) -> dict[str, Tensor]:
    condition = labelled(check, model)
    noise = Noise(0, torch.arange(condition.rows))
    return {"tokens": generate(model, condition, Sampler(guidance=guidance, greedy=True), noise).tokens}


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = generators.from_published(case.family, case.weights(), case.config)
    scale = float(check.inputs.get("cfg_scale", torch.tensor(1.5)))
    return greedy(model, check, Guidance(scale=scale, schedule="ramp", rule="var"))


def filter_probs(case: Case, check: Check) -> dict[str, Tensor]:
    settings = {name: check.inputs[name].item() for name in ("top_k", "top_p") if name in check.inputs}
    return {"probs": Filter(**{"top_p": 0.0, **settings}, convention="var").probs(check.inputs["logits"])}


def smooth_embed(case: Case, check: Check) -> dict[str, Tensor]:
    law = smooth_law(check.inputs["logits"], check.inputs["gumbel"], float(check.inputs["ratio"]))
    return {"embeddings": law @ check.inputs["codebook"]}


CALLS = {
    "logits": logits,
    "generate_greedy": generate_greedy,
    "filter_probs": filter_probs,
    "smooth_embed": smooth_embed,
}
