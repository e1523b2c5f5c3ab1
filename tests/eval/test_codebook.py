"""Codebook statistics against counts by hand."""

import math

import pytest
import torch

from eval.codebook import CodebookUsage


def test_usage_and_perplexity_by_hand() -> None:
    codes = CodebookUsage(8)
    codes.update(torch.tensor([[0, 0, 3], [5, 5, 3]]))
    codes.update(torch.tensor([0, 0]))
    assert codes.counts.tolist() == [4, 0, 0, 2, 0, 2, 0, 0]
    assert codes.usage() == 3 / 8
    assert codes.perplexity() == pytest.approx(2**1.5)  # entropy of (1/2, 1/4, 1/4): 1.5 bits
    inside = -(0.5 * math.log(0.6) + 0.5 * math.log(0.35))
    assert codes.entropy(inside=0.1) == pytest.approx(inside)


def test_equally_frequent_codes_are_all_in_use() -> None:
    codes = CodebookUsage(64)
    for part in torch.randperm(640, generator=torch.Generator().manual_seed(0)).split(7):
        codes.update(part % 64)
    assert codes.usage() == 1
    assert codes.perplexity() == pytest.approx(64)


def test_one_code_alone() -> None:
    codes = CodebookUsage(16)
    codes.update(torch.full((4, 5), 11))
    assert codes.usage() == 1 / 16
    assert codes.perplexity() == 1


def test_a_code_outside_is_named() -> None:
    codes = CodebookUsage(16)
    with pytest.raises(ValueError, match="code 16 is outside a codebook of 16"):
        codes.update(torch.tensor([3, 16]))
    with pytest.raises(ValueError, match="code -1 is outside"):
        codes.update(torch.tensor([-1]))
    assert not codes.counts.any()
    with pytest.raises(ValueError, match="no codes yet"):
        codes.entropy()
