"""What all heads of continuous tokens promise: noise keyed by sample, repeatable gradients, masks, guidance, refusals."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import heads
from generators.protocol import Prediction
from heads.diffusion import DiffusionHead
from heads.flow import FieldHead, FlowHead, RectifiedFlowHead
from heads.fourier import FourierDensity
from heads.mixture import MixtureHead
from heads.protocol import Head
from layers.noise import Noise
from layers.spec import Sequence, TokenSpec
from sampling.guidance import Guidance
from sampling.sampler import Sampler, SamplerDraw

SPEC = TokenSpec(Sequence(6), decoded=(1, 8, 8), channels=3)
MAKES: dict[str, Callable[[int, TokenSpec], Head]] = {
    "diffusion": partial(DiffusionHead, hidden=16, depth=2, steps="ddim10"),
    "diffusion, fixed variance": partial(DiffusionHead, hidden=16, depth=2, steps="ddim10", variance="fixed_large"),
    "flow": partial(FlowHead, hidden=16, depth=2, steps=5, solver="heun"),
    "stochastic flow": partial(FlowHead, hidden=16, depth=2, steps=5, solver="euler_maruyama", last=0.04),
    "rectified flow": partial(RectifiedFlowHead, hidden=16, depth=2, steps=5, shift=2.0),
    "mixture": partial(MixtureHead, components=4),
    "Fourier": partial(FourierDensity, frequencies=4, bound=5.0),
    "Fourier, channel by channel": partial(FourierDensity, frequencies=4, bound=5.0, hidden=16),
}
NETWORKS = [name for name in MAKES if "iffusion" in name or "flow" in name]


def randomised(make: Callable[[int, TokenSpec], Head], dtype: torch.dtype = torch.float64) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = make(8, SPEC).to(dtype)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.3)
    return head


def draw_of(head: Head, z: Tensor, index: Tensor, scale: float = 1.0, temperature: float = 1.0) -> SamplerDraw:
    """z (R, B, m, D) at positions 0..m-1 of the samples `index`."""
    positions = torch.arange(z.shape[2]).expand(z.shape[1], -1)
    prediction = Prediction(head, z, positions, torch.zeros_like(positions), total=1, keep=z.shape[2])
    sampler = Sampler(guidance=Guidance(scale=scale))
    draw = sampler.draw(prediction, Noise(0, index), round=0)
    draw.temperature = temperature
    return draw


def sample(head: Head, z: Tensor, index: Tensor, scale: float = 1.0, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        return head.sample(z, draw_of(head, z, index, scale, temperature))


@pytest.fixture(params=MAKES)
def head(request: pytest.FixtureRequest) -> Head:
    return randomised(MAKES[request.param])


@pytest.fixture
def z() -> Tensor:
    return torch.randn(2, 5, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_batch(head: Head, z: Tensor, scale: float) -> None:
    z = z[: 1 if scale == 1 else 2]
    index = torch.tensor([7, 0, 3, 11, 5])
    together = sample(head, z, index, scale)
    assert together.shape == (5, 6, 3)
    apart = torch.cat([sample(head, z[:, i : i + 1], index[i : i + 1], scale) for i in range(5)])
    assert_close(together, apart, atol=1e-9, rtol=1e-9)
    some = sample(head, z[:, :, :2], index, scale)  # and not on the positions drawn beside it
    assert_close(together[:, :2], some, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(together[0], sample(head, z[:, :1], index[1:2], scale)[0])


def test_guidance_between_equal_branches_changes_nothing(head: Head, z: Tensor) -> None:
    index = torch.arange(5)
    alone = sample(head, z[:1], index)
    guided = sample(head, z[:1].expand(2, -1, -1, -1), index, scale=3.0)
    atol = 5.0 * 2 / 1024 if isinstance(head, FourierDensity) else 1e-9  # drawn on cells where guided
    if isinstance(head, FourierDensity) and head.before is not None:
        alone, guided = alone[..., 0], guided[..., 0]  # the next channel reads the first, rounded
    assert_close(guided, alone, atol=atol, rtol=1e-9)
    assert not torch.allclose(sample(head, z, index, scale=3.0), sample(head, z[:1], index))


def test_nothing_is_drawn_for_no_positions(head: Head) -> None:
    empty = torch.zeros(1, 2, 0, 8, dtype=torch.float64)
    assert sample(head, empty, torch.arange(2)).shape == (2, 0, 3)


def test_the_loss_is_one_number_a_token_and_leaves_out_masked_ones(head: Head, z: Tensor) -> None:
    target = torch.randn(5, 6, 3, dtype=torch.float64).clamp(-4, 4)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    dice = torch.Generator().manual_seed(3)
    given = {}
    if isinstance(head, DiffusionHead):
        given = {"t": torch.randint(1000, (2, 5, 6), generator=dice)}
    elif isinstance(head, FlowHead):
        given = {"t": torch.rand(2, 5, 6, generator=dice, dtype=torch.float64)}
    if given:
        given["noise"] = torch.randn(2, 5, 6, 3, generator=dice, dtype=torch.float64)
    whole, masked = head.loss(z[0], target, **given), head.loss(z[0], target, mask=mask, **given)
    assert whole.shape == (5, 6)
    assert_close(masked, whole * mask)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_through_given_noise_repeat_bit_for_bit(name: str, z: Tensor) -> None:
    head = randomised(MAKES[name])
    target, dice = torch.randn(5, 6, 3, dtype=torch.float64), torch.Generator().manual_seed(3)
    t = torch.rand(2, 5, 6, generator=dice, dtype=torch.float64)
    t = (1000 * t).long() if isinstance(head, DiffusionHead) else t
    noise = torch.randn(2, 5, 6, 3, generator=dice, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        head.zero_grad()
        head.loss(z[0], target, t=t, noise=noise).mean().backward()
        return [parameter.grad.clone() for parameter in head.parameters()]

    first = gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    assert all((gradient != 0).any() for gradient in first)


@pytest.mark.parametrize("name", MAKES)
def test_half_precision_weights_are_sampled_and_trained_in_float32(name: str) -> None:
    head = randomised(MAKES[name], torch.bfloat16)
    z = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    assert sample(head, z, torch.arange(2)).dtype == torch.float32
    assert head.loss(z[0], torch.zeros(2, 3, 3)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        head = head.float()
        assert sample(head, z.float(), torch.arange(2)).dtype == torch.float32
        assert head.loss(z[0].float(), torch.zeros(2, 3, 3)).isfinite().all()


@pytest.mark.parametrize("make", [*MAKES.values(), FieldHead])
def test_discrete_tokens_are_refused(make: Callable[[int, TokenSpec], Head]) -> None:
    with pytest.raises(ValueError, match="needs continuous tokens"):
        make(8, TokenSpec(Sequence(6), decoded=(1, 8, 8), vocab_size=10))


def test_an_unknown_published_family_is_refused() -> None:
    with pytest.raises(ValueError, match="mar-diffloss"):
        heads.from_published("mar-difloss", {}, {})
