"""Calls of the `fourier-head` cases. The continuous head is the same weights without the bins."""

import torch
from torch import Tensor

import heads
from heads.fourier import FourierBins, FourierDensity, cdf, coefficients, density, inverse_cdf, waves
from tests.goldens import Case, Check


def bins(case: Case) -> FourierBins:
    return heads.from_published("fourier-head", case.weights(), case.config)


def continuous(case: Case) -> FourierDensity:
    config = {name: value for name, value in case.config.items() if name not in ("dim_output", "const_inverse_softmax")}
    return heads.from_published("fourier-head", case.weights(), config)


def amplitudes(case: Case, x: Tensor) -> Tensor:
    head = continuous(case)
    return head.amplitudes(x, x.new_zeros(*x.shape[:-1], 1)).squeeze(-3)


def logits(case: Case, check: Check) -> dict[str, Tensor]:
    return {"logits": bins(case).logits(check.inputs["x"])}


def series(case: Case, check: Check) -> dict[str, Tensor]:
    c = coefficients(amplitudes(case, check.inputs["x"]))
    return {"real": c.real, "imag": c.imag}


def regularization(case: Case, check: Check) -> dict[str, Tensor]:
    """What the penalty adds to the loss, whatever the target."""
    x, head = check.inputs["x"], bins(case)
    target = torch.zeros(x.shape[:-1], dtype=torch.int64)
    return {"loss": (head.loss(x, target) + head.log_prob(x, target)).mean()}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    return {"loss": bins(case).loss(check.inputs["x"], check.inputs["target"]).mean()}


def pdf(case: Case, check: Check) -> dict[str, Tensor]:
    head, points = amplitudes(case, check.inputs["x"])[:, None], check.inputs["points"]
    return {"pdf": density(head, waves(points, head.shape[-1] - 1))}


def density_at(case: Case, check: Check) -> dict[str, Tensor]:
    return {"density": continuous(case).log_prob(check.inputs["x"], check.inputs["values"][:, None]).exp()}


def mass_below(case: Case, check: Check) -> dict[str, Tensor]:
    return {"cdf": cdf(coefficients(amplitudes(case, check.inputs["x"])), check.inputs["values"])}


def sample(case: Case, check: Check) -> dict[str, Tensor]:
    return {"values": inverse_cdf(coefficients(amplitudes(case, check.inputs["x"])), check.inputs["uniform"])}


CALLS = {
    "logits": logits,
    "coefficients": series,
    "regularization": regularization,
    "loss": loss,
    "pdf": pdf,
    "density": density_at,
    "cdf": mass_below,
    "sample": sample,
}
