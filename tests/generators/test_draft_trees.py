"""A tree of drafts scored in one call: every node against teacher forcing on its own line, and what stays of it."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from generators.rar import RAR
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec

B, L, V, NODES = 3, 12, 11, 7
SPEC = TokenSpec(Grid(1, 3, 4), decoded=(1, 12, 16), vocab_size=V)
TEXT = {"num_classes": None, "text_dim": 8, "text_slots": 5}
MAKERS = {
    "rotary": (NextToken, {"num_classes": 4}),
    "learned, text": (NextToken, {"positions": "learned", **TEXT}),
    "rar": (RAR, {"num_classes": 4}),
}


def made(kind: str) -> tuple[NextToken | RAR, Condition]:
    torch.manual_seed(0)
    maker, settings = MAKERS[kind]
    model = maker(SPEC, 16, 2, 2, **settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if "text_dim" not in settings:
        return model.double().eval(), Condition(label=torch.tensor([0, 3, 1]))
    text = torch.randn(B, 5, 8, dtype=torch.float64)
    return model.double().eval(), Condition(text=text, text_mask=torch.arange(5) >= torch.arange(B)[:, None])


def line(parents: Tensor, node: int) -> list[int]:
    """The nodes below the root down to `node`."""
    return [] if node == 0 else [*line(parents, int(parents[node])), node]


@pytest.mark.parametrize("fed", [[0, 0, 0], [1, 4, 6]])
@pytest.mark.parametrize("kind", MAKERS)
@torch.inference_mode()
def test_a_node_sees_its_own_line_and_what_is_accepted_stays(kind: str, fed: list[int]) -> None:
    """Rows with trees and numbers of tokens of their own, under guidance; from the start, where the condition is fed too,
    and later. After the commit of a path the next call must find it in the cache."""
    model, condition = made(kind)
    generator = torch.Generator().manual_seed(1)
    given = torch.randint(V, (B, L), generator=generator)
    drafts = torch.randint(V, (B, NODES - 1), generator=generator)
    parents = torch.stack([
        torch.tensor([-1, 0, 0, 1, 1, 2, 4]), torch.tensor([-1, 0, 1, 2, 3, 4, 5]), torch.tensor([-1, 0, 0, 0, 3, 3, 5])
    ])  # fmt: skip
    branches, length = (condition, condition.null()), torch.tensor(fed)
    state = model.begin(branches, Noise(0, torch.arange(B)), room=NODES - 1)
    if max(fed):
        keep = torch.arange(L) < length[:, None]
        prediction = model.score(state, given[:, :-1])
        model.commit(state, prediction.positions, given, keep)

    def hidden(row: int, nodes: list[int]) -> Tensor:
        """(R, D) after the tokens of a row and a line of its nodes."""
        tokens = torch.zeros(1, L, dtype=torch.int64)
        known = [*given[row, : fed[row]].tolist(), *(drafts[row, node - 1].item() for node in nodes)]
        tokens[0, : len(known)] = torch.tensor(known, dtype=torch.int64)
        only = slice(row, row + 1)
        return torch.stack([model.hidden(tokens, branch.select(only))[0, len(known)] for branch in branches])

    prediction = model.score(state, drafts, parents)
    for row in range(B):
        for node in range(NODES):
            nodes = line(parents[row], node)
            if fed[row] + len(nodes) < L:
                assert prediction.positions[row, node] == fed[row] + len(nodes)
                assert_close(prediction.z[:, row, node], hidden(row, nodes))
    path = torch.tensor([[2, 5, -1], [1, 2, 3], [-1, -1, -1]])
    accepted = (path >= 0).sum(1)
    tokens = torch.cat((drafts.gather(1, (path - 1).clamp_min(0)), torch.zeros(B, 1, dtype=torch.int64)), dim=1)
    tokens.scatter_(1, accepted[:, None], 7)
    model.commit(state, prediction.positions[:, :4], tokens, torch.arange(4) <= accepted[:, None], path=path)
    after = model.step(state)
    known = torch.arange(L) < state.length[:, None]
    assert torch.equal(state.length, length + accepted + 1) and torch.equal(state.known, known)
    for row in range(B):
        ends = [*given[row, : fed[row]].tolist(), *tokens[row, : accepted[row] + 1].tolist()]
        assert state.tokens[row, : len(ends)].tolist() == ends
        whole = torch.stack([model.hidden(state.tokens[row : row + 1], branch.select([row])) for branch in branches])
        assert_close(after.z[:, row, 0], whole[:, 0, len(ends)])


@torch.inference_mode()
def test_a_chain_written_as_a_tree_is_a_chain() -> None:
    model, condition = made("rotary")
    drafts = torch.randint(V, (B, 4), generator=torch.Generator().manual_seed(2))
    state = model.begin((condition,), Noise(0, torch.arange(B)), room=4)
    plain = model.score(state, drafts).z
    assert_close(model.score(state, drafts, torch.arange(-1, 4)).z, plain)


@torch.inference_mode()
def test_tokens_beyond_the_last_place_are_dropped() -> None:
    model, condition = made("rotary")
    given = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(3))
    state = model.begin((condition,), Noise(0, torch.arange(B)), length=5)
    prediction = model.score(state, given[:, :3])
    model.commit(state, prediction.positions, given[:, :4], torch.arange(4) < torch.tensor([[1], [4], [2]]))
    prediction = model.score(state, given[:, 4:7])
    model.commit(state, prediction.positions, given[:, 4:8])
    assert state.length.tolist() == [5, 5, 5]
    assert state.tokens[1, :5].tolist() == given[1, :5].tolist() and not state.tokens[:, 5:].any()
