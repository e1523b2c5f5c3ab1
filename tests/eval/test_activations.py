"""Bytes that autograd saves, against a network whose saved tensors can be written down."""

import torch
from torch import nn

from eval.activations import SavedActivations


def test_each_saved_storage_counts_once_and_weights_do_not() -> None:
    model = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))
    x = torch.randn(5, 8)
    with SavedActivations(model) as saved:
        loss = model(x).square().sum()
    floats = 5 * 8 + 5 * 32 + 5 * 4  # the input, the output of tanh (also the input of the last layer), what is squared
    assert saved.bytes == 4 * floats
    loss.backward()
    assert saved.bytes == 4 * floats


def test_nothing_is_saved_without_gradient() -> None:
    model = nn.Linear(8, 8)
    with torch.no_grad(), SavedActivations(model) as saved:
        model(torch.randn(5, 8)).tanh()
    assert saved.bytes == 0
