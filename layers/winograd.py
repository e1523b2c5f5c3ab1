"""3 x 3 convolutions with a quarter of the multiplications, for decoding pictures on a CPU.

Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), F(4 x 4, 3 x 3): tiles
of 6 x 6 inputs, overlapping by 2, become tiles of 4 x 4 outputs; in between one product of channels for each of the 36
transformed places. Tiles go through in bands that stay in the cache. Where oneDNN's direct convolution already runs at the
speed of the machine's matrix products, this is 1.5 to 2 times as fast.

In float32 the result differs from the direct one by about 1e-5 of the largest output: for pictures, not for training, nor
for ids.

Letters: B pictures, C and D channels in and out, n x m tiles of a picture, t tiles of a band.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE = 4
BAND = 256  # tiles that go through together
NARROWEST = 32  # channels below which it is no gain
KERNEL = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
KERNEL += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


class WinogradConv(nn.Module):
    """A 3 x 3 nn.Conv2d of stride 1 and padding 1, for inference. Its weight cannot be trained, saved or moved any more."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        places = torch.tensor(KERNEL, dtype=torch.float64)
        weight = torch.einsum("pr,ocrs,qs->pqco", places, conv.weight.detach().double(), places)
        self.weight = weight.flatten(0, 1).to(conv.weight.dtype).contiguous()  # (36, C, D)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.into = torch.kron(*2 * [torch.tensor(INPUT).to(self.weight)])  # (36, 36)
        self.out_of = torch.kron(*2 * [torch.tensor(OUTPUT).to(self.weight)])  # (16, 36)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W), channels last in memory."""
        rows, _, height, width = x.shape
        n, m = -(-height // TILE), -(-width // TILE)
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, TILE * m - width + 1, 1, TILE * n - height + 1))
        y = x.new_empty(rows, n, TILE, m, TILE, self.weight.shape[-1])
        step = max(1, BAND // m)
        for picture, made in zip(x, y, strict=True):
            for first in range(0, n, step):
                band = picture[TILE * first : TILE * min(first + step, n) + 2]
                tiles = band.unfold(0, TILE + 2, TILE).unfold(1, TILE + 2, TILE)  # (n', m, C, 6, 6)
                count = len(tiles)
                tiles = tiles.permute(3, 4, 0, 1, 2).reshape(36, -1)
                products = (self.into @ tiles).view(36, count * m, -1) @ self.weight  # (36, t, D)
                back = (self.out_of @ products.flatten(1)).view(TILE, TILE, count, m, -1)
                made[first : first + count] = back.permute(2, 0, 3, 1, 4)
        y = y.view(rows, TILE * n, TILE * m, -1)[:, :height, :width]
        if self.bias is not None:
            y += self.bias
        return y.permute(0, 3, 1, 2)


def pack_convolutions(module: nn.Module) -> nn.Module:
    """Replace every wide enough 3 x 3 nn.Conv2d inside `module`, in place, where it is float32 on a CPU; others stay."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and _fits(child):
            setattr(module, name, WinogradConv(child))
        else:
            pack_convolutions(child)
    return module


def _fits(conv: nn.Conv2d) -> bool:
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    plain = plain and conv.groups == 1 and conv.padding_mode == "zeros" and type(conv) is nn.Conv2d
    weight = conv.weight
    wide = min(weight.shape[:2]) >= NARROWEST
    return plain and wide and weight.device.type == "cpu" and weight.dtype == torch.float32
