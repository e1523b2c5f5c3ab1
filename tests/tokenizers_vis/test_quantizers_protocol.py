"""What every quantiser promises, whichever it is."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.record import build
from tokenizers_vis import CLASSES
from tokenizers_vis.quantizers import Quantizer

VECTOR = {"vocab_size": 24, "dim": 6}
RECORDS: dict[str, dict[str, Any]] = {
    "vq": {"class_path": "VectorQuantizer", "init_args": VECTOR},
    "cosine": {"class_path": "VectorQuantizer", "init_args": {**VECTOR, "normalize": True, "revive_below": 0.1}},
    "rotation": {"class_path": "VectorQuantizer", "init_args": {**VECTOR, "rotation": True}},
    "entropy": {"class_path": "VectorQuantizer", "init_args": {**VECTOR, "entropy_temperature": 0.5}},
    "stochastic": {"class_path": "StochasticVectorQuantizer", "init_args": VECTOR},
    "ema": {"class_path": "EMAVectorQuantizer", "init_args": VECTOR},
    "ema cosine": {"class_path": "EMAVectorQuantizer", "init_args": {**VECTOR, "normalize": True}},
    "sim": {"class_path": "SimVQ", "init_args": VECTOR},
    "fsq": {"class_path": "FSQ", "init_args": {"levels": [8, 5, 3]}},
    "lfq": {"class_path": "LFQ", "init_args": {"bits": 5}},
    "lfq msb": {"class_path": "LFQ", "init_args": {"bits": 5, "msb_first": True}},
    "bsq": {"class_path": "LFQ", "init_args": {"bits": 5, "spherical": True, "entropy_temperature": None}},
    "residual vq": {
        "class_path": "ResidualQuantizer",
        "init_args": {"stage": {"class_path": "VectorQuantizer", "init_args": VECTOR}, "stages": 3},
    },
    "residual lfq": {
        "class_path": "ResidualQuantizer",
        "init_args": {"stage": {"class_path": "LFQ", "init_args": {"bits": 5}}, "stages": 3, "shrink": 0.5},
    },
}
LOSSES = {
    "vq": {"codebook", "commitment"},
    "entropy": {"codebook", "commitment", "entropy_sample", "entropy_codebook"},
    "ema": {"commitment"},
    "fsq": set(),
    "lfq": {"commitment", "entropy_sample", "entropy_codebook"},
    "bsq": {"commitment"},
    "residual vq": {"codebook", "commitment"},
}


def make(name: str) -> Quantizer:
    """The quantiser of a record; learned rows far enough apart for bfloat16 to matter and not to decide."""
    torch.manual_seed(0)
    quantizer = build(RECORDS[name], CLASSES)
    for key, tensor in quantizer.state_dict().items():
        if key.endswith("rows"):
            tensor.copy_(torch.randn_like(tensor))
    return quantizer


def vectors(quantizer: Quantizer, *shape: int) -> Tensor:
    return torch.randn(*shape, quantizer.dim, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=RECORDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_codes_ids_and_codebook_agree_bit_for_bit(name: str) -> None:
    quantizer = make(name).eval()
    z = vectors(quantizer, 7, 9)
    out = quantizer(z)
    assert torch.equal(out.z_q, quantizer.embed(out.ids))
    assert torch.equal(out.ids, quantizer.assign(z))
    assert out.ids.dtype == torch.int64
    if quantizer.depth == 1:
        assert quantizer.codebook().shape == (quantizer.vocab_size, quantizer.dim)
        assert torch.equal(out.z_q, quantizer.codebook()[out.ids])
    else:
        stages = torch.arange(quantizer.depth)
        assert quantizer.codebook().shape == (quantizer.depth, quantizer.vocab_size, quantizer.dim)
        assert_close(out.z_q, quantizer.codebook()[stages, out.ids].sum(-2))


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in ("fsq", "residual vq")])
def test_a_code_is_its_own_code(name: str) -> None:
    """ids -> codes -> ids, for all ids. (FSQ bounds its input, see its own test; a greedy sum need not find itself.)"""
    quantizer = make(name).eval()
    ids = torch.arange(quantizer.vocab_size)
    if quantizer.depth > 1:
        ids = torch.cartesian_prod(*[ids] * quantizer.depth)
    assert torch.equal(quantizer.assign(quantizer.embed(ids)), ids)


def test_a_vector_has_the_same_code_in_any_company(name: str) -> None:
    quantizer = make(name).eval()
    z = vectors(quantizer, 12)
    ids = quantizer.assign(z)
    assert torch.equal(quantizer.assign(z.view(3, 4, -1)), ids.view(3, 4, *ids.shape[1:]))
    assert torch.equal(torch.cat([quantizer.assign(row[None]) for row in z]), ids)


def test_autocast_leaves_it_in_float32(name: str) -> None:
    quantizer = make(name).eval()
    z = vectors(quantizer, 4, 8).bfloat16()
    plain = quantizer(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        out, ids = quantizer(z), quantizer.assign(z)
        codes = quantizer.embed(ids)
    assert torch.equal(out.ids, plain.ids)
    assert torch.equal(ids, plain.ids)
    for found, wanted in (
        (out.z_q, plain.z_q),
        (codes, plain.z_q),
        *zip(out.losses.values(), plain.losses.values(), strict=True),
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


def test_only_training_forwards_change_the_state(name: str) -> None:
    quantizer = make(name)
    z, before = vectors(quantizer, 50), deepcopy(quantizer.state_dict())
    quantizer.train().assign(z)
    quantizer.eval()(z)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_a_gradient_reaches_the_vectors_and_every_parameter(name: str) -> None:
    quantizer = make(name)
    z = vectors(quantizer, 50).requires_grad_()
    out = quantizer(z)
    ((out.z_q * torch.randn_like(z)).sum() + sum(out.losses.values())).backward()
    assert z.grad.abs().min() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_unweighted_scalars_by_name(name: str) -> None:
    quantizer = make(name)
    losses = quantizer(vectors(quantizer, 50)).losses
    assert losses.keys() == LOSSES[name]
    assert all(loss.shape == () for loss in losses.values())


def test_statistics_are_those_of_the_ids(name: str) -> None:
    quantizer = make(name).eval()
    out = quantizer(vectors(quantizer, 50))
    assert_close(out.stats["usage"], torch.tensor(len(out.ids.unique()) / quantizer.vocab_size))


def test_another_number_of_channels_is_refused(name: str) -> None:
    quantizer = make(name)
    with pytest.raises(ValueError, match=rf"got vectors of {quantizer.dim + 1} channels, made for {quantizer.dim}"):
        quantizer(torch.zeros(2, quantizer.dim + 1))


def test_straight_through_hands_the_gradient_on_unchanged() -> None:
    for name in ("vq", "ema", "sim", "lfq", "residual vq", "residual lfq"):
        quantizer = make(name)
        z = vectors(quantizer, 20).requires_grad_()
        wanted = torch.randn(20, quantizer.dim)
        (quantizer(z).z_q * wanted).sum().backward()
        assert torch.equal(z.grad, wanted), name
