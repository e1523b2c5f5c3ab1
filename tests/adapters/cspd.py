"""Calls of the `cspd` cases: the test of a continuous token, its replacement, and whole decodings with recorded noise."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import generators
from generators.mar import MAR
from generators.protocol import Prediction
from heads.protocol import Trajectory
from layers.spec import Condition
from sampling.filters import Filter
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.speculative import continuous
from sampling.speculative.continuous_decode import ContinuousSpeculation
from tests.goldens import Case, Check
from tokenizers_vis import kl


def laws(check: Check) -> tuple[Trajectory, Trajectory]:
    """Draft and target, as far as the call names them."""

    def law(name: str) -> Trajectory:
        total = check.inputs[f"{name}_logstd_sum"]
        mean = check.inputs.get(f"{name}_mean", torch.zeros_like(total))
        std = check.inputs.get(f"{name}_std", torch.ones_like(total))
        return Trajectory(mean, mean, std, total)

    return law("draft"), law("target")


def trajectory_ratio(case: Case, check: Check) -> dict[str, Tensor]:
    return {"ratio": continuous.chain_log_ratio(*laws(check)).exp()}


def accept_ratio(case: Case, check: Check) -> dict[str, Tensor]:
    limit = continuous.log_acceptance(check.inputs["x"], *laws(check), temperature=check.params["temperature"])
    return {"ratio": limit.exp()}


def modified_alpha(case: Case, check: Check) -> dict[str, Tensor]:
    return {"alpha": continuous.residual_share(check.inputs["x"], *laws(check), "released")}


def sample_modified(case: Case, check: Check) -> dict[str, Tensor]:
    normals, u = check.inputs["proposal_normals"], check.inputs["proposal_uniforms"]
    token, tries = continuous.sample_residual_released(*laws(check), normals, u)
    return {"sample": token, "n_tries": tries}


def speculative_sample(case: Case, check: Check) -> dict[str, Tensor]:
    limit = continuous.log_acceptance(check.inputs["x"], *laws(check), temperature=check.params["temperature"])
    accepted = check.inputs["u"].log() < limit
    replacement = sample_modified(case, check)["sample"]
    return {"sample": torch.where(accepted[:, None], check.inputs["x"], replacement), "accepted": accepted}


@dataclass(frozen=True)
class RecordedNoise:
    """orders (B, L): theirs, whose first entries are masked the longest. start (B, L, C) and steps (B, L, S, C), step k of
    the last axis but one used at index k, S - 1 first. tests: what test number v used, its tokens in layout order; a try
    beyond those recorded is never accepted."""

    orders: Tensor
    start: Tensor
    steps: Tensor
    tests: Mapping[str, Tensor]

    def uniform(self, use: str, place: Tensor, part: int = 0, size: tuple[int, ...] = ()) -> Tensor:
        if use == "order":
            return self.orders.flip(1).argsort(dim=1) / self.orders.shape[1]
        name = {"accept": "u", "tries accepted": "proposal_uniforms"}[use]
        recorded = self.tests.get(f"{name}_{part}", torch.ones(0, place.numel()))
        if use == "tries accepted":
            filled = torch.ones(*size, place.numel())
            filled[: len(recorded)] = recorded
            recorded = filled.T
        return self.placed(recorded.double(), place)

    def normal(self, use: str, place: Tensor, part: int = 0, size: tuple[int, ...] = ()) -> Tensor:
        if use == "tries":
            filled = torch.zeros(place.numel(), *size)
            recorded = self.tests.get(f"proposal_normals_{part}", torch.zeros(0, place.numel(), size[-1]))
            filled[:, : len(recorded)] = recorded.transpose(0, 1)
            return self.placed(filled.double(), place)
        noise = self.start if part == 0 else self.steps[:, :, self.steps.shape[2] - part]
        return noise.gather(1, place[..., None].expand(-1, -1, *size)).double()

    def placed(self, recorded: Tensor, place: Tensor) -> Tensor:
        """recorded (B * m, ...) in layout order of each row -> (B, m, ...) in the order of place."""
        turn = place.argsort(dim=1).argsort(dim=1)
        recorded = recorded.reshape(*place.shape, *recorded.shape[1:])
        return torch.stack([row[t] for row, t in zip(recorded, turn, strict=True)])


def model_of(case: Case, check: Check, name: str) -> MAR:
    weights = {key.removeprefix(f"{name}."): x for key, x in case.weights().items() if key.startswith(f"{name}.")}
    steps = check.params.get("num_sampling_steps", case.config["mar"].get("num_sampling_steps", "100"))
    config = case.config["mar"] | {"num_sampling_steps": str(steps)}
    return generators.from_published("mar", weights, config).requires_grad_(False)


def sampler_of(check: Check, length: int) -> Sampler:
    linear = check.params.get("cfg_schedule", "constant") == "linear"
    schedule = {"schedule": "mar_linear", "length": length} if linear else {"schedule": "constant"}
    guidance = Guidance(scale=check.params.get("cfg", 1.0), **schedule)
    temperature, rounds = check.params.get("temperature", 1.0), check.params.get("num_iter")
    return Sampler(Filter(temperature=temperature), guidance, rounds=rounds)


def trajectory(case: Case, check: Check) -> dict[str, Tensor]:
    """z (N, D) of the case are N samples of one token; with guidance its second half is the unconditional branch."""
    head = model_of(case, check, check.params["model"]).head
    branches = 1 if check.params.get("cfg", 1.0) == 1 else 2
    z = check.inputs["z"].unflatten(0, (branches, -1))[:, :, None]
    rows = z.shape[1]
    place = torch.zeros(rows, 1, dtype=torch.int64)
    start = check.inputs["noise_init"][:rows, None]
    steps = check.inputs["noise_by_k"].transpose(0, 1)[:rows, None]
    noise = RecordedNoise(place, start, steps, {})
    prediction = Prediction(head, z, place, place, total=1, keep=1)
    made = head.trajectory(z, sampler_of(check, 1).draw(prediction, noise, 0))
    return {name: getattr(made, name)[:, 0] for name in ("sample", "mean", "std", "logstd_sum")}


def speculative_generate(case: Case, check: Check) -> dict[str, Tensor]:
    params, given = check.params, check.inputs
    target, draft = (model_of(case, check, name) for name in ("target", "draft"))
    rule = ContinuousSpeculation(params["num_draft"], params["prefill_ratio"], temperature=params["inner_temperature"])
    noise = RecordedNoise(given["orders"].long(), given["noise"], given["inter_noise"], given)
    condition = Condition(label=given["condition"])
    state, _, tests = rule.generate(target, draft, condition, sampler_of(check, target.spec.length), noise)
    ratios = {
        f"accept_ratio_{v}": test.log_limit.exp().gather(1, test.positions.argsort(dim=1)).flatten()
        for v, test in enumerate(tests)
    }
    return {
        "latents": kl.unpatchify(state.tokens, case.config["mar"].get("patch_size", 1), target.spec.layout),
        **ratios,
    }


CALLS = {
    "sample_trajectory": trajectory,
    "trajectory_last_std": trajectory,
    "speculative_generate": speculative_generate,
    "trajectory_ratio": trajectory_ratio,
    "accept_ratio": accept_ratio,
    "modified_alpha": modified_alpha,
    "sample_modified": sample_modified,
    "speculative_sample": speculative_sample,
}
