"""The one-layer drafter: cached decoding against teacher forcing, trees against chains, its loss against its parts."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from layers.spec import Grid, TokenSpec
from sampling.speculative import trees
from sampling.speculative.drafter import Drafter, lantern_drafter_from_published

V, D, SLOTS, ROWS, BRANCHES = 12, 16, 3, 2, 2
SPEC = TokenSpec(Grid(1, 4, 4), decoded=(1, 64, 64), vocab_size=V)


def small_drafter(depth: int = 2) -> Drafter:
    torch.manual_seed(0)
    drafter = Drafter(SPEC, D, heads=4, mlp_hidden=24, slots=SLOTS, depth=depth, kv_heads=2).double()
    for parameter in drafter.parameters():
        nn.init.normal_(parameter, std=0.4)
    return drafter.requires_grad_(False)


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (b, T, D), tokens (b, T) equal in both branches, a read-out (V, D)."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(BRANCHES * ROWS, length, D, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (ROWS, length), generator=generator).repeat(BRANCHES, 1)
    return features, tokens, torch.randn(V, D, generator=generator, dtype=torch.float64)


def test_observing_in_pieces_is_teacher_forcing() -> None:
    """Rows take in different numbers of inputs; what was fed beyond them leaves no trace."""
    drafter, (features, tokens, _) = small_drafter(), inputs(9)
    whole = drafter(features, tokens)
    state = drafter.begin(ROWS, BRANCHES, room=4)
    drafter.observe(state, features[:, :4], tokens[:, :4])
    assert_close(state.root, whole[:, 3])
    count = torch.tensor([1, 3])
    drafter.observe(state, features[:, 4:7], tokens[:, 4:7], count)
    assert_close(state.root, whole[torch.arange(4), (3 + count).repeat(BRANCHES)])
    at = state.length[:, None].repeat(BRANCHES, 1) + torch.arange(2)
    row = torch.arange(4)[:, None]
    drafter.observe(state, features[row, at], tokens[row, at])
    assert state.length.tolist() == [7, 9]
    assert_close(state.root, whole[torch.arange(4), (state.length - 1).repeat(BRANCHES)])


def test_every_line_of_a_tree_is_read_as_a_chain_of_its_own() -> None:
    drafter, (features, tokens, readout) = small_drafter(), inputs(6)
    state = drafter.begin(ROWS, BRANCHES, room=5)
    count = torch.tensor([6, 4])
    drafter.observe(state, features, tokens, count)

    def read(x: Tensor) -> Tensor:
        logits = x @ readout.T
        return (logits[1] + 2.0 * (logits[0] - logits[1])).log_softmax(-1)

    parents, ranks = trees.static_tree([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)])
    first, expand = drafter.grow(state, read)
    drafted, _, laws = trees.fill_static_tree(first, expand, parents, ranks)
    assert_close(laws[:, 0], first.exp())
    for b in range(ROWS):
        rows = torch.tensor([b, ROWS + b])
        for line in ([1], [2], [1, 4]):  # the law after each inner node, recomputed from the start
            x, said = features[rows, : count[b]], tokens[rows, : count[b]]
            for node in line:
                x = torch.cat((x, drafter(x, said)[:, -1:]), dim=1)
                said = torch.cat((said, drafted[b, node].expand(2, 1)), dim=1)
            law = read(drafter(x, said)[:, None, -1:])[0, 0].exp()
            assert_close(laws[b, line[-1]], law)
    again, _ = drafter.grow(state, read)
    assert_close(again, first)  # a tree leaves no trace


def test_the_loss_counts_the_tokens_and_not_the_condition() -> None:
    drafter, (features, tokens, readout) = small_drafter(), inputs(8)
    loss, parts = drafter.loss(features, tokens, readout)
    out, target = drafter(features, tokens)[:, SLOTS:7], features[:, SLOTS + 1 : 8]
    count = 4 * (7 - SLOTS) + 1e-5
    feature = F.smooth_l1_loss(out, target, reduction="sum") / D / count
    law = F.cross_entropy((out @ readout.T).float().movedim(-1, 1), (target @ readout.T).float().softmax(-1).movedim(-1, 1),
                          reduction="sum") / count  # fmt: skip
    assert_close(parts["feature"], feature)
    assert_close(parts["law"], law)
    assert_close(loss, feature + 0.1 * law)
    changed = features.clone()
    changed[:, 0] += 1  # a condition slot moves what is drafted, but is no target
    assert drafter.loss(changed, tokens, readout)[0] != loss


CONFIG = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-6,
    "input_type": "t2i",
}


def test_published_drafters_say_what_does_not_fit() -> None:
    with pytest.raises(CheckpointMismatch, match=r"attention\.qkv\.weight is not in the checkpoint"):
        lantern_drafter_from_published({"fc.bias": torch.zeros(D)}, CONFIG)
    with pytest.raises(UnknownName, match="input_type 't2i3' is not known"):
        lantern_drafter_from_published({}, CONFIG | {"input_type": "t2i3"})
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        lantern_drafter_from_published({}, CONFIG | {"hidden_act": "gelu"})
    with pytest.raises(ValueError, match="drafts discrete tokens"):
        Drafter(TokenSpec(Grid(1, 4, 4), decoded=(1, 64, 64), channels=4), D, 2, 24)
