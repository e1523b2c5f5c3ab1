"""Speculative decoding of continuous tokens: two diffusion heads that start from the same noise.

Source: CSpD (Wang et al. 2024, arXiv:2411.11925). A token is the end of a chain of Gaussian steps; draft and target walk it
with the same noise and differ in the mean and deviation of the last step, and in the deviations of the steps before. With
s = exp(logstd_sum) the product of those, the ratio Sigma of both chains' densities enters the test. Three readings:

released     Sigma = s_target / s_draft, as the published code has it.
density      Sigma = s_draft / s_target: the densities p and q of two aligned chains have the ratio p / q of the products of
             1 / s. It is the reciprocal of the released one.
conditional  Sigma = 1: the noise of the earlier steps has one law for both models, so that given it only the last step is
             to be tested. With temperature 1, `sample_residual`, and a draft that holds the noise of its last step, the
             token follows the target's law given that noise, and so the target's law. This is the exact rule. The
             published samplers leave the last noise out; their token is the mean, to which no density test applies.

All densities are compared as logarithms. Letters: N tokens (any leading axes), C channels,
T tries.
"""

import torch
from torch import Tensor

from heads.protocol import Trajectory
from layers.record import look_up

SIGNS = {"released": 1.0, "density": -1.0, "conditional": 0.0}
FLAT = 42.0  # published temperature of the test: last steps are so narrow that without it hardly anything is accepted
TRIES = 100


def log_density(x: Tensor, law: Trajectory, temperature: float = 1.0) -> Tensor:
    """Of the last step at x (N, C), up to the constant that all share -> (N,).

    temperature widens the Gaussian in the exponent, and not in its normaliser.
    """
    return -(0.5 * ((x - law.mean) / (law.std * temperature)).square() + law.std.log()).sum(-1)


def chain_log_ratio(draft: Trajectory, target: Trajectory, reading: str = "released") -> Tensor:
    """log Sigma (N,). Raises UnknownName for a reading that is not known."""
    sign = look_up(reading, SIGNS, "reading of the trajectory ratio")
    return sign * (target.logstd_sum - draft.logstd_sum).sum(-1)


def log_acceptance(
    x: Tensor, draft: Trajectory, target: Trajectory, reading: str = "released", temperature: float = FLAT
) -> Tensor:
    """log of what u must stay below for the draft's x (N, C) to be accepted, both densities widened -> (N,)."""
    ratio = log_density(x, target, temperature) - log_density(x, draft, temperature)
    return ratio + chain_log_ratio(draft, target, reading)


def residual_share(x: Tensor, draft: Trajectory, target: Trajectory, reading: str = "released") -> Tensor:
    """max(p - q / Sigma, 0) / p at x (..., N, C), in [0, 1] -> (..., N): how much of the target is still owed there."""
    drafted = log_density(x, draft) - chain_log_ratio(draft, target, reading)
    return -torch.expm1((drafted - log_density(x, target)).clamp_max(0))


def sample_residual(
    draft: Trajectory, target: Trajectory, normals: Tensor, u: Tensor, reading: str = "conditional"
) -> tuple[Tensor, Tensor]:
    """One token (N, C) each of the law norm(max(p - q / Sigma, 0)), by rejection: the first try that is accepted.

    normals (T, N, C), u (T, N): of the tries. Returns tokens, and found bool (N,); a token not found is the last try, a
    plain draw of the target. A token's result depends on no other token.
    """
    tried = target.mean + target.std * normals
    accepted = u < residual_share(tried, draft, target, reading)
    found = accepted.any(0)
    first = torch.where(found, accepted.long().argmax(0), len(u) - 1)
    return tried.take_along_dim(first[None, ..., None], 0).squeeze(0), found


def sample_residual_released(
    draft: Trajectory, target: Trajectory, normals: Tensor, u: Tensor, reading: str = "released"
) -> tuple[Tensor, Tensor]:
    """As the published code: tries go on until every token was found once, and a later find replaces an earlier one; a
    token never found is 0. Returns tokens (N, C), and the number of tries int64 ().
    """
    tried = target.mean + target.std * normals
    accepted = u < residual_share(tried, draft, target, reading)
    complete = (accepted.long().cumsum(0) > 0).flatten(1).all(1)
    tries = torch.where(complete.any(), complete.long().argmax() + 1, len(u))
    index = torch.arange(len(u), device=u.device).reshape(-1, *(1 for _ in u.shape[1:]))
    last = torch.where(accepted & (index < tries), index, -1).amax(0)
    token = tried.take_along_dim(last.clamp_min(0)[None, ..., None], 0).squeeze(0)
    return torch.where((last >= 0)[..., None], token, 0), tries
