"""Critics that tell data from reconstructions: of patches of a picture, and of whole clips."""

from functools import partial

import torch
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from layers.sincos import sincos_3d
from layers.spec import Grid


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, arXiv:1611.07004, sec. 3.2.2): images float (B, C, H, W) -> logits (B, 1, h, w), high
    where a patch looks real.

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


class ClipDiscriminator(nn.Module):
    """LARP's critic (Wang et al. 2024, arXiv:2410.21264, appendix): clips float (B, 3, T, H, W) in [-1, 1] -> logits (B, 1).

    A transformer reads patches of the clip behind a token that says what it makes of the whole. video: (T, H, W) of the
    clips; patch: what one token covers, (frames, rows, columns). Pixels enter in [0, 1]; places are sines of frame, row and
    column. Raises ValueError where patch does not divide video, or for clips of another size.
    """

    def __init__(
        self,
        video: tuple[int, int, int],
        patch: tuple[int, int, int] = (4, 8, 8),
        dim: int = 512,
        depth: int = 12,
        heads: int = 8,
    ) -> None:
        super().__init__()
        if any(size % step for size, step in zip(video, patch, strict=True)):
            raise ValueError(f"ClipDiscriminator: patch {tuple(patch)} must divide video {tuple(video)}")
        self.video = tuple(video)
        self.patches = nn.Conv3d(3, dim, tuple(patch), stride=tuple(patch))
        grid = Grid(*(size // step for size, step in zip(video, patch, strict=True)))
        self.register_buffer("places", sincos_3d(grid, dim), persistent=False)  # (L, D)
        self.whole = nn.Parameter(torch.empty(1, dim))
        block = partial(Block, qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-5))
        self.blocks = nn.Sequential(*(block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.readout = nn.Linear(dim, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.whole)

    def forward(self, clips: Tensor) -> Tensor:
        if clips.shape[2:] != self.video:
            raise ValueError(f"ClipDiscriminator: got clips {tuple(clips.shape)}, made for (B, 3, *{self.video})")
        x = rearrange(self.patches((clips + 1) / 2), "b d t h w -> b (t h w) d") + self.places
        x = self.blocks(torch.cat((repeat(self.whole, "1 d -> b 1 d", b=len(x)), x), dim=1))
        return self.readout(self.norm(x[:, 0]))


DISCRIMINATORS = {made.__name__: made for made in (PatchDiscriminator, ClipDiscriminator)}
