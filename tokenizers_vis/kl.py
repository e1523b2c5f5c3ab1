"""KLTokenizer: the KL-regularised autoencoder, continuous tokens. Published: the KL-16 of MAR, which xAR and Hi-MAR share.

Papers: Rombach et al. 2022 (latent diffusion, arXiv:2112.10752, sec. 3.1 and appendix G), trained anew by Li et al. 2024
(MAR, arXiv:2406.11838, appendix A). The network is diffusers' AutoencoderKL.

Dims: B batch, H x W pixels, f stride, Z channels of the latent, p side of a token in latent cells, h x w = H/fp x W/fp
tokens, L = h*w, C = Z*p*p.

What to know:
- tokens are the latent times `scale`, in `encode` and nowhere else; `decode` divides by it;
- the published decoder has no attention but in its middle, unlike LDM's own file of the same size;
- the level that attends is fixed at construction: build it with another image_size, the weights fit any.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from einops import rearrange
from torch import Tensor, nn, no_grad

from layers.keymap import Target, translate
from layers.record import look_up
from layers.spec import Condition, Grid, TokenSpec
from tokenizers_vis.protocol import Tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def patchify(latent: Tensor, patch: int) -> Tensor:
    """(B, Z, H, W) -> tokens (B, L, Z p p): raster of patches; within one, channel by channel, then row by row."""
    return rearrange(latent, "b z (h p) (w q) -> b (h w) (z p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, grid: Grid) -> Tensor:
    """tokens (B, L, Z p p) on a grid of h x w patches -> (B, Z, h p, w p)."""
    return rearrange(tokens, "b (h w) (z p q) -> b z (h p) (w q)", h=grid.h, p=patch, q=patch)


class KLTokenizer(Tokenizer):
    """Pictures <-> continuous tokens: a Gaussian posterior a latent cell, `scale` times its mean or a sample.

    Raises ValueError for sizes that do not divide.

    Args:
        image_size: Height and width in pixels, or one number for both.
        channels: Z, of the latent.
        width: Channels of the finest level.
        mult: Multiples of it, fine to coarse; one halving between two levels.
        res_blocks: Residual blocks an encoder level; a decoder level has one more.
        encoder_attention: Levels whose blocks are followed by attention, 0 the finest.
        decoder_attention: The same of the decoder.
        groups: Of the group normalisation.
        patch: Side p of a token in latent cells.
        scale: What the latent is multiplied by so that tokens have unit variance; 1 / its standard deviation.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int = 16,
        width: int = 128,
        mult: Sequence[int] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        encoder_attention: Sequence[int] = (4,),
        decoder_attention: Sequence[int] = (),
        groups: int = 32,
        patch: int = 1,
        scale: float = 1.0,
    ) -> None:
        from diffusers import AutoencoderKL  # takes five seconds, which every command would pay

        super().__init__()
        height, width_px = (image_size, image_size) if isinstance(image_size, int) else image_size
        stride = patch * 2 ** (len(mult) - 1)
        if height % stride or width_px % stride:
            raise ValueError(
                f"KLTokenizer: image_size {height}x{width_px} is not a multiple of {stride} pixels a token"
            )
        if odd := [width * m for m in mult if width * m % groups]:
            raise ValueError(f"KLTokenizer: {odd[0]} channels are not divisible into groups={groups}")
        if not scale > 0:
            raise ValueError(f"KLTokenizer: scale is {scale}, must be positive")
        levels = range(len(mult))
        if beyond := [level for level in (*encoder_attention, *decoder_attention) if level not in levels]:
            raise ValueError(f"KLTokenizer: attention at level {beyond[0]} of {len(mult)} levels")
        self.patch, self.scale = patch, scale
        grid = Grid(1, height // stride, width_px // stride)
        self.spec = TokenSpec(grid, decoded=(1, height, width_px), channels=channels * patch**2)
        self.prefixes = (grid.length,)
        self.network = AutoencoderKL(
            block_out_channels=[width * m for m in mult],
            down_block_types=[
                "AttnDownEncoderBlock2D" if i in encoder_attention else "DownEncoderBlock2D" for i in levels
            ],
            up_block_types=[
                "AttnUpDecoderBlock2D" if i in decoder_attention else "UpDecoderBlock2D" for i in reversed(levels)
            ],
            layers_per_block=res_blocks,
            latent_channels=channels,
            norm_num_groups=groups,
            sample_size=height,
        )

    def posterior(self, images: Tensor) -> "DiagonalGaussianDistribution":
        """images (B, 3, H, W) in [-1, 1] -> the law of the latent (B, Z, H/f, W/f), before `scale`.

        It has `mean`, `logvar` (within [-30, 20]) and `kl()`, (B,), summed over the latent. Raises ValueError for
        images of another size than `spec.decoded`.
        """
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"KLTokenizer: got images {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))}); "
                "build it with another image_size, the weights fit any"
            )
        return self.network.encode(images).latent_dist

    def tokens(self, latent: Tensor) -> Tensor:
        """A latent (B, Z, H/f, W/f) as the network has it -> tokens (B, L, C)."""
        return patchify(latent * self.scale, self.patch)

    @no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens float (B, L, C).

        noise: standard normal (B, L, C), for a sample of the posterior; None: its mean. Raises ValueError as `posterior`.
        """
        posterior = self.posterior(images)
        tokens = self.tokens(posterior.mean)
        return tokens if noise is None else tokens + self.tokens(posterior.std) * noise

    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens float (B, L, C) -> images (B, 3, H, W), unclamped.

        Only whole grids decode, so `present` must stay None; `condition` and `noise` have nothing to change here.
        Raises ValueError for another shape, a given `present`.
        """
        if present is not None:
            raise ValueError("KLTokenizer: decodes whole grids only, so present must be None")
        expected = (self.spec.length, self.spec.channels)
        if tokens.shape[1:] != expected:
            raise ValueError(
                f"KLTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, {expected[0]}, {expected[1]})"
            )
        return self.network.decode(unpatchify(tokens, self.patch, self.spec.layout) / self.scale).sample

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> reconstruction of a posterior sample (B, 3, H, W), parts.

        parts: "kl", summed over the latent, mean over pictures; "stats": the standard deviation of the latent's means,
        which `scale` is the inverse of, and the mean one of the posterior.
        """
        posterior = self.posterior(images)
        latent = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        stats = {"latent_std": posterior.mean.detach().std(), "posterior_std": posterior.std.detach().mean()}
        return self.network.decode(latent).sample, {"kl": posterior.kl().mean(), "stats": stats}

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and reconstruction loss (VQGAN, eq. 7)."""
        return self.network.decoder.conv_out.weight


def _without_places(weight: Tensor) -> Tensor:
    """A 1x1 convolution (c, c, 1, 1) as a matrix."""
    return weight.flatten(1)


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    keys = _both(f"{theirs}.norm", f"{ours}.group_norm")
    for name, place in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        keys |= {
            f"{theirs}.{name}.weight": (f"{ours}.{place}.weight", _without_places),
            f"{theirs}.{name}.bias": f"{ours}.{place}.bias",
        }
    return keys


def _res(theirs: str, ours: str) -> dict[str, Target]:
    names = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return {
        key: to for name, place in names.items() for key, to in _both(f"{theirs}.{name}", f"{ours}.{place}").items()
    }


def _level(theirs: str, ours: str, resample: str, resampler: str) -> dict[str, Target]:
    return {
        **_res(f"{theirs}.block.{{j}}", f"{ours}.resnets.{{j}}"),
        **_attention(f"{theirs}.attn.{{j}}", f"{ours}.attentions.{{j}}"),
        **_both(f"{theirs}.{resample}.conv", f"{ours}.{resampler}.0.conv"),
    }


def kl_keys(levels: int) -> dict[str, Target]:
    """LDM's names -> ours. Theirs number the decoder's levels from the finest, though the coarsest runs first."""
    keys = _both("quant_conv", "network.quant_conv") | _both("post_quant_conv", "network.post_quant_conv")
    for side in ("encoder", "decoder"):
        keys |= {
            **_both(f"{side}.conv_in", f"network.{side}.conv_in"),
            **_res(f"{side}.mid.block_1", f"network.{side}.mid_block.resnets.0"),
            **_attention(f"{side}.mid.attn_1", f"network.{side}.mid_block.attentions.0"),
            **_res(f"{side}.mid.block_2", f"network.{side}.mid_block.resnets.1"),
            **_both(f"{side}.norm_out", f"network.{side}.conv_norm_out"),
            **_both(f"{side}.conv_out", f"network.{side}.conv_out"),
        }
    for i in range(levels):
        keys |= _level(f"encoder.down.{i}", f"network.encoder.down_blocks.{i}", "downsample", "downsamplers")
        keys |= _level(f"decoder.up.{i}", f"network.decoder.up_blocks.{levels - 1 - i}", "upsample", "upsamplers")
    return keys


KL16_SCALE = 0.2325  # 1 / standard deviation of KL-16's latents over ImageNet train; their mean is left in
KL16_CONFIG: dict[str, Any] = {  # their constructor arguments and the published values
    "embed_dim": 16,
    "ch_mult": (1, 1, 2, 2, 4),
    # fixed in their code, or not asked there
    "ch": 128,
    "num_res_blocks": 2,
    "encoder_attn_resolutions": (16,),
    "decoder_attn_resolutions": (),
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "double_z": True,
    "norm_groups": 32,
    "norm_eps": 1e-6,
    "use_variational": True,
    # not of the file: the size of the pictures (None: `resolution`, which only says where attention stands), and what the
    # generators on top make of the latent
    "image_size": None,
    "patch_size": 1,
    "scale_factor": KL16_SCALE,
}
FIXED = ("in_channels", "out_ch", "double_z", "norm_eps", "use_variational")


def kl16_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> KLTokenizer:
    """MAR's AutoencoderKL from its tensors and constructor arguments, in eval mode and float32.

    Raises UnknownName for an argument it does not have, ValueError for one that no file has another value of,
    CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, KL16_CONFIG, "kl16-vae: config key")
    if odd := [name for name in FIXED if config.get(name, KL16_CONFIG[name]) != KL16_CONFIG[name]]:
        raise ValueError(f"kl16-vae: {odd[0]} is {config[odd[0]]}, always {KL16_CONFIG[odd[0]]} in published files")
    config = KL16_CONFIG | dict(config)
    levels = {config["resolution"] // 2**i: i for i in range(len(config["ch_mult"]))}
    with init_empty_weights(include_buffers=False):
        tokenizer = KLTokenizer(
            config["image_size"] or config["resolution"],
            channels=config["embed_dim"],
            width=config["ch"],
            mult=config["ch_mult"],
            res_blocks=config["num_res_blocks"],
            encoder_attention=[levels[side] for side in config["encoder_attn_resolutions"] if side in levels],
            decoder_attention=[levels[side] for side in config["decoder_attn_resolutions"] if side in levels],
            groups=config["norm_groups"],
            patch=config["patch_size"],
            scale=config["scale_factor"],
        )
    keys = kl_keys(len(config["ch_mult"]))
    tokenizer.load_state_dict(translate(state, keys, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()
