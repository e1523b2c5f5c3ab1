"""The fast convolution against the direct one."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from layers.winograd import WinogradConv, pack_convolutions


@pytest.mark.parametrize("size", [(4, 4), (16, 16), (13, 7), (1, 2), (70, 130)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_direct_convolution_at_any_size(size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 6, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    with torch.inference_mode():
        assert_close(WinogradConv(conv)(x), conv(x))


def test_in_float32_it_differs_by_a_few_1e_5_of_the_largest_output() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(160, 160, 3, padding=1), torch.randn(1, 160, 32, 32)
    with torch.inference_mode():
        direct = conv(x)
        assert (WinogradConv(conv)(x) - direct).abs().max() < 3e-5 * direct.abs().max()


def test_wide_plain_convolutions_are_replaced_and_others_stay() -> None:
    torch.manual_seed(0)
    stays = [nn.Conv2d(32, 8, 3, padding=1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 32, 3, 2, 1)]
    stays += [nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect")]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sequential(nn.Conv2d(32, 40, 3, padding=1)), nn.SiLU())
    packed = pack_convolutions(copy.deepcopy(model))
    assert [type(part) for part in (packed[0], packed[1][0])] == [nn.Conv2d, WinogradConv]
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        assert_close(packed(x), model(x))
    assert all(type(pack_convolutions(nn.Sequential(conv))[0]) is nn.Conv2d for conv in stays)
    assert type(pack_convolutions(copy.deepcopy(model).double())[1][0]) is nn.Conv2d
