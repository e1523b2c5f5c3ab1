"""The flow heads: exact solutions under a known velocity, guidance of two and three branches, the published layout."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from heads.flow import FieldHead, FlowHead, RectifiedFlowHead, rectified_flow_from_published
from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from layers.spec import Sequence, TokenSpec
from tests.heads.recorded import Recorded

SPEC = TokenSpec(Sequence(6), decoded=(1, 8, 8), channels=3)
CONFIG = {"target_channels": 3, "z_channels": 8, "depth": 2, "width": 20, "num_sampling_steps": "5", "mlp_mult": 4}


def published_state() -> dict[str, Tensor]:
    """Random weights under the names of the original; the gated layers are 56 wide: 80 * 2 / 3, up to a multiple of 8."""
    dice = torch.Generator().manual_seed(0)
    layers = {"input_proj": (20, 3), "cond_embed": (20, 8), "final_layer.linear": (3, 20)}
    layers |= {"time_embed.mlp.0": (20, 256), "time_embed.mlp.2": (20, 20), "final_layer.adaLN_modulation.1": (40, 20)}
    for i in range(2):
        layers |= {f"res_blocks.{i}.mlp.w12": (112, 20), f"res_blocks.{i}.mlp.w3": (20, 56)}
        layers |= {f"res_blocks.{i}.adaLN_modulation.1": (60, 20)}
    state = {f"net.{name}.weight": torch.randn(shape, generator=dice) / 4 for name, shape in layers.items()}
    state |= {f"net.{name}.bias": torch.randn(shape[0], generator=dice) / 4 for name, shape in layers.items()}
    for i in range(2):
        state |= {f"net.res_blocks.{i}.in_ln.{kind}": torch.randn(20, generator=dice) for kind in ("weight", "bias")}
    return {name: tensor.double() for name, tensor in state.items()}


def by_the_paper(state: dict[str, Tensor], x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Ming-UniVision's network, layer by layer; its velocity points from noise to data."""

    def linear(name: str, value: Tensor) -> Tensor:
        return functional.linear(value, state[f"net.{name}.weight"], state[f"net.{name}.bias"])

    ladder = 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = 1000 * t[..., None] * ladder
    waves = torch.cat((angle.cos(), angle.sin()), -1)
    y = linear("time_embed.mlp.2", functional.silu(linear("time_embed.mlp.0", waves))) + linear("cond_embed", z)
    h = linear("input_proj", x)
    for i in range(2):
        block = f"res_blocks.{i}"
        norm = state[f"net.{block}.in_ln.weight"], state[f"net.{block}.in_ln.bias"]
        shift, scale, gate = linear(f"{block}.adaLN_modulation.1", functional.silu(y)).chunk(3, -1)
        activated, linear_part = linear(
            f"{block}.mlp.w12", functional.layer_norm(h, (20,), *norm, eps=1e-6) * (1 + scale) + shift
        ).chunk(2, -1)
        h = h + gate * linear(f"{block}.mlp.w3", functional.silu(activated) * linear_part)
    shift, scale = linear("final_layer.adaLN_modulation.1", functional.silu(y)).chunk(2, -1)
    return linear("final_layer.linear", functional.layer_norm(h, (20,), eps=1e-6) * (1 + scale) + shift)


def published() -> RectifiedFlowHead:
    with torch.random.fork_rng():
        return rectified_flow_from_published(published_state(), CONFIG).double().requires_grad_(False)


def test_the_published_network_is_the_papers_its_velocity_turned_round() -> None:
    torch.manual_seed(0)
    x, z, t = (torch.randn(4, 5, n, dtype=torch.float64) for n in (3, 8, 1))
    t = t[..., 0].sigmoid()
    assert_close(published().velocity(x, t, z), -by_the_paper(published_state(), x, t, z))


@pytest.mark.parametrize("shift", [None, 2.0])
def test_three_branches_share_the_token_and_mix_their_velocities(shift: float | None) -> None:
    """v_u + I (v_t - v_u) + T (v_c - v_t), Euler from noise with steps u / (u + s - s u), one row of noise for all."""
    torch.manual_seed(0)
    config = {**CONFIG, "time_shifting_factor": shift}
    with torch.random.fork_rng():
        head = rectified_flow_from_published(published_state(), config).double().requires_grad_(False)
    z, noise = torch.randn(3, 2, 4, 8, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)

    def mixed(rows: Tensor, part: int = 0) -> Tensor:
        full, none, text = rows
        return none + 1.1 * (text - none) + 3.0 * (full - text)

    draw = Recorded(lambda part: noise, temperature=0.9)
    draw.mix = mixed
    found = head.sample(z, draw)
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    s = shift or 1.0
    times = 1 - u / (u + s - s * u)
    x = 0.9 * noise
    for t, after in pairwise(times):
        x = x + (t - after) * mixed(by_the_paper(published_state(), x, t.expand(3, 2, 4), z))
    assert_close(found, x)


def test_a_wrong_file_or_argument_is_refused() -> None:
    state = published_state()
    del state["net.res_blocks.1.adaLN_modulation.1.bias"]
    with pytest.raises(CheckpointMismatch, match=r"net\.modulation\.project\.bias needs 3 parts"):
        rectified_flow_from_published(state, CONFIG)
    with pytest.raises(UnknownName, match="RectifiedFlowLoss"):
        rectified_flow_from_published(published_state(), {**CONFIG, "cfg": 3.0})
    with pytest.raises(UnknownName, match="solver"):
        FlowHead(8, SPEC, solver="eular")


POINT = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def to_the_point(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of data that are one point, as two branches of which the second ends in the origin."""
    return torch.stack((x - POINT, x)) / t


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_field_with_known_ends_is_followed_exactly(scale: float) -> None:
    """Euler: straight paths; guidance of two points is the point beyond them. float64 noise stays float64."""
    noise = torch.randn(2, 4, 3, dtype=torch.float64)
    head = FieldHead(8, SPEC, solver="euler", steps=7, last=None)
    draw = Recorded(lambda part: noise, scale)
    assert_close(head.sample(to_the_point, draw), (scale * POINT).expand(2, 4, 3))
    assert draw.parts == list(range(7))


def test_the_last_step_of_the_stochastic_path_nearly_reaches_the_point() -> None:
    """At t = 0.04 the drift x + 1.96 v moves x by 0.04 (x - point) (1 / 0.04 + ...): what remains is of its order."""
    noise = torch.randn(101, 2, 4, 3, dtype=torch.float64)
    head = FieldHead(8, SPEC, steps=100)
    out = head.sample(lambda x, t: to_the_point(x, t)[:1], Recorded(noise.__getitem__))
    assert float((out - POINT).abs().max()) < 0.3  # 0.04 noise, carried a little past the point


def test_losses_are_the_squared_error_of_noise_minus_data() -> None:
    torch.manual_seed(0)
    target, noise, z = torch.randn(3, 2, 6, 3)
    assert_close(FieldHead(8, SPEC).loss(z, target, noise=noise), (noise - target - z).square().mean(-1))
    head = FlowHead(8, SPEC, hidden=16, depth=2)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, t = torch.randn(2, 6, 8), torch.rand(4, 2, 6)
    eps = torch.randn(4, 2, 6, 3)
    x = (1 - t[..., None]) * target + t[..., None] * eps
    error = (eps - target - head.velocity(x, t, hidden)).square().mean(-1).mean(0)
    assert_close(head.loss(hidden, target, t=t, noise=eps), error)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_head_asks_its_network_at_the_times_of_its_path(solver: str) -> None:
    """A sample is the solver's, run on `velocity` with times as tensors."""
    torch.manual_seed(0)
    head = FlowHead(8, SPEC, hidden=16, depth=2, solver=solver, steps=4, shift=2.0).double().requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    z, noise = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(2, 6, 3, dtype=torch.float64)
    field = FieldHead(8, SPEC, solver=solver, steps=4, last=None, shift=2.0)

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return head.velocity(x, t, z)

    draw = Recorded(lambda part: noise)
    assert_close(head.sample(z, draw), field.sample(ask, draw))
