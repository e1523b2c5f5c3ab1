"""The adaptive network: one product for many steps is that of every step, and the paper's equations hold."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from heads import mlp
from heads.mlp import AdaptiveMLP


@pytest.fixture
def net() -> AdaptiveMLP:
    torch.manual_seed(0)
    net = AdaptiveMLP(condition_dim=7, channels=3, out_channels=6, width=16, depth=2).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.requires_grad_(False)


def by_the_paper(net: AdaptiveMLP, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """MAR's network, layer by layer: the modulation of a block is one linear layer of SiLU(embedded z + embedded t)."""
    ladder = torch.exp(-torch.arange(128, dtype=torch.float64) * torch.log(torch.tensor(10_000.0).double()) / 128)
    angle = t[..., None] * ladder
    y = net.embed_time(torch.cat((angle.cos(), angle.sin()), -1)) + net.embed_condition(z)
    weights = net.modulation.project.weight.split(16), net.modulation.project.bias.split(16)
    layers = iter(zip(*weights, strict=True))

    def next_chunk() -> Tensor:
        weight, bias = next(layers)
        return functional.silu(y) @ weight.T + bias

    h = net.embed_token(x)
    for norm, branch in zip(net.norms, net.branches, strict=True):
        shift, scale, gate = next_chunk(), next_chunk(), next_chunk()
        h = h + gate * branch(norm(h) * (1 + scale) + shift)
    shift, scale = next_chunk(), next_chunk()
    return net.readout(functional.layer_norm(h, (16,), eps=1e-6) * (1 + scale) + shift)


def test_rows_at_times_of_their_own_follow_the_paper(net: AdaptiveMLP) -> None:
    x, z, t = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 7).double(), 999 * torch.rand(4, 5).double()
    assert_close(net.at(x, z, t), by_the_paper(net, x, z, t), atol=1e-9, rtol=1e-9)
    several = 999 * torch.rand(3, 4, 5).double()  # several times for each z
    assert_close(net.at(x, z, several)[1], by_the_paper(net, x, z, several[1]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 25, 10_000])
def test_a_ladder_is_every_step_whatever_the_size_of_its_products(
    net: AdaptiveMLP, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "ROWS", rows)
    x, z = torch.randn(4, 3).double(), torch.randn(2, 4, 7).double()  # two branches share x
    times = (999.0, 500.0, 20.0, 20.0, 0.0)
    steps = list(net.ladder(z, times))
    assert len(steps) == len(times)
    for modulations, t in zip(steps, times, strict=True):
        wanted = by_the_paper(net, x.expand(2, 4, 3), z, torch.full((2, 4), t).double())
        assert_close(net(x, modulations), wanted, atol=1e-9, rtol=1e-9)


def test_an_untrained_network_says_zero_and_learns_from_its_first_step() -> None:
    net = AdaptiveMLP(7, 3, 3, 16, 2)
    out = net.at(torch.randn(4, 3), torch.randn(4, 7), torch.rand(4))
    assert torch.equal(out, torch.zeros(4, 3))
    (out - 1).square().sum().backward()
    assert (net.readout.weight.grad != 0).any()
