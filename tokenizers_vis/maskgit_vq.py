"""MaskGITVQTokenizer: a convolutional VQ tokenizer without attention. Published: the f16, 1024-code one of MaskGIT.

Paper: Chang et al. 2022, "MaskGIT: Masked Generative Image Transformer" (arXiv:2202.04200, sec. 3.1), after VQGAN (Esser
et al. 2021, arXiv:2012.09841). RAR and TiTok use the same weights in the layout of their PyTorch port.

Dims: B batch, H x W pixels, h x w = H/f x W/f grid, L = h*w tokens, Z channels of a code, C of a block.

What to know:
- where a block changes its width, the way around it starts at the block's own output: what entered is not in it;
- levels are halved by averaging, so there is no convolution on the way down;
- the network speaks of pixels in [0, 1]; here they come and go in [-1, 1] as everywhere.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn

from layers.keymap import Target, translate
from layers.record import look_up
from tokenizers_vis.grid_vq import GridVQ
from tokenizers_vis.quantizers import Quantizer, VectorQuantizer


class Block(nn.Module):
    """h = conv(act(norm(conv(act(norm(x)))))); x + h, or h + skip(h) where the width changes."""

    def __init__(self, c_in: int, c_out: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.skip = None if c_in == c_out else nn.Conv2d(c_out, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.skip is None else self.skip(h))


class Up(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks at one resolution, then the way to the next level."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, dropout: float, resample: nn.Module) -> None:
        super().__init__()
        self.res = nn.Sequential(*(Block(c_out if j else c_in, c_out, groups, dropout) for j in range(blocks)))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(self.res(x))


def norm(c: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, c, eps=1e-6)


def encoder(widths: Sequence[int], c_in: int, z: int, blocks: int, groups: int, dropout: float) -> nn.Sequential:
    """(B, 3, H, W) -> (B, Z, h, w). widths: of the levels, fine to coarse; c_in: of the first convolution."""
    coarsest = len(widths) - 1
    levels = [
        Level(before, c, blocks, groups, dropout, nn.Identity() if i == coarsest else nn.AvgPool2d(2))
        for i, (before, c) in enumerate(zip((c_in, *widths), widths, strict=False))
    ]
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, c_in, 3, padding=1, bias=False),
            levels=nn.Sequential(*levels),
            middle=nn.Sequential(*(Block(widths[-1], widths[-1], groups, dropout) for _ in range(blocks))),
            norm=norm(widths[-1], groups),
            act=nn.SiLU(),
            out=nn.Conv2d(widths[-1], z, 1),
        )
    )


def decoder(widths: Sequence[int], z: int, blocks: int, groups: int, dropout: float) -> nn.Sequential:
    """(B, Z, h, w) -> (B, 3, H, W). widths: of the levels, coarse to fine."""
    finest = len(widths) - 1
    levels = [
        Level(before, c, blocks, groups, dropout, nn.Identity() if i == finest else Up(c))
        for i, (before, c) in enumerate(zip((widths[0], *widths), widths, strict=False))
    ]
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(z, widths[0], 3, padding=1),
            middle=nn.Sequential(*(Block(widths[0], widths[0], groups, dropout) for _ in range(blocks))),
            levels=nn.Sequential(*levels),
            norm=norm(widths[-1], groups),
            act=nn.SiLU(),
            out=nn.Conv2d(widths[-1], 3, 3, padding=1),
        )
    )


class MaskGITVQTokenizer(GridVQ):
    """Images of one size <-> a grid of codes, raster order. The original weighs the quantiser's "codebook" term by 0.25.

    Raises ValueError for sizes that do not divide, and for a quantiser with more than one id a vector.

    Args:
        image_size: Height and width in pixels, or one number for both; the weights do not depend on it.
        quantizer: Its `dim` is the number of channels of the latent.
        width: Channels of the finest level.
        mult: Multiples of it, fine to coarse; f = 2^(levels - 1).
        blocks: Residual blocks a level, and in the middle.
        groups: Of the group normalisation.
        dropout: In the blocks.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        quantizer: Quantizer,
        width: int = 128,
        mult: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(image_size, quantizer, stride=2 ** (len(mult) - 1))
        if odd := [width * m for m in (1, *mult) if width * m % groups]:
            raise ValueError(f"MaskGITVQTokenizer: {odd[0]} channels are not divisible into groups={groups}")
        widths = [width * m for m in mult]
        self.encoder = encoder(widths, width, quantizer.dim, blocks, groups, dropout)
        self.decoder = decoder(widths[::-1], quantizer.dim, blocks, groups, dropout)

    def latent(self, images: Tensor) -> Tensor:
        return self.encoder((images + 1) / 2)

    def pixels(self, codes: Tensor) -> Tensor:
        return 2 * self.decoder(codes) - 1


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _block(theirs: str, ours: str) -> dict[str, Target]:
    return {
        **_both(f"{theirs}.norm1", f"{ours}.norm1"),
        f"{theirs}.conv1.weight": f"{ours}.conv1.weight",
        **_both(f"{theirs}.norm2", f"{ours}.norm2"),
        f"{theirs}.conv2.weight": f"{ours}.conv2.weight",
        f"{theirs}.nin_shortcut.weight": f"{ours}.skip.weight",
    }


def decoder_keys(levels: int, theirs: str = "decoder", ours: str = "decoder") -> dict[str, Target]:
    """The port's names -> ours. Theirs number the levels from the finest, though the coarsest runs first."""
    keys = {
        **_both(f"{theirs}.conv_in", f"{ours}.stem"),
        **_block(f"{theirs}.mid.{{j}}", f"{ours}.middle.{{j}}"),
        **_both(f"{theirs}.norm_out", f"{ours}.norm"),
        **_both(f"{theirs}.conv_out", f"{ours}.out"),
    }
    for i in range(levels):
        keys |= _block(f"{theirs}.up.{i}.block.{{j}}", f"{ours}.levels.{levels - 1 - i}.res.{{j}}")
        keys |= _both(f"{theirs}.up.{i}.upsample_conv", f"{ours}.levels.{levels - 1 - i}.resample.conv")
    return keys


def maskgit_vqgan_keys(levels: int) -> dict[str, Target]:
    """The whole file."""
    return {
        "encoder.conv_in.weight": "encoder.stem.weight",
        **_block("encoder.down.{i}.block.{j}", "encoder.levels.{i}.res.{j}"),
        **_block("encoder.mid.{j}", "encoder.middle.{j}"),
        **_both("encoder.norm_out", "encoder.norm"),
        **_both("encoder.conv_out", "encoder.out"),
        **decoder_keys(levels),
        "quantize.embedding.weight": "quantizer.rows",
    }


MASKGIT_VQGAN_CONFIG: dict[str, Any] = {  # their constructor arguments and the published values
    "channel_mult": (1, 1, 2, 2, 4),
    "num_resolutions": 5,
    "dropout": 0.0,
    "hidden_channels": 128,
    "num_channels": 3,
    "num_res_blocks": 2,
    "resolution": 256,
    "z_channels": 256,
    "num_embeddings": 1024,
    "embedding_dim": 256,
    "commitment_cost": 0.25,
    # fixed in their code, or not asked there
    "num_groups": 32,
    "image_size": None,  # of the pictures; None: `resolution`
}


def maskgit_vqgan_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MaskGITVQTokenizer:
    """The port's encoder, decoder and codebook in one, from their tensors and arguments, in eval mode and float32.

    Raises UnknownName for an argument they do not have, ValueError for sizes that contradict each other,
    CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, MASKGIT_VQGAN_CONFIG, "maskgit-vqgan: config key")
    config = MASKGIT_VQGAN_CONFIG | dict(config)
    mult, levels = config["channel_mult"], config["num_resolutions"]
    if levels != len(mult) or config["z_channels"] != config["embedding_dim"] or config["num_channels"] != 3:
        raise ValueError(
            f"maskgit-vqgan: num_resolutions {levels} must count channel_mult {list(mult)}, z_channels "
            f"{config['z_channels']} must be embedding_dim {config['embedding_dim']}, num_channels 3"
        )
    with init_empty_weights(include_buffers=False):
        tokenizer = MaskGITVQTokenizer(
            config["image_size"] or config["resolution"],
            VectorQuantizer(config["num_embeddings"], config["embedding_dim"]),
            width=config["hidden_channels"],
            mult=mult,
            blocks=config["num_res_blocks"],
            groups=config["num_groups"],
            dropout=config["dropout"],
        )
    keys = maskgit_vqgan_keys(levels)
    tokenizer.load_state_dict(translate(state, keys, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()
