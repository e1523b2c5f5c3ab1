"""The entropy terms, against the definition written out over all codes."""

from math import log

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tokenizers_vis.quantizers import entropy
from tokenizers_vis.quantizers.entropy import EPS, sign_entropies, softmax_entropies


def written_out(logits: Tensor) -> tuple[Tensor, Tensor]:
    law = logits.softmax(-1)
    mean = law.mean(0)
    return -(law * law.log()).sum(-1).mean(), -(mean * (mean + EPS).log()).sum()


def test_taken_in_parts_values_and_gradients_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(11, 4, dtype=torch.float64)
    z = torch.randn(37, 4, dtype=torch.float64, requires_grad=True)
    wanted = written_out(z @ rows.t() / 0.7)
    monkeypatch.setattr(entropy, "ELEMENTS", 50)
    found = softmax_entropies(z, 11, lambda part: part @ rows.t(), 0.7)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
        assert_close(*(torch.autograd.grad(value, z, retain_graph=True)[0] for value in (ours, theirs)))


@pytest.mark.parametrize("bits", [1, 4, 5])
def test_sign_patterns_are_a_product_of_bits(bits: int) -> None:
    logits = torch.randn(20, bits, dtype=torch.float64, requires_grad=True)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * bits).view(-1, bits)
    found, wanted = sign_entropies(logits), written_out(logits @ signs.t() / 2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
        assert_close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, theirs)))


def test_eighteen_undecided_bits() -> None:
    sample, codebook = sign_entropies(torch.zeros(64, 18))
    assert_close(sample, torch.tensor(18 * log(2)))
    assert_close(codebook, torch.tensor(-log(2**-18 + EPS)), atol=1e-4, rtol=0)


def test_saturated_bits_have_finite_gradients() -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, -1e4]], requires_grad=True)
    sample, codebook = sign_entropies(logits)
    (sample - codebook).backward()
    assert_close(sample.detach(), torch.tensor(0.0))
    assert logits.grad.isfinite().all()
