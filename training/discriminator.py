"""PatchGAN: a convolutional critic of overlapping patches (Isola et al. 2017, arXiv:1611.07004, sec. 3.2.2)."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """images float (B, C, H, W) -> logits (B, 1, h, w), high where a patch looks real.

    Every convolution is 4x4 with padding 1: `layers` of stride 2, the first `width` wide and each next one twice as
    wide up to 8 * width, one more of stride 1, and the read-out. Batch norm after all but the first and the last, leaky
    ReLU 0.2. Weights start at N(0, 0.02), scales of batch norm at N(1, 0.02). Defaults: the critic of VQGAN (Esser et
    al. 2021, arXiv:2012.09841) and LlamaGen (Sun et al. 2024, arXiv:2406.06525), 70 x 70 pixels a patch.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**depth, 8) for depth in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth in range(1, layers + 1):
            stride = 2 if depth < layers else 1
            blocks += [
                nn.Conv2d(widths[depth - 1], widths[depth], 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[depth]),
                nn.LeakyReLU(0.2),
            ]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)
