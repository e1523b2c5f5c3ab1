"""Multi-scale residual VQ autoencoder: an image becomes K grids of codes, coarse to fine, of one codebook.

Paper: Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction"
(arXiv:2404.02905, sec. 3.2, algorithms 1 and 2).

Dims: B batch, K scales, scale k of (h_k, w_k) cells, L tokens of all scales, V codes of C channels, f the latent and
feature map (B, C, H/16, W/16) at the size of the last scale.

What to know:
- scale k quantises what the scales before it left of f, averaged down to its cells; what its codes add to f (resized
  up, through a convolution phi) is subtracted before the next scale: the arithmetic is that of layers/pyramid.py;
- the ids are chosen without gradient, first; the codebook learns from the vectors that they stand for, where it learns
  by itself (running means, new vectors for dead codes); the loss then walks the same ids once more;
- the losses compare f with the sum after every scale, so each prefix of scales is trained to be a picture;
- any prefix of whole scales decodes, always at full size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from einops import rearrange
from torch import Tensor, nn

from layers.conv_blocks import conv_keys, decoder, encoder, res_keys
from layers.keymap import Target, translate
from layers.pyramid import ScaleReader, Scales
from layers.record import look_up
from layers.spec import Condition, Pyramid, TokenSpec
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer, VectorQuantizer
from tokenizers_vis.quantizers.protocol import straight_through
from tokenizers_vis.quantizers.usage import code_counts, usage_metrics


class DirectionQuantizer(VectorQuantizer):
    """The row of the largest cosine, as it is stored: lengths are not compared, and not lost."""

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        return self._choose(z, self.codebook())

    def _choose(self, z: Tensor, rows: Tensor) -> Tensor:
        return (F.normalize(z, dim=-1) @ F.normalize(rows, dim=-1).t()).argmax(-1)


class MultiScaleVQTokenizer(Tokenizer):
    """Images of one size <-> K grids of codes.

    scales: cells of each scale, coarse to fine, (h, w) or one number for both; a picture has 2^(len(mult) - 1) times as
    many pixels as the last. channels, mult: a level is channels * mult wide, fine to coarse. res_blocks: of an encoder
    level. groups: of every GroupNorm. phis, phi_ratio: see layers.pyramid.Scales. code_kernel: of the convolutions
    around the codes. drop_scales: in training, the share of pictures that are decoded from a random number of scales.
    Raises ValueError for scales that do not grow to the last, and a quantiser with more than one id a vector.
    """

    def __init__(
        self,
        scales: Sequence[int | tuple[int, int]],
        quantizer: Quantizer,
        channels: int = 160,
        mult: Sequence[int] = (1, 1, 2, 2, 4),
        res_blocks: int = 2,
        groups: int = 32,
        phis: int | None = 4,
        phi_ratio: float = 0.5,
        code_kernel: int = 3,
        dropout: float = 0.0,
        drop_scales: float = 0.0,
    ) -> None:
        super().__init__()
        if quantizer.depth != 1:
            raise ValueError(
                f"MultiScaleVQTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a scale holds "
                "1 a cell"
            )
        c, widths, pad = quantizer.dim, [channels * m for m in mult], code_kernel // 2
        self.scales = Scales([(s, s) if isinstance(s, int) else s for s in scales], c, phis, phi_ratio)
        f = 2 ** (len(mult) - 1)
        self.spec = TokenSpec(
            Pyramid(self.scales.sizes),
            decoded=(1, self.scales.height * f, self.scales.width * f),
            vocab_size=quantizer.vocab_size,
        )
        self.prefixes = self.scales.prefixes
        self.drop_scales = drop_scales
        self.encoder = encoder(widths, channels, c, res_blocks, groups, dropout)
        self.to_code = nn.Conv2d(c, c, code_kernel, padding=pad)
        self.quantizer = quantizer
        self.from_code = nn.Conv2d(c, c, code_kernel, padding=pad)
        self.decoder = decoder(widths[::-1], c, res_blocks + 1, groups, dropout)

    @torch.no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens int64 (B, L).

        noise: uniforms in [0, 1), (B, L), for a quantiser that draws; None: the nearest codes.
        Raises ValueError for images of another size than `spec.decoded`.
        """
        return self._assign(self._latent(images), noise)[0]

    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, n) in [0, V) of the first scales, n one of `prefixes` -> images (B, 3, H, W), unclamped.

        Whole scales decode, so `present` must stay None; `condition` and `noise` have nothing to change here.
        Raises ValueError for another n, ids outside [0, V), a given `present`.
        """
        if present is not None:
            raise ValueError("MultiScaleVQTokenizer: decodes whole scales only, so present must be None")
        if tokens.dim() != 2 or tokens.shape[1] not in self.prefixes:
            raise ValueError(
                f"MultiScaleVQTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, n), n one of {self.prefixes}"
            )
        *_, f = self.scales.sums(self.embed(tokens))
        return self.pixels(f)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W), parts.

        parts: "codebook" and "commitment", the mean over scales of the squared distance of f and the sum so far, with
        gradient to the codes and phi, or to f; "ids" (B, L); "stats": of the quantiser, and each scale's perplexity in
        this batch.
        """
        f = self._latent(images)
        ids, rest = self._assign(f.detach())
        stats = self.quantizer(self._evenly(rest)).stats if self.training else {}
        sums = torch.stack(list(self.scales.sums(self.quantizer.embed(ids))))  # (K, B, C, H/16, W/16)
        losses = {
            "codebook": F.mse_loss(sums, f.detach().expand_as(sums)),
            "commitment": F.mse_loss(f.expand_as(sums), sums.detach()),
        }
        for k, part in enumerate(ids.split(self.scales.lengths, dim=1)):
            counts = code_counts(part, self.spec.vocab_size)
            stats = {**stats, f"perplexity_scale_{k}": usage_metrics(counts)["perplexity"]}
        shown = self.pixels(straight_through(f, self._last_sum(sums)))
        return shown, {**losses, "ids": ids, "stats": stats}

    def reader(self) -> ScaleReader:
        """What a generator feeds on: a frozen copy of the codebook and the phi."""
        first = self.scales.phi[0]
        reader = ScaleReader(
            self.scales.sizes,
            self.spec.vocab_size,
            self.scales.channels,
            phis=len(self.scales.phi),
            ratio=getattr(first, "ratio", 0.0),
        )
        weights = {f"scales.{name}": tensor for name, tensor in self.scales.state_dict().items()}
        reader.load_state_dict({"codebook": self.codebook(), **weights})
        return reader.to(self.from_code.weight.device).eval()

    def codebook(self) -> Tensor:
        """(V, C), as the scales get them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., C). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(
                f"MultiScaleVQTokenizer: ids from {low} to {high}, the codebook has 0 to {self.spec.vocab_size - 1}"
            )
        return self.quantizer.embed(tokens)

    def pixels(self, f: Tensor) -> Tensor:
        """f, a reader's memory, (B, C, h, w) -> images (B, 3, H, W), unclamped."""
        return self.decoder(self.from_code(f.to(self.from_code.weight.dtype)))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and reconstruction loss (VQGAN, eq. 7)."""
        return self.decoder.out.weight

    def _latent(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> f (B, C, h, w), in float32 or better."""
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"MultiScaleVQTokenizer: got images {tuple(images.shape)}, made for (B, "
                f"{', '.join(map(str, expected))}); build it with other scales, the weights fit any"
            )
        f = self.to_code(self.encoder(images))
        return f.to(torch.promote_types(f.dtype, torch.float32))

    @torch.no_grad()
    def _assign(self, f: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f (B, C, h, w) -> ids (B, L), and the vectors that they stand for (B, L, C): scale k's are what the scales
        before it left."""
        ids, seen = [], []
        draws = [None] * len(self.scales.sizes) if noise is None else noise.split(self.scales.lengths, dim=1)
        for k, draw in enumerate(draws):
            seen.append(self.scales.pool(f, k))
            ids.append(self.quantizer.assign(seen[-1], draw))
            f = f - self.scales.spread(self.quantizer.embed(ids[-1]), k)
        return torch.cat(ids, 1), torch.cat(seen, 1)

    def _evenly(self, z: Tensor) -> Tensor:
        """The vectors of all scales (B, L, C) -> (N, C), as many of each scale, thinned out or repeated at random.

        The codebook learns from these: the fine scales are most of L, and would take the codes from the coarse ones.
        """
        count = -(-z.shape[0] * z.shape[1] // len(self.prefixes))
        even = []
        for part in z.split(self.scales.lengths, dim=1):
            part = rearrange(part, "b n c -> (b n) c")
            turn = torch.arange(count, device=z.device) % len(part)
            even.append(part[torch.randperm(len(part), device=z.device)[turn]])
        return torch.cat(even)

    def _last_sum(self, sums: Tensor) -> Tensor:
        """(K, B, C, h, w) -> (B, C, h, w): of all scales; in training, of a random number of them for some pictures."""
        if not (self.training and self.drop_scales):
            return sums[-1]
        count, rows = sums.shape[:2]
        last = torch.randint(count, (rows,), device=sums.device)
        last = torch.where(torch.rand(rows, device=sums.device) < self.drop_scales, last, count - 1)
        return sums[last, torch.arange(rows, device=sums.device)]


def _half(side: str, resample: str, theirs: str, levels: Sequence[int], deepest: int) -> dict[str, Target]:
    """levels: the number that theirs has of each level, in the order they run; deepest: of that with attention."""
    keys = {
        **conv_keys(f"{side}.conv_in", f"{side}.stem"),
        **res_keys(f"{side}.mid.block_1", f"{side}.middle.0"),
        **_attention(f"{side}.mid.attn_1", f"{side}.middle.1"),
        **res_keys(f"{side}.mid.block_2", f"{side}.middle.2"),
        **conv_keys(f"{side}.norm_out", f"{side}.norm"),
        **conv_keys(f"{side}.conv_out", f"{side}.out"),
    }
    for ours, number in enumerate(levels):
        here, level = f"{side}.{theirs}.{number}", f"{side}.levels.{ours}"
        keys |= res_keys(f"{here}.block.{{j}}", f"{level}.res.{{j}}")
        keys |= conv_keys(f"{here}.{resample}.conv", f"{level}.resample.conv")
        if number == deepest:
            keys |= _attention(f"{here}.attn.{{j}}", f"{level}.attn.{{j}}")
    return keys


def _attention(theirs: str, ours: str) -> dict[str, Target]:
    pairs = [("norm", "norm"), ("qkv", "qkv"), ("proj_out", "out")]
    return {k: v for a, b in pairs for k, v in conv_keys(f"{theirs}.{a}", f"{ours}.{b}").items()}


def var_vqvae_keys(levels: int) -> dict[str, Target]:
    """The key map of `levels` resolutions. The decoder's `up` are numbered fine to coarse, ours in the order they run."""
    return {
        **_half("encoder", "downsample", "down", range(levels), levels - 1),
        **_half("decoder", "upsample", "up", range(levels)[::-1], levels - 1),
        **conv_keys("quant_conv", "to_code"),
        **conv_keys("post_quant_conv", "from_code"),
        "quantize.embedding.weight": "quantizer.rows",
        **conv_keys("quantize.quant_resi.qresi_ls.{j}", "scales.phi.{j}"),  # some phi, shared by neighbouring scales
        **conv_keys("quantize.quant_resi.qresi", "scales.phi.0"),  # one phi for all
        **conv_keys("quantize.quant_resi.{j}", "scales.phi.{j}"),  # one phi a scale
        "quantize.ema_vocab_hit_SV": None,  # running use of the codes in training: bookkeeping
    }


VAR_VQVAE_CONFIG: dict[str, Any] = {  # their constructor arguments and defaults
    "vocab_size": 4096,
    "z_channels": 32,
    "ch": 128,
    "dropout": 0.0,
    "using_znorm": False,
    "quant_conv_ks": 3,
    "quant_resi": 0.5,
    "share_quant_resi": 4,
    "default_qresi_counts": 0,
    "v_patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    # fixed in their code
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "num_groups": 32,
    # of their training, no part of the model
    "beta": 0.25,
    "test_mode": True,
}


def var_vqvae_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MultiScaleVQTokenizer:
    """VAR's VQVAE from its tensors and constructor arguments, in eval mode and float32.

    It takes the tensors of `state` as they are, without a copy, where they are float32 already.
    Raises UnknownName for an argument it does not have, CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, VAR_VQVAE_CONFIG, "var-vqvae: config key")
    config = VAR_VQVAE_CONFIG | dict(config)
    quantizer = DirectionQuantizer if config["using_znorm"] else VectorQuantizer
    phis = config["share_quant_resi"] or config["default_qresi_counts"] or None
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        tokenizer = MultiScaleVQTokenizer(
            config["v_patch_nums"],
            quantizer(config["vocab_size"], config["z_channels"]),
            channels=config["ch"],
            mult=config["ch_mult"],
            res_blocks=config["num_res_blocks"],
            groups=config["num_groups"],
            phis=phis,
            phi_ratio=config["quant_resi"],
            code_kernel=config["quant_conv_ks"],
            dropout=config["dropout"],
        )
    keys = var_vqvae_keys(len(config["ch_mult"]))
    tokenizer.load_state_dict(translate(state, keys, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()
