"""Encoder and decoder of convolutional autoencoders, from pixels to a latent grid f = 2^(levels - 1) pixels apart.

Source: VQGAN (Esser et al. 2021, arXiv:2012.09841); the published tokenizers of LlamaGen and VAR have this layout.

Dims: B batch, H x W pixels, h x w = H/f x W/f grid, Z channels of the latent, C of a block.

What to know:
- attention stands at the coarsest level only, after each residual block of that level and in the middle;
- an encoder level halves with one zero column right and one zero row below, not with symmetric padding;
- the decoder's levels run coarse to fine;
- no activation after the last convolution: decoded pixels may leave [-1, 1].
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.keymap import Target


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), a 1x1 convolution on x where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        over = not torch.is_grad_enabled()  # nobody else holds what a norm has made
        branch = self.conv1(F.silu(self.norm1(x), inplace=over))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(branch), inplace=over)))


class Attention(nn.Module):
    """x + attention of every cell to every cell, one head."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(c, groups)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three c) h w -> three b 1 (h w) c", three=3)
        seen = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, C)
        return x + self.out(rearrange(seen, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Down(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2), H and W even."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each on the coarsest, then the way to the next level."""

    def __init__(
        self, c_in: int, c_out: int, blocks: int, groups: int, dropout: float, attention: bool, resample: nn.Module
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, groups, dropout) for j in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out, groups) if attention else nn.Identity() for _ in range(blocks))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.resample(x)


def norm(c: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, c, eps=1e-6)


def middle(c: int, groups: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(ResBlock(c, c, groups, dropout), Attention(c, groups), ResBlock(c, c, groups, dropout))


def encoder(widths: Sequence[int], c_in: int, z: int, blocks: int, groups: int, dropout: float) -> nn.Sequential:
    """(B, 3, H, W) -> (B, Z, h, w). widths: of the levels, fine to coarse; c_in: of the first convolution."""
    coarsest = len(widths) - 1
    levels = [
        Level(before, c, blocks, groups, dropout, i == coarsest, nn.Identity() if i == coarsest else Down(c))
        for i, (before, c) in enumerate(zip((c_in, *widths), widths, strict=False))
    ]
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, c_in, 3, padding=1),
            levels=nn.Sequential(*levels),
            middle=middle(widths[-1], groups, dropout),
            norm=norm(widths[-1], groups),
            act=nn.SiLU(),
            out=nn.Conv2d(widths[-1], z, 3, padding=1),
        )
    )


def decoder(widths: Sequence[int], z: int, blocks: int, groups: int, dropout: float) -> nn.Sequential:
    """(B, Z, h, w) -> (B, 3, H, W). widths: of the levels, coarse to fine."""
    finest = len(widths) - 1
    levels = [
        Level(before, c, blocks, groups, dropout, i == 0, nn.Identity() if i == finest else Up(c))
        for i, (before, c) in enumerate(zip((widths[0], *widths), widths, strict=False))
    ]
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(z, widths[0], 3, padding=1),
            middle=middle(widths[0], groups, dropout),
            levels=nn.Sequential(*levels),
            norm=norm(widths[-1], groups),
            act=nn.SiLU(),
            out=nn.Conv2d(widths[-1], 3, 3, padding=1),
        )
    )


def conv_keys(theirs: str, ours: str) -> dict[str, Target]:
    """One layer with weight and bias."""
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def res_keys(theirs: str, ours: str) -> dict[str, Target]:
    """A ResBlock under the names that VQGAN gave its parts."""
    pairs = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "skip")]
    return {k: v for a, b in pairs for k, v in conv_keys(f"{theirs}.{a}", f"{ours}.{b}").items()}
