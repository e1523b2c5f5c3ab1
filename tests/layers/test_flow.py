"""Flows: exact solutions for a point and for Gaussian data, orders of convergence, times."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.flow import (
    ODE_SOLVERS,
    Velocity,
    euler,
    euler_maruyama,
    floored_times,
    heun,
    interpolate,
    logit_normal,
    score_from_velocity,
    shifted,
    training_times,
    uniform_times,
)

M, S = 0.7, 0.3  # mean and scale of the Gaussian data


def scale_at(t: float) -> float:
    return ((1 - t) ** 2 * S**2 + t**2) ** 0.5


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[noise - x_0 | x_t] of data N(M, S^2)."""
    centred = (x - (1 - t) * M) / scale_at(t) ** 2
    return t * centred - (M + (1 - t) * S**2 * centred)


def along(times: list[float]) -> Velocity:
    return lambda x, i: gaussian_velocity(x, times[i])


def exact(noise: Tensor) -> Tensor:
    return M + S * noise


def test_the_line_runs_from_data_to_noise() -> None:
    torch.manual_seed(0)
    data, noise = torch.randn(2, 3, 4)
    assert torch.equal(interpolate(data, noise, torch.zeros(3)), data)
    assert torch.equal(interpolate(data, noise, torch.ones(3)), noise)
    t = torch.tensor([0.25, 0.5, 1.0])
    assert_close(interpolate(data, noise, t), torch.lerp(data, noise, t[:, None]))


def test_the_score_is_that_of_the_marginal() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for t in (0.04, 0.3, 1.0):
        wanted = -(x - (1 - t) * M) / scale_at(t) ** 2
        assert_close(score_from_velocity(x, gaussian_velocity(x, t), t), wanted)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_carries_noise_to_a_point_exactly(steps: int) -> None:
    point, noise = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    times = uniform_times(steps)
    assert_close(euler(lambda x, i: (x - point) / times[i], noise, times), point.expand(5, 2))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_to_the_exact_flow_at_their_order(solver: str, order: int) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (200, 400):
        times = uniform_times(steps)
        errors.append(float((ODE_SOLVERS[solver](along(times), noise, times) - exact(noise)).abs().max()))
    assert abs(errors[0] / errors[1] - 2**order) < 0.1 * 2**order
    assert errors[1] < (3e-3 if order == 1 else 3e-5)


def test_heun_asks_at_both_ends_of_a_step_in_order() -> None:
    asked = []

    def velocity(x: Tensor, i: int) -> Tensor:
        asked.append(i)
        return x

    heun(velocity, torch.ones(1), uniform_times(3))
    assert asked == [0, 1, 1, 2, 2, 3]


def test_the_stochastic_path_keeps_the_marginals() -> None:
    """The solver is linear in its noise for Gaussian data, so its mean and variance follow from unit impulses."""

    def outcome(steps: int) -> tuple[float, float]:
        times = floored_times(steps, last=0.01)
        inputs = torch.eye(steps, dtype=torch.float64)  # one impulse a row: the start, then the noise of each step
        start = torch.cat((torch.zeros(1, dtype=torch.float64), inputs[:, 0]))

        def normal(part: int) -> Tensor:
            return torch.cat((torch.zeros(1, dtype=torch.float64), inputs[:, part]))

        out = euler_maruyama(along(times), start, times, normal)
        return float(out[0]), float((out[1:] - out[0]).square().sum())

    coarse, fine = outcome(500), outcome(1000)
    assert abs(fine[0] - M) < 2e-3 and abs(fine[1] - S**2) < 2e-3
    assert abs(fine[1] - S**2) < abs(coarse[1] - S**2)


def test_the_stochastic_step_is_the_published_one() -> None:
    """One step by hand: x + (x + (2 - t) v) dt + sqrt(2 t |dt|) noise; none of it in the last step, temperature in it."""
    x, noise = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    v = torch.tensor([1.5, 0.25], dtype=torch.float64)
    times = [1.0, 0.04, 0.0]
    first = x + (x + v) * -0.96 + 0.5 * (2 * 0.96) ** 0.5 * noise
    wanted = first + (first + 1.96 * v) * -0.04
    assert_close(euler_maruyama(lambda x, i: v, x, times, lambda part: noise, temperature=0.5), wanted)


def test_times() -> None:
    assert uniform_times(4) == [1, 0.75, 0.5, 0.25, 0]
    floored = torch.tensor(floored_times(50, 0.04), dtype=torch.float64)
    assert_close(floored, torch.cat((torch.linspace(1, 0.04, 50, dtype=torch.float64), floored.new_zeros(1))))
    with pytest.raises(ValueError, match="2 at least"):
        floored_times(1, 0.04)
    assert [shifted(t, 1.0) for t in uniform_times(4)] == uniform_times(4)
    assert (shifted(1.0, 3.0), shifted(0.0, 3.0), shifted(0.5, 3.0)) == (1, 0, 0.75)


def test_training_times_follow_their_law() -> None:
    """20,000 draws; the tolerances are five standard errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        uniform = training_times("uniform", (20_000,), torch.device("cpu"))
        middle = training_times("logit_normal", (20_000,), torch.device("cpu"))
    assert abs(float(uniform.mean()) - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(float(middle.logit().mean())) < 5 / 20_000**0.5
    assert abs(float(middle.logit().std()) - 1) < 5 / (2 * 20_000) ** 0.5
    assert logit_normal(torch.zeros(1)) == 0.5
    with pytest.raises(ValueError, match="logit_normal"):
        training_times("cosine", (2,), torch.device("cpu"))
