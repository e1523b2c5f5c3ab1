"""Calls of the `mar-diffloss` cases: the network, the tables, the loss, the reverse chain."""

import torch
from torch import Tensor

import heads
from heads.diffusion import DiffusionHead
from layers.diffusion import data_from_noise, log_variance, p_mean, q_sample
from tests.goldens import Case, Check
from tests.heads.recorded import Recorded


def head_of(case: Case, check: Check) -> DiffusionHead:
    steps = check.params.get("num_sampling_steps", case.config.get("num_sampling_steps", "100"))
    config = {**case.config, "num_sampling_steps": str(steps)}
    return heads.from_published("mar-diffloss", case.weights(), config).requires_grad_(False)


def branches(rows: Tensor, scale: float) -> Tensor:
    """[cond; uncond] (2 n, ...) -> (R, 1, n, ...), one branch where nothing is guided."""
    return rows[None, None] if scale == 1 else rows.unflatten(0, (2, 1, -1))


def denoise(case: Case, check: Check) -> dict[str, Tensor]:
    head = head_of(case, check)
    out = head.denoise(check.inputs["x_t"], check.inputs["t"], check.inputs["z"])
    return {"net_out": torch.cat(out, dim=-1)}


def denoise_cfg(case: Case, check: Check) -> dict[str, Tensor]:
    head, scale = head_of(case, check), check.params["cfg"]
    z, t = (check.inputs[name].unflatten(0, (2, -1)) for name in ("z", "t"))
    noise, share = head.denoise(check.inputs["x_t"].chunk(2)[0], t, z)
    noise = torch.lerp(noise[1], noise[0], scale).expand_as(share)
    return {"net_out": torch.cat((noise, share), dim=-1).flatten(0, 1)}


def noised(case: Case, check: Check) -> dict[str, Tensor]:
    chain = head_of(case, check).train_chain
    return {"x_t": q_sample(chain, *(check.inputs[name] for name in ("target", "t", "noise")))}


def loss(case: Case, check: Check) -> dict[str, Tensor]:
    given = [check.inputs[name] for name in ("z", "target", "t", "noise")]
    error, bound = head_of(case, check).terms(*given)
    return {"loss": error + bound, "vb": bound, "mse": error}


def loss_reduced(case: Case, check: Check) -> dict[str, Tensor]:
    """The mean over the rows that the mask selects."""
    head, given = head_of(case, check), {name: tensor[None] for name, tensor in check.inputs.items()}
    mask = given.get("mask", torch.ones_like(given["t"])).bool()
    each = head.loss(given["z"], given["target"], mask=mask, t=given["t"][None], noise=given["noise"][None])
    return {"loss": each.sum() / mask.sum()}


def reverse_step(case: Case, check: Check) -> dict[str, Tensor]:
    head, x, k = head_of(case, check), check.inputs["x_t"], check.inputs["k"]
    noise, share = head.denoise(x, head.chain.timesteps[k], check.inputs["z"])
    log_var = log_variance(head.chain, k, head.variance, share)
    out = {"mean": p_mean(head.chain, x, k, noise), "log_variance": log_var}
    out["pred_xstart"] = data_from_noise(head.chain, x, k, noise)
    if "noise" in check.inputs:
        added = (0.5 * log_var).exp() * check.inputs["noise"] * check.params.get("temperature", 1.0)
        out["sample"] = out["mean"] + (k > 0)[:, None] * added
    return out


def sample(case: Case, check: Check) -> dict[str, Tensor]:
    head, scale = head_of(case, check), check.params.get("cfg", 1.0)
    z = branches(check.inputs["z"], scale)
    parts = torch.cat((check.inputs["noise_init"][None], check.inputs["noise_steps"]))[:, None, : z.shape[2]]
    draw = Recorded(parts.__getitem__, scale, check.params.get("temperature", 1.0))
    return {"sample": head.sample(z, draw)[0]}


def respaced_schedule(case: Case, check: Check) -> dict[str, Tensor]:
    chain = head_of(case, check).chain
    return {
        "timesteps": chain.timesteps,
        "betas": chain.betas,
        "posterior_log_variance_clipped": chain.posterior_log_variance,
    }


def base_schedule(case: Case, check: Check) -> dict[str, Tensor]:
    return {"alphas_cumprod": head_of(case, check).train_chain.signal}


CALLS = {
    "denoise": denoise,
    "denoise_cfg": denoise_cfg,
    "q_sample": noised,
    "loss": loss,
    "loss_mse": loss,
    "loss_mean": loss_reduced,
    "loss_masked": loss_reduced,
    "p_mean_variance": reverse_step,
    "p_log_variance": reverse_step,
    "pred_xstart": reverse_step,
    "p_sample": reverse_step,
    "sample": sample,
    "respaced_schedule": respaced_schedule,
    "base_schedule": base_schedule,
}
