"""TiTok: a picture as a short line of tokens, by two plain transformers.

Papers: Yu et al. 2024, "An Image is Worth 32 Tokens for Reconstruction and Generation" (arXiv:2406.07550), in two stages
and, as released later, in one; Kim et al. 2025, "Democratizing Text-to-Image Masked Generative Models with Compact
Text-Aware One-Dimensional Tokens" (arXiv:2501.07730, sec. 3.1), whose decoder reads a caption.

Dims: B batch, H x W pixels, h x w patches, K tokens of C channels, D width of a transformer, S text positions, F what the
decoder says of a patch: 3 p p colours, or logits over V' codes of another tokenizer, of Z channels each.

What to know:
- the encoder reads [start][patches][K latents] and keeps the latents; the decoder reads [start][h w masks][K tokens][text]
  and keeps the masks: nothing but the tokens passes between them;
- in two stages the decoder first learns to name the codes of a grid tokenizer, its teacher (cross entropy: the warm-up);
  then encoder and codebook rest, and the decoder goes on together with the teacher's own decoder, which is fed with the
  mixture of codes under the softmax, not with the likeliest code;
- the two-stage files hold weights that were trained with the K x D latents read as D x K without a transposition, so that
  a token is made of slices of several latents: `legacy_layout`;
- the networks speak of pixels in [0, 1]; here they come and go in [-1, 1] as everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from layers.attention import Attention
from layers.keymap import Target, translate
from layers.record import look_up
from layers.spec import Condition, Grid, TokenSpec
from layers.spec import Sequence as Line
from tokenizers_vis.maskgit_vq import MASKGIT_VQGAN_CONFIG, MaskGITVQTokenizer, decoder, decoder_keys
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer, VectorQuantizer


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), Attention(dim, heads, bias=True)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """(B, N, D) -> (B, N, D), without the last norm. mask: bool, True where a query may look."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x, mask)
        return x


def _table(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, dim))  # as strong as what it is added to: places tell rows apart at once


class LatentEncoder(nn.Module):
    """Pixels in [0, 1] (B, 3, H, W) -> K vectors (B, K, C). legacy_layout: see above."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch: int,
        patches: int,
        tokens: int,
        channels: int,
        legacy_layout: bool,
    ) -> None:
        super().__init__()
        self.legacy_layout = legacy_layout
        self.patch = nn.Conv2d(3, dim, patch, stride=patch)
        self.start, self.place = _table(1, dim), _table(patches + 1, dim)
        self.latents, self.latent_place = _table(tokens, dim), _table(tokens, dim)
        self.trunk = Transformer(dim, depth, heads)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, channels)

    def forward(self, pixels: Tensor) -> Tensor:
        x = rearrange(self.patch(pixels), "b d h w -> b (h w) d")
        x = torch.cat([self.start.expand(len(x), -1, -1), x], 1) + self.place
        latents = (self.latents + self.latent_place).expand(len(x), -1, -1)
        x = self.trunk(torch.cat([x, latents], 1))
        x = self.norm(x[:, -len(self.latents) :])  # (B, K, D)
        if self.legacy_layout:
            x = x.reshape(len(x), x.shape[2], x.shape[1]).transpose(1, 2)
        return self.out(x)


class PatchPixels(nn.Module):
    """What the decoder says of a patch is its colours, (row, column, colour); a convolution mends the seams."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch, self.features = patch, 3 * patch**2
        self.out = nn.Conv2d(3, 3, 3, padding=1)
        nn.init.dirac_(self.out.weight)  # it begins as if it were not there
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """x (B, h w, 3 p p), rows: h -> (B, 3, H, W)."""
        return self.out(rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=self.patch, q=self.patch))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.out.weight


class CodeMixture(nn.Module):
    """What the decoder says of a patch are logits over the codes of a MaskGITVQTokenizer, whose decoder makes the pixels.

    vocab_size: V', of that tokenizer. channels: Z, of its codes. width: of the finest level; mult: multiples of it, fine
    to coarse, for 2^(levels - 1) pixels a side of a patch. blocks: a level, and in the middle. groups: of its norms.
    """

    def __init__(
        self,
        vocab_size: int = 1024,
        channels: int = 256,
        width: int = 128,
        mult: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if odd := [width * m for m in mult if width * m % groups]:
            raise ValueError(f"CodeMixture: {odd[0]} channels are not divisible into groups={groups}")
        self.patch, self.features = 2 ** (len(mult) - 1), vocab_size
        self.rows = nn.Parameter(torch.empty(vocab_size, channels).uniform_(-1 / vocab_size, 1 / vocab_size))
        self.decoder = decoder([width * m for m in reversed(mult)], channels, blocks, groups, dropout)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """x (B, h w, V') logits, rows: h -> (B, 3, H, W)."""
        codes = x.softmax(-1) @ self.rows
        return self.decoder(rearrange(codes, "b (h w) z -> b z h w", h=rows))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.out.weight


class MaskDecoder(nn.Module):
    """K vectors (B, K, C) -> what the patches show (B, h w, F), which `pixels` turns into colours."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patches: int,
        tokens: int,
        channels: int,
        text_slots: int,
        text_dim: int,
        pixels: PatchPixels | CodeMixture,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, dim)
        self.start, self.mask, self.place = _table(1, dim), _table(1, dim), _table(patches + 1, dim)
        self.latent_place = _table(tokens, dim)
        if text_slots:
            self.text, self.text_place = nn.Linear(text_dim, dim), _table(text_slots, dim)
        self.trunk = Transformer(dim, depth, heads)
        self.norm = nn.LayerNorm(dim)
        if isinstance(pixels, CodeMixture):
            self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Tanh(), nn.Linear(2 * dim, pixels.features))
        else:
            self.head = nn.Linear(dim, pixels.features)
        self.pixels = pixels

    def forward(self, codes: Tensor, text: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """text (B, S, T), None: there is none; seen (B, S) bool: which positions of it are looked at, None: all."""
        patches = len(self.place) - 1
        masks = torch.cat([self.start, self.mask.expand(patches, -1)]) + self.place
        parts = [masks.expand(len(codes), -1, -1), self.embed(codes) + self.latent_place]
        look = None
        if text is not None:
            parts.append(self.text(text) + self.text_place)
            if seen is not None:
                look = F.pad(seen, (1 + patches + codes.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, N)
        x = self.trunk(torch.cat(parts, 1), look)
        return self.head(self.norm(x[:, 1 : 1 + patches]))


class TiTokTokenizer(Tokenizer):
    """Images of one size <-> K tokens without a place in the picture: codes of a quantiser, or a Gaussian's values.

    Raises ValueError for sizes that contradict each other, naming both.

    Args:
        image_size: Height and width in pixels, or one number for both.
        tokens: K.
        quantizer: Makes the tokens discrete; its `dim` is C.
        channels: C of continuous tokens, which have a Gaussian posterior; give this or a quantizer.
        scale: What continuous tokens are multiplied by so that they have unit variance.
        encoder_dim: Width of the encoder.
        encoder_depth: Its blocks.
        encoder_heads: Its heads of attention.
        encoder_patch: Pixels a side of a patch that it reads.
        decoder_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_heads: Its heads of attention.
        decoder_patch: Pixels a side of a patch that it makes.
        text_slots: Positions of the captions that the decoder reads; 0: it reads none.
        text_dim: Width of a position.
        pixels: Two stages: what makes pixels of the codes that the decoder names; null: one stage, it names colours.
        train_tokens: Whether encoder and codebook learn; false: they rest, as in the second stage.
        legacy_layout: Whether latents are read in the order of the published two-stage files.
        teacher: For the warm-up: forward then trains the decoder to name its codes. Its codebook and decoder are copied to
            `pixels`, which rest. It is not part of the state.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        tokens: int,
        quantizer: Quantizer | None = None,
        channels: int | None = None,
        scale: float = 1.0,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        encoder_patch: int = 16,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_heads: int = 12,
        decoder_patch: int = 16,
        text_slots: int = 0,
        text_dim: int = 768,
        pixels: CodeMixture | None = None,
        train_tokens: bool = True,
        legacy_layout: bool = False,
        teacher: MaskGITVQTokenizer | None = None,
    ) -> None:
        super().__init__()
        if (quantizer is None) == (channels is None):
            raise ValueError(
                "TiTokTokenizer: give a quantizer (discrete tokens) or channels (continuous ones), one of them"
            )
        if quantizer is not None and quantizer.depth != 1:
            raise ValueError(
                f"TiTokTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a token is 1"
            )
        if not scale > 0 or (quantizer is not None and scale != 1):
            raise ValueError(f"TiTokTokenizer: scale is {scale}, must be positive, and 1 for discrete tokens")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, patch in (("encoder_patch", encoder_patch), ("decoder_patch", decoder_patch)):
            if height % patch or width % patch:
                raise ValueError(f"TiTokTokenizer: image_size {height} x {width} is not divisible by {name}={patch}")
        if pixels is not None and pixels.patch != decoder_patch:
            raise ValueError(
                f"TiTokTokenizer: decoder_patch is {decoder_patch}, a code of pixels stands for {pixels.patch} a side"
            )
        dims = channels if quantizer is None else quantizer.dim
        vocab_size = None if quantizer is None else quantizer.vocab_size
        self.spec = TokenSpec(Line(tokens), decoded=(1, height, width), vocab_size=vocab_size, channels=channels)
        self.prefixes = (tokens,)
        self.scale, self.text_shape, self.train_tokens = scale, (text_slots, text_dim), train_tokens
        self.grid = Grid(1, height // decoder_patch, width // decoder_patch)
        outputs, patches = 2 * dims if quantizer is None else dims, height * width // encoder_patch**2
        self.encoder = LatentEncoder(
            encoder_dim, encoder_depth, encoder_heads, encoder_patch, patches, tokens, outputs, legacy_layout
        )
        self.quantizer = quantizer
        pixels = PatchPixels(decoder_patch) if pixels is None else pixels
        self.decoder = MaskDecoder(
            decoder_dim, decoder_depth, decoder_heads, self.grid.length, tokens, dims, text_slots, text_dim, pixels
        )
        for module in (self.encoder, *(part for name, part in self.decoder.named_children() if name != "pixels")):
            module.apply(_init)
        with torch.no_grad():  # the encoder begins as if the pixels came in [-1, 1]: else all pictures look alike to it
            self.encoder.patch.weight.mul_(2)
            self.encoder.patch.bias.copy_(-self.encoder.patch.weight.sum((1, 2, 3)) / 2)
        if not train_tokens:
            self.encoder.requires_grad_(False)
            if quantizer is not None:
                quantizer.requires_grad_(False)
        self._teacher = () if teacher is None else (self._taught_by(teacher),)  # a tuple: no part of the state

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and reconstruction loss (VQGAN, eq. 7)."""
        return self.decoder.pixels.last_layer

    @torch.no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens int64 (B, K), or float (B, K, C).

        noise: of discrete tokens uniforms in [0, 1), (B, K), for a quantiser that draws; of continuous ones standard
        normal (B, K, C), for a sample of the posterior. None: the nearest codes, the posterior's mean.
        Raises ValueError for images of another size than `spec.decoded`.
        """
        if self.quantizer is not None:
            return self.quantizer.assign(self._vectors(images), noise)
        law = self.posterior(images)
        return self.scale * (law.mean if noise is None else law.mean + law.stddev * noise)

    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, K) in [0, V), or float (B, K, C) -> images (B, 3, H, W), unclamped.

        condition: its text (B, S, T) is read by a decoder with text_slots; where there is none, `keep` is False, or
        `text_mask` is False, nothing is looked at. All tokens decode together, so `present` must stay None; `noise` has
        nothing to change here.
        Raises ValueError for another shape, ids outside [0, V), a given `present`, text of another shape.
        """
        if present is not None:
            raise ValueError("TiTokTokenizer: decodes all its tokens only, so present must be None")
        expected = (self.spec.length,) if self.quantizer is not None else (self.spec.length, self.spec.channels)
        if tokens.shape[1:] != expected:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"TiTokTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, {wanted})")
        codes = tokens / self.scale if self.quantizer is None else self.embed(tokens)
        return self._images(self._patches(codes, condition))

    def forward(self, images: Tensor, condition: Condition | None = None) -> tuple[Tensor | None, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1], condition as in `decode` -> reconstruction (B, 3, H, W), parts.

        parts: discrete: "ids" (B, K), and the quantiser's losses by name; continuous: "kl", summed over the latent, mean
        over pictures; "stats". Where the tokens rest there are no such losses. With a teacher the reconstruction is None
        and "proxy" the cross entropy of the patches' logits and its codes.
        """
        with torch.set_grad_enabled(self.train_tokens and torch.is_grad_enabled()):
            codes, parts = self._codes(images)
        patches = self._patches(codes, condition)
        if not self._teacher:
            return self._images(patches), parts
        target = self._teacher[0].to(images.device).encode(images)  # (B, h w)
        return None, {**parts, "proxy": F.cross_entropy(patches.float().transpose(1, 2), target)}

    def posterior(self, images: Tensor) -> Normal:
        """images (B, 3, H, W) in [-1, 1] -> the law of continuous tokens (B, K, C), before `scale`.

        Raises ValueError where the tokens are discrete, and as `encode`.
        """
        if self.quantizer is not None:
            raise ValueError("TiTokTokenizer: these tokens are discrete, they have no posterior")
        mean, logvar = self._vectors(images).float().chunk(2, -1)
        return Normal(mean, (logvar.clamp(-30, 20) / 2).exp(), validate_args=False)

    def codebook(self) -> Tensor:
        """(V, C), as the decoder gets them."""
        return self._codes_only().codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., C). Raises ValueError for ids outside [0, V), and without a codebook."""
        quantizer = self._codes_only()
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= quantizer.vocab_size:
            raise ValueError(
                f"TiTokTokenizer: ids from {low} to {high}, the codebook has 0 to {quantizer.vocab_size - 1}"
            )
        return quantizer.embed(tokens)

    def _codes_only(self) -> Quantizer:
        if self.quantizer is None:
            raise ValueError("TiTokTokenizer: these tokens are continuous, there is no codebook")
        return self.quantizer

    def _vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, C), of continuous tokens (B, K, 2C)."""
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"TiTokTokenizer: got images {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))})"
            )
        return self.encoder((images + 1) / 2)

    def _codes(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Training's codes (B, K, C), with gradient to the encoder, and the parts about them."""
        if self.quantizer is None:
            law = self.posterior(images)
            stats = {"latent_std": law.mean.detach().std(), "posterior_std": law.stddev.detach().mean()}
            parts = {"stats": stats}
            if self.train_tokens:
                unit = Normal(torch.zeros_like(law.mean), 1.0, validate_args=False)
                parts["kl"] = kl_divergence(law, unit).sum((1, 2)).mean()
            return law.rsample(), parts
        if not self.train_tokens:
            ids = self.quantizer.assign(self._vectors(images))
            return self.quantizer.embed(ids), {"ids": ids}
        out = self.quantizer(self._vectors(images))
        return out.z_q, {**out.losses, "ids": out.ids, "stats": out.stats}

    def _patches(self, codes: Tensor, condition: Condition | None) -> Tensor:
        """(B, K, C) -> (B, h w, F)."""
        text = None if condition is None else condition.text
        slots, dim = self.text_shape
        if not slots or text is None:
            return self.decoder(codes)
        if text.shape != (len(codes), slots, dim):
            raise ValueError(
                f"TiTokTokenizer: got text {tuple(text.shape)}, {len(codes)} pictures are decoded with "
                f"({len(codes)}, {slots}, {dim})"
            )
        seen = condition.text_mask
        if condition.keep is not None:
            kept = condition.keep[:, None].expand(-1, slots)
            seen = kept if seen is None else seen & kept
        return self.decoder(codes, text, seen)

    def _images(self, patches: Tensor) -> Tensor:
        return 2 * self.decoder.pixels(patches, self.grid.h) - 1

    def _taught_by(self, teacher: MaskGITVQTokenizer) -> MaskGITVQTokenizer:
        pixels = self.decoder.pixels
        if not isinstance(pixels, CodeMixture):
            raise ValueError(
                "TiTokTokenizer: a teacher needs pixels, a CodeMixture that takes over its codes and decoder"
            )
        if (teacher.spec.layout, teacher.spec.vocab_size) != (self.grid, pixels.features):
            raise ValueError(
                f"TiTokTokenizer: the decoder names {pixels.features} codes on {self.grid}, the teacher makes "
                f"{teacher.spec.vocab_size} on {teacher.spec.layout}"
            )
        with torch.no_grad():
            pixels.rows.copy_(teacher.codebook())
        pixels.decoder.load_state_dict(teacher.decoder.state_dict())
        pixels.requires_grad_(False)
        return teacher.eval().requires_grad_(False)


def _init(module: nn.Module) -> None:
    """Normal, of deviation 0.7 / sqrt(inputs): at the widths of the paper its 0.02, and not too little at smaller ones."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.7 * module.weight[0].numel() ** -0.5)
        nn.init.zeros_(module.bias)


# ---- the published files


def _flat(tensor: Tensor) -> Tensor:
    """A 1 x 1 convolution (c, d, 1, 1) as a matrix, the mask token (1, 1, D) as a row."""
    return tensor.flatten(1)


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _pointwise(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.weight": (f"{ours}.weight", _flat), f"{theirs}.bias": f"{ours}.bias"}


def _vit(side: str) -> dict[str, Target]:
    theirs, ours = f"{side}.transformer.{{i}}", f"{side}.trunk.blocks.{{i}}"
    return {
        f"{side}.class_embedding": f"{side}.start",
        f"{side}.positional_embedding": f"{side}.place",
        f"{side}.latent_token_positional_embedding": f"{side}.latent_place",
        **_both(f"{side}.ln_pre", f"{side}.trunk.norm"),
        **_both(f"{theirs}.ln_1", f"{ours}.attention_norm"),
        f"{theirs}.attn.in_proj_weight": f"{ours}.attention.qkv.weight",
        f"{theirs}.attn.in_proj_bias": f"{ours}.attention.qkv.bias",
        **_both(f"{theirs}.attn.out_proj", f"{ours}.attention.out"),
        **_both(f"{theirs}.ln_2", f"{ours}.mlp_norm"),
        **_both(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1"),
        **_both(f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"),
        **_both(f"{side}.ln_post", f"{side}.norm"),
    }


TITOK_KEYS: dict[str, Target] = {  # of every file
    "latent_tokens": "encoder.latents",
    **_both("encoder.patch_embed", "encoder.patch"),
    **_vit("encoder"),
    **_pointwise("encoder.conv_out", "encoder.out"),
    "quantize.embedding.weight": "quantizer.rows",
    "quantize.embed_prob": None,  # how often codes were used, for the training rule that revives them
    **_both("decoder.decoder_embed", "decoder.embed"),
    "decoder.mask_token": ("decoder.mask", _flat),
    **_vit("decoder"),
    **_both("decoder.text_guidance_proj", "decoder.text"),
    "decoder.text_guidance_positional_embedding": "decoder.text_place",
}
ONE_STAGE_KEYS: dict[str, Target] = {
    **_pointwise("decoder.ffn.0", "decoder.head"),
    **_both("decoder.conv_out", "decoder.pixels.out"),
}
TITOK_CONFIG: dict[str, Any] = {  # their section model.vq_model and its values where it leaves one out
    "quantize_mode": "vq",
    "codebook_size": 4096,
    "token_size": 12,
    "use_l2_norm": False,
    "commitment_cost": 0.25,
    "clustering_vq": False,
    "vit_enc_model_size": "base",
    "vit_dec_model_size": "base",
    "vit_enc_patch_size": 16,
    "vit_dec_patch_size": 16,
    "num_latent_tokens": 32,
    "finetune_decoder": True,
    "is_legacy": True,
    "pretrained_tokenizer_weight": None,  # a path of theirs
    "text_context_length": 77,
    "text_embed_dim": 768,
    # fixed in their code
    "pixel_codebook": 1024,
    "pixel_cfg": {},  # what differs from the published maskgit-vqgan
    "scale_factor": 1.0,  # not of the file
}
SIZES: dict[str, dict[str, int]] = {
    "small": {"width": 512, "layers": 8, "heads": 8},
    "base": {"width": 768, "layers": 12, "heads": 12},
    "large": {"width": 1024, "layers": 24, "heads": 16},
}


def titok_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> TiTokTokenizer:
    """TiTok or TA-TiTok under the original configuration: its sections `model` and `dataset`, others are not read.

    A file with keys of a caption's projection has a text-aware decoder. `size_table` adds sizes to SIZES. In eval mode
    and float32. Raises UnknownName for an option or a size that they do not have, ValueError for options that contradict
    each other or a file of the first stage, CheckpointMismatch listing all keys that do not fit.
    """
    given = config["model"]["vq_model"]
    for name in given:
        look_up(name, TITOK_CONFIG, "titok: config key")
    options = TITOK_CONFIG | dict(given)
    continuous = look_up(options["quantize_mode"], {"vq": False, "vae": True}, "titok: quantize_mode")
    two_stage, legacy = options["finetune_decoder"], options["is_legacy"]
    if two_stage != legacy or (two_stage and continuous):
        raise ValueError(
            f"titok: finetune_decoder is {two_stage}, is_legacy {legacy}, quantize_mode {options['quantize_mode']}; files "
            "that decode to pictures have both and vq (two stages), or neither (one stage). A file of the first stage: add "
            "the tensors of maskgit-vqgan but the encoder's, with pixel_ before their names, and set finetune_decoder"
        )
    sizes = SIZES | dict(config.get("size_table", {}))
    enc, dec = (look_up(options[f"vit_{side}_model_size"], sizes, "titok: size") for side in ("enc", "dec"))
    text = any(key.startswith("decoder.text_guidance") for key in state)
    with init_empty_weights(include_buffers=False):
        pixels, own_keys = _two_stage(options) if two_stage else (None, ONE_STAGE_KEYS)
        codes = VectorQuantizer(options["codebook_size"], options["token_size"], normalize=options["use_l2_norm"])
        tokenizer = TiTokTokenizer(
            config["dataset"]["preprocessing"]["crop_size"],
            options["num_latent_tokens"],
            quantizer=None if continuous else codes,
            channels=options["token_size"] if continuous else None,
            scale=options["scale_factor"],
            encoder_dim=enc["width"],
            encoder_depth=enc["layers"],
            encoder_heads=enc["heads"],
            encoder_patch=options["vit_enc_patch_size"],
            decoder_dim=dec["width"],
            decoder_depth=dec["layers"],
            decoder_heads=dec["heads"],
            decoder_patch=options["vit_dec_patch_size"],
            text_slots=options["text_context_length"] if text else 0,
            text_dim=options["text_embed_dim"],
            pixels=pixels,
            legacy_layout=legacy,
        )
    tokenizer.load_state_dict(translate(state, TITOK_KEYS | own_keys, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()


def _two_stage(options: Mapping[str, Any]) -> tuple[CodeMixture, dict[str, Target]]:
    for name in options["pixel_cfg"]:
        look_up(name, MASKGIT_VQGAN_CONFIG, "titok: key of pixel_cfg")
    sizes = MASKGIT_VQGAN_CONFIG | dict(options["pixel_cfg"])
    mult, levels = sizes["channel_mult"], sizes["num_resolutions"]
    if levels != len(mult) or sizes["num_channels"] != 3:
        raise ValueError(
            f"titok: pixel_cfg: num_resolutions {levels} must count channel_mult {list(mult)}, num_channels "
            f"{sizes['num_channels']} must be 3"
        )
    blocks, groups, width = sizes["num_res_blocks"], sizes["num_groups"], sizes["hidden_channels"]
    pixels = CodeMixture(options["pixel_codebook"], sizes["z_channels"], width, mult, blocks, groups, sizes["dropout"])
    return pixels, {
        **_pointwise("decoder.ffn.0", "decoder.head.0"),
        **_pointwise("decoder.ffn.2", "decoder.head.2"),
        "pixel_quantize.embedding.weight": "decoder.pixels.rows",
        **decoder_keys(levels, "pixel_decoder", "decoder.pixels.decoder"),
    }
