"""Diffusion tables and steps against Bayes' rule, exact Gaussian chains, torch.distributions and diffusers."""

from math import cos, log, pi

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from layers.diffusion import (
    SCHEDULES,
    Tables,
    at,
    binned_log_prob,
    bound_term,
    cosine_betas,
    data_from_noise,
    gaussian_kl,
    linear_betas,
    log_variance,
    noise_from_data,
    p_mean,
    posterior_mean,
    q_sample,
    respaced,
    tables,
)

EXACT = {"atol": 1e-12, "rtol": 1e-9}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plan", ["50", "ddim20", "8,4,2"])
def test_tables_follow_from_the_recursion_and_bayes_rule(schedule: str, plan: str) -> None:
    betas = SCHEDULES[schedule](1000)
    kept = respaced(1000, plan)
    chain = tables(betas, kept)
    signal, full = 1.0, []
    for beta in betas.tolist():
        signal *= 1 - beta
        full.append(signal)
    previous = 1.0
    for k, timestep in enumerate(kept):
        now = full[timestep]
        alpha = now / previous
        assert chain.timesteps[k] == timestep
        assert_close(float(chain.signal[k]), now, **EXACT)
        assert_close(float(chain.betas[k]), 1 - alpha, **EXACT)
        if k:  # q(x_k-1 | x_k, x_0): the product of two Gaussians in x_k-1
            precision = alpha / (1 - alpha) + 1 / (1 - previous)
            assert_close(float(chain.posterior_log_variance[k]), -log(precision), atol=1e-9, rtol=1e-9)
            assert_close(float(chain.mean_of_noisy[k]), alpha**0.5 / (1 - alpha) / precision, atol=1e-10, rtol=1e-7)
            assert_close(
                float(chain.mean_of_data[k]), previous**0.5 / (1 - previous) / precision, atol=1e-10, rtol=1e-7
            )
        previous = now
    assert chain.posterior_log_variance[0] == chain.posterior_log_variance[1]
    assert chain.mean_of_data[0] == 1 and chain.mean_of_noisy[0] == 0


def test_cosine_schedule_is_the_cosine_until_its_ceiling() -> None:
    signal = tables(cosine_betas(1000)).signal
    u = (torch.arange(999) + 1) / 1000
    wanted = torch.cos((u.double() + 0.008) / 1.008 * pi / 2) ** 2 / cos(0.008 / 1.008 * pi / 2) ** 2
    assert_close(signal[:999], wanted, atol=1e-7, rtol=0)  # u is rounded to float32
    assert cosine_betas(1000)[-1] == 0.999


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
def test_schedules_are_those_of_diffusers_to_float32(schedule: str, theirs: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)
    assert_close(tables(SCHEDULES[schedule](1000)).signal.float(), scheduler.alphas_cumprod, atol=1e-6, rtol=0)


def test_respacing_keeps_the_steps_that_the_original_keeps() -> None:
    assert respaced(1000, 10) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    hundred = respaced(1000, "100")
    assert (len(hundred), hundred[:9], hundred[-3:]) == (100, [0, 10, 20, 30, 40, 50, 61, 71, 81], [979, 989, 999])
    assert respaced(1000, "ddim10") == list(range(0, 1000, 100))
    assert respaced(1000, 1) == [0]
    assert respaced(300, "2,3,1") == [0, 99, 100, 150, 199, 200]  # 100 + 49.5 is rounded half to even
    assert respaced(10, "2,2,2") == [0, 3, 4, 6, 7, 9]  # the first sections take what is left over
    rounded_once = [round(999 / 20 * i) for i in range(21)]
    assert respaced(1000, 21) != rounded_once  # the stride is summed up, and its errors with it


@pytest.mark.parametrize("plan", ["ddim37", "0", "1001", "600,2"])
def test_a_plan_that_cannot_be_kept_is_refused(plan: str) -> None:
    with pytest.raises(ValueError, match="respaced"):
        respaced(1000, plan)


def test_a_chain_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match="two steps"):
        tables(cosine_betas(1000), [0])


@pytest.fixture
def chain() -> Tables:
    return tables(cosine_betas(1000), respaced(1000, 25))


def test_data_noise_and_their_mixture_determine_each_other(chain: Tables) -> None:
    torch.manual_seed(0)
    data, noise = torch.randn(2, 25, 3, dtype=torch.float64)
    k = torch.arange(25)
    x = q_sample(chain, data, k, noise)
    assert_close(data_from_noise(chain, x, k, noise), data, atol=1e-7, rtol=0)
    assert_close(noise_from_data(chain, x, k, data), noise, atol=1e-9, rtol=0)
    one_by_one = torch.stack([q_sample(chain, data[i], i, noise[i]) for i in range(25)])
    assert torch.equal(x, one_by_one)


def test_the_exact_chain_of_gaussian_data_keeps_its_marginals(chain: Tables) -> None:
    """Data N(m, s^2): E[noise | x_k] is linear, so mean and variance of every step follow without sampling."""
    m, s = 0.7, 0.3
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, variance = (
        float(chain.signal_scale[-1]) * m,
        float(chain.signal[-1]) * s**2 + float(chain.noise_scale[-1]) ** 2,
    )
    for k in reversed(range(len(chain))):
        a, b = float(chain.signal_scale[k]), float(chain.noise_scale[k])
        total = a**2 * s**2 + b**2
        noise = (probe - a * m) * b / total
        out = p_mean(chain, probe, k, noise)
        offset, slope = out[0], out[1] - out[0]
        of_data = s**2 * b**2 / total  # Var[x_0 | x_k]
        added = (float(chain.posterior_log_variance[k].exp()) if k else 0.0) + float(
            chain.mean_of_data[k]
        ) ** 2 * of_data
        mean, variance = float(offset + slope * mean), float(slope**2 * variance + added)
        before = float(chain.signal[k - 1]) if k else 1.0
        assert_close(mean, before**0.5 * m, atol=1e-9, rtol=0)
        assert_close(variance, before * s**2 + 1 - before, atol=1e-9, rtol=0)


def test_variances_lie_between_those_of_the_posterior_and_of_beta(chain: Tables) -> None:
    k = torch.arange(25)
    share = torch.ones(25, 2, dtype=torch.float64)
    small, large = (log_variance(chain, k, "learned_range", sign * share) for sign in (-1, 1))
    assert_close(small[:, 0], chain.posterior_log_variance)
    assert_close(large[:, 0], chain.betas.log())
    assert_close(log_variance(chain, k, "learned_range", 0 * share), (small + large) / 2)
    assert torch.equal(log_variance(chain, k, "fixed_small", share), small)
    fixed = log_variance(chain, k, "fixed_large", share)
    assert torch.equal(fixed[1:], large[1:]) and torch.equal(fixed[0], small[1])
    with pytest.raises(ValueError, match="learned_range"):
        log_variance(chain, k, "fixed", share)


def test_divergence_of_gaussians_is_that_of_torch() -> None:
    torch.manual_seed(0)
    m1, m2, v1, v2 = torch.randn(4, 50, dtype=torch.float64)
    wanted = kl_divergence(Normal(m1, (0.5 * v1).exp()), Normal(m2, (0.5 * v2).exp()))
    assert_close(gaussian_kl(m1, v1, m2, v2), wanted)


def test_binned_probabilities_are_those_of_a_normal_law() -> None:
    """The tanh is within 1e-3 of the normal distribution function; the bins of a row of 256 sum to one exactly."""
    centres = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_scale = torch.tensor(0.2, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    found = binned_log_prob(centres, mean, log_scale).exp()
    law = Normal(mean, log_scale.exp())
    upper, lower = law.cdf(centres + 1 / 255), law.cdf(centres - 1 / 255)
    upper[-1], lower[0] = 1, 0
    assert_close(found, upper - lower, atol=1e-3, rtol=0)
    assert_close(found.sum(), torch.tensor(1.0, dtype=torch.float64), atol=1e-9, rtol=0)
    far = binned_log_prob(torch.tensor([0.0]), torch.tensor([50.0]), torch.tensor([0.0]))
    assert_close(far, torch.tensor([1e-12]).log())


def test_the_bound_is_the_divergence_from_the_true_posterior(chain: Tables) -> None:
    torch.manual_seed(0)
    data, noise, wrong = torch.randn(3, 25, 4, dtype=torch.float64)
    share = torch.rand(25, 4, dtype=torch.float64) * 2 - 1
    k = torch.arange(25)
    x = q_sample(chain, data, k, noise)
    perfect = bound_term(chain, data, x, k, noise, -torch.ones_like(share))
    assert_close(perfect[1:], torch.zeros(24, dtype=torch.float64), atol=1e-9, rtol=0)

    truth = Normal(posterior_mean(chain, data, x, k), (0.5 * at(chain.posterior_log_variance, k, x)).exp())
    step = Normal(p_mean(chain, x, k, wrong), (0.5 * log_variance(chain, k, "learned_range", share)).exp())
    wanted = kl_divergence(truth, step).mean(-1) / log(2)
    wanted[0] = -binned_log_prob(data[0], step.mean[0], step.stddev[0].log()).mean() / log(2)
    assert_close(bound_term(chain, data, x, k, wrong, share), wanted, atol=1e-7, rtol=1e-7)


def test_linear_schedule_keeps_its_sum_for_any_number_of_steps() -> None:
    assert_close(linear_betas(1000)[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))
    assert_close(linear_betas(250).sum(), linear_betas(1000).sum())
