"""LFQ and BSQ: signs, bit orders, and agreement with vector-quantize-pytorch."""

import pytest
import torch
from torch.testing import assert_close
from vector_quantize_pytorch import LFQ as TheirLFQ

from tokenizers_vis.quantizers import LFQ


@pytest.mark.parametrize("spherical", [False, True])
def test_codes_ids_and_losses_are_those_of_vector_quantize_pytorch(spherical: bool) -> None:
    bits, temperature = 7, 0.05
    theirs = TheirLFQ(codebook_size=2**bits, dim=bits, spherical=spherical, commitment_loss_weight=1.0).train()
    ours = LFQ(bits, spherical=spherical, msb_first=True, entropy_temperature=temperature)
    z = torch.randn(2, 50, bits)
    (wanted, wanted_ids, _), parts = theirs(z, inv_temperature=1 / temperature, return_loss_breakdown=True)
    found = ours(z)
    assert_close(found.z_q, wanted)
    assert torch.equal(found.ids, wanted_ids)
    assert_close(found.losses["commitment"], parts.commitment)
    assert_close(found.losses["entropy_sample"], parts.per_sample_entropy, atol=1e-4, rtol=0)
    # it clamps the probability in the logarithm at 1e-5 where we add 1e-5: V codes, at most 1e-5 each
    assert_close(found.losses["entropy_codebook"], parts.batch_entropy, atol=2**bits * 1e-5, rtol=0)


def test_bit_orders_on_a_vector_written_by_hand() -> None:
    z = torch.tensor([0.3, -2.0, 1.0, 0.0])  # + - + -, zero counts as negative
    assert LFQ(4).assign(z).item() == 0b0101
    assert LFQ(4, msb_first=True).assign(z).item() == 0b1010
    assert LFQ(4).embed(torch.tensor(0b0101)).tolist() == [1, -1, 1, -1]


def test_codes_on_the_sphere_have_unit_length_and_pass_no_radial_gradient() -> None:
    z = torch.randn(10, 9, requires_grad=True)
    out = LFQ(9, spherical=True)(z)
    assert_close(out.z_q.norm(dim=-1), torch.ones(10))
    (out.z_q * torch.randn(10, 9)).sum().backward()
    assert_close((z.grad * z).sum(-1), torch.zeros(10))


def test_more_bits_than_the_entropy_terms_or_an_id_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"30 bits are too many for entropy terms \(24 at most\)"):
        LFQ(30)
    assert LFQ(62, entropy_temperature=None).assign(torch.ones(62)).item() == 2**62 - 1
    with pytest.raises(ValueError, match=r"63 bits, an int64 id holds 1 to 62"):
        LFQ(63, entropy_temperature=None)
