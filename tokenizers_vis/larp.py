"""LARPTokenizer: a clip becomes a sequence of codes that learned queries gather from all of it, not from places in it.

Paper: Wang et al. 2024, "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior" (arXiv:2410.21264,
sec. 3). The prior that orders the codes while the tokenizer learns is in training/larp_prior.py.

Dims: B batch, T x H x W clip, t x h x w grid of patches, P = t*h*w, n tokens, D width, C channels of a code.

What to know:
- both halves are transformers over two sequences put one behind the other, with attention in all directions; only the
  second comes out. The encoder reads [patches][queries], the decoder [codes][places of patches];
- as n queries are a table of the model, n is any number, chosen when it is made; there is no order in space among them;
- the places of patches are sums of sines: of row and column over all of D, and of the frame over all of D again;
- the encoder ends without a norm, a code's length is 1, and in training it is drawn (StochasticVectorQuantizer);
- the network speaks of pixels in [0, 1]; here they come and go in [-1, 1] as everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from einops.layers.torch import Rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from layers.keymap import Target, translate
from layers.record import look_up
from layers.sincos import sincos, sincos_3d
from layers.spec import Condition, Grid, TokenSpec
from layers.spec import Sequence as Line
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer, StochasticVectorQuantizer, VectorQuantizer

PLACES = ("video", "queries", "codes", "patches")  # the four sequences, in the order in which they are read

NORMS: dict[str, Callable[[int, int], nn.Module]] = {  # of (B, n, C), by the axes whose numbers one mean is taken of
    "none": lambda n, c: nn.Identity(),
    "batch and tokens": lambda n, c: nn.Sequential(
        Rearrange("b n c -> b c n"), nn.SyncBatchNorm(c), Rearrange("b c n -> b n c")
    ),
    "batch": lambda n, c: nn.Sequential(
        Rearrange("b n c -> b (n c)"), nn.SyncBatchNorm(n * c), Rearrange("b (n c) -> b n c", n=n)
    ),
    "channels": lambda n, c: nn.LayerNorm(c),
    "tokens and channels": lambda n, c: nn.LayerNorm((n, c)),
}


class Places(nn.Module):
    """What is added to a sequence, or stands for it: () -> (L, D).

    axes: a table (n, D) an axis, the first axis slowest; a place is the sum of its row of each. learned: the tables are
    parameters. kind: one more learned vector, the same for all places.
    """

    def __init__(self, axes: Sequence[Tensor], learned: bool, kind: bool) -> None:
        super().__init__()
        self.axes = [f"axis_{i}" for i in range(len(axes))]
        for name, table in zip(self.axes, axes, strict=True):
            if learned:
                self.register_parameter(name, nn.Parameter(table))
            else:
                self.register_buffer(name, table)
        self.kind = nn.Parameter(torch.randn(axes[0].shape[-1]) * 0.02) if kind else None

    def forward(self) -> Tensor:
        table, *rest = (getattr(self, name) for name in self.axes)
        for axis in rest:
            table = rearrange(table[:, None] + axis, "a b d -> (a b) d")
        return table if self.kind is None else table + self.kind


class Transformer(nn.Module):
    """context (B, m, D), query (B, l, D) -> what became of the query (B, l, D). No norm at the end."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-5)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=False, norm_layer=norm) for _ in range(depth)))

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        return self.blocks(torch.cat((context, query), dim=1))[:, context.shape[1] :]


class LARPTokenizer(Tokenizer):
    """Clips of one size <-> a sequence of n codes.

    video: (T, H, W). tokens: n. patch: (frames, rows, columns) of a patch. decoder_dim, decoder_depth, decoder_heads None:
    the encoder's. norm: of the vectors before the quantiser, a name of NORMS. learned: which of PLACES are learned tables
    and not fixed sines; kinds: which have a learned vector of their own beside these. local_start: see `_start_locally`;
    all PLACES must be learned, and a token be there for each patch. Raises ValueError for a clip that the patches do not
    divide, a quantiser with more than one id a vector, heads that do not divide the width, a local start without these.
    """

    def __init__(
        self,
        video: Sequence[int],
        tokens: int,
        quantizer: Quantizer,
        patch: Sequence[int] = (4, 8, 8),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        norm: Literal["none", "batch and tokens", "batch", "channels", "tokens and channels"] = "none",
        learned: Sequence[str] = ("queries",),
        kinds: Sequence[str] = ("patches",),
        local_start: bool = False,
    ) -> None:
        super().__init__()
        decoder_dim, decoder_heads = decoder_dim or dim, decoder_heads or heads
        if len(video) != 3 or len(patch) != 3 or any(size % part for size, part in zip(video, patch, strict=True)):
            raise ValueError(
                f"LARPTokenizer: video {tuple(video)} is not divisible by patch {tuple(patch)} (frames, rows, columns)"
            )
        if quantizer.depth != 1:
            raise ValueError(
                f"LARPTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a token is 1"
            )
        if dim % heads or decoder_dim % decoder_heads:
            raise ValueError(
                f"LARPTokenizer: heads={heads} must divide dim={dim}, decoder_heads={decoder_heads} decoder_dim={decoder_dim}"
            )
        for name in (*learned, *kinds):
            look_up(name, dict.fromkeys(PLACES), "LARPTokenizer: place")
        self.spec = TokenSpec(Line(tokens), decoded=tuple(video), vocab_size=quantizer.vocab_size)
        self.prefixes = (tokens,)
        self.grid = Grid(*(size // part for size, part in zip(video, patch, strict=True)))
        self.patch = tuple(patch)

        def places(name: str, axes: Sequence[Tensor]) -> Places:
            return Places(axes, name in learned, name in kinds)

        def of_patches(name: str, dim: int) -> Places:
            grid = self.grid
            if name in learned:
                return places(name, [sincos(torch.arange(size), dim) for size in (grid.t, grid.h, grid.w)])
            return places(name, [sincos_3d(grid, dim)])

        def of_tokens(name: str, dim: int) -> Places:
            start = torch.randn(tokens, dim) * 0.02 if name in learned else sincos(torch.arange(tokens), dim)
            return places(name, [start])

        self.patches = nn.Conv3d(3, dim, self.patch, stride=self.patch)
        self.at_video, self.at_queries = of_patches("video", dim), of_tokens("queries", dim)
        self.encoder = Transformer(dim, depth, heads)
        self.to_code = nn.Linear(dim, quantizer.dim)
        self.norm = look_up(norm, NORMS, "LARPTokenizer: norm")(tokens, quantizer.dim)
        self.from_code = nn.Linear(quantizer.dim, decoder_dim)
        self.at_codes, self.at_patches = of_tokens("codes", decoder_dim), of_patches("patches", decoder_dim)
        self.decoder = Transformer(decoder_dim, decoder_depth or depth, decoder_heads)
        self.out_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.out = nn.Linear(decoder_dim, 3 * self.patch[0] * self.patch[1] * self.patch[2])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(dim, -1))
        nn.init.zeros_(self.patches.bias)
        nn.init.zeros_(self.out.weight)
        self.quantizer = quantizer
        if local_start:
            if tokens != self.grid.length or set(learned) != set(PLACES):
                raise ValueError(
                    f"LARPTokenizer: local_start needs a token a patch, {self.grid.length}, and learned {PLACES}; "
                    f"got {tokens} tokens, learned {tuple(learned)}"
                )
            self._start_locally()

    @torch.no_grad()
    def _start_locally(self) -> None:
        """Let query i begin by reading patch i, and the place of patch i by reading code i: a linear autoencoder of patches.

        From the usual start a small model shows the mean clip for hundreds of steps, since every query reads the mean of
        all patches. Here the first quarter of the channels is for places, random and the same on both sides, by which the
        first blocks attend; what they carry lies in the other channels. All other branches begin silent.
        """
        for one, many, side in (
            (self.at_queries, self.at_video, self.encoder),
            (self.at_codes, self.at_patches, self.decoder),
        ):
            width = many.axis_0.shape[1]
            marks = width // 4
            for name in many.axes:
                table = getattr(many, name)
                table.copy_(torch.randn_like(table) / 3**0.5)
                table[:, marks:] = 0
            for places in (one, many):
                if places.kind is not None:
                    nn.init.zeros_(places.kind)
            one.axis_0.copy_(many())
            for number, block in enumerate(side.blocks):
                nn.init.zeros_(block.mlp.fc2.weight)
                if number:
                    nn.init.zeros_(block.attn.proj.weight)
            attention = side.blocks[0].attn
            query, key, value = attention.qkv.weight.view(3, width, width)
            query.copy_(2 * torch.randn_like(query) / marks**0.5)
            query[:, marks:] = 0
            key.copy_(query)
            nn.init.orthogonal_(value[:, marks:])
            value[:, :marks] = 0
            attention.proj.weight.copy_(2 * value.t())
        self.patches.weight[: self.at_video.axis_0.shape[1] // 4] = 0
        self.to_code.weight[:, : self.to_code.in_features // 4] = 0
        self.from_code.weight[: self.from_code.out_features // 4] = 0

    @property
    def last_layer(self) -> Tensor:
        return self.out.weight

    def latent(self, images: Tensor) -> Tensor:
        """images (B, 3, T, H, W) in [-1, 1] -> (B, n, C), before quantisation. Raises ValueError for another size."""
        expected = (3, *self.spec.decoded)
        if images.shape[1:] != expected:
            raise ValueError(
                f"LARPTokenizer: got clips {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))})"
            )
        video = rearrange(self.patches((images + 1) / 2), "b d t h w -> b (t h w) d") + self.at_video()
        z = self.encoder(video, repeat(self.at_queries(), "n d -> b n d", b=len(images)))
        return self.norm(self.to_code(z))

    def pixels(self, codes: Tensor) -> Tensor:
        """codes (B, n, C) -> images (B, 3, T, H, W), unclamped."""
        given = self.from_code(codes.to(self.from_code.weight.dtype)) + self.at_codes()
        y = self.out(self.out_norm(self.decoder(given, repeat(self.at_patches(), "p d -> b p d", b=len(codes)))))
        sizes = {**vars(self.grid), **dict(zip(("pt", "ph", "pw"), self.patch, strict=True))}
        return 2 * rearrange(y, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", **sizes) - 1

    @torch.no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """images (B, 3, T, H, W) in [-1, 1] -> tokens int64 (B, n).

        noise: uniforms in [0, 1), (B, n), to draw the codes with; None: the nearest codes. Raises ValueError for clips of
        another size than `spec.decoded`.
        """
        return self.quantizer.assign(self.latent(images), noise)

    def encode_start(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """The first frames (B, 3, f, H, W) of a clip -> tokens (B, n) of them with the last one standing still.

        What a generator of continuations is told. noise as in `encode`. Raises ValueError unless 1 <= f <= T.
        """
        frames, whole = images.shape[2], self.spec.decoded[0]
        if not 1 <= frames <= whole:
            raise ValueError(f"LARPTokenizer: {frames} frames are given, a clip has {whole}: give 1 to {whole}")
        still = repeat(images[:, :, -1], "b c h w -> b c f h w", f=whole - frames)
        return self.encode(torch.cat((images, still), dim=2), noise=noise)

    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, n) in [0, V) -> images (B, 3, T, H, W), unclamped.

        Only whole sequences decode, so `present` must stay None; `condition` and `noise` have nothing to change here.
        Raises ValueError for another n, ids outside [0, V), a given `present`.
        """
        if present is not None:
            raise ValueError("LARPTokenizer: decodes whole sequences only, so present must be None")
        if tokens.dim() != 2 or tokens.shape[1] != self.spec.length:
            raise ValueError(f"LARPTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, {self.spec.length})")
        return self.pixels(self.embed(tokens))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, T, H, W) in [-1, 1] -> reconstruction, parts.

        parts: the quantiser's losses by name; "ids" (B, n); "codes" (B, n, C) with a gradient to the encoder, which the
        prior reads; "stats".
        """
        out = self.quantizer(self.latent(images))
        return self.pixels(out.z_q), {**out.losses, "ids": out.ids, "codes": out.z_q, "stats": out.stats}

    def codebook(self) -> Tensor:
        """(V, C), as the decoder gets them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., C). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(
                f"LARPTokenizer: ids from {low} to {high}, the codebook has 0 to {self.spec.vocab_size - 1}"
            )
        return self.quantizer.embed(tokens)


# ---- published weights

CONFIG: dict[str, Any] = {  # the original constructor's arguments, and the values they have when left out
    "bottleneck": None,
    "bottleneck_token_num": 1024,
    "input_size": 128,
    "frame_num": 16,
    "temporal_patch_size": 4,
    "patch_size": 8,
    "decoder_temporal_patch_size": 4,
    "decoder_patch_size": 8,
    "in_channels": 3,
    "transformer_name": "transformer_encoder_parallel",
    "encoder_name": None,
    "decoder_name": None,
    "encoder_hidden_size": 768,
    "decoder_hidden_size": 768,
    "encoder_num_heads": 12,
    "decoder_num_heads": 12,
    "encoder_depth": 6,
    "decoder_depth": 6,
    "learned_encoder_patch_pe": False,
    "learned_encoder_latent_query_embed": True,
    "learned_decoder_latent_pe": False,
    "learned_decoder_patch_query_embed": False,
    "use_encoder_patch_token_type_embed": False,
    "use_encoder_latent_query_token_type_embed": False,
    "use_decoder_latent_token_type_embed": False,
    "use_decoder_patch_query_token_type_embed": False,
    # of the prior, a network of training alone; and how tables begin, which come with the file
    "prior_model": None,
    "encoder_query_gaussian_init": True,
    "latent_pe_scale_factor": 10_000,
    "query_init_std": 0.02,
}
BOTTLENECK: dict[str, Any] = {
    "bottleneck_dim": None,
    "norm": None,
    "regularizer": None,
    # not read by their code
    "param_names": None,
}
REGULARIZER: dict[str, Any] = {
    "codebook_size": None,
    "l2_normalized": False,
    "stochastic": False,
    "stochastic_temperature": 1.0,
    "entropy_loss_weight": 0.0,
    "entropy_loss_temperature": 0.01,
    # of their training loop, no part of the model; and the shape that ids always have here
    "commitment_loss_weight": 0.25,
    "codebook_loss_weight": 1.0,
    "same_index_shape": True,
}
NAMES = {  # theirs -> ours
    "encoder_patch": "video",
    "encoder_latent_query": "queries",
    "decoder_latent": "codes",
    "decoder_patch_query": "patches",
}
NORM_NAMES = {
    **dict.fromkeys(("none", "no", "ln_d_na"), "none"),  # the last is built in their code, and not run
    "bn_bn": "batch and tokens",
    "bn_b": "batch",
    "ln_d": "channels",
    "ln_nd": "tokens and channels",
}
ABSENT = (None, "none", "no", "null", "")
PRIOR = ("input_proj", "ln_f", "head", *(f"blocks.{{i}}.{part}" for part in ("ln1", "ln2", "mlp.0", "mlp.2")))
PRIOR += tuple(f"blocks.{{i}}.attn.{part}" for part in ("key", "query", "value", "proj"))


def _pair(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def _table(table: Tensor) -> Tensor:  # (1, L, D), or one axis of a grid (1, t, h, w, D) of which two are 1
    return table.flatten(0, -2)


def _vector(kind: Tensor) -> Tensor:  # (1, 1, D)
    return kind.flatten()


def _with_frames(kernel: Tensor) -> Tensor:  # (D, 3, rows, columns) where a patch is of one frame
    return kernel[:, :, None] if kernel.dim() == 4 else kernel


def _blocks(side: str) -> dict[str, Target]:
    block = f"{side}.blocks.{{i}}"
    parts = (f"{block}.{part}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"))
    return {f"{block}.attn.qkv.weight": f"{block}.attn.qkv.weight"} | {
        key: target for part in parts for key, target in _pair(part, part).items()
    }


def _axes(theirs: str, row: str, ours: str) -> dict[str, Target]:
    names = (f"{theirs}_t_embed", f"{theirs}_h_embed", f"{row}_w_embed")
    return {name: (f"{ours}.axis_{i}", _table) for i, name in enumerate(names)}


LARP_KEYS: dict[str, Target] = {  # theirs -> ours; None: ignored, for the reason beside it
    "x_embedder.proj.weight": ("patches.weight", _with_frames),
    "x_embedder.proj.bias": "patches.bias",
    "encoder_patch_pe": ("at_video.axis_0", _table),
    "encoder_latent_query_embed": "at_queries.axis_0",
    "decoder_latent_pe": ("at_codes.axis_0", _table),
    "decoder_patch_query_embed": ("at_patches.axis_0", _table),
    **{f"{theirs}_token_type_embed": (f"at_{ours}.kind", _vector) for theirs, ours in NAMES.items()},
    **_axes("encoder", "encode", "at_video"),  # their name for its columns lacks a letter
    **_axes("decoder", "decoder", "at_patches"),
    **_blocks("encoder"),
    **_blocks("decoder"),
    **_pair("bottleneck.in_linear", "to_code"),
    **_pair("bottleneck.out_linear", "from_code"),
    "bottleneck.regularizer.embedding.weight": "quantizer.rows",
    "bottleneck.regularizer.stochastic_temperature_inv": None,  # one number, read where the temperature is learned
    **_pair("final_layer.norm_final", "out_norm"),
    **_pair("final_layer.linear", "out"),
    "prior_model.pos_emb": None,  # the prior: a network of training alone
    **{f"prior_model.{name}.{part}": None for name in PRIOR for part in ("weight", "bias")},
}


def _norm_keys(norm: str) -> dict[str, Target]:
    if norm in ("channels", "tokens and channels"):
        return _pair("bottleneck.norm_layer", "norm")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"bottleneck.norm_layer.{name}": f"norm.1.{name}" for name in names}


def larp_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> LARPTokenizer:
    """LARP's tokenizer from its tensors and constructor arguments, in eval mode and float32, without its prior.

    It takes the tensors of `state` as they are, without a copy, where they are float32 already.
    Raises UnknownName for an argument it does not have, ValueError for one of a model that is not LARP's, CheckpointMismatch
    listing all keys that do not fit.
    """
    config = _complete(config, CONFIG, "config key")
    bottleneck = _complete(config["bottleneck"]["args"], BOTTLENECK, "bottleneck key")
    if (scheme := bottleneck["regularizer"]["name"]) != "vq":
        raise ValueError(f"larp: regularizer is {scheme!r}, must be 'vq': a TokenSpec of ids")
    scheme = _complete(bottleneck["regularizer"]["args"], REGULARIZER, "regularizer key")
    patch = (config["temporal_patch_size"], config["patch_size"])
    decoder_patch = (config["decoder_temporal_patch_size"], config["decoder_patch_size"])
    if patch != decoder_patch:
        raise ValueError(
            f"larp: the decoder's patches {decoder_patch} must be the encoder's {patch}, which cut its output"
        )
    for side in ("transformer_name", "encoder_name", "decoder_name"):
        if config[side] not in (*ABSENT, CONFIG["transformer_name"]):
            raise ValueError(f"larp: {side} is {config[side]!r}, must be {CONFIG['transformer_name']!r}")
    norm = look_up((bottleneck["norm"] or "none").lower(), NORM_NAMES, "larp: norm")
    dim = bottleneck["bottleneck_dim"] if bottleneck["bottleneck_dim"] > 0 else config["encoder_hidden_size"]
    learned = {"encoder_patch_pe": "video", "encoder_latent_query_embed": "queries"}
    learned |= {"decoder_latent_pe": "codes", "decoder_patch_query_embed": "patches"}
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        tokenizer = LARPTokenizer(
            (config["frame_num"], config["input_size"], config["input_size"]),
            config["bottleneck_token_num"],
            _quantizer(state, scheme, dim),
            patch=(patch[0], patch[1], patch[1]),
            dim=int(config["encoder_hidden_size"]),
            depth=config["encoder_depth"],
            heads=int(config["encoder_num_heads"]),
            decoder_dim=int(config["decoder_hidden_size"]),
            decoder_depth=config["decoder_depth"],
            decoder_heads=int(config["decoder_num_heads"]),
            norm=norm,
            learned=[ours for theirs, ours in learned.items() if config[f"learned_{theirs}"]],
            kinds=[ours for theirs, ours in NAMES.items() if config[f"use_{theirs}_token_type_embed"]],
        )
    keys = {**LARP_KEYS, **_norm_keys(norm)}
    tokenizer.load_state_dict(translate(state, keys, tokenizer.state_dict()), assign=True)
    return tokenizer.float().eval()


def _complete(config: Mapping[str, Any], known: Mapping[str, Any], what: str) -> dict[str, Any]:
    for name in config:
        look_up(name, known, f"larp: {what}")
    return {**known, **config}


def _quantizer(state: Mapping[str, Tensor], scheme: Mapping[str, Any], dim: int) -> Quantizer:
    if not scheme["stochastic"]:
        entropy = scheme["entropy_loss_temperature"] if scheme["entropy_loss_weight"] > 0 else None
        return VectorQuantizer(
            scheme["codebook_size"], dim, normalize=scheme["l2_normalized"], entropy_temperature=entropy
        )
    if not scheme["l2_normalized"]:
        raise ValueError("larp: a stochastic regularizer compares by cosine, so l2_normalized must be true")
    temperature = scheme["stochastic_temperature"]
    if temperature <= 0:  # theirs is learned
        temperature = 1 / float(state["bottleneck.regularizer.stochastic_temperature_inv"])
    return StochasticVectorQuantizer(scheme["codebook_size"], dim, temperature)
