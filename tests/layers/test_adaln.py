"""Adaptive layer norm: as diffusers' adaLN-Zero, one row a sample or a token, own or shared, closed at the start."""

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from torch.testing import assert_close

from layers.adaln import Modulation, SharedModulation, modulate


def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def test_chunks_and_norm_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    theirs = AdaLayerNormZero(16)
    ours, norm = Modulation(16, 16, 6), nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    randomise(theirs)
    ours.project.load_state_dict(theirs.linear.state_dict())
    x, condition = torch.randn(3, 5, 16), torch.randn(3, 16)
    shift, scale, *rest = ours(condition)
    normed, *expected = theirs(x, emb=condition)
    assert_close(modulate(norm(x), scale, shift), normed)
    assert_close(torch.stack(rest).squeeze(2), torch.stack(expected))


def test_a_condition_a_token_is_that_of_each_token() -> None:
    torch.manual_seed(0)
    modulation = Modulation(6, 4, 3)
    randomise(modulation)
    condition = torch.randn(2, 5, 6)
    chunks = modulation(condition)
    assert chunks.shape == (3, 2, 5, 4)
    assert_close(chunks, torch.cat([modulation(condition[:, i]) for i in range(5)], dim=2))


def test_a_shared_table_with_an_offset_is_an_own_table_with_another_bias() -> None:
    torch.manual_seed(0)
    shared, block, own = Modulation(6, 4, 3), SharedModulation(4, 3), Modulation(6, 4, 3)
    randomise(shared)
    randomise(block)
    own.project.weight.data.copy_(shared.project.weight)
    own.project.bias.data.copy_(shared.project.bias + block.offset.flatten())
    for condition in (torch.randn(2, 6), torch.randn(2, 5, 6)):
        assert_close(block(shared(condition)), own(condition))


class Block(nn.Module):
    """A gated residual branch, its modulation given: the block does not know whether it is its own or shared."""

    def __init__(self, modulation: nn.Module) -> None:
        super().__init__()
        self.modulation, self.norm, self.branch = modulation, nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        return x + gate * self.branch(modulate(self.norm(x), scale, shift))


@pytest.mark.parametrize("shared", [False, True])
def test_a_block_starts_as_the_identity_and_its_gate_learns_at_once(shared: bool) -> None:
    torch.manual_seed(0)
    table = Modulation(6, 4, 3)
    block = Block(SharedModulation(4, 3) if shared else table)
    x, condition = torch.randn(2, 5, 4), torch.randn(2, 6)
    out = block(x, table(condition) if shared else condition)
    assert torch.equal(out, x)
    out.square().sum().backward()
    _, _, gate = table.project.weight.grad.chunk(3)
    assert (gate != 0).all()
    assert all((parameter.grad == 0).all() for parameter in block.branch.parameters())
