"""The diffusion head: its chain on an exactly known law, its trajectory, its guidance, its published layout."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import heads
from heads.diffusion import DiffusionHead
from layers.diffusion import log_variance, p_mean
from layers.keymap import CheckpointMismatch
from layers.spec import Sequence, TokenSpec
from tests.heads.recorded import Recorded

SPEC = TokenSpec(Sequence(6), decoded=(1, 8, 8), channels=3)


def head_of(variance: str = "learned_range", steps: str = "ddim10") -> DiffusionHead:
    torch.manual_seed(0)
    head = DiffusionHead(8, SPEC, hidden=16, depth=2, steps=steps, variance=variance).double().requires_grad_(False)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def noise_of(steps: int, rows: tuple[int, int]) -> Tensor:
    return torch.randn(steps + 1, *rows, 3, dtype=torch.float64)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_the_trajectory_is_the_chain_of_single_steps(variance: str) -> None:
    head, scale, temperature = head_of(variance), 2.5, 0.9
    z, noise = torch.randn(2, 4, 6, 8, dtype=torch.float64), noise_of(10, (4, 6))
    draw = Recorded(noise.__getitem__, scale, temperature)
    found = head.trajectory(z, draw)
    x, log_std = noise[0], []
    for i, k in enumerate(reversed(range(10))):
        guess, share = head.denoise(x, torch.full((2, 4, 6), int(head.chain.timesteps[k])), z)
        mean = p_mean(head.chain, x, k, guess[1] + scale * (guess[0] - guess[1]))
        log_std.append(0.5 * log_variance(head.chain, k, variance, share[0]))  # the variance is not guided
        x = mean + log_std[-1].exp() * temperature * noise[i + 1]
    assert_close(found.sample, mean)
    assert_close(found.mean, mean)
    assert_close(found.std, log_std[-1].exp() * temperature)
    assert_close(found.logstd_sum, torch.stack(log_std[:-1]).sum(0))
    assert torch.equal(head.sample(z, draw), found.sample)
    assert draw.parts == 2 * list(range(10))  # one mix a step


def test_a_chain_that_knows_the_data_ends_there() -> None:
    """A point of data: the noise is (x - sqrt(abar) point) / sqrt(1 - abar), whatever was drawn on the way."""
    head, point = head_of(steps="25"), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    chain = head.chain
    step = {"k": len(chain)}

    class Oracle(nn.Module):
        def ladder(self, z: Tensor, times: tuple[float, ...]) -> tuple[float, ...]:
            return times

        def forward(self, x: Tensor, modulations: float) -> Tensor:
            step["k"] -= 1
            k = step["k"]
            assert modulations == chain.timesteps[k]
            noise = (x - float(chain.signal_scale[k]) * point) / float(chain.noise_scale[k])
            return torch.cat((noise, torch.rand_like(noise)), -1)[None]

    head.net = Oracle()
    out = head.sample(torch.zeros(1, 4, 6, 8, dtype=torch.float64), Recorded(noise_of(25, (4, 6)).__getitem__))
    assert_close(out, point.expand(4, 6, 3), atol=1e-9, rtol=0)


def test_the_bound_trains_the_variance_alone_and_a_fixed_variance_has_none() -> None:
    z, target = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t, noise = torch.tensor([0, 10, 500, 990]), torch.randn(4, 3, dtype=torch.float64)
    head = head_of().requires_grad_()
    (gradient,) = torch.autograd.grad(head.terms(z, target, t, noise)[1].sum(), head.net.readout.bias)
    assert (gradient[:3] == 0).all() and (gradient[3:] != 0).all()
    error, bound = head_of("fixed_small").terms(z, target, t, noise)
    assert torch.equal(bound, torch.zeros(4, dtype=torch.float64)) and (error > 0).all()


def test_noise_levels_are_drawn_for_every_repeat() -> None:
    head = DiffusionHead(8, SPEC, hidden=8, depth=1, repeats=4096)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = head.loss(torch.zeros(1, 1, 8), torch.zeros(1, 1, 3))
        errors, bounds = head.terms(
            torch.zeros(1, 8), torch.zeros(1, 3), torch.randint(1000, (4096, 1)), torch.randn(4096, 1, 3)
        )
    # an untrained head says zero: the squared error is a mean of chi-squares; five standard errors of each estimate
    wanted, spread = (errors + bounds).mean(), (errors + bounds).std() / 64
    assert abs(float(loss - wanted)) < 5 * 2**0.5 * float(spread)


def test_every_key_of_the_published_layout_is_consumed() -> None:
    """MAR-B's head at its full size, from shapes: 35.75 million parameters."""
    with torch.device("meta"):
        head = DiffusionHead(768, TokenSpec(Sequence(256), (1, 256, 256), channels=16), hidden=1024, depth=6)
    assert sum(parameter.numel() for parameter in head.parameters()) == 35_749_920
    theirs = {"input_proj": (1024, 16), "cond_embed": (1024, 768), "final_layer.linear": (32, 1024)}
    theirs |= {"time_embed.mlp.0": (1024, 256), "time_embed.mlp.2": (1024, 1024)}
    theirs |= {"final_layer.adaLN_modulation.1": (2048, 1024)}
    for i in range(6):
        theirs |= {f"res_blocks.{i}.mlp.{j}": (1024, 1024) for j in (0, 2)}
        theirs |= {f"res_blocks.{i}.adaLN_modulation.1": (3072, 1024)}
    state = {f"net.{name}.weight": torch.zeros(shape) for name, shape in theirs.items()}
    state |= {f"net.{name}.bias": torch.zeros(shape[0]) for name, shape in theirs.items()}
    state |= {f"net.res_blocks.{i}.in_ln.{kind}": torch.zeros(1024) for i in range(6) for kind in ("weight", "bias")}
    config = {"target_channels": 16, "z_channels": 768, "depth": 6, "width": 1024, "num_sampling_steps": "100"}
    loaded = heads.from_published("mar-diffloss", state, config)
    assert loaded.chain.timesteps.tolist() == head.chain.timesteps.tolist()
    assert all((parameter == 0).all() for parameter in loaded.parameters())
    del state["net.cond_embed.bias"]
    with pytest.raises(CheckpointMismatch, match=r"net\.embed_condition\.bias is not in the checkpoint"):
        heads.from_published("mar-diffloss", state, config)
    with pytest.raises(ValueError, match="DiffLoss: argument"):
        heads.from_published("mar-diffloss", state, {**config, "widht": 3})


def test_an_unknown_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="learned_range"):
        DiffusionHead(8, SPEC, variance="learned")
