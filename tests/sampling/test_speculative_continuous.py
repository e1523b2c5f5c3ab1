"""Tests of continuous tokens: densities against closed forms, the exact rule's law, and decoding with two generators."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from generators.mar import MAR
from heads.diffusion import DiffusionHead
from heads.protocol import Trajectory
from layers.noise import Noise
from layers.record import UnknownName
from layers.spec import Condition, Grid, TokenSpec
from sampling.decode import generate
from sampling.guidance import Guidance
from sampling.sampler import Sampler
from sampling.speculative import continuous
from sampling.speculative.continuous_decode import ContinuousSpeculation

N, C = 12, 3
DRAWS, BINS, TRIES = 100_000, 40, 40
CRITICAL = 72.1  # of chi-square at 39 degrees of freedom: a true rule fails once in 1000 seeds, the seed is fixed


def trajectories(seed: int = 0) -> tuple[Trajectory, Trajectory]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> Trajectory:
        mean, spread, total = torch.randn(3, N, C, generator=generator, dtype=torch.float64).mul(0.3)
        return Trajectory(mean, mean, spread.exp(), total)

    return one(), one()


def gaussian(law: Trajectory, x: Tensor) -> Tensor:
    return Normal(law.mean, law.std).log_prob(x).sum(-1)


def test_at_temperature_one_the_test_is_the_ratio_of_the_densities() -> None:
    draft, target = trajectories()
    x = torch.randn(N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = gaussian(target, x) - gaussian(draft, x)
    steps = (draft.logstd_sum - target.logstd_sum).sum(-1)  # log p / q of chains whose noise is the same
    for reading, extra in (("conditional", 0), ("density", steps), ("released", -steps)):
        assert_close(continuous.log_acceptance(x, draft, target, reading, temperature=1.0), plain + extra)
        owed = (1 - (-(plain + extra)).exp()).clamp_min(0)
        assert_close(continuous.residual_share(x, draft, target, reading), owed)
    with pytest.raises(UnknownName, match="density"):
        continuous.chain_log_ratio(draft, target, "densities")


def test_temperature_widens_the_exponents_alone() -> None:
    draft, target = trajectories()
    wide = continuous.log_acceptance(draft.mean, draft, target, "conditional", temperature=1e6)
    assert_close(wide, (draft.std.log() - target.std.log()).sum(-1))
    same = continuous.log_acceptance(draft.mean, draft, draft, "released")
    assert_close(same, torch.zeros(N, dtype=torch.float64))  # p == q: always accepted, nothing is owed
    assert_close(continuous.residual_share(draft.mean, draft, draft, "released"), torch.zeros(N, dtype=torch.float64))


def test_narrow_last_steps_do_not_underflow() -> None:
    tiny = torch.full((1, 16), 4e-3)
    draft, target = (Trajectory(m, m, tiny, tiny * 0) for m in (torch.zeros(1, 16), torch.full((1, 16), 1e-2)))
    found = continuous.log_acceptance(target.mean, draft, target, "conditional", temperature=1.0)
    assert_close(found, torch.tensor([16 * 0.5 * 2.5**2]))
    share = continuous.residual_share(target.mean, draft, target, "conditional")
    assert_close(share, torch.tensor([1 - torch.exp(torch.tensor(-50.0))]))


def one_dimension(seed: int, reading: str) -> tuple[Tensor, Trajectory]:
    """DRAWS tokens of one channel: a draft, its test at temperature 1, its replacement. -> tokens, and the target's law."""
    generator = torch.Generator().manual_seed(seed)

    def law(mean: float, std: float, total: float) -> Trajectory:
        mean, std, total = (torch.full((DRAWS, 1), x, dtype=torch.float64) for x in (mean, std, total))
        return Trajectory(mean, mean, std, total)

    draft, target = law(0.4, 1.1, 0.3), law(0.0, 0.8, 0.0)
    x = draft.mean + draft.std * torch.randn(DRAWS, 1, generator=generator, dtype=torch.float64)
    limit = continuous.log_acceptance(x, draft, target, reading, temperature=1.0)
    accepted = torch.rand(DRAWS, generator=generator, dtype=torch.float64).log() < limit
    normals = torch.randn(TRIES, DRAWS, 1, generator=generator, dtype=torch.float64)
    u = torch.rand(TRIES, DRAWS, generator=generator, dtype=torch.float64)
    replacement, found = continuous.sample_residual(draft, target, normals, u, reading)
    assert reading != "conditional" or bool((found | accepted).double().mean() > 0.9999)
    return torch.where(accepted[:, None], x, replacement), target


def chi_square(tokens: Tensor, law: Trajectory) -> Tensor:
    place = Normal(law.mean, law.std).cdf(tokens).flatten().clamp(0, 1 - 1e-12)
    count = torch.bincount((place * BINS).long(), minlength=BINS)
    return ((count - DRAWS / BINS).square() / (DRAWS / BINS)).sum()


def test_the_conditional_reading_gives_the_law_of_the_target_and_the_others_do_not() -> None:
    assert chi_square(*one_dimension(0, "conditional")) < CRITICAL
    assert chi_square(*one_dimension(0, "density")) > 10 * CRITICAL
    assert chi_square(*one_dimension(0, "released")) > 10 * CRITICAL


def test_a_replacement_is_the_first_try_found_and_depends_on_no_other_token() -> None:
    draft, target = trajectories(2)
    generator = torch.Generator().manual_seed(3)
    normals = torch.randn(30, N, C, generator=generator, dtype=torch.float64)
    u = torch.rand(30, N, generator=generator, dtype=torch.float64)
    token, found = continuous.sample_residual(draft, target, normals, u)
    for i in range(N):
        one = [Trajectory(*(x[i : i + 1] for x in (y.sample, y.mean, y.std, y.logstd_sum))) for y in (draft, target)]
        alone, _ = continuous.sample_residual(*one, normals[:, i : i + 1], u[:, i : i + 1])
        assert torch.equal(alone[0], token[i])
        tried = one[1].mean + one[1].std * normals[:, i : i + 1]
        shares = torch.cat([continuous.residual_share(x, *one, "conditional") for x in tried])
        good = (u[:, i] < shares).nonzero().flatten()
        assert bool(found[i]) == (len(good) > 0)
        assert_close(token[i], tried[int(good[0]) if len(good) else -1, 0])


def test_the_released_replacement_goes_on_until_all_are_found() -> None:
    draft, target = trajectories(2)
    normals = torch.randn(5, N, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    far = replace(draft, mean=draft.mean + 50)  # everything is owed: each try is accepted
    token, tries = continuous.sample_residual_released(far, target, normals, torch.zeros(5, N))
    assert int(tries) == 1
    assert_close(token, target.mean + target.std * normals[0])
    some = torch.ones(5, N)
    some[1, 3:] = some[2, :3] = some[2, 5] = some[4] = 0  # token 5 is found twice before all are found
    token, tries = continuous.sample_residual_released(far, target, normals, some)
    number = torch.where(torch.arange(N) < 3, 2, 1)
    number[5] = 2
    assert int(tries) == 3
    assert_close(token, target.mean + target.std * normals[number, torch.arange(N)])
    some[:, 0] = 1
    token, tries = continuous.sample_residual_released(far, target, normals, some)
    assert int(tries) == 5 and bool((token[0] == 0).all())


# ---- two generators

SPEC = TokenSpec(Grid(1, 4, 4), decoded=(1, 64, 64), channels=C)


def small_mar(seed: int) -> MAR:
    torch.manual_seed(seed)
    head = partial(DiffusionHead, hidden=16, depth=1, steps=4)
    model = MAR(SPEC, dim=16, depth=1, heads=2, num_classes=3, head=head, buffer=2, rounds=8).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


CONDITION = Condition(label=torch.tensor([0, 2, 1]))


def noise_of(rows: slice = slice(None)) -> Noise:
    return Noise(11, torch.arange(3)[rows])


def test_a_draft_that_is_the_target_is_always_accepted_where_nothing_was_drafted_before_it() -> None:
    """Blocks of one round: both see the same tokens, so the chains are the same and the decoding is the plain one."""
    model, sampler = small_mar(0), Sampler(guidance=Guidance(scale=1.5))
    state, _, tests = ContinuousSpeculation(every=1, prefill=0.0).generate(model, model, CONDITION, sampler, noise_of())
    assert len(tests) == 7 and all(bool(test.accepted.all()) for test in tests)
    assert_close(state.tokens, generate(model, CONDITION, sampler, noise_of()).tokens)


@pytest.mark.parametrize("reading,temperature", [("released", 42.0), ("density", 42.0), ("conditional", 1.0)])
def test_every_position_is_decided_and_the_large_model_is_called_less(reading: str, temperature: float) -> None:
    rule = ContinuousSpeculation(every=3, prefill=0.2, reading=reading, temperature=temperature)
    state, draft, tests = rule.generate(small_mar(0), small_mar(1), CONDITION, Sampler(), noise_of())
    assert bool(state.known.all()) and torch.equal(state.tokens, draft.tokens)
    assert (state.nfe, draft.nfe, len(tests)) == (2 + 3, 6, 3)  # rounds 0 and 1; tests after 3, 6 and 7
    assert sum(test.positions.shape[1] for test in tests) == 16 - sum(state.plan[:2])


def test_under_the_exact_rule_a_sample_is_the_same_in_any_batch() -> None:
    rule = ContinuousSpeculation(every=3, prefill=0.2, reading="conditional", temperature=1.0)
    models = small_mar(0), small_mar(1)
    together, _, _ = rule.generate(*models, CONDITION, Sampler(), noise_of())
    for i in range(3):
        one = slice(i, i + 1)
        alone, _, _ = rule.generate(*models, Condition(label=CONDITION.label[one]), Sampler(), noise_of(one))
        assert_close(alone.tokens, together.tokens[one], atol=1e-10, rtol=0)


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="exact at temperature 1 only, got 42"):
        ContinuousSpeculation(reading="conditional")
    with pytest.raises(ValueError, match="every=0"):
        ContinuousSpeculation(every=0)
    other = MAR(replace(SPEC, channels=5), dim=16, depth=1, heads=2, num_classes=3)
    with pytest.raises(ValueError, match="must share their tokens"):
        ContinuousSpeculation().generate(small_mar(0), other, CONDITION, Sampler(), noise_of())
