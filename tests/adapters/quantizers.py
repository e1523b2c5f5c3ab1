"""The quantisers, each built from the case's numbers. Constants that a case states in words only are read there."""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis.quantizers import (
    FSQ,
    LFQ,
    EMAVectorQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    StochasticVectorQuantizer,
    VectorQuantizer,
)
from tokenizers_vis.quantizers.usage import code_counts, usage_metrics


def stated(check: Check, pattern: str, otherwise: float) -> float:
    """The number that `pattern` finds in the check's note; `otherwise`, the published constant, where it finds none."""
    found = re.search(pattern + r" ?([\d.]+(?:e-?\d+)?)", check.note)
    return float(found.group(1).rstrip(".")) if found else otherwise


def with_rows(quantizer: Quantizer, rows: Tensor, name: str = "rows") -> Quantizer:
    quantizer.get_parameter(name).data.copy_(rows)
    return quantizer


def learned(case: Case, check: Check, normalize: bool) -> dict[str, Tensor]:
    codebook, z = check.inputs["codebook"], check.inputs["z"].clone().requires_grad_()
    quantizer = with_rows(VectorQuantizer(*codebook.shape, normalize=normalize), codebook)
    out = quantizer(z)
    (through,) = torch.autograd.grad((out.z_q * check.inputs["upstream_grad"]).sum(), z, retain_graph=True)
    total = out.losses["codebook"] + case.config["beta"] * out.losses["commitment"]
    grad_z, grad_codebook = torch.autograd.grad(total, (z, quantizer.rows))
    return {
        "ids": out.ids,
        "z_q": out.z_q,
        "codebook_loss": out.losses["codebook"],
        "commit_loss": out.losses["commitment"],
        "ste_grad_z": through,
        "loss_grad_z": grad_z,
        "loss_grad_codebook": grad_codebook,
    }


def stochastic_vq_probs(case: Case, check: Check) -> dict[str, Tensor]:
    codebook = check.inputs["codebook"]
    quantizer = StochasticVectorQuantizer(*codebook.shape, temperature=case.config["temperature"])
    return {"probs": with_rows(quantizer, codebook).probs(check.inputs["z"]).flatten(0, -2)}


def ema_vq_update(case: Case, check: Check) -> dict[str, Tensor]:
    codebook = check.inputs["codebook"]
    decay, eps = stated(check, "decay", 0.99), stated(check, "eps", 1e-5)
    quantizer = EMAVectorQuantizer(*codebook.shape, decay=decay, eps=eps)
    quantizer.rows.copy_(codebook)
    quantizer.sums.copy_(check.inputs["embed_avg"])
    quantizer.counts.copy_(check.inputs["cluster_size"])
    commitment = quantizer(check.inputs["z"]).losses["commitment"]
    return {
        "embed_avg": quantizer.sums,
        "cluster_size": quantizer.counts,
        "codebook": quantizer.codebook(),
        "commit_loss": commitment,
    }


def rotation_trick_grad(case: Case, check: Check) -> dict[str, Tensor]:
    codebook, z = check.inputs["codebook"], check.inputs["z"].clone().requires_grad_()
    z_q = with_rows(VectorQuantizer(*codebook.shape, rotation=True), codebook)(z).z_q
    return {"grad_z": torch.autograd.grad((z_q * check.inputs["upstream_grad"]).sum(), z)[0]}


def residual_vq(case: Case, check: Check) -> dict[str, Tensor]:
    stages, vocab_size, dim = check.inputs["codebooks"].shape
    quantizer = ResidualQuantizer(partial(VectorQuantizer, vocab_size, dim), stages)
    for stage, codebook in zip(quantizer.stages, check.inputs["codebooks"], strict=True):
        with_rows(stage, codebook)
    out = quantizer(check.inputs["z"])
    return {"ids": out.ids, "z_q": out.z_q}


def sim_vq(case: Case, check: Check) -> dict[str, Tensor]:
    codebook = check.inputs["codebook"]
    quantizer = with_rows(SimVQ(*codebook.shape), check.inputs["weight"], "transform.weight")
    quantizer.frozen.copy_(codebook)
    out = quantizer(check.inputs["z"])
    weight = stated(check, r"mse\(sg z, q\) \+", case.config["beta"])
    return {"ids": out.ids, "z_q": out.z_q, "loss": out.losses["codebook"] + weight * out.losses["commitment"]}


def fsq(case: Case, check: Check) -> dict[str, Tensor]:
    out = FSQ(case.config["levels"])(check.inputs["z"])
    return {"codes": out.z_q, "ids": out.ids}


def lfq(case: Case, check: Check) -> dict[str, Tensor]:
    z, bits, temperature = check.inputs["z"], case.config["bits"], stated(check, "temperature", 0.01)
    out = LFQ(bits, entropy_temperature=temperature)(z)
    return {
        "codes": out.z_q,
        "ids_lsb": out.ids,
        "ids_msb": LFQ(bits, msb_first=True).assign(z),
        "sample_entropy": out.losses["entropy_sample"],
        "codebook_entropy": out.losses["entropy_codebook"],
        "commit": out.losses["commitment"],
    }


def bsq(case: Case, check: Check) -> dict[str, Tensor]:
    out = LFQ(case.config["bits"], spherical=True, msb_first=True)(check.inputs["z"])
    return {"codes": out.z_q, "ids": out.ids}


def usage(case: Case, check: Check) -> dict[str, Tensor]:
    counts = code_counts(check.inputs["ids"], case.config["codebook_size"])
    return {"counts": counts, **usage_metrics(counts)}


def with_scalars_as_stored(
    call: Callable[[Case, Check], dict[str, Tensor]], case: Case, check: Check
) -> dict[str, Tensor]:
    """The files hold scalars as tensors of one number."""
    return {name: torch.atleast_1d(value) for name, value in call(case, check).items()}


CALLS = {
    name: partial(with_scalars_as_stored, call)
    for name, call in {
        "vq": partial(learned, normalize=False),
        "cosine_vq": partial(learned, normalize=True),
        "stochastic_vq_probs": stochastic_vq_probs,
        "ema_vq_update": ema_vq_update,
        "rotation_trick_grad": rotation_trick_grad,
        "residual_vq": residual_vq,
        "sim_vq": sim_vq,
        "fsq": fsq,
        "lfq": lfq,
        "bsq": bsq,
        "usage_metrics": usage,
    }.items()
}
