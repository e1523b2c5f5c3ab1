"""The Gaussian mixture: its density is torch's, its draws follow it, guidance of one Gaussian is the exact tilt."""

import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.testing import assert_close

from heads.mixture import MixtureHead
from layers.spec import Sequence, TokenSpec
from tests.heads.recorded import Recorded

SPEC = TokenSpec(Sequence(6), decoded=(1, 8, 8), channels=3)


def head_of(components: int) -> MixtureHead:
    torch.manual_seed(0)
    head = MixtureHead(8, SPEC, components).double().requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    return head


def test_the_density_is_that_of_torch() -> None:
    head = head_of(5)
    z, target = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    logits, mean, log_scale = head.mixture(z)
    law = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, log_scale.exp()), 1))
    assert_close(head.log_prob(z, target), law.log_prob(target))
    assert_close(head.loss(z, target), -law.log_prob(target))


def test_draws_have_the_mean_and_the_covariance_of_the_mixture() -> None:
    """40,000 draws; five standard errors of each mean, ten per cent of each variance."""
    head, n = head_of(3), 40_000
    z = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    dice = torch.Generator().manual_seed(0)
    draw = Recorded(
        lambda part: torch.randn(1, n, 3, generator=dice, dtype=torch.float64),
        u=torch.rand(1, n, generator=dice, dtype=torch.float64),
    )
    x = head.sample(z.expand(1, 1, n, 8), draw)[0]
    logits, mean, log_scale = (part[0, 0, 0] for part in head.mixture(z))
    weights = logits.softmax(-1)
    wanted = weights @ mean
    variance = weights @ (mean.square() + (2 * log_scale).exp()) - wanted.square()
    assert ((x.mean(0) - wanted).abs() < 5 * (variance / n).sqrt()).all()
    assert_close(x.var(0), variance, rtol=0.1, atol=0)


def test_guidance_of_one_gaussian_is_the_exact_tilt() -> None:
    """p_c^s p_u^(1-s) of Gaussians of one scale: that scale, and the mean m_u + s (m_c - m_u)."""
    head, scale = head_of(1), 2.5
    head.readout.weight[4:] = 0  # the scale does not depend on z
    z, noise = torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    out = head.sample(z, Recorded(lambda part: noise, scale, temperature=0.5, u=torch.rand(4, 6).double()))
    _, mean, log_scale = head.mixture(z)
    full, none = mean.squeeze(-2)
    assert_close(out, none + scale * (full - none) + 0.5 * log_scale[0].squeeze(-2).exp() * noise)


def test_an_untrained_head_is_spread_out_and_no_scale_passes_its_floor() -> None:
    head = MixtureHead(8, SPEC, 64, floor=0.01)
    logits, mean, log_scale = head.mixture(torch.randn(2, 8))
    assert (logits == 0).all() and torch.equal(mean[0], mean[1]) and 0.8 < float(mean.std()) < 1.2
    assert_close(log_scale, torch.full_like(log_scale, 1.01).log())
    nn.init.constant_(head.readout.bias, -100.0)
    assert_close(head.mixture(torch.zeros(1, 8))[2].exp(), torch.full((1, 64, 3), 0.01))
