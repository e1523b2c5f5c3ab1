"""D-AR, through from_published: its tokenizer and its generator.

Their time runs from noise to data and ours from data to noise, so times are 1 - t and velocities have the other sign.
"""

from typing import Any

import torch
from torch import Tensor

import generators
import tokenizers_vis
from generators.next_token import NextToken
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check
from tokenizers_vis.d_ar import DARTokenizer


def tokenizer(case: Case, shown: Tensor) -> DARTokenizer:
    """For pictures of the size of `shown`."""
    config = {name: value for name, value in case.config.items() if not name.startswith("_")}
    fixed = dict(case.config.get("_override", {}))  # what the original has no names for
    axes = fixed.pop("rope_axes", None)
    made = {**config, **fixed, "sampling_resolution": list(shown.shape[-2:])}
    found: DARTokenizer = tokenizers_vis.from_published("d-ar", case.weights(), made)
    if axes is not None and sum(axes) != found.encoder.blocks[0].attention.head_dim:
        raise ValueError(f"rope_axes {axes} must share out all of a head")
    return found


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": tokenizer(case, check.inputs["images"]).encode(check.inputs["images"])}


def decode_tokens_to_cond(case: Case, check: Check) -> dict[str, Tensor]:
    patch = max(case.config["encoder_patch_size"], case.config["diff_decoder"]["patch_size"])
    model = tokenizer(case, torch.empty(patch, patch))  # pictures do not matter here
    return {"cond": model.condition(model.embed(check.inputs["tokens"]))}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    noise = check.inputs["noise"]
    model = tokenizer(case, noise)
    steps, taken = check.params.get("num_denoising_steps"), check.params.get("clip_steps")
    if taken is None and steps is None:
        return {"images": model.decode(check.inputs["tokens"], noise=noise)}
    return {"images": model.pixels(check.inputs["tokens"], noise, steps=steps, taken=taken)}


def denoise(case: Case, check: Check) -> dict[str, Tensor]:
    x = check.inputs["x_t"]
    return {"velocity": -tokenizer(case, x).velocity(x, 1 - check.inputs["t"].double(), check.inputs["z"])}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    if case.kind == "generator":
        model = generator(case)
        return {"loss": model.loss(check.inputs["tokens"], condition(check, model))[0]}
    target, z, t, noise = (check.inputs[name] for name in ("target", "z", "t", "noise"))
    flow, guess, _ = tokenizer(case, target).fit(target, z, t, noise)
    return {"loss": flow, "pred_image": guess}


def train_forward(case: Case, check: Check) -> dict[str, Tensor]:
    images, t, noise = (check.inputs[name] for name in ("images", "t", "noise"))
    model = tokenizer(case, images).train()
    guess, parts = model(images, progress=t, noise=noise)
    seen = model.windows(model.condition(model.embed(parts["ids"])), t)
    losses = {"vq_loss": parts["codebook"], "commit_loss": 0.25 * parts["commitment"], "fm_loss": parts["flow"]}
    return {**losses, "cond_window": seen, "pred_image": guess}


def generator(case: Case) -> NextToken:
    return generators.from_published("d-ar", case.weights(), case.config)


def condition(check: Check, model: NextToken) -> Condition:
    given = check.inputs.get("condition")
    if check.params.get("condition") == "null":
        rows = len(check.inputs["tokens"])
        return Condition(label=torch.zeros(rows, dtype=torch.int64)).null()
    return Condition(text=given[:, : model.condition.slots]) if given.is_floating_point() else Condition(label=given)


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = generator(case)
    with torch.inference_mode():
        return {"logits": model.logits(check.inputs["tokens"], condition(check, model))}


def guidance(scale: Any) -> Guidance:
    """ "1.2,8.0", or one number. Where the first is 1 and the last above, it is 1.001; where it is below, nothing is guided."""
    ends = [float(end) for end in str(scale).split(",")]
    start, end = ends[0], ends[-1]
    if start == 1 and end > 1:
        start += 1e-3
    return Guidance(scale=start, schedule="linspace", end=end) if start > 1 else Guidance()


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = generator(case)
    given = condition(check, model)
    scale = check.inputs.get("cfg_scale", check.params.get("cfg_scale", 1.0))
    sampler = Sampler(guidance=guidance(scale.item() if isinstance(scale, Tensor) else scale), greedy=True)
    return {"tokens": generate(model, given, sampler, Noise(0, torch.arange(given.rows))).tokens}


CALLS = {
    "encode": encode,
    "decode_tokens_to_cond": decode_tokens_to_cond,
    "decode": decode,
    "denoise": denoise,
    "loss": loss,
    "train_forward": train_forward,
    "logits": logits,
    "generate_greedy": generate_greedy,
}
