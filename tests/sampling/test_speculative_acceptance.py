"""Acceptance of a chain: the law that comes out, on grids of uniforms and by enumeration, without sampling error."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.speculative.acceptance import (
    Verdict,
    acceptance_rate,
    expected_speedup,
    expected_tokens,
    falling_weights,
    one_step_law,
    residual,
    total_variation,
    verify_chain,
    verify_greedy,
    weighted_law,
)

V = 4


def random_laws(*shape: int, seed: int = 0) -> Tensor:
    """float64 (*shape, V), with zeros: about one entry in five."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(*shape, V, generator=generator, dtype=torch.float64) + 0.05
    mass = mass * (torch.rand(*shape, V, generator=generator) > 0.2)
    mass[..., 0] += 0.1
    return mass / mass.sum(-1, keepdim=True)


def law_of_sequences(p: Tensor, q: Tensor, **weights: Tensor | float) -> Tensor:
    """Exact law of the first two tokens that a chain of two drafts brings, (V, V), where one is rejected the next comes
    from the target. p[x] is the target's row after x; p (V + 1, V) with the first row last; q (V + 1, V) likewise."""
    out = torch.zeros(V, V, dtype=torch.float64)
    for x, y in product(range(V), repeat=2):
        drafted = q[-1, x] * q[x, y]
        if drafted == 0:
            continue
        rows = torch.stack((p[-1], p[x], p[y]))[None]
        laws = torch.stack((q[-1], q[x]))[None]
        draft = torch.tensor([[x, y]])
        verdict = verify_chain(rows, laws, draft, torch.ones(1, 2), **weights)
        first, second = verdict.accept_prob[0].tolist()
        out[x, y] += drafted * first * second
        rejected_second = verify_chain(rows, laws, draft, torch.tensor([[-1.0, 1.0]]), **weights)
        out[x] += drafted * first * (1 - second) * rejected_second.law[0]
        out += drafted * (1 - first) * verdict.law[0][:, None] * p[:-1]
    return out


def test_a_chain_reproduces_the_law_of_the_target() -> None:
    for seed in range(5):
        p, q = random_laws(V + 1, seed=seed), random_laws(V + 1, seed=100 + seed)
        assert_close(law_of_sequences(p, q), p[-1][:, None] * p[:-1], atol=1e-12, rtol=0)


def test_on_a_grid_of_uniforms_what_is_kept_is_the_smaller_of_the_two_laws() -> None:
    p, q = random_laws(2, seed=3)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    draft = torch.arange(V).repeat_interleave(len(u))[:, None]
    rows = torch.stack((p, p)).expand(len(draft), 2, V)
    verdict = verify_chain(rows, q.expand(len(draft), 1, V), draft, u.repeat(V)[:, None])
    kept = q * verdict.count.double().view(V, -1).mean(1)
    assert_close(kept, torch.minimum(p, q), atol=1e-4, rtol=0)
    assert_close(kept.sum(), acceptance_rate(p, q), atol=1e-4, rtol=0)
    assert_close(1 - acceptance_rate(p, q), total_variation(p, q))


def test_a_token_without_mass_is_never_accepted_and_equal_laws_always_are() -> None:
    p = torch.tensor([[[0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]]).expand(3, -1, -1)
    q = torch.stack((torch.tensor([1.0, 0, 0, 0]), p[0, 0], torch.tensor([0.0, 0, 0, 1.0])))[:, None]
    draft = torch.tensor([[0], [2], [1]])
    verdict = verify_chain(p, q, draft, torch.tensor([[0.0], [1 - 2**-24], [0.0]]))
    assert verdict.count.tolist() == [0, 1, 1]  # the last draft has q = 0, which no drafter draws
    assert_close(verdict.law, torch.stack((p[0, 0], p[0, 1], p[0, 1])))
    assert_close(verdict.accept_prob, torch.tensor([[0.0], [1.0], [1.0]]))
    assert_close(residual(p[0, 0], p[0, 0]), p[0, 0])  # nothing left: no division by 0


def test_weights_give_the_law_that_the_closed_form_says() -> None:
    for weights in (1.0, 3.0, torch.tensor([2.0, 0.5])):
        p, q = random_laws(V + 1, seed=7), random_laws(V + 1, seed=8)
        found = law_of_sequences(p, q, weights=weights)
        w = torch.as_tensor(weights, dtype=torch.float64).expand(2)
        first = weighted_law(p[-1], q[-1], w[0])
        assert_close(found.sum(1), first, atol=1e-12, rtol=0)
    assert total_variation(weighted_law(p[-1], q[-1], 1.5), p[-1]) > 0.01


def test_weights_of_one_or_more_leave_the_plain_residual() -> None:
    p, q = random_laws(50, seed=1), random_laws(50, seed=2)
    assert_close(residual(p, torch.minimum(q, 2.5 * p)), residual(p, q), atol=1e-12, rtol=0)
    assert_close(one_step_law(torch.minimum(p, q), residual(p, q)), p, atol=1e-12, rtol=0)
    assert_close(falling_weights(3, 2.0, 0.7, 0.1), 2 * torch.exp(torch.tensor([-0.1, -0.8, -1.5]).double()))


def test_greedy_is_the_chain_of_one_hot_laws() -> None:
    logits = torch.randn(64, 5, V, generator=torch.Generator().manual_seed(0))
    draft = logits[:, :-1].argmax(-1)
    draft[torch.arange(64), torch.arange(64) % 4] += torch.arange(64) // 4 % 3
    draft %= V
    count, token = verify_greedy(logits, draft)
    sharp = torch.nn.functional.one_hot(logits.argmax(-1), V).double()
    flat = torch.full((64, 4, V), 1 / V, dtype=torch.float64)
    verdict = verify_chain(sharp, flat, draft, torch.full((64, 4), 0.5))
    assert torch.equal(count, verdict.count) and torch.equal(token, verdict.law.argmax(-1))


def test_the_batch_changes_nothing() -> None:
    p, q = random_laws(9, 4, seed=4), random_laws(9, 3, seed=5)
    generator = torch.Generator().manual_seed(6)
    draft, u = torch.randint(V, (9, 3), generator=generator), torch.rand(9, 3, generator=generator)

    def fields(verdict: Verdict) -> tuple[Tensor, ...]:
        return verdict.accept_prob, verdict.count, verdict.law

    together = fields(verify_chain(p, q, draft, u))
    alone = [fields(verify_chain(p[i : i + 1], q[i : i + 1], draft[i : i + 1], u[i : i + 1])) for i in range(9)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(together, zip(*alone, strict=True), strict=True))


@pytest.mark.parametrize("n", [1, 4])
def test_tokens_a_call_follow_the_geometric_sum(n: int) -> None:
    alpha = torch.tensor([0.0, 0.4, 0.9, 1.0], dtype=torch.float64)
    expected = torch.tensor([1.0, *((1 - a ** (n + 1)) / (1 - a) for a in (0.4, 0.9)), n + 1], dtype=torch.float64)
    assert_close(expected_tokens(alpha, n), expected)
    assert_close(expected_speedup(alpha, n, 0.25), expected / (1 + 0.25 * n))
