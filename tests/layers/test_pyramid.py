"""Next-scale arithmetic: which phi, what adds up, what a position may know."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from layers.pyramid import ScaleReader, Scales, phi_index
from layers.record import build

SIZES = ((1, 1), (1, 2), (2, 3), (4, 6))
STARTS = (0, 1, 3, 9, 33)


def reader(sizes: tuple[tuple[int, int], ...] = SIZES, **options: Any) -> ScaleReader:
    torch.manual_seed(0)
    made = ScaleReader(sizes, 20, 5, **options)
    for tensor in made.state_dict().values():
        nn.init.normal_(tensor, std=0.5)
    return made


def some_tokens(rows: int = 3, length: int = STARTS[-1]) -> Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scales", "index"),
    [
        (1, "0"),
        (4, "0 1 2 3"),
        (5, "0 1 2 2 3"),
        (6, "0 0 1 2 3 3"),
        (8, "0 0 1 1 2 2 3 3"),
        (10, "0 0 1 1 1 2 2 3 3 3"),  # exact arithmetic would say 0 0 0 1 1 2 2 2 3 3
        (14, "0 0 0 1 1 1 1 2 2 2 2 3 3 3"),
    ],
)
def test_four_phis_are_shared_as_in_the_published_weights(scales: int, index: str) -> None:
    assert phi_index(scales, 4) == tuple(map(int, index.split()))


def test_one_phi_serves_all_and_one_a_scale_serves_each() -> None:
    assert phi_index(6, 1) == (0,) * 6
    assert phi_index(4, 4) == (0, 1, 2, 3)
    assert phi_index(7, 7) == tuple(range(7))
    assert len(Scales(SIZES, 5, phis=None).phi) == len(SIZES)


def test_the_sums_are_the_papers_formula() -> None:
    made, tokens = reader(ratio=-0.25), some_tokens()  # the sign of the ratio does not count
    f = torch.zeros(3, 5, 4, 6)
    for k, (h, w) in enumerate(SIZES):
        e = made.codebook[tokens[:, STARTS[k] : STARTS[k + 1]]].transpose(1, 2).reshape(3, 5, h, w)
        e = F.interpolate(e, size=(4, 6), mode="bicubic", align_corners=False) if k < 3 else e
        phi = made.scales.phi[k]
        f = f + 0.75 * e + 0.25 * F.conv2d(e, phi.weight, phi.bias, padding=1)
        *_, ours = made.scales.sums(made.embed(tokens[:, : STARTS[k + 1]]))
        assert_close(ours, f)


def test_features_are_the_sum_so_far_averaged_over_each_cell() -> None:
    made, tokens = reader(), some_tokens()
    features = made(tokens)
    assert not features[:, :1].any()
    sums = list(made.scales.sums(made.embed(tokens)))
    cells = sums[1].unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))  # 4x6 -> 2x3 cells of 2x2
    assert_close(features[:, 3:9], cells.flatten(2).transpose(1, 2))
    assert_close(features[:, 9:], sums[2].flatten(2).transpose(1, 2))


@pytest.mark.parametrize("sizes", [SIZES, ((1, 1), (2, 2), (3, 3)), ((3, 2),), ((2, 2), (2, 2))])
def test_reading_scale_by_scale_gives_the_features_of_teacher_forcing(sizes: tuple[tuple[int, int], ...]) -> None:
    made = reader(sizes)
    lengths = [h * w for h, w in sizes]
    tokens = some_tokens(length=sum(lengths))
    memory, read = made.begin(3), [torch.zeros(3, lengths[0], 5)]
    before = memory.clone()
    for k, part in enumerate(tokens.split(lengths, dim=1)):
        after, features = made.read(memory, part, k)
        assert torch.equal(memory, before)  # a value, never changed
        memory, before = after, after.clone()
        read.append(features)
    assert torch.equal(torch.cat(read, 1), made(tokens))
    *_, total = made.scales.sums(made.embed(tokens))
    assert torch.equal(memory, total)


def test_a_scale_knows_only_the_scales_before_it() -> None:
    made, tokens = reader(), some_tokens()
    for k in range(len(SIZES)):
        other = tokens.clone()
        other[:, STARTS[k] :] = (other[:, STARTS[k] :] + 7) % 20
        a, b = made(tokens), made(other)
        assert torch.equal(a[:, : STARTS[k + 1]], b[:, : STARTS[k + 1]])
        assert k == len(SIZES) - 1 or not torch.equal(a[:, STARTS[k + 1] :], b[:, STARTS[k + 1] :])


def test_a_prefix_of_scales_has_the_features_of_the_whole() -> None:
    made, tokens = reader(), some_tokens()
    for end in STARTS[1:]:
        assert torch.equal(made(tokens[:, :end]), made(tokens)[:, :end])


def test_soft_codes_that_are_certain_are_tokens() -> None:
    made, tokens = reader(), some_tokens()[:, 1:3]
    certain = F.one_hot(tokens, 20).float()
    assert torch.equal(made.mix(certain), made.embed(tokens))
    memory = torch.randn(3, 5, 4, 6)
    for soft, hard in zip(made.add(memory, made.mix(certain), 1), made.read(memory, tokens, 1), strict=True):
        assert torch.equal(soft, hard)
    half = (certain + certain.flip(1)) / 2
    assert_close(made.mix(half), made.embed(tokens).mean(1, keepdim=True).expand(-1, 2, -1))


def test_autocast_changes_nothing_and_the_rows_are_independent() -> None:
    made, tokens = reader(), some_tokens()
    features = made(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made(tokens), features)
    assert_close(torch.cat([made(row[None]) for row in tokens]), features)
    assert_close(made.double()(tokens).float(), features)


@pytest.mark.parametrize("options", [{}, {"phis": 1}, {"phis": None, "ratio": -0.25}, {"ratio": 0.0}])
def test_a_record_and_a_state_dict_make_the_same_reader(options: dict[str, Any]) -> None:
    made = reader(**options)
    again = build(made.record(), {"ScaleReader": ScaleReader})
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(some_tokens()), made(some_tokens()))
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((), "at least one scale"),
        (((0, 1), (2, 2)), "at least one cell"),
        (((1, 1), (3, 1), (2, 2)), r"\(3, 1\) is larger than the last scale \(2, 2\)"),
    ],
)
def test_sizes_that_do_not_grow_are_refused(sizes: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scales(sizes, 5)


def test_parts_of_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 4 tokens; whole scales are the first \(1, 3, 9, 33\)"):
        list(Scales(SIZES, 5).sums(torch.zeros(1, 4, 5)))
