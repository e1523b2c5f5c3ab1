"""Attention against its formula, the masks against small ones written by hand, the rotary table against its definition."""

import copy

import pytest
import torch
from einops import rearrange
from timm.layers import GELUTanh, Mlp
from torch import Tensor
from torch.testing import assert_close

from layers.attention import Attention, KVCache, block_causal_mask, causal_mask, window_mask
from layers.packed import PackedLinear, pack_linears
from layers.rotary import layout_places, rotary_table, rotate, with_zero_slots
from layers.spec import Grid, Pyramid, Sequence


def formula(attention: Attention, x: Tensor, rotary: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out, one key/value head repeated for each query head of its group."""
    sizes = [n * attention.head_dim for n in (attention.heads, attention.kv_heads, attention.kv_heads)]
    q, k, v = (rearrange(y, "b l (h d) -> b h l d", d=attention.head_dim) for y in attention.qkv(x).split(sizes, -1))
    turn = lambda y: rotate(y.transpose(1, 2), rotary).transpose(1, 2)  # noqa: E731
    k, v = (y.repeat_interleave(attention.heads // attention.kv_heads, 1) for y in (turn(k), v))
    logits = (turn(q) @ k.transpose(-1, -2)) / attention.head_dim**0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return attention.out(rearrange(weights @ v, "b h l d -> b l (h d)"))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_its_formula(kv_heads: int) -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, 4, kv_heads, bias=True).double(), torch.randn(2, 9, 32, dtype=torch.float64)
    rotary, mask = rotary_table(torch.arange(9)[:, None], 8).double(), torch.rand(9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    assert_close(attention(x, rotary, mask), formula(attention, x, rotary, mask))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert_close(attention(x, rotary, causal=True), formula(attention, x, rotary, causal))


def test_the_cache_holds_what_was_written_last_and_is_read_up_to_the_span() -> None:
    torch.manual_seed(0)
    attention, x = Attention(32, 4).double(), torch.randn(2, 6, 32, dtype=torch.float64)
    whole = attention(x, causal=True)
    cache = KVCache.allocate(2, 8, 4, 8, x)
    slots = torch.arange(6).expand(2, -1)
    wrong = torch.randn_like(x)
    attention(wrong, mask=causal_mask(slots, 8)[:, None], cache=cache, slots=slots, span=8)
    parts = [
        attention(
            x[:, i : i + 2],
            mask=causal_mask(slots[:, i : i + 2], 6)[:, None],
            cache=cache,
            slots=slots[:, i : i + 2],
            span=6,
        )
        for i in (0, 2, 4)
    ]
    assert_close(torch.cat(parts, 1), whole)


def test_a_zero_slot_is_seen_with_logit_zero_and_sees_evenly() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 1).double(), torch.randn(1, 3, 8, dtype=torch.float64)
    rotary = with_zero_slots(rotary_table(torch.arange(1)[:, None], 8), 2).double()
    q, k, v = attention.qkv(x).chunk(3, -1)
    logits = torch.tensor([0.0, 0.0, (q[0, 2] @ k[0, 2]).item() / 8**0.5], dtype=torch.float64)
    wanted = torch.stack([v[0].mean(0), v[0].mean(0), logits.softmax(-1) @ v[0]])
    assert_close(attention(x, rotary)[0], attention.out(wanted))


def test_masks_written_by_hand() -> None:
    assert causal_mask(torch.tensor([[0, 2]]), 4).int().tolist() == [[[1, 0, 0, 0], [1, 1, 1, 0]]]
    assert block_causal_mask([1, 2]).int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert window_mask(1, 4, 3).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert window_mask(3, 3, 3)[4].all() and window_mask(3, 3, 3)[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="window is 2, must be odd"):
        window_mask(3, 3, 2)


@pytest.mark.parametrize("grid", [Grid(1, 3, 4), Grid(2, 3, 4), Sequence(7)])
def test_rotary_turns_each_pair_by_its_place_on_its_axis(grid: Grid | Sequence) -> None:
    places, head_dim = layout_places(grid), 12
    table = rotary_table(places, head_dim, theta=100.0)
    pairs = head_dim // 2 // places.shape[1]
    for token in range(grid.length):
        for axis in range(places.shape[1]):
            for i in range(pairs):
                angle = torch.tensor(float(places[token, axis]) * 100.0 ** (-i / pairs))
                assert_close(table[token, axis * pairs + i], torch.stack((angle.cos(), angle.sin())))
    x = torch.randn(1, grid.length, 2, head_dim)
    turned = rotate(x, table)
    as_complex = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(table)[:, None]
    assert_close(turned, torch.view_as_real(as_complex).flatten(-2))


def test_raster_places_and_layouts_without_axes() -> None:
    assert layout_places(Grid(1, 2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout_places(Grid(2, 1, 2)).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    with pytest.raises(ValueError, match="no single axis system"):
        layout_places(Pyramid(((1, 1), (2, 2))))


def test_attention_depends_on_relative_places_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    product = lambda i, j: (rotate(q, table(i)) * rotate(k, table(j))).sum()  # noqa: E731
    table = lambda place: rotary_table(torch.tensor([place]), 8)  # noqa: E731
    assert_close(product((2, 3), (5, 1)), product((4, 7), (7, 5)))


def test_packed_linears_compute_the_same_and_leave_other_types_alone() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False)))
    packed, double = pack_linears(copy.deepcopy(net)), pack_linears(copy.deepcopy(net).double())
    assert isinstance(packed[0], PackedLinear) and isinstance(packed[1][0], PackedLinear)
    assert isinstance(double[0], torch.nn.Linear)
    for rows in (1, 8, 33):
        x = torch.randn(rows, 3, 40)
        assert_close(packed(x), net(x).detach(), atol=1e-5, rtol=1e-5)


def test_a_packed_mlp_takes_its_gelu_along() -> None:
    torch.manual_seed(0)
    mlp = Mlp(16, 64, act_layer=GELUTanh)
    packed = pack_linears(copy.deepcopy(mlp))
    assert isinstance(packed.fc1, PackedLinear) and isinstance(packed.act, torch.nn.Identity)
    x = torch.randn(3, 5, 16)
    assert_close(packed(x), mlp(x).detach(), atol=1e-5, rtol=1e-5)
    other = pack_linears(Mlp(16, 64, act_layer=torch.nn.GELU))
    assert isinstance(other.act, torch.nn.GELU) and isinstance(other.fc1, PackedLinear)


def test_a_cache_is_written_from_a_slot_on() -> None:
    cache = KVCache.allocate(2, 6, 1, 3, torch.zeros(1))
    keys, values = torch.randn(2, 2, 2, 1, 3)
    cache.write_from(3, keys, values)
    assert torch.equal(cache.keys[:, 3:5], keys) and torch.equal(cache.values[:, 3:5], values)
    assert (cache.keys[:, [0, 1, 2, 5]] == 0).all()


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="heads=5 must divide dim=32"):
        Attention(32, 5)
    with pytest.raises(ValueError, match="head_dim is 6, must be a multiple of 4 for 2 axes"):
        rotary_table(torch.zeros(1, 2), 6)
