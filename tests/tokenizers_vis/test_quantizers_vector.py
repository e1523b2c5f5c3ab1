"""Codebooks: nearest rows, how they learn, and agreement with vector-quantize-pytorch where that computes the same."""

from math import log

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close
from vector_quantize_pytorch import SimVQ as TheirSimVQ
from vector_quantize_pytorch import VectorQuantize

from tokenizers_vis.quantizers import EMAVectorQuantizer, SimVQ, StochasticVectorQuantizer, VectorQuantizer, vector
from tokenizers_vis.quantizers.vector import nearest

ROWS = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [-3.0, -3.0]])


def with_rows(quantizer: VectorQuantizer, rows: torch.Tensor) -> VectorQuantizer:
    quantizer.rows.data.copy_(rows)
    return quantizer


def test_nearest_on_a_codebook_written_by_hand() -> None:
    z = torch.tensor([[0.9, 0.2], [1.1, 0.2], [0.1, 5.0], [-1.4, -1.4], [-1.6, -1.6]])
    assert nearest(z, ROWS).tolist() == [0, 1, 2, 0, 3]


def test_of_equally_near_rows_the_first_is_taken() -> None:
    assert (
        nearest(torch.tensor([[1.0, 1.0]]), torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).item() == 1
    )


def test_nearest_does_not_depend_on_how_many_distances_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = torch.randn(37, 5), torch.randn(11, 5)
    wanted = torch.cdist(z, rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    assert torch.equal(nearest(z, rows), wanted)
    monkeypatch.setattr(vector, "DISTANCES", 40)
    assert torch.equal(nearest(z, rows), wanted)


def test_normalised_codes_are_the_unit_rows_of_largest_cosine() -> None:
    quantizer = with_rows(VectorQuantizer(16, 4, normalize=True), torch.randn(16, 4) * 3)
    z = torch.randn(30, 4)
    cosines = functional.cosine_similarity(z[:, None], quantizer.rows[None], dim=-1)
    out = quantizer(z)
    assert torch.equal(out.ids, cosines.argmax(-1))
    assert_close(out.z_q.norm(dim=-1), torch.ones(30))
    squared = 2 - 2 * cosines.max(-1).values  # |z/|z| - e|^2
    assert_close(out.losses["commitment"], squared.mean() / 4)


@pytest.mark.parametrize(("normalize", "rotation"), [(False, False), (False, True), (True, False), (True, True)])
def test_codes_and_their_gradient_are_those_of_vector_quantize_pytorch(normalize: bool, rotation: bool) -> None:
    theirs = VectorQuantize(
        dim=6, codebook_size=32, use_cosine_sim=normalize, rotation_trick=rotation, commitment_weight=1.0
    ).eval()
    ours = VectorQuantizer(32, 6, normalize=normalize, rotation=rotation)
    ours.rows.data.copy_(theirs._codebook.embed[0])
    z, weight = torch.randn(2, 20, 6), torch.randn(2, 20, 6)
    z1, z2 = z.clone().requires_grad_(), z.clone().requires_grad_()
    theirs.train()
    theirs._codebook.eval()
    wanted, wanted_ids, _ = theirs(z1, freeze_codebook=True)
    found = ours(z2)
    assert torch.equal(found.ids, wanted_ids)
    assert_close(found.z_q, wanted)
    (wanted * weight).sum().backward()
    (found.z_q * weight).sum().backward()
    assert_close(z2.grad, z1.grad)


def test_rotation_turns_the_gradient_with_the_vector() -> None:
    """In the plane: z = (1, 0) to q = (0, 2) is a quarter turn and a stretch by 2, and the gradient goes back by it."""
    quantizer = with_rows(VectorQuantizer(1, 2, rotation=True), torch.tensor([[0.0, 2.0]]))
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    (quantizer(z).z_q * torch.tensor([[3.0, 5.0]])).sum().backward()
    assert_close(z.grad, torch.tensor([[10.0, -6.0]]))


def test_codebook_loss_moves_rows_to_the_mean_of_their_vectors() -> None:
    """One gradient step at rate N D / (2 n) of a row with n vectors lands on their mean."""
    quantizer = with_rows(VectorQuantizer(4, 2), ROWS)
    z = torch.tensor([[2.0, 0.4], [3.0, 0.6], [0.0, 0.2]])
    quantizer(z).losses["codebook"].backward()
    stepped = quantizer.rows.detach() - z.numel() / 2 * quantizer.rows.grad / torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    assert_close(stepped, torch.tensor([[0.0, 0.2], [2.5, 0.5], [0.0, 2.0], [-3.0, -3.0]]))


@pytest.mark.parametrize("normalize", [False, True])
def test_running_means_are_those_of_vector_quantize_pytorch(normalize: bool) -> None:
    theirs = VectorQuantize(
        dim=6, codebook_size=8, decay=0.8, use_cosine_sim=normalize, rotation_trick=False, threshold_ema_dead_code=0
    )
    ours = EMAVectorQuantizer(8, 6, normalize=normalize, decay=0.8)
    ours.rows.copy_(theirs._codebook.embed[0])
    ours.sums.copy_(theirs._codebook.embed[0])
    for _ in range(5):
        z = torch.randn(4, 25, 6)
        wanted, wanted_ids, _ = theirs(z)
        found = ours(z)
        assert torch.equal(found.ids, wanted_ids)
        assert_close(found.z_q, wanted)
        assert_close(ours.codebook(), theirs._codebook.embed[0])
        assert_close(ours.counts, theirs._codebook.cluster_size[0])


def test_running_mean_of_steady_input_in_closed_form() -> None:
    """n equal batches: counts 1 -> g^n + (1 - g^n) c, sums e -> g^n e + (1 - g^n) c m."""
    quantizer = EMAVectorQuantizer(4, 2, decay=0.9, eps=0.0)
    quantizer.rows.copy_(ROWS)
    quantizer.sums.copy_(ROWS)
    z = torch.tensor([[2.0, 0.2], [2.2, 0.0], [0.0, 2.2]])
    for _ in range(7):
        quantizer(z)
    old, new = 0.9**7, 1 - 0.9**7
    assert_close(quantizer.counts, torch.tensor([old, old + 2 * new, old + new, old]))
    assert_close(quantizer.sums[1], old * ROWS[1] + new * torch.tensor([4.2, 0.2]))
    assert_close(quantizer.codebook(), quantizer.sums / quantizer.counts[:, None])


def test_sim_vq_is_that_of_vector_quantize_pytorch() -> None:
    theirs = TheirSimVQ(dim=6, codebook_size=32, rotation_trick=False)
    ours = SimVQ(32, 6)
    ours.frozen.copy_(theirs.frozen_codebook)
    ours.transform.weight.data.copy_(theirs.code_transform.weight)
    z = torch.randn(2, 20, 6)
    wanted, wanted_ids, wanted_loss = theirs(z)
    found = ours(z)
    assert torch.equal(found.ids, wanted_ids)
    assert_close(found.z_q, wanted)
    assert_close(found.losses["codebook"] + 0.25 * found.losses["commitment"], wanted_loss)


def test_stochastic_codes_follow_their_law() -> None:
    quantizer = with_rows(StochasticVectorQuantizer(5, 3, temperature=0.5), torch.randn(5, 3))
    z = torch.randn(3)
    grid = (torch.arange(10_000) + 0.5) / 10_000  # this test has no sampling error
    drawn = quantizer.assign(z.expand(len(grid), 3), grid)
    share = torch.bincount(drawn, minlength=5) / len(grid)
    assert_close(share, quantizer.probs(z).detach(), atol=1e-4, rtol=0)


def test_stochastic_codes_are_drawn_in_training_only() -> None:
    quantizer = with_rows(StochasticVectorQuantizer(5, 3, temperature=10.0), torch.randn(5, 3))
    z = torch.randn(1, 3).expand(400, 3)
    torch.manual_seed(0)
    assert len(quantizer.train()(z).ids.unique()) == 5  # nearly uniform: a code is missed in one of 10^38 seeds
    assert torch.equal(quantizer.eval()(z).ids, quantizer.assign(z))


def test_entropy_terms_of_a_sure_and_evenly_used_codebook() -> None:
    quantizer = with_rows(VectorQuantizer(4, 2, entropy_temperature=1e-3), ROWS)
    losses = quantizer(ROWS.clone()).losses
    assert_close(losses["entropy_sample"], torch.tensor(0.0))
    assert_close(losses["entropy_codebook"], torch.tensor(-log(0.25 + 1e-5)))
