"""The weight average against its closed form."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from tests.training import tiny
from training.ema import EMA


def moved_model(steps: int, decay: float) -> tuple[nn.Module, EMA, list[torch.Tensor]]:
    """A model whose weight is set to random values after every step, its average, and all the values."""
    model = nn.BatchNorm1d(3).double()
    average = EMA(model, decay)
    history = [model.weight.detach().clone()]
    draws = torch.Generator().manual_seed(0)
    for step in range(steps):
        history.append(torch.randn(3, generator=draws, dtype=torch.float64))
        with torch.no_grad():
            model.weight.copy_(history[-1])
            model.running_mean.fill_(step)
        average.update()
    return model, average, history


def test_average_is_the_weighted_sum_of_all_values() -> None:
    decay, steps = 0.7, 40
    _, average, history = moved_model(steps, decay)
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(steps)]
    expected = torch.zeros(3, dtype=torch.float64)
    for place, value in enumerate(history):
        own = 1 - decays[place - 1] if place else 1.0
        expected += own * torch.tensor(decays[place:], dtype=torch.float64).prod() * value
    assert_close(average.average["weight"], expected, atol=1e-14, rtol=0)


def test_without_decay_it_is_the_model() -> None:
    model, average, _ = moved_model(3, decay=0.0)
    assert torch.equal(average.average["weight"], model.weight)


def test_applied_lends_parameters_and_leaves_buffers() -> None:
    model, average, history = moved_model(5, decay=0.5)
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert torch.equal(model.weight, average.average["weight"])
        assert not torch.equal(model.weight, history[-1])
        assert torch.equal(model.running_mean, torch.full((3,), 4.0, dtype=torch.float64))
        raise RuntimeError("inside")
    assert torch.equal(model.weight, history[-1])


def test_state_goes_on_where_it_was() -> None:
    model, average, _ = moved_model(5, decay=0.9)
    again = EMA(model, 0.9)
    again.load_state_dict(average.state_dict())
    for ema in (average, again):
        ema.update()
    assert torch.equal(average.average["weight"], again.average["weight"])


def test_decay_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        EMA(nn.Linear(1, 1), 1.0)


def grown(model: nn.Module) -> EMA:
    """The average of a model whose parameters are doubled, tripled and quadrupled."""
    average = EMA(model, 0.5)
    for factor in (2, 3, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        average.update()
    return average


def average_in_shards(out: Path) -> None:
    """On every process: average a sharded model, lend the average, hand the state to another one."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    sharded = fully_shard(nn.Linear(6, 4))
    average = grown(sharded)
    with average.applied(), torch.no_grad():
        answer = sharded(torch.ones(1, 6))
    again = EMA(sharded, 0.5)
    again.load_state_dict(average.state_dict())
    state = again.state_dict()["average"]
    if dist.get_rank() == 0:
        save_file({**state, "answer": answer, "own": sharded.weight.full_tensor()}, out)
    else:
        sharded.weight.full_tensor()
    dist.destroy_process_group()


def test_a_sharded_model_has_the_average_of_the_whole_one(tmp_path: Path) -> None:
    tiny.launch(2, average_in_shards, tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    average = grown(model)
    assert_close(found["weight"], average.average["weight"], atol=1e-6, rtol=0)
    assert_close(found["bias"], average.average["bias"], atol=1e-6, rtol=0)
    assert_close(found["own"], model.weight, atol=1e-6, rtol=0)
    with average.applied():
        assert_close(found["answer"], model(torch.ones(1, 6)), atol=1e-5, rtol=0)
