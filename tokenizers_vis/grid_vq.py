"""What convolutional VQ tokenizers share: a picture becomes a grid of vectors, each vector the id of a code, and back.

Source: VQGAN (Esser et al. 2021, arXiv:2012.09841).

Dims: B batch, H x W pixels, h x w = H/f x W/f grid, L = h*w tokens in raster order, D channels of a code.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn, no_grad

from layers.spec import Condition, Grid, TokenSpec
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer


class GridVQ(Tokenizer):
    """Images of one size <-> a grid of codes. A child builds its two networks, and says how they are run.

    image_size: pixels, (H, W) or one number for both; the weights do not depend on it. stride: f. The decoder's last layer
    is `decoder.out`. Raises ValueError for an image size that f does not divide, and for a quantiser with more than one
    id a vector.
    """

    decoder: nn.Module

    def __init__(self, image_size: int | Sequence[int], quantizer: Quantizer, stride: int) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % stride or width % stride:
            raise ValueError(
                f"{self._name}: image_size {height} x {width} is not divisible by {stride} = 2^(levels - 1)"
            )
        if quantizer.depth != 1:
            raise ValueError(
                f"{self._name}: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a Grid holds 1 a cell"
            )
        grid = Grid(1, height // stride, width // stride)
        self.spec = TokenSpec(grid, decoded=(1, height, width), vocab_size=quantizer.vocab_size)
        self.prefixes = (grid.length,)
        self.quantizer = quantizer

    @abstractmethod
    def latent(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, D, h, w), before quantisation."""

    @abstractmethod
    def pixels(self, codes: Tensor) -> Tensor:
        """codes (B, D, h, w) -> images (B, 3, H, W), unclamped."""

    @no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens int64 (B, L).

        noise: uniforms in [0, 1), (B, L), for a quantiser that draws; None: the nearest codes.
        Raises ValueError for images of another size than `spec.decoded`.
        """
        return self.quantizer.assign(self._vectors(images), noise)

    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, L) in [0, V) -> images (B, 3, H, W), unclamped.

        Only whole grids decode, so `present` must stay None; `condition` and `noise` have nothing to change here.
        Raises ValueError for another L, ids outside [0, V), a given `present`.
        """
        if present is not None:
            raise ValueError(f"{self._name}: decodes whole grids only, so present must be None")
        if tokens.dim() != 2 or tokens.shape[1] != self.spec.length:
            raise ValueError(f"{self._name}: got tokens {tuple(tokens.shape)}, decodes (B, {self.spec.length})")
        return self._images(self.embed(tokens))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), parts.

        parts: the quantiser's losses by name; "ids" (B, L); "z" (B, L, D), the vectors before quantisation; "stats".
        """
        z = self._vectors(images)
        out = self.quantizer(z)
        return self._images(out.z_q), {**out.losses, "ids": out.ids, "z": z, "stats": out.stats}

    def codebook(self) -> Tensor:
        """(V, D), as the decoder gets them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., D). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(
                f"{self._name}: ids from {low} to {high}, the codebook has 0 to {self.spec.vocab_size - 1}"
            )
        return self.quantizer.embed(tokens)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and reconstruction loss (VQGAN, eq. 7)."""
        return self.decoder.out.weight

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, D)."""
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"{self._name}: got images {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))}); "
                "build it with another image_size, the weights fit any"
            )
        return rearrange(self.latent(images), "b d h w -> b (h w) d")

    def _images(self, codes: Tensor) -> Tensor:
        """(B, L, D) -> (B, 3, H, W)."""
        return self.pixels(rearrange(codes, "b (h w) d -> b d h w", h=self.spec.layout.h))
