"""Next-scale arithmetic: token maps of growing size add up to one feature map. Tokenizer and generator share it.

Paper: Tian et al. 2024, "Visual Autoregressive Modeling" (arXiv:2404.02905, sec. 3.2, algorithms 1 and 2).

Dims: B batch, K scales, scale k of (h_k, w_k) cells and n_k = h_k*w_k tokens, coarse to fine; H x W the last scale;
L tokens of all scales, each in raster order; V codes of C channels.

What to know:
- a scale's codes are first resized to H x W (bicubic), then smoothed by a convolution phi; the last skips the resizing;
- the feature map f is the sum over scales; what a later scale sees of it is f averaged down to its size (area);
- there may be fewer phi than scales: `phi_index` says who uses which;
- everything is float32 or better, whatever the autocast.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SMALLEST_RATIO = 1e-6  # up to it phi is the identity and has no weights


def phi_index(scales: int, phis: int) -> tuple[int, ...]:
    """Which of `phis` convolutions each of `scales` scales uses: that whose tick is nearest to k / (K - 1), the first of
    equals.

    In float64, as the published weights were trained: at K = 10 with 4 phis two scales lie midway between ticks, and
    rounding decides (0 0 1 1 1 2 2 3 3 3).
    """
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(margin, 1 - margin, phis)
    return tuple(int(np.abs(ticks - k / max(1, scales - 1)).argmin()) for k in range(scales))


class Phi(nn.Conv2d):
    """(1 - r) x + r conv3x3(x), (B, C, H, W); r = `ratio`."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.lerp(x, F.conv2d(x, weight, bias, padding=1), self.ratio)


class Scales(nn.Module):
    """The way from maps of codes to the feature map and back: resizing and phi. It knows no codebook.

    sizes: (h, w) of each scale, coarse to fine, none beyond the last. phis: how many convolutions the scales share
    (1: all the same one), None: one a scale. ratio: r of each phi; 0: no phi.
    Raises ValueError for sizes that are none and for a scale that is larger than the last.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], channels: int, phis: int | None = 4, ratio: float = 0.5
    ) -> None:
        super().__init__()
        self.sizes, self.channels = tuple((int(h), int(w)) for h, w in sizes), channels
        if not self.sizes or min(min(size) for size in self.sizes) < 1:
            raise ValueError(f"Scales: sizes need at least one scale of at least one cell, got {self.sizes}")
        self.height, self.width = self.sizes[-1]
        if beyond := [size for size in self.sizes if size[0] > self.height or size[1] > self.width]:
            raise ValueError(
                f"Scales: {beyond[0]} is larger than the last scale {self.sizes[-1]}, which is the size of the "
                "feature map: order the scales coarse to fine"
            )
        self.lengths = tuple(h * w for h, w in self.sizes)  # n_k
        self.prefixes = tuple(accumulate(self.lengths))
        count = len(self.sizes) if phis is None else phis
        self.index = phi_index(len(self.sizes), count)
        smooth = abs(ratio) > SMALLEST_RATIO
        self.phi = nn.ModuleList(Phi(channels, abs(ratio)) if smooth else nn.Identity() for _ in range(count))

    def spread(self, codes: Tensor, scale: int) -> Tensor:
        """Codes of one scale (B, n_k, C) -> what they add to f, (B, C, H, W)."""
        h, w = self.sizes[scale]
        x = rearrange(codes.to(torch.promote_types(codes.dtype, torch.float32)), "b (h w) c -> b c h w", h=h, w=w)
        x = x.contiguous()  # channels last would pool in another order than memory
        with torch.autocast(x.device.type, enabled=False):
            if scale < len(self.sizes) - 1:
                x = F.interpolate(x, size=self.sizes[-1], mode="bicubic")
            return self.phi[self.index[scale]](x)

    def pool(self, f: Tensor, scale: int) -> Tensor:
        """f (B, C, H, W) -> (B, n_k, C): f as scale k sees it."""
        if self.sizes[scale] != self.sizes[-1]:
            f = F.interpolate(f, size=self.sizes[scale], mode="area")
        return rearrange(f, "b c h w -> b (h w) c")

    def sums(self, codes: Tensor) -> Iterator[Tensor]:
        """Codes (B, n, C) of the first scales -> f (B, C, H, W) after each of them.

        Raises ValueError where n is not the number of tokens of the first one, two, ... scales.
        """
        if codes.shape[1] not in self.prefixes:
            raise ValueError(f"Scales: got {codes.shape[1]} tokens; whole scales are the first {self.prefixes}")
        used = self.prefixes.index(codes.shape[1]) + 1
        f = None
        for scale, part in enumerate(codes.split(self.lengths[:used], dim=1)):
            h = self.spread(part, scale)
            f = h if f is None else f + h
            yield f


class ScaleReader(nn.Module):
    """What a next-scale generator feeds on: the features that the scales decoded so far give to the positions of the
    next one. A frozen module; the weights are the tokenizer's (`MultiScaleVQTokenizer.reader()`).

    Teacher forcing, all positions at once:      features = reader(tokens)
    Generating, scale after scale (k = 0, 1, ..., K - 1), the features of scale 0 being zeros:
                                                 memory = reader.begin(rows)
                                                 memory, features = reader.read(memory, tokens of scale k, k)
    where `features` is for scale k + 1, and `memory` is f (B, C, H, W), a value that is never changed in place. Soft
    codes instead of tokens:                     memory, features = reader.add(memory, reader.mix(probs), k)

    The arguments are those of Scales, and plain values: `record` says them, `layers.record.build` makes the same module
    again, and its state_dict fills it.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        vocab_size: int,
        channels: int,
        phis: int | None = 4,
        ratio: float = 0.5,
    ) -> None:
        super().__init__()
        self.arguments = {"vocab_size": vocab_size, "channels": channels, "phis": phis, "ratio": ratio}
        self.register_buffer("codebook", torch.zeros(vocab_size, channels))
        self.scales = Scales(sizes, channels, phis, ratio)
        self.requires_grad_(False)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of each scale, as in the Pyramid layout of the tokens."""
        return self.scales.sizes

    @property
    def channels(self) -> int:
        return self.scales.channels

    def record(self) -> dict[str, Any]:
        return {
            "class_path": "ScaleReader",
            "init_args": {"sizes": [list(size) for size in self.sizes], **self.arguments},
        }

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 (...) in [0, V) -> codes (..., C)."""
        return F.embedding(tokens, self.codebook)

    def mix(self, probs: Tensor) -> Tensor:
        """Laws (..., V) over the codes -> their mean codes (..., C)."""
        return probs.to(self.codebook.dtype) @ self.codebook

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (B, n) of the first scales, whole ones -> features (B, n, C) of the same positions; those of
        scale k come from the scales before it, those of scale 0 are zeros."""
        before = self.scales.sums(self.embed(tokens))
        features = [self.codebook.new_zeros(len(tokens), self.scales.lengths[0], self.channels)]
        for scale in range(1, self.scales.prefixes.index(tokens.shape[1]) + 1):
            features.append(self.scales.pool(next(before), scale))
        return torch.cat(features, dim=1)

    def begin(self, rows: int) -> Tensor:
        """The memory before any scale, zeros (B, C, H, W)."""
        return self.codebook.new_zeros(rows, self.channels, *self.sizes[-1])

    def read(self, memory: Tensor, tokens: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """memory before scale k, its tokens int64 (B, n_k), k -> memory after it, features (B, n_{k+1}, C) of the next
        scale; (B, 0, C) after the last."""
        return self.add(memory, self.embed(tokens), scale)

    def add(self, memory: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """As `read`, for codes (B, n_k, C)."""
        memory = memory + self.scales.spread(codes, scale)
        if scale == len(self.sizes) - 1:
            return memory, memory.new_zeros(len(memory), 0, self.channels)
        return memory, self.scales.pool(memory, scale + 1)
