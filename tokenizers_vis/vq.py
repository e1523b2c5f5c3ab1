"""Convolutional VQ autoencoder: an image becomes a grid of codebook entries, f = 2^(levels - 1) pixels apart.

Paper: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv:2406.06525:
VQ-16 and VQ-8); the layout is VQGAN's (Esser et al. 2021, arXiv:2012.09841), the codebook small and on the
unit sphere (Yu et al. 2021, arXiv:2110.04627).

Dims: B batch, H x W pixels, h x w = H/f x W/f grid, L = h*w tokens, D channels of a code,
Z of the latent, C of a block.

What to know:
- attention stands at the coarsest level only, after each residual block of that level and in the middle;
- an encoder level halves with one zero column right and one zero row below, not with symmetric padding;
- the decoder's levels run coarse to fine, each one residual block longer than the encoder's;
- no activation after the last convolution: decoded pixels may leave [-1, 1].
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from accelerate import init_empty_weights
from einops import rearrange
from torch import Tensor, nn, no_grad

from layers.keymap import Join, Target, translate
from layers.record import look_up
from layers.spec import Condition, Grid, TokenSpec
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer, VectorQuantizer


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), a 1x1 convolution on x where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(branch))))


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


class VQTokenizer(Tokenizer):
    """Images of one size <-> a grid of codes, raster order.

    image_size: pixels, (H, W) or one number for both; the weights do not depend on it. channels, encoder_mult,
    decoder_mult: a level is channels * mult wide, fine to coarse, decoder_mult None for the encoder's;
    f = 2^(len(mult) - 1). res_blocks: of an encoder level. groups: of every GroupNorm. z_channels: Z.
    Raises ValueError for an image size that f does not divide, widths that groups do not divide, encoder and decoder
    of different depth, and a quantiser with more than one id a vector.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        quantizer: Quantizer,
        channels: int = 128,
        encoder_mult: Sequence[int] = (1, 1, 2, 2, 4),
        decoder_mult: Sequence[int] | None = None,
        res_blocks: int = 2,
        groups: int = 32,
        z_channels: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        decoder_mult = encoder_mult if decoder_mult is None else decoder_mult
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        f = 2 ** (len(encoder_mult) - 1)
        if len(encoder_mult) != len(decoder_mult):
            raise ValueError(
                f"VQTokenizer: encoder_mult has {len(encoder_mult)} levels, decoder_mult {len(decoder_mult)}: "
                "give as many, or the decoded image has another size"
            )
        if height % f or width % f:
            raise ValueError(f"VQTokenizer: image_size {height} x {width} is not divisible by {f} = 2^(levels - 1)")
        if odd := [channels * m for m in (1, *encoder_mult, *decoder_mult) if channels * m % groups]:
            raise ValueError(f"VQTokenizer: {odd[0]} channels are not divisible into groups={groups}")
        if quantizer.depth != 1:
            raise ValueError(
                f"VQTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a Grid holds 1 a cell"
            )
        grid = Grid(1, height // f, width // f)
        self.spec = TokenSpec(grid, decoded=(1, height, width), vocab_size=quantizer.vocab_size)
        self.prefixes = (grid.length,)
        down, up = [channels * m for m in encoder_mult], [channels * m for m in reversed(decoder_mult)]
        self.encoder = encoder(down, channels, z_channels, res_blocks, groups, dropout)
        self.to_code = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.quantizer = quantizer
        self.from_code = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.decoder = decoder(up, z_channels, res_blocks + 1, groups, dropout)

    @no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens int64 (B, L).

        noise: uniforms in [0, 1), (B, L), for a quantiser that draws; None: the nearest codes.
        Raises ValueError for images of another size than `spec.decoded`.
        """
        return self.quantizer.assign(self._latent(images), noise)

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
            raise ValueError("VQTokenizer: decodes whole grids only, so present must be None")
        if tokens.dim() != 2 or tokens.shape[1] != self.spec.length:
            raise ValueError(f"VQTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, {self.spec.length})")
        return self._pixels(self.embed(tokens))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), parts.

        parts: the quantiser's losses by name; "ids" (B, L); "z" (B, L, D), the vectors before quantisation; "stats".
        """
        z = self._latent(images)
        out = self.quantizer(z)
        return self._pixels(out.z_q), {**out.losses, "ids": out.ids, "z": z, "stats": out.stats}

    def codebook(self) -> Tensor:
        """(V, D), as the decoder gets them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., D). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(f"VQTokenizer: ids from {low} to {high}, the codebook has 0 to {self.spec.vocab_size - 1}")
        return self.quantizer.embed(tokens)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and reconstruction loss (VQGAN, eq. 7)."""
        return self.decoder.out.weight

    def _latent(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> z (B, L, D)."""
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"VQTokenizer: got images {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))}); "
                "build it with another image_size, the weights fit any"
            )
        return rearrange(self.to_code(self.encoder(images)), "b d h w -> b (h w) d")

    def _pixels(self, codes: Tensor) -> Tensor:
        """(B, L, D) -> (B, 3, H, W)."""
        codes = rearrange(codes, "b (h w) d -> b d h w", h=self.spec.layout.h)
        return self.decoder(self.from_code(codes.to(self.from_code.weight.dtype)))


def _conv(theirs: str, ours: str) -> dict[str, Target]:
    """One layer with weight and bias."""
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _res(theirs: str, ours: str) -> dict[str, Target]:
    pairs = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "skip")]
    return {k: v for a, b in pairs for k, v in _conv(f"{theirs}.{a}", f"{ours}.{b}").items()}


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    joined = {
        f"{theirs}.{name}.{part}": Join(f"{ours}.qkv.{part}", place, 3)
        for place, name in enumerate("qkv")
        for part in ("weight", "bias")
    }
    return joined | _conv(f"{theirs}.norm", f"{ours}.norm") | _conv(f"{theirs}.proj_out", f"{ours}.out")


def _half(side: str, resample: str) -> dict[str, Target]:
    return {
        **_conv(f"{side}.conv_in", f"{side}.stem"),
        **_res(f"{side}.conv_blocks.{{i}}.res.{{j}}", f"{side}.levels.{{i}}.res.{{j}}"),
        **_attention(f"{side}.conv_blocks.{{i}}.attn.{{j}}", f"{side}.levels.{{i}}.attn.{{j}}"),
        **_conv(f"{side}.conv_blocks.{{i}}.{resample}.conv", f"{side}.levels.{{i}}.resample.conv"),
        **_res(f"{side}.mid.0", f"{side}.middle.0"),
        **_attention(f"{side}.mid.1", f"{side}.middle.1"),
        **_res(f"{side}.mid.2", f"{side}.middle.2"),
        **_conv(f"{side}.norm_out", f"{side}.norm"),
        **_conv(f"{side}.conv_out", f"{side}.out"),
    }


LLAMAGEN_VQ_KEYS: dict[str, Target] = {  # both number the levels in the order they run
    **_half("encoder", "downsample"),
    **_half("decoder", "upsample"),
    **_conv("quant_conv", "to_code"),
    **_conv("post_quant_conv", "from_code"),
    "quantize.embedding.weight": "quantizer.rows",
    "quantize.codebook_used": None,  # the last 65536 ids seen in training: bookkeeping
}


LLAMAGEN_VQ_CONFIG: dict[str, Any] = {  # their constructor arguments and defaults
    "codebook_size": 16384,
    "codebook_embed_dim": 8,
    "codebook_l2_norm": True,
    "encoder_ch_mult": (1, 1, 2, 2, 4),
    "decoder_ch_mult": (1, 1, 2, 2, 4),
    "z_channels": 256,
    "dropout_p": 0.0,
    # fixed in their code, or not asked there
    "ch": 128,
    "num_res_blocks": 2,
    "num_groups": 32,
    "image_size": 256,
    # of their training loop, no part of the model
    "commit_loss_beta": 0.25,
    "entropy_loss_ratio": 0.0,
    "codebook_show_usage": True,
}


def llamagen_vq_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> VQTokenizer:
    """LlamaGen's VQModel from its tensors and constructor arguments, in eval mode and float32.

    It takes the tensors of `state` as they are, without a copy, where they are float32 already.
    Raises UnknownName for an argument it does not have, CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, LLAMAGEN_VQ_CONFIG, "llamagen-vq: config key")
    config = LLAMAGEN_VQ_CONFIG | dict(config)
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        tokenizer = VQTokenizer(
            config["image_size"],
            VectorQuantizer(
                config["codebook_size"], config["codebook_embed_dim"], normalize=config["codebook_l2_norm"]
            ),
            channels=config["ch"],
            encoder_mult=config["encoder_ch_mult"],
            decoder_mult=config["decoder_ch_mult"],
            res_blocks=config["num_res_blocks"],
            groups=config["num_groups"],
            z_channels=config["z_channels"],
            dropout=config["dropout_p"],
        )
    tokenizer.load_state_dict(translate(state, LLAMAGEN_VQ_KEYS, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()
