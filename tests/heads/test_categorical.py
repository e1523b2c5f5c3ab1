"""The categorical head: loss, log-probability and sampling say the same law."""

import pytest
import torch
from torch.testing import assert_close

from heads.categorical import Categorical
from layers.spec import Sequence, TokenSpec

SPEC = TokenSpec(Sequence(5), decoded=(1, 8, 8), vocab_size=13)


def test_loss_is_minus_the_log_probability_of_the_target() -> None:
    torch.manual_seed(0)
    head = Categorical(8, SPEC, bias=True)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    z, target = torch.randn(3, 5, 8), torch.randint(13, (3, 5))
    law = (z @ head.readout.weight.T + head.readout.bias).softmax(-1)
    assert_close(head.log_prob(z, target), law.gather(-1, target[..., None])[..., 0].log())
    assert_close(head.loss(z, target), -head.log_prob(z, target))
    assert head.loss(z, target).shape == (3, 5)


def test_logits_are_float32_at_least() -> None:
    head = Categorical(8, SPEC)
    assert head.bfloat16().logits(torch.zeros(1, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert head.double().logits(torch.zeros(1, 8, dtype=torch.float64)).dtype == torch.float64


def test_continuous_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="needs discrete tokens"):
        Categorical(8, TokenSpec(Sequence(5), decoded=(1, 8, 8), channels=4))
