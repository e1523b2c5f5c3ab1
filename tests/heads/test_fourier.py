"""Fourier densities: mass, coefficients and distribution function against numerical integrals; draws follow the law."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import heads
from heads.fourier import FourierBins, FourierDensity, cdf, coefficients, density, inverse_cdf, roughness, waves
from layers.spec import Sequence, TokenSpec
from tests.heads.recorded import Recorded

SPEC = TokenSpec(Sequence(6), decoded=(1, 8, 8), channels=2)
N = 6
GRID = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 2000) - 1  # midpoints: exact for these polynomials


@pytest.fixture
def amplitudes() -> Tensor:
    return torch.randn(3, 2, N + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def on_grid(amplitudes: Tensor) -> Tensor:
    return density(amplitudes[:, None], waves(GRID, N))


def test_the_density_has_mass_one_and_is_never_negative(amplitudes: Tensor) -> None:
    p = on_grid(amplitudes)
    assert (p >= 0).all()
    assert_close(p.mean(-1) * 2, torch.ones(3, dtype=torch.float64))


def test_coefficients_are_the_sums_and_the_integrals_that_define_them(amplitudes: Tensor) -> None:
    a = torch.complex(amplitudes[:, 0], amplitudes[:, 1])
    sums = torch.stack([(a[:, k:] * a[:, : N + 1 - k].conj()).sum(-1) for k in range(N + 1)], -1)
    c = coefficients(amplitudes)
    assert_close(c, sums)
    cos, sin = waves(GRID, N).unbind(-2)
    integrals = (on_grid(amplitudes)[..., None] * torch.complex(cos, -sin)).mean(1) * 2
    assert_close(integrals, c / c[:, :1].real)


def test_roughness_is_twice_the_squared_slope_of_the_density_before_its_normalisation(amplitudes: Tensor) -> None:
    """p' = Re sum i pi k c_k e^(i pi k x), whose mean square is half the sum of |pi k c_k|^2."""
    c = coefficients(amplitudes)
    k = torch.arange(N + 1)
    cos, sin = waves(GRID, N).unbind(-2)
    slope = (1j * torch.pi * k * c[:, None] * torch.complex(cos, sin)).sum(-1).real
    assert_close(roughness(amplitudes), 8 * slope.square().mean(-1))


def test_the_distribution_function_is_the_integral_and_its_inverse_returns(amplitudes: Tensor) -> None:
    c = coefficients(amplitudes)
    edges = torch.linspace(-1, 1, 4001, dtype=torch.float64)[1:]
    numeric = on_grid(amplitudes).cumsum(-1) / 2000
    assert_close(cdf(c[:, None], edges.expand(3, -1)), numeric, atol=1e-5, rtol=0)
    u = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = inverse_cdf(c[:, None], u)
    assert_close(cdf(c[:, None], x), u, atol=1e-6, rtol=0)


def test_bins_hold_the_density_at_their_centres() -> None:
    torch.manual_seed(0)
    head = FourierBins(8, TokenSpec(Sequence(6), (1, 8, 8), vocab_size=11), N, penalty=0.1)
    z, target = torch.randn(2, 6, 8), torch.randint(11, (2, 6))
    centres = (torch.arange(11) + 0.5) / 5.5 - 1
    p = density(head.amplitudes(z)[..., None, :, :], waves(centres, N))
    assert_close(head.logits(z), (p / p.sum(-1, keepdim=True) + 1e-5).log(), atol=1e-5, rtol=0)
    loss = -head.log_prob(z, target) + 0.1 * roughness(head.amplitudes(z))
    assert_close(head.loss(z, target), loss)
    mask = torch.rand(2, 6) < 0.5
    assert_close(head.loss(z, target, mask=mask), loss * mask)
    u = torch.rand(2, 6, dtype=torch.float64)
    tokens = head.sample(z[None], Recorded(lambda part: u, u=u))
    below = torch.cat((torch.zeros(2, 6, 1), head.logits(z).softmax(-1).cumsum(-1)), -1)
    assert (below.gather(-1, tokens[..., None])[..., 0] <= u + 1e-6).all()
    assert (below.gather(-1, tokens[..., None] + 1)[..., 0] >= u - 1e-6).all()
    with pytest.raises(ValueError, match="needs discrete, ordered tokens"):
        FourierBins(8, SPEC)


def continuous(hidden: int | None) -> FourierDensity:
    torch.manual_seed(0)
    head = FourierDensity(8, SPEC, N, bound=1.5, hidden=hidden, penalty=0.1).double().requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


@pytest.mark.parametrize("hidden", [None, 16])
def test_the_density_over_two_channels_has_mass_one(hidden: int | None) -> None:
    head, z = continuous(hidden), torch.randn(8, dtype=torch.float64)
    axis = 1.5 * ((torch.arange(60, dtype=torch.float64) + 0.5) / 30 - 1)
    points = torch.cartesian_prod(axis, axis)
    mass = head.log_prob(z.expand(len(points), 8), points).exp().sum() * 0.05**2
    assert_close(mass, torch.tensor(1.0, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_channel_reads_those_before_it_alone() -> None:
    head, z = continuous(16), torch.randn(4, 8, dtype=torch.float64)
    value = torch.rand(4, 2, dtype=torch.float64)
    whole = head.amplitudes(z, value)
    other = head.amplitudes(z, value + torch.tensor([0.0, 0.3]))
    assert torch.equal(whole, other)
    moved = head.amplitudes(z, value + torch.tensor([0.3, 0.0]))
    assert torch.equal(whole[:, 0], moved[:, 0]) and not torch.allclose(whole[:, 1], moved[:, 1])
    assert_close(head.amplitudes(z, value, slice(1, 2)), whole[:, 1:])


def test_guided_draws_follow_the_tilted_density() -> None:
    """p_c^s p_u^(1-s) / Z, tempered, on one channel: the quantiles of a grid of uniforms lie within a cell of the exact."""
    torch.manual_seed(0)
    head = (
        FourierDensity(8, TokenSpec(Sequence(6), (1, 8, 8), channels=1), N, cells=2048).double().requires_grad_(False)
    )
    nn.init.normal_(head.readout.weight)
    z = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    u = (torch.arange(99, dtype=torch.float64) + 1) / 100
    normal = torch.special.ndtri(u)[None, :, None]
    drawn = head.sample(z.expand(2, 1, 99, 8), Recorded(lambda part: normal, scale=1.5, temperature=2.0))[0, :, 0]
    c, n = (on_grid(head.amplitudes(row.squeeze(0), torch.zeros(1, 1).double())[0])[0].log() for row in z)
    tilted = ((n + 1.5 * (c - n)) / 2.0).softmax(-1).cumsum(-1)
    wanted = GRID[torch.searchsorted(tilted, u)]
    assert_close(drawn, wanted, atol=2e-3, rtol=0)


def test_a_token_outside_of_the_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size 1\.6, outside of \[-1\.5, 1\.5\]"):
        continuous(None).loss(torch.zeros(1, 1, 8).double(), torch.tensor([[[0.0, -1.6]]]).double())


def test_the_published_arguments_choose_bins_or_the_continuous_head() -> None:
    state = {"fc_extract_autocorrelation_params.weight": torch.randn(14, 8)}
    state["fc_extract_autocorrelation_params.bias"] = torch.randn(14)
    config = {"dim_input": 8, "num_frequencies": 6, "device": "cuda", "init_denominator_weight": 1000}
    head = heads.from_published("fourier-head", state, config)
    assert isinstance(head, FourierDensity)
    assert torch.equal(head.readout.weight, state["fc_extract_autocorrelation_params.weight"])
    bins = heads.from_published("fourier-head", state, {**config, "dim_output": 18, "const_inverse_softmax": 1e-3})
    assert isinstance(bins, FourierBins) and bins.floor == 1e-3 and bins.waves.shape == (18, 2, 7)
