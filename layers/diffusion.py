"""Gaussian diffusion in discrete steps: tables of a noise schedule, and what is read off them. No networks here.

Sources: DDPM (Ho et al. 2020, arXiv:2006.11239); the cosine schedule, the learned range of variances and the variational
bound: Nichol and Dhariwal 2021, arXiv:2102.09672. Tables are float64, a number is rounded once, where it meets a tensor.

Letters: T steps of the schedule that was trained, n <= T steps kept for sampling, k an index into the kept ones (0 is the
cleanest), abar the share of signal variance. k is a number, or int64 (...) over the leading axes of x (..., C).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, log, pi, sqrt

import torch
from torch import Tensor

# ---- schedules


def cosine_betas(steps: int, ceiling: float = 0.999) -> Tensor:
    """abar follows cos^2(pi/2 (u + 0.008) / 1.008), u from 0 to 1; each beta at most `ceiling`. float64 (steps,)."""

    def signal(u: float) -> float:
        return cos((u + 0.008) / 1.008 * pi / 2) ** 2

    betas = [min(1 - signal((i + 1) / steps) / signal(i / steps), ceiling) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def linear_betas(steps: int) -> Tensor:
    """From 0.1 / steps to 20 / steps in equal strides: DDPM's, for any number of steps. float64 (steps,)."""
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64, device="cpu")


SCHEDULES = {"cosine": cosine_betas, "linear": linear_betas}


def respaced(steps: int, plan: int | str) -> list[int]:
    """Which of `steps` timesteps a shorter chain keeps, ascending.

    plan: a count n, spread evenly with both ends kept; "a,b,c": so many in each of equal sections; "ddim n": every s-th
    from 0, for the smallest stride s that keeps exactly n. Source: Nichol and Dhariwal 2021, as ADM and MAR round it: the
    stride is summed up in floating point, each sum rounded half to even.
    Raises ValueError for a plan that the steps cannot serve.
    """
    plan = str(plan)
    if plan.startswith("ddim"):
        count = int(plan.removeprefix("ddim"))
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(f"respaced: no whole stride keeps exactly {count} of {steps} steps")
    counts = [int(count) for count in plan.split(",")]
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"respaced: cannot keep {count} of the {size} steps of section {section} (plan {plan!r})")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.add(start + round(place))
            place += stride
        start += size
    return sorted(kept)


@dataclass(frozen=True, eq=False)
class Tables:
    """A schedule of n steps, float64 (n,) each; timesteps int64 (n,): their numbers in the schedule that was trained.

    Tables stay on the host: a sampler reads numbers off them, without a question to the device.
    """

    timesteps: Tensor
    betas: Tensor
    signal: Tensor  # abar
    signal_scale: Tensor  # sqrt(abar)
    noise_scale: Tensor  # sqrt(1 - abar)
    inverse_scale: Tensor  # 1 / sqrt(abar)
    inverse_noise: Tensor  # sqrt(1 / abar - 1)
    posterior_log_variance: Tensor  # its entry 0, log 0, is replaced by entry 1
    log_betas: Tensor
    mean_of_data: Tensor  # the posterior's mean is mean_of_data x_0 + mean_of_noisy x_t
    mean_of_noisy: Tensor

    def __len__(self) -> int:
        return len(self.betas)


def tables(betas: Tensor, kept: list[int] | None = None) -> Tables:
    """betas float64 (T,), `kept` timesteps of it (all when None). Raises ValueError for fewer than two."""
    timesteps = torch.tensor(range(len(betas)) if kept is None else kept, device="cpu")
    if len(timesteps) < 2:
        raise ValueError(f"tables: a chain needs two steps at least, got {timesteps.tolist()}")
    if kept is not None:
        signal = (1 - betas).cumprod(0)[timesteps]
        betas = 1 - signal / torch.cat((signal.new_ones(1), signal[:-1]))
    signal = (1 - betas).cumprod(0)
    before = torch.cat((signal.new_ones(1), signal[:-1]))
    variance = betas * (1 - before) / (1 - signal)
    return Tables(
        timesteps=timesteps,
        betas=betas,
        signal=signal,
        signal_scale=signal.sqrt(),
        noise_scale=(1 - signal).sqrt(),
        inverse_scale=(1 / signal).sqrt(),
        inverse_noise=(1 / signal - 1).sqrt(),
        posterior_log_variance=torch.cat((variance[1:2], variance[1:])).log(),
        log_betas=betas.log(),
        mean_of_data=betas * before.sqrt() / (1 - signal),
        mean_of_noisy=(1 - before) * (1 - betas).sqrt() / (1 - signal),
    )


def at(table: Tensor, k: int | Tensor, like: Tensor) -> float | Tensor:
    """Entry k of a table: a number for a number; else (..., 1) in the dtype of `like`, to stand before its channels."""
    if isinstance(k, int):
        return float(table[k])
    return _copied(table, k.device)[k].to(like.dtype)[..., None]


@lru_cache(maxsize=256)
def _copied(table: Tensor, device: torch.device) -> Tensor:
    """The table on the device: copied there once, not at every training step."""
    with torch.inference_mode(False):
        return table.to(device)


# ---- one step


def q_sample(chain: Tables, data: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
    """x_t of data x_0: sqrt(abar) x_0 + sqrt(1 - abar) noise."""
    return at(chain.signal_scale, k, data) * data + at(chain.noise_scale, k, data) * noise


def data_from_noise(chain: Tables, x: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
    """The x_0 that x_t and its noise imply; never clipped."""
    return at(chain.inverse_scale, k, x) * x - at(chain.inverse_noise, k, x) * noise


def noise_from_data(chain: Tables, x: Tensor, k: int | Tensor, data: Tensor) -> Tensor:
    """The noise that x_t and its x_0 imply."""
    return (at(chain.inverse_scale, k, x) * x - data) / at(chain.inverse_noise, k, x)


def posterior_mean(chain: Tables, data: Tensor, x: Tensor, k: int | Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, x_0)."""
    return at(chain.mean_of_data, k, x) * data + at(chain.mean_of_noisy, k, x) * x


def log_variance(chain: Tables, k: int | Tensor, kind: str, share: Tensor) -> Tensor:
    """The log-variance of the reverse step, in the shape of share (..., C).

    kind: learned_range, share in [-1, 1] going from the posterior's to that of beta, in the log; fixed_small, the
    posterior's; fixed_large, that of beta, its entry 0 the posterior's of entry 1. Raises ValueError for another kind.
    """
    small = at(chain.posterior_log_variance, k, share)
    if kind == "learned_range":
        part = (share + 1) / 2
        return part * at(chain.log_betas, k, share) + (1 - part) * small
    if kind == "fixed_small":
        return torch.zeros_like(share) + small
    if kind == "fixed_large":
        large = torch.cat((chain.posterior_log_variance[:1], chain.log_betas[1:]))
        return torch.zeros_like(share) + at(large, k, share)
    raise ValueError(f"log_variance: {kind!r} is not known; known: {', '.join(VARIANCES)}")


VARIANCES = ("learned_range", "fixed_small", "fixed_large")


def p_mean(chain: Tables, x: Tensor, k: int | Tensor, noise: Tensor) -> Tensor:
    """The mean of the reverse step p(x_{t-1} | x_t) whose predicted noise is `noise`."""
    return posterior_mean(chain, data_from_noise(chain, x, k, noise), x, k)


# ---- the variational bound


def gaussian_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p || q) of Gaussians, elementwise, in nats."""
    ratio = (log_var_p - log_var_q).exp()
    return 0.5 * (log_var_q - log_var_p - 1 + ratio + (mean_p - mean_q) ** 2 * (-log_var_q).exp())


def binned_log_prob(x: Tensor, mean: Tensor, log_scale: Tensor, half_bin: float = 1 / 255) -> Tensor:
    """Log-probability of the bin around x under a Gaussian, elementwise, in nats; the outermost bins are open.

    The normal distribution function is approximated by a tanh, as in GELU; probabilities are kept above 1e-12.
    Source: DDPM, sec. 3.3, for pixels in [-1, 1].
    """

    def below(value: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(sqrt(2 / pi) * (value + 0.044715 * value**3)))

    inverse = (-log_scale).exp()
    upper, lower = below(inverse * (x - mean + half_bin)), below(inverse * (x - mean - half_bin))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp_min(1e-12).log()


def bound_term(chain: Tables, data: Tensor, x: Tensor, k: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """One term of the variational bound under learned_range variances, bits a channel: (..., C) -> (...).

    KL from the true posterior to the reverse step; at k = 0 minus the log-probability of the data instead.
    """
    true_mean, true_log_var = posterior_mean(chain, data, x, k), at(chain.posterior_log_variance, k, x)
    mean, log_var = p_mean(chain, x, k, noise), log_variance(chain, k, "learned_range", share)
    kl = gaussian_kl(true_mean, true_log_var, mean, log_var).mean(-1)
    return torch.where(k == 0, -binned_log_prob(data, mean, 0.5 * log_var).mean(-1), kl) / log(2)
