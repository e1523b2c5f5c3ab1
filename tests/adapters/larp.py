"""Calls of the `larp` cases: the tokenizer and its prior, and the generator on its tokens."""

import re
from ast import literal_eval

import torch
from torch import Tensor
from torch.nn import functional

import generators
import tokenizers_vis
from generators.next_token import GivenClip, NextToken
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate as decode_tokens
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from tests.goldens import Case, Check
from tokenizers_vis.larp import LARPTokenizer
from training.larp_prior import SIZES, LARPPrior, larp_prior_from_published

TINY = {"gptc-tiny": (2, 2, 32)}  # a size that the cases add to those of the original: depth, heads, width


def _tokenizer(case: Case) -> LARPTokenizer:
    return tokenizers_vis.from_published("larp", case.weights(), case.config)


def _prior(case: Case) -> LARPPrior:
    prior = case.config["prior_model"]
    if prior["name"] not in SIZES:
        size = dict(zip(("n_layer", "n_head", "n_embd"), TINY[prior["name"]], strict=True))
        prior = {**prior, "args": {**prior["args"], **size}}
    return larp_prior_from_published(case.weights(), {**case.config, "prior_model": prior})


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": _tokenizer(case).encode(check.inputs["images"])}


@torch.inference_mode()
def encode_features(case: Case, check: Check) -> dict[str, Tensor]:
    tokenizer = _tokenizer(case)
    z = tokenizer.latent(check.inputs["images"])
    coded = tokenizer.quantizer(z)
    weights, losses = case.config["bottleneck"]["args"]["regularizer"]["args"], coded.losses
    loss = weights.get("commitment_loss_weight", 0.25) * losses["commitment"]
    loss = loss + weights.get("codebook_loss_weight", 1.0) * losses["codebook"]
    if "entropy_sample" in losses:
        loss = loss + weights["entropy_loss_weight"] * (losses["entropy_sample"] - losses["entropy_codebook"])
    return {"projected_z": z, "encoded": tokenizer.from_code(coded.z_q), "loss_q": loss.reshape(1)}


@torch.inference_mode()
def decode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"images": _tokenizer(case).decode(check.inputs["tokens"])}


@torch.inference_mode()
def prior_logits(case: Case, check: Check) -> dict[str, Tensor]:
    tokenizer, tokens = _tokenizer(case), check.inputs["tokens"]
    logits = _prior(case).logits(tokenizer.embed(tokens), tokenizer.codebook())
    return {"logits": logits, "ce": functional.cross_entropy(logits.movedim(-1, 1), tokens[:, 1:]).reshape(1)}


def _generator(case: Case) -> NextToken:
    return generators.from_published("larp", case.weights(), case.config)


def _condition(check: Check, model: NextToken) -> Condition:
    given = check.inputs["condition"]
    if isinstance(model.condition, GivenClip):
        return Condition(clip=given[:, : model.condition.slots - 1])  # the original's separator is our model's affair
    return Condition(label=given.clamp_min(0), keep=given >= 0)  # a negative class is the null one


@torch.inference_mode()
def logits(case: Case, check: Check) -> dict[str, Tensor]:
    model = _generator(case)
    return {"logits": model.logits(check.inputs["tokens"], _condition(check, model))}


@torch.inference_mode()
def loss(case: Case, check: Check) -> dict[str, Tensor]:
    model = _generator(case)
    return {"loss": model.loss(check.inputs["tokens"], _condition(check, model))[0].reshape(1)}


def generate_greedy(case: Case, check: Check) -> dict[str, Tensor]:
    model = _generator(case)
    condition = _condition(check, model)
    stated = re.search(r"\{.*?\}", check.note)  # the settings stand in the note
    settings = {**(literal_eval(stated.group()) if stated else {}), **check.params}
    settings |= {name: check.inputs[name].item() for name in ("cfg_scale", "cfg_interval") if name in check.inputs}
    scale, interval = float(settings.get("cfg_scale", 1.0)), int(settings.get("cfg_interval", -1))
    guidance = Guidance(scale=max(scale, 1.0), schedule="interval", interval=interval)
    noise = Noise(0, torch.arange(condition.rows))
    return {"tokens": decode_tokens(model, condition, Sampler(guidance=guidance, greedy=True), noise).tokens}


CALLS = {
    "encode": encode,
    "encode_features": encode_features,
    "decode": decode,
    "prior_logits": prior_logits,
    "logits": logits,
    "loss": loss,
    "generate_greedy": generate_greedy,
}
