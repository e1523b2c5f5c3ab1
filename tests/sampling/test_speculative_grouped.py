"""Grouped acceptance: windows against a loop over sorted ranks, partitions against their exact law."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sampling.speculative import grouped
from sampling.speculative.acceptance import acceptance_rate, verify_chain

P_NEAR, D_NEAR = 0.08, 0.5


def block(rows: int, n: int, size: int, top: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Filtered logits and laws p (rows, n + 1, V), laws q and drafts, uniforms, an embedding table."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, n + 1, size, generator=generator, dtype=torch.float64)
    logits = logits.float().masked_fill(logits < logits.topk(top).values[..., -1:], -torch.inf)
    p = logits.softmax(-1)
    q = torch.randn(rows, n, size, generator=generator).softmax(-1)
    draft = torch.rand(rows, n, size, generator=generator).argsort(-1)[..., 0]
    u = torch.rand(rows, n, generator=generator)
    return logits, p, q, draft, u, torch.randn(size, 2, generator=generator).mul(0.4)


@pytest.mark.parametrize("size,top", [(60, 60), (60, 25), (9, 9), (5, 5)])
def test_windows_are_slices_of_the_sorted_vocabulary(size: int, top: int) -> None:
    logits, p, q, draft, u, embedding = block(6, 5, size, top)
    groups = grouped.rank_windows(
        logits[:, :5], p[:, :5], draft, grouped.embedding_distance(embedding), 7, P_NEAR, D_NEAR
    )
    verdict = grouped.verify_grouped(p, q, draft, u, groups)
    plain = verify_chain(p, q, draft, u)
    for b in range(6):
        for i in range(5):
            x = int(draft[b, i])
            order = logits[b, i].sort(stable=True).indices
            rank = int((order == x).nonzero())
            window = order[rank - 7 : rank + 7]  # a negative start counts from the end, as in the published code
            near = (p[b, i, window] - p[b, i, x]).abs() < P_NEAR
            near &= (embedding[window] - embedding[x]).square().sum(-1) < D_NEAR
            members = {x} if len(window) == 0 else set(window[near].tolist())
            assert set(groups.tokens[b, i][groups.kept[b, i]].tolist()) == members
            kept = torch.tensor(sorted(members), dtype=torch.int64)
            ratio = p[b, i, kept].sum() / q[b, i, kept].sum()
            expected = 0.0 if p[b, i, kept].sum() == 0 else min(1.0, float(ratio))
            assert verdict.accept_prob[b, i].item() == pytest.approx(expected, abs=1e-6)
            if len(window) == 0:
                assert_close(verdict.accept_prob[b, i], plain.accept_prob[b, i])


def test_a_group_beyond_the_table_is_not_restricted() -> None:
    logits, p, _, draft, _, embedding = block(4, 3, 60, 60)
    whole = grouped.rank_windows(logits[:, :3], p[:, :3], draft, p_near=1.1)
    short = grouped.embedding_distance(embedding[:30] * 100)
    groups = grouped.rank_windows(logits[:, :3], p[:, :3], draft, short, p_near=1.1)
    beyond = (whole.tokens >= 30).any(-1)
    assert torch.equal(groups.kept[beyond], whole.kept[beyond]) and bool(beyond.any())
    assert bool((groups.kept.sum(-1)[~beyond] <= 2).all())


def test_the_correction_is_the_token_s_own_and_the_batch_changes_nothing() -> None:
    logits, p, q, draft, u, _ = block(8, 4, 40, 30)
    groups = grouped.rank_windows(logits[:, :4], p[:, :4], draft)
    verdict = grouped.verify_grouped(p, q, draft, u, groups)
    assert set(verdict.count.tolist()) - {0, 4}
    for b in range(8):
        one = slice(b, b + 1)
        alone = grouped.rank_windows(logits[one, :4], p[one, :4], draft[one])
        single = grouped.verify_grouped(p[one], q[one], draft[one], u[one], alone)
        assert torch.equal(single.accept_prob[0], verdict.accept_prob[b])
        row = int(verdict.count[b])
        left = p[b, row] if row == 4 else (p[b, row] - q[b, row]).clamp_min(0)
        assert_close(verdict.law[b], left / left.sum())


def test_groups_never_accept_less_on_average() -> None:
    logits, p, q, *_ = block(8, 4, 40, 30)
    clusters = grouped.rank_blocks(logits[:, :4], 5)
    assert bool((torch.bincount(clusters[0, 0]) == 5).all())
    assert torch.equal(clusters[0, 0][logits[0, 0].topk(5).indices], torch.zeros(5, dtype=torch.int64))
    rate = grouped.grouped_acceptance_rate(p[:, :4], q, clusters)
    assert bool((rate >= acceptance_rate(p[:, :4], q) - 1e-6).all())
    alone = torch.arange(40).expand(8, 4, 40)
    assert_close(grouped.grouped_acceptance_rate(p[:, :4], q, alone), acceptance_rate(p[:, :4], q))


def test_a_partition_keeps_the_law_of_its_clusters() -> None:
    """Exact law of one tested token, summed over all drafts: clusters have the target's law, and rest of q within them."""
    logits, p, q, *_ = block(1, 1, 12, 9, seed=4)
    p, q = p.double(), q.double()
    clusters = grouped.rank_blocks(logits[:, :1], 4)
    draft = torch.arange(12)[:, None]
    every = (x.expand(12, *x.shape[1:]) for x in (p, q, clusters))
    laws, drafters, blocks = every
    verdict = grouped.verify_partition(laws, drafters, draft, torch.ones(12, 1), blocks)
    kept = q[0, 0] * verdict.accept_prob[:, 0]
    out = kept + (q[0, 0] * (1 - verdict.accept_prob[:, 0])) @ verdict.law
    assert_close(out.sum(), torch.tensor(1.0, dtype=torch.float64))
    mass = grouped.cluster_mass(out, clusters[0, 0])
    assert_close(mass, grouped.cluster_mass(p[0, 0] / p[0, 0].sum(), clusters[0, 0]), atol=1e-6, rtol=0)
    accepted = grouped.verify_partition(laws, drafters, draft, -torch.ones(12, 1), blocks)
    assert_close(accepted.law, laws[:, 1])
