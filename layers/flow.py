"""Flows on straight lines between data and noise: times, targets, solvers. No networks here.

Time runs from 1 (noise) to 0 (data): x_t = (1 - t) x_0 + t noise, velocity dx/dt = noise - x_0. Sources: flow matching
(Lipman et al. 2023, arXiv:2210.02747), rectified flow (Liu et al. 2023, arXiv:2209.03003).

A solver walks down a list of times and asks `velocity(x, i)`, the velocity at times[i].
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]

# ---- targets


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of data, noise (..., C) at t (...)."""
    t = t[..., None].to(data.dtype)
    return (1 - t) * data + t * noise


def score_from_velocity(x: Tensor, velocity: Tensor, t: float) -> Tensor:
    """The gradient of log p_t at x_t, for t > 0."""
    return -(x + (1 - t) * velocity) / t


# ---- times


def uniform_times(steps: int) -> list[float]:
    """1, 1 - 1/n, ..., 0: n + 1 times."""
    return [1 - i / steps for i in range(steps + 1)]


def floored_times(steps: int, last: float) -> list[float]:
    """n times from 1 down to `last` in equal strides, then 0. Source: xAR (arXiv:2502.20388), last = 0.04.

    Raises ValueError for fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"floored_times: steps is {steps}, must be 2 at least (1 and {last}, then 0)")
    return [1 - (1 - last) * i / (steps - 1) for i in range(steps)] + [0.0]


def shifted(t: float, shift: float) -> float:
    """t moved towards noise where shift > 1: shift t / (1 + (shift - 1) t); both ends stay.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: Tensor) -> Tensor:
    """Training times from standard normal numbers: more of them in the middle. Source: Esser et al. 2024, sec. 3.1."""
    return normal.sigmoid()


# ---- solvers


def euler(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at times[0] -> x at times[-1]; exact where the velocity is constant along each path."""
    for i in range(len(times) - 1):
        x = x + (times[i + 1] - times[i]) * velocity(x, i)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """As `euler`, of second order: the mean of the velocities at both ends of a step. Two evaluations a step."""
    for i in range(len(times) - 1):
        stride = times[i + 1] - times[i]
        here = velocity(x, i)
        there = velocity(x + stride * here, i + 1)
        x = x + stride * (here + there) / 2
    return x


def euler_maruyama(
    velocity: Velocity, x: Tensor, times: Sequence[float], normal: Callable[[int], Tensor], temperature: float = 1.0
) -> Tensor:
    """The stochastic path with the flow's marginals, noise of variance 2 t dt; the last step adds none.

    normal(i): standard normal numbers like x, for the i-th step, counted from 1. Its drift is velocity - t score.
    Source: xAR (arXiv:2502.20388), after SiT (Ma et al. 2024, arXiv:2401.08740).
    """
    for i in range(len(times) - 1):
        t, stride = times[i], times[i + 1] - times[i]
        v = velocity(x, i)
        x = x + stride * (v - t * score_from_velocity(x, v, t))
        if i < len(times) - 2:
            x = x + temperature * sqrt(2 * t * -stride) * normal(i + 1)
    return x


ODE_SOLVERS: dict[str, Callable[[Velocity, Tensor, Sequence[float]], Tensor]] = {"euler": euler, "heun": heun}


def training_times(law: str, size: tuple[int, ...], device: torch.device) -> Tensor:
    """t (size) drawn by a named law: uniform, or logit_normal. Raises ValueError for another."""
    if law == "uniform":
        return torch.rand(size, device=device)
    if law == "logit_normal":
        return logit_normal(torch.randn(size, device=device))
    raise ValueError(f"training times: law {law!r} is not known; known: uniform, logit_normal")
