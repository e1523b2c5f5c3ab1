"""Next-X prediction: a causal transformer that is itself the velocity of a flow, entity after entity. X is what one likes.

xAR: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (Ren et al. 2025, arXiv:2502.20388).

Letters: R branches of guidance, B samples, b rows (R * B), N entities, L tokens of the grid, T tokens of the sequence, l
rows that are computed, m tokens of one entity, C channels of a token, D width.

What to know:
- an entity's tokens are carried together from noise (t = 1) to data (t = 0). In training every entity has a time of its own
  and reads the others before it as noisy as they are; when sampling it reads them clean, at time 0;
- what is said of an entity, its class and its time, modulates every block; the time goes in as floor(1000 t);
- places: 0 to L - 1 are the grid in raster order, so a token of the tokenizer keeps its place in every order. Coarse scales
  are tokens that the tokenizer does not know: they have the places L to T - 1, are drawn and read like others, and are
  forgotten in the end. T = L but for them;
- decoding keeps keys and values of the clean entities, a slot a token of the sequence. A velocity writes the slots of its own
  entity, which nothing else reads, so it can be asked again; the commit of the entity writes them for good (the original
  feeds a clean entity together with the first step of the next: the same numbers, the same work);
- the two stacks are one network (the names encoder and decoder are inherited from MAR).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import isqrt, prod
from typing import Any

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import GluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from generators.protocol import Generator, Prediction, State
from heads.flow import FieldHead
from heads.protocol import Head
from layers.adaln import Modulation, modulate
from layers.attention import KVCache
from layers.condition import LabelEmbedding, check_labels, drop_condition
from layers.flow import interpolate, training_times
from layers.keymap import Join, Target, translate
from layers.noise import Noise
from layers.record import look_up
from layers.rotary import rotary_table, rotate
from layers.sincos import sincos
from layers.spec import Condition, Grid, TokenSpec, stack

FREQUENCIES = 256  # channels of the sinusoid of the time
TICKS = 1000  # the network is told floor(1000 t)

# ---- entities


class Entity(ABC):
    """How a grid of h x w tokens is cut into entities, in order."""

    def coarse(self, h: int, w: int) -> tuple[tuple[int, int], ...]:
        """Sizes of the coarser grids that are drawn beside the grid itself."""
        return ()

    @abstractmethod
    def split(self, h: int, w: int) -> Sequence[Tensor]:
        """The places of every entity, int64 (m,). Raises ValueError for a grid that cannot be cut so."""


class TokenEntity(Entity):
    """Every token by itself, in raster order."""

    def split(self, h: int, w: int) -> Sequence[Tensor]:
        return torch.arange(h * w).split(1)


@dataclass(frozen=True)
class CellEntity(Entity):
    """Cells of neighbouring tokens in raster order, and so inside a cell. size: of a cell, a number or rows and columns."""

    size: int | Sequence[int] = 8

    def split(self, h: int, w: int) -> Sequence[Tensor]:
        rows, columns = _sides(self, self.size, h, w)
        places = torch.arange(h * w).view(h, w)
        return rearrange(places, "(a p) (b q) -> (a b) (p q)", p=rows, q=columns).unbind(0)


@dataclass(frozen=True)
class SubsampleEntity(Entity):
    """Evenly spaced tokens, of the whole grid each time. size: how many a row and a column, one number or two."""

    size: int | Sequence[int] = 8

    def split(self, h: int, w: int) -> Sequence[Tensor]:
        rows, columns = _sides(self, self.size, h, w)
        places = torch.arange(h * w).view(h, w)
        return rearrange(places, "(p a) (q b) -> (a b) (p q)", p=rows, q=columns).unbind(0)


@dataclass(frozen=True)
class ScaleEntity(Entity):
    """The grid's content averaged down to coarser grids, each of half the side of the next, then the grid itself.

    scales: how many in all. The paper does not say how it resizes; here a coarse token is the mean of what it covers.
    """

    scales: int = 5

    def coarse(self, h: int, w: int) -> tuple[tuple[int, int], ...]:
        return tuple((-(-h // 2**i), -(-w // 2**i)) for i in range(self.scales - 1, 0, -1))

    def split(self, h: int, w: int) -> Sequence[Tensor]:
        if self.scales < 1 or 2 ** (self.scales - 1) > max(h, w):
            raise ValueError(f"ScaleEntity: a grid of {h}x{w} tokens cannot be halved to scales={self.scales}")
        lengths = [prod(size) for size in self.coarse(h, w)]
        coarse = torch.arange(h * w, h * w + sum(lengths)).split(lengths) if lengths else ()
        return *coarse, torch.arange(h * w)


class ImageEntity(Entity):
    """The whole grid at once: a flow without an order."""

    def split(self, h: int, w: int) -> Sequence[Tensor]:
        return (torch.arange(h * w),)


def _sides(entity: Entity, size: int | Sequence[int], h: int, w: int) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    if min(rows, columns) < 1 or h % rows or w % columns:
        raise ValueError(f"{type(entity).__name__}: {rows}x{columns} tokens do not divide a grid of {h}x{w} tokens")
    return rows, columns


ENTITIES = {made.__name__: made for made in (TokenEntity, CellEntity, SubsampleEntity, ScaleEntity, ImageEntity)}

# ---- the network


class EntityAttention(nn.Module):
    """Self-attention with rotary positions. With a cache the rows go to its slots from `start` on, and what they read is
    all slots up to the last of them."""

    def __init__(self, dim: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, dim // heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, start: int = 0
    ) -> Tensor:
        """x (b, l, D), rotary (l, d/2, 2) cos and sin, mask bool (l, l) -> (b, l, D)."""
        qkv = rearrange(self.qkv(x), "b l (three h d) -> three b l h d", three=3, h=self.heads)
        (q, k), v = rotate(qkv[:2], rotary), qkv[2]
        if cache is not None:
            cache.write_from(start, k, v)
            stop = start + x.shape[1]
            k, v = cache.keys[:, :stop], cache.values[:, :stop]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (b, h, l, d)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.drop(self.out(rearrange(y, "b h l d -> b l (h d)")))


class Block(nn.Module):
    """x + g1 Attention(RMS(x) (1 + s1) + b1), then x + g2 MLP(RMS(x) (1 + s2) + b2); RMS without weights, MLP gated by
    GELU."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.modulation = Modulation(dim, dim, 6)
        self.norm = nn.RMSNorm(dim, eps, elementwise_affine=False)
        self.attention = EntityAttention(dim, heads, dropout, attention_dropout)
        self.mlp = GluMlp(dim, 2 * hidden, act_layer=nn.GELU, drop=dropout, gate_last=False)

    def forward(self, x: Tensor, told: Tensor, entity: Tensor | None, **attend: Any) -> Tensor:
        """x (b, l, D); told (b, n, D), what is said of n entities; entity int64 (l,): which each row is of, None where
        there is one."""
        chunks = self.modulation(told)  # (6, b, n, D)
        if entity is not None:
            chunks = chunks[:, :, entity]
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = chunks
        x = torch.addcmul(x, gate_1, self.attention(modulate(self.norm(x), scale_1, shift_1), **attend))
        return torch.addcmul(x, gate_2, self.mlp(modulate(self.norm(x), scale_2, shift_2)))


class Stack(nn.Module):
    """Blocks and the norm after them, with a learned and a rotary position for each token of the sequence."""

    def __init__(self, places: Tensor, dim: int, depth: int, heads: int, eps: float, **block: Any) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(len(places), dim))
        self.blocks = nn.ModuleList(Block(dim, heads, eps=eps, **block) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps)
        self.register_buffer("rotary", rotary_table(places, dim // heads), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stack":
        """Moves and casts the module, but leaves the rotary table in float32: half precision would round its angles."""
        table = self.rotary
        super()._apply(fn, recurse)
        self.rotary = table.to(self.rotary.device)
        return self

    def forward(
        self, x: Tensor, told: Tensor, entity: Tensor | None, mask: Tensor | None, caches: Sequence[KVCache], start: int
    ) -> Tensor:
        rotary = self.rotary[start : start + x.shape[1]]
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            x = block(x, told, entity, rotary=rotary, mask=mask, cache=cache, start=start)
        return self.norm(x)


class Trunk(nn.Module):
    """From tokens to the read-out. This is the part that `torch.compile` is for: `generator.trunk.compile()`.

    Every entity is compiled for by itself: worth its time for a few large ones.
    """

    def __init__(
        self,
        places: Tensor,
        channels: int,
        dim: int,
        depth: Sequence[int],
        heads: Sequence[int],
        eps: float,
        **block: Any,
    ) -> None:
        super().__init__()
        self.embed, self.embed_norm = nn.Linear(channels, dim), nn.RMSNorm(dim, eps)
        self.first = Stack(places, dim, depth[0], heads[0], eps, **block)
        self.middle = nn.Linear(dim, dim)
        self.second = Stack(places, dim, depth[1], heads[1], eps, **block)

    def forward(
        self,
        x: Tensor,
        told: Tensor,
        entity: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[KVCache] = (),
        start: int = 0,
    ) -> Tensor:
        """x (b, l, C): the tokens of the sequence from `start` on -> (b, l, D). The other arguments: see Block and
        EntityAttention."""
        rows, cut = slice(start, start + x.shape[1]), len(self.first.blocks)
        x = self.embed_norm(self.embed(x) + self.first.position[rows])
        x = self.first(x, told, entity, mask, caches[:cut], start)
        x = self.middle(x) + self.second.position[rows]
        return self.second(x, told, entity, mask, caches[cut:], start)


# ---- the generator


@dataclass
class XARState(State):
    """label (b, 1, D): the class of each row, embedded; caches: one a block, of the committed entities."""

    label: Tensor = None
    caches: Sequence[KVCache] = ()


class XAR(Generator):
    """Class-conditional velocity of the entities of a grid of continuous tokens.

    entity: what is predicted at once. depth, heads: of the first and the second stack, or one number for both. mlp_ratio:
    hidden width of the blocks over dim, before the third that gating saves. head: integrates the velocity; FieldHead or
    a kind of it. dropout falls on both residual branches and inside the MLP, attention_dropout on the weights of
    attention; condition_drop is the share of classes replaced by the null one in `loss`, in training mode. time_law: of
    the entities' times in `loss` (layers.flow.training_times).
    Raises ValueError for a spec, an entity or a head it cannot serve, naming both sides.
    """

    def __init__(
        self,
        spec: TokenSpec,
        entity: Entity,
        dim: int,
        depth: int | Sequence[int],
        heads: int | Sequence[int],
        num_classes: int | None = None,
        head: Callable[[int, TokenSpec], Head] = FieldHead,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_drop: float = 0.1,
        time_law: str = "logit_normal",
    ) -> None:
        super().__init__()
        depth, heads = ((n, n) if isinstance(n, int) else tuple(n) for n in (depth, heads))
        if num_classes is None:
            raise ValueError("XAR is class-conditional: give num_classes")
        if spec.channels is None:
            raise ValueError(f"XAR predicts continuous tokens, the tokenizer makes discrete ones: {spec}")
        if not isinstance(spec.layout, Grid) or spec.layout.t != 1:
            raise ValueError(f"XAR cuts the grid of one picture into entities, the tokenizer makes {spec}")
        if odd := [n for n in heads if dim % (4 * n)]:
            raise ValueError(
                f"XAR: dim={dim} must be a multiple of 4 x heads={odd[0]} (rows and columns x channel pairs)"
            )
        self.spec, self.condition_drop, self.time_law = spec, condition_drop, time_law
        h, w = self.size = spec.layout.h, spec.layout.w
        entities = entity.split(h, w)
        self.coarse = entity.coarse(h, w)
        self.lengths = tuple(len(places) for places in entities)
        self.ends = (0, *accumulate(self.lengths))  # entity k is [ends[k], ends[k + 1]) of the sequence
        self.prefixes = tuple(accumulate(self.lengths[len(self.coarse) :]))  # tokens of the grid after its entities
        order = torch.cat(tuple(entities))
        self.register_buffer("order", order, persistent=False)  # (T,) the place of each token of the sequence
        self.register_buffer("rank", order.argsort(), persistent=False)  # and where in the sequence each place comes
        entity_of = torch.arange(len(entities)).repeat_interleave(torch.tensor(self.lengths))
        self.register_buffer("entity_of", entity_of, persistent=False)

        self.condition = LabelEmbedding(num_classes, dim)
        self.embed_time = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        block = {"hidden": int(dim * mlp_ratio * 2 / 3), "dropout": dropout, "attention_dropout": attention_dropout}
        at = torch.cat([_centres(size, self.size) for size in (self.size, *self.coarse)])[order]
        self.trunk = Trunk(at, spec.channels, dim, depth, heads, norm_eps, **block)
        self.readout = nn.Linear(dim, spec.channels)
        self.head = head(dim, spec)
        if not isinstance(self.head, FieldHead):
            raise ValueError(
                f"XAR is a velocity itself and needs a FieldHead to integrate it, not {type(self.head).__name__}"
            )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.condition.table.weight, self.trunk.first.position, self.trunk.second.position):
            nn.init.normal_(table, std=0.02)

    # ---- teacher forcing

    def whole(self, tokens: Tensor) -> Tensor:
        """tokens (B, L, C) -> (B, T, C): with the tokens of the coarse grids behind them."""
        if not self.coarse:
            return tokens
        grid = rearrange(tokens, "b (h w) c -> b c h w", h=self.size[0])
        coarse = [F.adaptive_avg_pool2d(grid, size).flatten(2).mT for size in self.coarse]
        return torch.cat((tokens, *coarse), dim=1)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x (B, T, C) by place, t (B, N) a time for each entity -> dx/dt (B, T, C) by place.

        An entity's velocity depends on it and the entities before it, as noisy as they are given.
        """
        told = self.condition(condition) + self._time(t)  # (B, N, D)
        mask = self.mask if len(self.lengths) > 1 else None
        out = self.readout(self.trunk(x[:, self.order].to(self.trunk.first.position.dtype), told, self.entity_of, mask))
        return out[:, self.rank].to(torch.promote_types(out.dtype, torch.float32))

    @property
    def mask(self) -> Tensor:
        """bool (T, T) in the order of the sequence, True where a token may look."""
        return self.entity_of[None] <= self.entity_of[:, None]

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        keep: Tensor | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (B, L, C) -> mean squared error of the velocity.

        keep bool (B,): where False the null class is put; t (B, N), a time for each entity; noise (B, T, C) by place.
        Each is drawn when None.
        """
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        data = self.whole(tokens)
        if t is None:
            t = training_times(self.time_law, (len(tokens), len(self.lengths)), tokens.device)
        if noise is None:
            noise = torch.randn_like(data)
        x = interpolate(data, noise, t[:, self.entity_of[self.rank]])
        loss = self.head.loss(self.velocity(x, t, condition), data, noise=noise).mean()
        return loss, {"velocity_error": loss.detach()}

    def _time(self, t: Tensor) -> Tensor:
        """t (...) -> (..., D). The product is taken in float32: 0.7 is 700 there, and 699 in float64."""
        waves = sincos((TICKS * t.float()).long(), FREQUENCIES, dtype=self.trunk.first.position.dtype)
        return self.embed_time(waves.roll(FREQUENCIES // 2, -1))  # cosines first

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
    ) -> XARState:
        """Raises LabelError for a class out of range, ValueError for a length that is not one of whole entities.

        Of coarse grids, what a fixed part of the picture covers entirely is fixed too.
        """
        rows, weight = branches[0].rows, self.trunk.first.position
        length = self.spec.length if length is None else length
        if length not in self.prefixes:
            raise ValueError(f"length is {length}, whole entities end at {', '.join(map(str, self.prefixes))}")
        if branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        label = self.condition(stack(list(branches)))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rounds = len(self.coarse) + self.prefixes.index(length) + 1
        blocks = [*self.trunk.first.blocks, *self.trunk.second.blocks]
        of = [(block.attention.heads, block.attention.head_dim) for block in blocks]
        return XARState(
            tokens=weight.new_zeros((rows, self.spec.length, self.spec.channels), dtype=dtype),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=weight.device),
            length=torch.zeros(rows, dtype=torch.int64, device=weight.device),
            rounds=rounds,
            fixed=None if fixed is None else (self.whole(fixed[0]), self._covered(fixed[1])),
            label=label,
            caches=[KVCache.allocate(len(label), self.ends[rounds], *sizes, label) for sizes in of],
        )

    def step(self, state: XARState, ahead: int | None = None) -> Prediction:
        """The velocity of the next entity as a field of x (B, m, C) and t, () or (B,); the network runs when it is asked.

        Raises ValueError for `ahead`: what comes next is one entity, never another number of tokens.
        """
        if ahead is not None:
            raise ValueError("XAR predicts one whole entity a step")
        entity, rows = state.round, len(state.tokens)
        if entity == state.rounds:
            raise ValueError(f"XAR: all {entity} entities are committed")
        branches = len(state.label) // rows

        def field(x: Tensor, t: Tensor) -> Tensor:
            out = self.readout(self._run(state, x, t, entity))
            return rearrange(out, "(R B) m c -> R B m c", R=branches)

        positions = self.order[self.ends[entity] : self.ends[entity + 1]].expand(rows, -1)
        index = torch.full_like(positions, entity)
        return Prediction(self.head, field, positions, index, len(self.lengths), keep=positions.shape[1])

    def commit(self, state: XARState, positions: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
        """The tokens (B, m, C) of the whole next entity. Raises ValueError for anything else."""
        size = self.lengths[state.round]
        if keep is not None or tokens.shape[1] != size:
            raise ValueError(
                f"XAR commits whole entities: the next has {size} tokens, got {tokens.shape[1]}"
                f"{'' if keep is None else ', and keep, which would leave some out'}"
            )
        entity, state.round = state.round, state.round + 1
        if state.round < state.rounds:  # nothing reads the last one
            self._run(state, tokens, tokens.new_zeros(()), entity)
        if entity >= len(self.coarse):
            state.tokens[:, positions[0]] = tokens.to(state.tokens.dtype)
            state.known[:, positions[0]] = True
            state.length = state.length + size

    def _run(self, state: XARState, x: Tensor, t: Tensor, entity: int) -> Tensor:
        """x (B, m, C) at t, after the committed entities -> (b, m, D), for all branches."""
        branches = len(state.label) // len(x)
        told = state.label + repeat(self._time(t).expand(len(x), -1), "B d -> (R B) 1 d", R=branches)
        x = repeat(x.to(self.trunk.first.position.dtype), "B m c -> (R B) m c", R=branches)
        state.nfe += 1
        return self.trunk(x, told, caches=state.caches, start=self.ends[entity])

    def _covered(self, mask: Tensor) -> Tensor:
        """mask bool (B, L) -> (B, T): a token of a coarse grid where all it covers is."""
        if not self.coarse:
            return mask
        open_ = rearrange((~mask).float(), "b (h w) -> b 1 h w", h=self.size[0])
        coarse = [F.adaptive_max_pool2d(open_, size).flatten(1) == 0 for size in self.coarse]
        return torch.cat((mask, *coarse), dim=1)


def _centres(size: tuple[int, int], finest: tuple[int, int]) -> Tensor:
    """Row and column of the middle of each token of a grid, float (n, 2), in tokens of the finest."""
    axes = [(torch.arange(n) + 0.5) * (full / n) - 0.5 for n, full in zip(size, finest, strict=True)]
    return torch.cartesian_prod(*axes)


# ---- published weights

XAR_CONFIG: dict[str, Any] = {  # their constructor arguments and the values they have when left out
    "img_size": 256,
    "vae_stride": 16,
    "patch_size": 1,
    "vae_embed_dim": 16,
    "clusters": 4,
    "encoder_embed_dim": 1024,
    "encoder_depth": 16,
    "encoder_num_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_depth": 16,
    "decoder_num_heads": 16,
    "mlp_ratio": 4.0,
    "label_drop_prob": 0.1,
    "attn_dropout": 0.0,
    "proj_dropout": 0.0,
    "num_steps": 50,  # an argument of their sampler: velocities an entity
    # not read by their code either
    "class_num": 1000,
    "norm_layer": None,
    "diffusion_batch_mul": 4,
}


CLASSES = 1000  # of their table, whatever class_num says


def _first(position: Tensor) -> Tensor:  # (1, T, D)
    return position.squeeze(0)


def _both(theirs: str, ours: str) -> dict[str, Target]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def _stack(theirs: str, ours: str) -> dict[str, Target]:
    block, of = f"{theirs}_blocks.{{i}}", f"{ours}.blocks.{{i}}"
    keys: dict[str, Target] = {
        f"{theirs}_pos_embed_learned": (f"{ours}.position", _first),
        f"{theirs}_norm.weight": f"{ours}.norm.weight",
        **_both(f"{block}.attn.qkv", f"{of}.attention.qkv"),
        **_both(f"{block}.attn.proj", f"{of}.attention.out"),
        **_both(f"{block}.mlp.fc2", f"{of}.mlp.fc2"),
        **_both(f"{block}.ada_lin.1", f"{of}.modulation.project"),
    }
    for kind in ("weight", "bias"):
        keys |= {f"{block}.mlp.fc1_{part}.{kind}": Join(f"{of}.mlp.fc1.{kind}", i, 2) for i, part in enumerate("gx")}
    rotary = ("freqs", "freqs_cos", "freqs_sin")  # the rotary table, recomputed from the grid
    return keys | {f"{block}.attn.rope.{name}": None for name in rotary}


XAR_KEYS: dict[str, Target] = {  # theirs -> ours; None: ignored, for the reason beside it
    "class_emb.weight": "condition.table.weight",
    **_both("time_embed.mlp.0", "embed_time.0"),
    **_both("time_embed.mlp.2", "embed_time.2"),
    **_both("z_proj", "trunk.embed"),
    "z_proj_ln.weight": "trunk.embed_norm.weight",
    **_stack("encoder", "trunk.first"),
    **_both("decoder_embed", "trunk.middle"),
    **_stack("decoder", "trunk.second"),
    **_both("pred", "readout"),
    "mask": None,  # who may look where, recomputed from the entities
}


def xar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> XAR:
    """An xAR generator from its tensors and the original constructor arguments, in eval mode and float32.

    It takes the tensors of `state` as they are, without a copy, where they are float32 already.
    Raises UnknownName for an argument it does not have, ValueError for stacks of two widths, CheckpointMismatch listing all
    keys that do not fit.
    """
    for name in config:
        look_up(name, XAR_CONFIG, "xAR: argument")
    config = XAR_CONFIG | dict(config)
    dim, side = config["encoder_embed_dim"], config["img_size"] // (config["vae_stride"] * config["patch_size"])
    if config["decoder_embed_dim"] != dim:
        raise ValueError(
            f"xAR: encoder_embed_dim is {dim}, decoder_embed_dim {config['decoder_embed_dim']}: must agree"
        )
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = XAR(
            TokenSpec(
                Grid(1, side, side),
                decoded=(1, config["img_size"], config["img_size"]),
                channels=config["vae_embed_dim"] * config["patch_size"] ** 2,
            ),
            CellEntity(side // isqrt(config["clusters"])),
            dim=dim,
            depth=(config["encoder_depth"], config["decoder_depth"]),
            heads=(config["encoder_num_heads"], config["decoder_num_heads"]),
            num_classes=CLASSES,
            head=partial(FieldHead, steps=config["num_steps"]),
            mlp_ratio=config["mlp_ratio"],
            dropout=config["proj_dropout"],
            attention_dropout=config["attn_dropout"],
            condition_drop=config["label_drop_prob"],
        )
    model.load_state_dict(translate(state, XAR_KEYS, model.state_dict()), assign=True)
    return model.float().eval()
