"""Residual quantisation: greedy stages, their sum, their losses."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from vector_quantize_pytorch import ResidualVQ

from tokenizers_vis.quantizers import LFQ, ResidualQuantizer, VectorQuantizer


def test_ids_and_sum_are_those_of_vector_quantize_pytorch() -> None:
    theirs = ResidualVQ(dim=6, codebook_size=16, num_quantizers=4).eval()
    ours = ResidualQuantizer(partial(VectorQuantizer, 16, 6), stages=4).eval()
    for stage, layer in zip(ours.stages, theirs.layers, strict=True):
        stage.rows.data.copy_(layer._codebook.embed[0])
    z = torch.randn(2, 30, 6)
    wanted, wanted_ids, _ = theirs(z)
    found = ours(z)
    assert torch.equal(found.ids, wanted_ids)
    assert_close(found.z_q, wanted)


def test_losses_are_means_over_stages_on_what_is_left() -> None:
    quantizer = ResidualQuantizer(partial(VectorQuantizer, 8, 3), stages=2)
    for stage in quantizer.stages:
        stage.rows.data.normal_()
    z = torch.randn(20, 3)
    first = quantizer.stages[0](z)
    second = quantizer.stages[1](z - first.z_q)
    for name, value in quantizer(z).losses.items():
        assert_close(value, (first.losses[name] + second.losses[name]) / 2)


def test_shrinking_stages_of_signs_write_a_number_in_binary() -> None:
    """S stages of +-2^-s reach every number in [-2, 2] within 2^(1 - S)."""
    quantizer = ResidualQuantizer(partial(LFQ, 3), stages=8, shrink=0.5)
    z = torch.rand(100, 3) * 4 - 2
    assert (quantizer(z).z_q - z).abs().max() <= 2**-7


def test_a_residual_stage_is_refused() -> None:
    stage = partial(ResidualQuantizer, partial(LFQ, 3), 2)
    with pytest.raises(ValueError, match="a stage must give 1 code a vector, gives 2"):
        ResidualQuantizer(stage, 2)
