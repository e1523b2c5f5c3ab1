"""Next-scale prediction: all tokens of one scale at once, coarse to fine. VAR, and MVAR on the same classes.

VAR: "Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction" (Tian et al. 2024,
arXiv:2404.02905). MVAR: "MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning" (Zhang et
al. 2025, arXiv:2505.12742).

Letters: R branches of guidance, B samples, b rows (R * B), K scales of (h_k, w_k) cells, L tokens of all scales, l rows
that are computed, C channels of the reader's features, D width, H heads.

What to know:
- the input at a position is no token but a feature: the sum of the scales before, as the position's own scale sees it
  (layers/pyramid.py); scale 0 is fed the class. So logits belong to the position that they come out of, without a shift;
- attention. VAR: a scale reads itself and all scales before it. MVAR: itself alone (all it knows of the past is its
  input), and from `windowed_from` on each cell reads a window around it. Neither needs a mask: scales are attended to
  one after the other, so MVAR needs no cache, and its scales can be trained apart;
- both have the same parameters under the same names, so VAR's weights are a start for MVAR.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import log, prod
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import DropPath, GELUTanh, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from generators.protocol import Generator, Prediction, State, one_state
from heads.categorical import Categorical
from heads.protocol import Head
from layers.adaln import Modulation, SharedModulation, modulate
from layers.attention import KVCache
from layers.condition import LabelEmbedding, check_labels, drop_condition
from layers.keymap import Target, translate
from layers.noise import Noise
from layers.pyramid import ScaleReader
from layers.spec import Condition, Pyramid, TokenSpec, stack
from layers.windows import attend_window, check_window

SHARPEST = log(100)  # the log of the largest factor of a cosine
SHAPES = 64  # that are compiled for, of any pyramid
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Span:
    """One scale in attention: which rows of its input are its queries, which keys they read, and how: a window of so
    many cells squared around each on the grid `size`, or (window 0) all of them."""

    queries: slice
    keys: slice
    size: tuple[int, int]
    window: int = 0


class ScaleAttention(nn.Module):
    """Self-attention, span by span. Queries and values have a bias, keys have none.

    cosine: q and k of length 1 and a learned factor a head, exp(min(log_scale, log 100)). Otherwise the logits are
    q k 0.25 / sqrt(d), not 1 / sqrt(d).
    """

    def __init__(self, dim: int, heads: int, cosine: bool, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, dim // heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((heads, 1), log(4))) if cosine else None
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, spans: Sequence[Span], cache: KVCache | None = None, start: int = 0) -> Tensor:
        """x (b, l, D) -> (b, l, D). With a cache the rows go to its slots from `start` on, and keys are its slots."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "b l (h d) -> b l h d", h=self.heads) for y in (q + self.q_bias, k, v + self.v_bias))
        if self.log_scale is None:
            scale = 0.25 * self.head_dim**-0.5
        else:
            scale = 1.0
            q = (q * (self.log_scale.clamp_max(SHARPEST).exp() / length(q))).type_as(v)
            k = (k / length(k)).type_as(v)
        if cache is not None:
            cache.write_from(start, k, v)
            k, v = cache.keys, cache.values
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (b, h, l, d)
        how = {"scale": scale, "dropout_p": self.dropout if self.training else 0.0}
        parts = []
        for span in spans:
            rows = q[:, :, span.queries], k[:, :, span.keys], v[:, :, span.keys]
            if span.window:
                parts.append(attend_window(*rows, span.size, span.window, **how))
            else:
                parts.append(F.scaled_dot_product_attention(*rows, **how))
        return self.drop(self.out(rearrange(torch.cat(parts, dim=2), "b h l d -> b l (h d)")))


def length(x: Tensor) -> Tensor:
    """(..., d) -> (..., 1), never zero."""
    return x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


class Block(nn.Module):
    """x + g1 Attention(LN(x) (1 + s1) + b1), then x + g2 MLP(LN(x) (1 + s2) + b2); LN without weights."""

    def __init__(
        self, dim: int, heads: int, hidden: int, eps: float, cosine: bool, shared: bool, drops: Sequence[float]
    ) -> None:
        super().__init__()
        dropout, attention_dropout, drop_path = drops
        self.modulation = SharedModulation(dim, 6) if shared else Modulation(dim, dim, 6)
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attention = ScaleAttention(dim, heads, cosine, dropout, attention_dropout)
        self.mlp = Mlp(dim, hidden, act_layer=GELUTanh, drop=(0.0, dropout))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, chunks: Tensor, **attend: Any) -> Tensor:
        """x (b, l, D), chunks (6, b, 1, D) -> (b, l, D)."""
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = chunks
        branch = self.attention(modulate(self.norm(x), scale_1, shift_1), **attend)
        x = torch.addcmul(x, self.drop_path(branch), gate_1)
        return torch.addcmul(x, self.drop_path(self.mlp(modulate(self.norm(x), scale_2, shift_2))), gate_2)


class Trunk(nn.Module):
    """All blocks. This is the part that `torch.compile` is for: `generator.trunk.compile()`."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of every module, but for so many shapes as there are scales: beyond torch's own limit of 8 the largest
        scales would run as they are."""
        super().compile(*args, **{"recompile_limit": SHAPES, **kwargs})

    def forward(
        self,
        x: Tensor,
        chunks: Sequence[Tensor],
        spans: Sequence[Span],
        caches: Sequence[KVCache] | None = None,
        start: int = 0,
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, chunks[i], spans=spans, cache=cache, start=start)
        return x


@dataclass
class NextScaleState(State):
    """memory: the reader's, after the committed scales, (B, C, H, W); features (B, n, C): its input to the next scale;
    label (b, 1, D): the class of each row, embedded; chunks: what it makes of every block, (6, b, 1, D) each; caches:
    one a block, or None where a scale reads itself alone."""

    memory: Tensor = None
    features: Tensor = None
    label: Tensor = None
    chunks: Sequence[Tensor] = ()
    caches: Sequence[KVCache] | None = None


class NextScale(Generator):
    """Class-conditional transformer over the scales of `spec`, a Pyramid.

    reader: made by the tokenizer (`tokenizer.reader()`); it stays frozen.
    shared_modulation: one adaptive-norm projection for all blocks, with an offset each (VAR-d36), instead of one each.
    cosine: attention over normalised queries and keys. attention: "pyramid", a scale reads itself and those before it
    (VAR), or "scale", itself alone (MVAR); there, window (odd; 0: none) cells squared around each cell are read from
    scale `windowed_from` on. coarse_steps: 0 trains all scales in every step; n, of "scale" alone, trains the scales
    before `windowed_from` together in n steps, then each later one in a step of its own, and so on (MVAR: 8).
    progressive: the share of training in which the pyramid grows, one scale after the other, from `first_scales` scales
    on; it keeps those for `hold` steps, and a new scale's loss rises over `scale_warmup` steps.
    dropout falls on both residual branches, condition_drop is the share of classes replaced by the null one in `loss`, in
    training mode. gate_init: factor on the initial weights that make the gates.
    Raises ValueError for a spec or a reader it cannot serve, naming both sides.
    """

    undecayed = ("position", "start", "level", "offset", "log_scale")

    def __init__(
        self,
        spec: TokenSpec,
        reader: ScaleReader,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        head: Callable[[int, TokenSpec], Head] = Categorical,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        shared_modulation: bool = False,
        cosine: bool = True,
        attention: Literal["pyramid", "scale"] = "pyramid",
        window: int = 0,
        windowed_from: int = 0,
        coarse_steps: int = 0,
        progressive: float = 0.0,
        first_scales: int = 5,
        hold: int = 0,
        scale_warmup: int = 0,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        condition_drop: float = 0.1,
        gate_init: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_classes is None:
            raise ValueError("NextScale is class-conditional: give num_classes")
        if not isinstance(spec.layout, Pyramid) or spec.vocab_size is None:
            raise ValueError(f"NextScale predicts discrete tokens in a Pyramid, the tokenizer makes {spec}")
        self.spec, self.sizes, self.condition_drop = spec, spec.layout.sizes, condition_drop
        if (reader.sizes, len(reader.codebook)) != (self.sizes, spec.vocab_size):
            raise ValueError(
                f"NextScale: the reader knows {len(reader.codebook)} codes at the sizes {reader.sizes}, the tokens are "
                f"of {spec.vocab_size} codes at {self.sizes}"
            )
        if dim % heads:
            raise ValueError(f"NextScale: heads={heads} must divide dim={dim}")
        if attention == "pyramid" and (window or coarse_steps):
            raise ValueError(
                f'NextScale: window={window} and coarse_steps={coarse_steps} need attention="scale": in a pyramid scales '
                "read each other"
            )
        if progressive and (coarse_steps or not 0 < progressive <= 1 or not 1 <= first_scales <= len(self.sizes)):
            raise ValueError(
                f"NextScale: progressive={progressive} must be in [0, 1], first_scales={first_scales} in [1, "
                f"{len(self.sizes)}], and coarse_steps={coarse_steps} 0"
            )
        self.markov, self.window, self.windowed_from = attention == "scale", window, windowed_from
        for size in self.sizes[windowed_from:] if window else ():
            check_window(*size, window)
        self.coarse_steps, self.progressive, self.first_scales = coarse_steps, progressive, first_scales
        self.hold, self.scale_warmup = hold, scale_warmup
        self.ends = (0, *accumulate(prod(size) for size in self.sizes))  # scale k is [ends[k], ends[k + 1])

        self.condition = LabelEmbedding(num_classes, dim)
        self.word = nn.Linear(reader.channels, dim)
        self.start = nn.Parameter(torch.empty(self.ends[1], dim))
        self.level = nn.Embedding(len(self.sizes), dim)
        self.position = nn.Parameter(torch.empty(self.ends[-1], dim))
        self.shared = Modulation(dim, dim, 6) if shared_modulation else None
        rates = torch.linspace(0, drop_path, depth).tolist()
        hidden = round(dim * mlp_ratio)
        self.trunk = Trunk(
            [
                Block(dim, heads, hidden, norm_eps, cosine, shared_modulation, (dropout, attention_dropout, rate))
                for rate in rates
            ]
        )
        self.norm = nn.LayerNorm(dim, norm_eps, elementwise_affine=False)
        self.norm_modulation = Modulation(dim, dim, 2)
        scale_of = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.ends).diff())
        self.register_buffer("scale_of", scale_of, persistent=False)  # (L,)
        self.reader = reader.requires_grad_(False)
        self.head = one_state(self, head(dim, spec))
        self._initialise(gate_init)

    @torch.no_grad()
    def _initialise(self, gate_init: float) -> None:
        """Normal weights of variance 1 / 3D; the projections that close a branch are divided by
        sqrt(2 depth), what modulates is halved, gates are times gate_init, the read-out 0.02. Biases are zero."""
        blocks, dim = self.trunk.blocks, self.word.out_features
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("reader."):
                nn.init.trunc_normal_(module.weight, std=(3 * dim) ** -0.5)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.start, self.position):
            nn.init.trunc_normal_(table, std=(3 * dim) ** -0.5)
        for module in self.head.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 0.02
        self.norm_modulation.project.weight *= 0.5
        for block in blocks:
            block.attention.out.weight /= (2 * len(blocks)) ** 0.5
            block.mlp.fc2.weight /= (2 * len(blocks)) ** 0.5
            if self.shared is None:
                parts = block.modulation.project.weight.view(6, dim, dim)
            else:
                parts = nn.init.normal_(block.modulation.offset, std=dim**-0.5)
            parts[:2] *= gate_init
            parts[2:] *= 0.5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NextScale":
        """Moves and casts the module, but leaves reader and read-out in float32 where the rest goes to half precision."""

        def whole(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALF and tensor.dtype not in HALF else moved

        apart = {name: self._modules.pop(name) for name in ("reader", "head")}  # the last two: the order stays
        try:
            super()._apply(fn, recurse)
            for module in apart.values():
                module._apply(whole, recurse)
        finally:
            self._modules.update(apart)
        return self

    # ---- teacher forcing

    def hidden(self, tokens: Tensor, condition: Condition, scales: tuple[int, int] | None = None) -> Tensor:
        """tokens (B, L) -> (B, l, D), of the scales [first, stop) (all when None): each row has seen what the scales
        before its own add up to. Raises ValueError for a first scale but 0 where scales read each other."""
        first, stop = scales or (0, len(self.sizes))
        if first and not self.markov:
            raise ValueError(f'NextScale: scales={scales} must begin at 0 where attention="pyramid"')
        with torch.no_grad():
            features = self.reader(tokens[:, : self.ends[stop]])
        label = self.condition(condition)
        with torch.autocast(tokens.device.type, enabled=False):
            x = self._inputs(label, features, 0)[:, self.ends[first] :]  # cut late: every parameter has a gradient
        x = self.trunk(x, self._chunks(label), self._spans(first, stop))
        return self._finish(x, label)

    def logits(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L) -> (B, L, V): row i is the law of token i."""
        return self.head.logits(self.hidden(tokens, condition))

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        keep: Tensor | None = None,
        scales: tuple[int, int] | None = None,
        warm: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the cross-entropies of the tokens of `scales` (all when None) over L, in nats, mean over B.

        keep bool (B,): where False the null class is put; drawn when None. warm: weight of the last of the scales.
        """
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        first, stop = scales or (0, len(self.sizes))
        target = tokens[:, self.ends[first] : self.ends[stop]]
        nats = self.head.loss(self.hidden(tokens, condition, scales), target)  # (B, l)
        weight = torch.ones_like(nats[0])
        weight[self.ends[stop - 1] - self.ends[first] :] = warm
        loss = (nats * weight).sum(1).mean() / self.ends[-1]
        return loss, {"cross_entropy": nats.detach().mean()}

    def curriculum(self, step: int, steps: int) -> dict[str, Any]:
        """The scales to train on; see coarse_steps and progressive."""
        if self.coarse_steps:
            later = len(self.sizes) - self.windowed_from
            turn = step % (self.coarse_steps + later) - self.coarse_steps
            first = self.windowed_from + turn
            return {"scales": (0, self.windowed_from) if turn < 0 else (first, first + 1)}
        if not self.progressive:
            return {}

        def grown(step: int) -> int:
            if step <= self.hold:
                return self.first_scales
            share = (step - self.hold) / max(steps * self.progressive - self.hold, 1)
            return self.first_scales + round(min(share, 1.0) * (len(self.sizes) - self.first_scales))

        stop = grown(step)
        if stop == len(self.sizes):
            return {}
        warm = 1.0
        if stop > self.first_scales and self.scale_warmup:
            since = step - bisect_left(range(step + 1), stop, key=grown)
            warm = min(max((since + 1) / self.scale_warmup, 0.01), 1.0)
        return {"scales": (0, stop), "warm": warm}

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
    ) -> NextScaleState:
        """Raises LabelError for a class out of range, ValueError for a length that is not one of whole scales."""
        rows, device = branches[0].rows, self.position.device
        length = self.spec.length if length is None else length
        if length not in self.ends[1:]:
            raise ValueError(f"length is {length}, whole scales end at {', '.join(map(str, self.ends[1:]))}")
        if branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        label = self.condition(stack(list(branches)))
        caches = None
        if not self.markov:
            first = self.trunk.blocks[0].attention
            empty = partial(KVCache.allocate, len(label), length, first.heads, first.head_dim, label)
            caches = [empty() for _ in self.trunk.blocks]
        return NextScaleState(
            tokens=torch.zeros(rows, self.spec.length, dtype=torch.int64, device=device),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            rounds=self.ends.index(length),
            fixed=fixed,
            memory=self.reader.begin(rows),
            features=self.reader.codebook.new_zeros(rows, self.ends[1], self.reader.channels),
            label=label,
            chunks=self._chunks(label),
            caches=caches,
        )

    def step(self, state: NextScaleState, ahead: int | None = None) -> Prediction:
        """The laws of all tokens of the next scale. Raises ValueError for `ahead`: they are one scale, never another n."""
        if ahead is not None:
            raise ValueError("NextScale predicts one whole scale a step")
        scale, rows = state.round, len(state.tokens)
        if scale == state.rounds:
            raise ValueError(f"NextScale: all {scale} scales are committed")
        start, stop = self.ends[scale], self.ends[scale + 1]
        own = slice(0, stop - start)
        keys, window = (own, self._window(scale)) if self.markov else (slice(0, stop), 0)
        span = Span(own, keys, self.sizes[scale], window)
        branches = len(state.label) // rows
        features = repeat(state.features, "B n c -> (R B) n c", R=branches)
        x = self._inputs(state.label, features, scale)
        z = self._finish(self.trunk(x, state.chunks, [span], state.caches, start), state.label)
        state.nfe += 1
        positions = torch.arange(start, stop, device=z.device).expand(rows, -1)
        return Prediction(
            head=self.head,
            z=rearrange(z, "(R B) m d -> R B m d", R=branches),
            positions=positions,
            index=torch.full_like(positions, scale),
            total=len(self.sizes),
            keep=stop - start,
        )

    def commit(
        self,
        state: NextScaleState,
        positions: Tensor,
        tokens: Tensor,
        keep: Tensor | None = None,
        soft: Tensor | None = None,
    ) -> None:
        """The tokens (B, n) of the whole next scale. soft: laws (B, n, V) whose mean codes the next scales (and
        `state.memory`) are made from in place of the tokens'. Raises ValueError for anything but a whole scale."""
        start, stop = self.ends[state.round], self.ends[state.round + 1]
        if keep is not None or tokens.shape[1] != stop - start:
            raise ValueError(
                f"NextScale commits whole scales: the next has {stop - start} tokens, got {tokens.shape[1]}"
                f"{'' if keep is None else ', and keep, which would leave some out'}"
            )
        codes = self.reader.embed(tokens) if soft is None else self.reader.mix(soft)
        state.memory, state.features = self.reader.add(state.memory, codes, state.round)
        state.tokens = torch.cat((state.tokens[:, :start], tokens, state.tokens[:, stop:]), dim=1)
        state.known = state.known.index_fill(1, positions[0], True)
        state.length = state.length + (stop - start)
        state.round += 1

    def _window(self, scale: int) -> int:
        return self.window if scale >= self.windowed_from else 0

    def _spans(self, first: int, stop: int) -> list[Span]:
        spans = []
        for scale, (begin, end) in enumerate(pairwise(self.ends[first : stop + 1]), first):
            own = slice(begin - self.ends[first], end - self.ends[first])
            keys, window = (own, self._window(scale)) if self.markov else (slice(0, own.stop), 0)
            spans.append(Span(own, keys, self.sizes[scale], window))
        return spans

    def _inputs(self, label: Tensor, features: Tensor, first: int) -> Tensor:
        """label (b, 1, D), features (b, l, C) of the scales from `first` on -> (b, l, D)."""
        begin = self.ends[first]
        features = features.to(self.word.weight.dtype)
        if first == 0:
            x = torch.cat((label + self.start, self.word(features[:, self.ends[1] :])), dim=1)
        else:
            x = self.word(features)
        rows = slice(begin, begin + x.shape[1])
        return x + self.level(self.scale_of[rows]) + self.position[rows]

    def _chunks(self, label: Tensor) -> list[Tensor]:
        """What the class (b, 1, D) makes of every block: (6, b, 1, D) each."""
        given = label if self.shared is None else self.shared(label)
        return [block.modulation(given) for block in self.trunk.blocks]

    def _finish(self, x: Tensor, label: Tensor) -> Tensor:
        """The last norm, in float32 at least, as the read-out is."""
        scale, shift = self.norm_modulation(label)
        return modulate(self.norm(x.to(torch.promote_types(x.dtype, torch.float32))), scale, shift)


# ---- published weights


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2)


VAR_KEYS: dict[str, Target] = {  # theirs -> ours; None: ignored, for the reason beside it
    "word_embed.weight": "word.weight",
    "word_embed.bias": "word.bias",
    "class_emb.weight": "condition.table.weight",
    "pos_start": ("start", _rows),
    "pos_1LC": ("position", _rows),
    "lvl_embed.weight": "level.weight",
    "blocks.{i}.attn.mat_qkv.weight": "trunk.blocks.{i}.attention.qkv.weight",
    "blocks.{i}.attn.q_bias": "trunk.blocks.{i}.attention.q_bias",
    "blocks.{i}.attn.v_bias": "trunk.blocks.{i}.attention.v_bias",
    "blocks.{i}.attn.scale_mul_1H11": ("trunk.blocks.{i}.attention.log_scale", _rows),
    "blocks.{i}.attn.proj.weight": "trunk.blocks.{i}.attention.out.weight",
    "blocks.{i}.attn.proj.bias": "trunk.blocks.{i}.attention.out.bias",
    "blocks.{i}.ffn.fc1.weight": "trunk.blocks.{i}.mlp.fc1.weight",
    "blocks.{i}.ffn.fc1.bias": "trunk.blocks.{i}.mlp.fc1.bias",
    "blocks.{i}.ffn.fc2.weight": "trunk.blocks.{i}.mlp.fc2.weight",
    "blocks.{i}.ffn.fc2.bias": "trunk.blocks.{i}.mlp.fc2.bias",
    "blocks.{i}.ada_lin.1.weight": "trunk.blocks.{i}.modulation.project.weight",
    "blocks.{i}.ada_lin.1.bias": "trunk.blocks.{i}.modulation.project.bias",
    "blocks.{i}.ada_gss": ("trunk.blocks.{i}.modulation.offset", _rows),
    "shared_ada_lin.1.weight": "shared.project.weight",
    "shared_ada_lin.1.bias": "shared.project.bias",
    "head_nm.ada_lin.1.weight": "norm_modulation.project.weight",
    "head_nm.ada_lin.1.bias": "norm_modulation.project.bias",
    "head.weight": "head.readout.weight",
    "head.bias": "head.readout.bias",
    "blocks.{i}.attn.zero_k_bias": None,  # constant zeros: keys have no bias
    "lvl_1L": None,  # the scale of each position, computed from the layout
    "attn_bias_for_masking": None,  # who may see whom, computed; a file of MVAR may even hold VAR's
}
READER_KEYS: dict[str, Target] = {  # of the tokenizer, where a file of the generator carries it along
    "vae_local.quantize.embedding.weight": "reader.codebook",
    "vae_local.quantize.quant_resi.qresi_ls.{i}.weight": "reader.scales.phi.{i}.weight",
    "vae_local.quantize.quant_resi.qresi_ls.{i}.bias": "reader.scales.phi.{i}.bias",
    "vae_local.quantize.quant_resi.qresi.weight": "reader.scales.phi.0.weight",
    "vae_local.quantize.quant_resi.qresi.bias": "reader.scales.phi.0.bias",
    "vae_local.quantize.quant_resi.{i}.weight": "reader.scales.phi.{i}.weight",
    "vae_local.quantize.quant_resi.{i}.bias": "reader.scales.phi.{i}.bias",
    "vae_local.quantize.ema_vocab_hit_SV": None,  # usage statistics
}


def var_from_published(
    state: Mapping[str, Tensor], config: Mapping[str, Any], reader: ScaleReader | None = None, **settings: Any
) -> NextScale:
    """A VAR generator under the constructor arguments of the original configuration, in float32.

    reader: of the tokenizer; None: its tensors are in `state` under `vae_local.` (where they are not, the reader stays
    empty, on the device "meta": enough to say what a file holds). It takes the tensors of `state` as they are, without a
    copy, where they are float32 already.
    """
    vae = {"vocab_size": 4096, "z_channels": 32, "share_quant_resi": 4, "quant_resi": 0.5} | config.get("vae", {})
    sides = config.get("patch_nums", (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    sizes = tuple((side, side) for side in sides)
    pixels = sides[-1] * 2 ** (len(vae.get("ch_mult", (1, 1, 2, 2, 4))) - 1)
    carried = any(key.startswith("vae_local.") for key in state)
    if reader is None:
        with torch.device("meta"):
            phis = vae["share_quant_resi"] or vae.get("default_qresi_counts") or None  # None: one a scale
            reader = ScaleReader(sizes, vae["vocab_size"], vae["z_channels"], phis, vae["quant_resi"])
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = NextScale(
            TokenSpec(Pyramid(sizes), decoded=(1, pixels, pixels), vocab_size=vae["vocab_size"]),
            reader,
            dim=config.get("embed_dim", 1024),
            depth=config.get("depth", 16),
            heads=config.get("num_heads", 16),
            num_classes=config.get("num_classes", 1000),
            head=partial(Categorical, bias=True),
            mlp_ratio=config.get("mlp_ratio", 4.0),
            norm_eps=config.get("norm_eps", 1e-6),
            shared_modulation=config.get("shared_aln", False),
            cosine=config.get("attn_l2_norm", False),
            dropout=config.get("drop_rate", 0.0),
            attention_dropout=config.get("attn_drop_rate", 0.0),
            drop_path=config.get("drop_path_rate", 0.0),
            condition_drop=config.get("cond_drop_rate", 0.1),
            **settings,
        )
    own = model.state_dict()
    held = {} if carried else {key: tensor for key, tensor in own.items() if key.startswith("reader.")}
    wanted = {key: tensor for key, tensor in own.items() if key not in held}
    model.load_state_dict({**translate(state, VAR_KEYS | READER_KEYS, wanted), **held}, assign=True)
    return model.float().eval()


def mvar_from_published(
    state: Mapping[str, Tensor], config: Mapping[str, Any], reader: ScaleReader | None = None
) -> NextScale:
    """An MVAR generator, as `var_from_published`. Files of VAR fit too: a start for fine-tuning."""
    return var_from_published(
        state,
        config,
        reader,
        attention="scale",
        window=config.get("kernel_size", 7),
        windowed_from=config.get("refine_step", 8),
        coarse_steps=8,
    )
