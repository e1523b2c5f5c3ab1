"""The weight average against its closed form."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

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
