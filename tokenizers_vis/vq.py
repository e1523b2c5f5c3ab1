"""Convolutional VQ autoencoder: an image becomes a grid of codebook entries, f = 2^(levels - 1) pixels apart.

Paper: Sun et al. 2024, "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv:2406.06525:
VQ-16 and VQ-8); the layout is VQGAN's (Esser et al. 2021, arXiv:2012.09841), the codebook small and on the
unit sphere (Yu et al. 2021, arXiv:2110.04627).

Dims: B batch, H x W pixels, h x w = H/f x W/f grid, L = h*w tokens, D channels of a code, Z of the latent.

The convolutions are those of layers/conv_blocks.py, a decoder's level one residual block longer than an encoder's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn

from layers.conv_blocks import conv_keys, decoder, encoder, res_keys
from layers.keymap import Join, Target, translate
from layers.record import look_up
from tokenizers_vis.grid_vq import GridVQ
from tokenizers_vis.quantizers import Quantizer, VectorQuantizer


class VQTokenizer(GridVQ):
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
        decoder_mult = encoder_mult if decoder_mult is None else decoder_mult
        if len(encoder_mult) != len(decoder_mult):
            raise ValueError(
                f"VQTokenizer: encoder_mult has {len(encoder_mult)} levels, decoder_mult {len(decoder_mult)}: "
                "give as many, or the decoded image has another size"
            )
        super().__init__(image_size, quantizer, stride=2 ** (len(encoder_mult) - 1))
        if odd := [channels * m for m in (1, *encoder_mult, *decoder_mult) if channels * m % groups]:
            raise ValueError(f"VQTokenizer: {odd[0]} channels are not divisible into groups={groups}")
        down, up = [channels * m for m in encoder_mult], [channels * m for m in reversed(decoder_mult)]
        self.encoder = encoder(down, channels, z_channels, res_blocks, groups, dropout)
        self.to_code = nn.Conv2d(z_channels, quantizer.dim, 1)
        self.from_code = nn.Conv2d(quantizer.dim, z_channels, 1)
        self.decoder = decoder(up, z_channels, res_blocks + 1, groups, dropout)

    def latent(self, images: Tensor) -> Tensor:
        return self.to_code(self.encoder(images))

    def pixels(self, codes: Tensor) -> Tensor:
        return self.decoder(self.from_code(codes.to(self.from_code.weight.dtype)))


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    joined = {
        f"{theirs}.{name}.{part}": Join(f"{ours}.qkv.{part}", place, 3)
        for place, name in enumerate("qkv")
        for part in ("weight", "bias")
    }
    return joined | conv_keys(f"{theirs}.norm", f"{ours}.norm") | conv_keys(f"{theirs}.proj_out", f"{ours}.out")


def _half(side: str, resample: str) -> dict[str, Target]:
    return {
        **conv_keys(f"{side}.conv_in", f"{side}.stem"),
        **res_keys(f"{side}.conv_blocks.{{i}}.res.{{j}}", f"{side}.levels.{{i}}.res.{{j}}"),
        **_attention(f"{side}.conv_blocks.{{i}}.attn.{{j}}", f"{side}.levels.{{i}}.attn.{{j}}"),
        **conv_keys(f"{side}.conv_blocks.{{i}}.{resample}.conv", f"{side}.levels.{{i}}.resample.conv"),
        **res_keys(f"{side}.mid.0", f"{side}.middle.0"),
        **_attention(f"{side}.mid.1", f"{side}.middle.1"),
        **res_keys(f"{side}.mid.2", f"{side}.middle.2"),
        **conv_keys(f"{side}.norm_out", f"{side}.norm"),
        **conv_keys(f"{side}.conv_out", f"{side}.out"),
    }


LLAMAGEN_VQ_KEYS: dict[str, Target] = {  # both number the levels in the order they run
    **_half("encoder", "downsample"),
    **_half("decoder", "upsample"),
    **conv_keys("quant_conv", "to_code"),
    **conv_keys("post_quant_conv", "from_code"),
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
