"""Next-neighbour prediction: all tokens at one Manhattan distance from the first corner in one round, on any grid.

NAR: "Neighboring Autoregressive Modeling for Efficient Visual Generation" (He et al. 2025, arXiv:2503.10696), pictures
and video. The transformer is LlamaGen's (arXiv:2406.06525), conditioned by prefix tokens, a class or a caption.

Letters: R branches of guidance, B samples, b rows (R * B), T condition slots, L tokens, l new positions, m tokens of a
round, A axes of the grid (2, or 3 with frames), D width.

What to know:
- the distance of a token is frame + row + column, so t x h x w tokens take t + h + w - 2 rounds, 2n - 1 on n x n. A token
  sees the condition and every token no farther than itself: those of its own round too, in both directions;
- there is a read-out an axis: a token says what follows it in its row, what lies below it, what is there in the next frame.
  A token that has several neighbours behind it gets the mean of their logits; the first token gets the mean of what the
  last condition slot says along all axes. The read-out of the first axis stands after `depth` blocks, that of each further
  axis `axis_depth` blocks higher;
- the cache is static, slot T + i is the token at place i of the raster, whenever it is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from torch import Tensor, nn

from generators.next_token import LARP_CONFIG, LLAMAGEN_KEYS, SPAN, Block, llama_arguments, round_up
from generators.protocol import Generator, Prediction, State
from heads.neighbour import Neighbour
from heads.protocol import Head
from layers.attention import KVCache
from layers.condition import LabelEmbedding, TextEmbedding, check_labels, drop_condition
from layers.keymap import Join, Target, translate
from layers.noise import Noise
from layers.record import look_up
from layers.rotary import layout_places, rotary_table, with_zero_slots
from layers.sincos import sincos
from layers.spec import Condition, Grid, TokenSpec, stack
from layers.spec import Sequence as Line


class Trunk(nn.Module):
    """All blocks, and a norm for each axis at the height of its read-out. `generator.trunk.compile()` compiles it."""

    def __init__(self, blocks: list[Block], heights: list[int], dim: int, eps: float) -> None:
        super().__init__()
        self.heights = heights
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList([nn.RMSNorm(dim, eps) for _ in heights])

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        mask: Tensor,
        caches: Sequence[KVCache] | None = None,
        slots: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        """x (b, l, D) -> (b, l, A, D)."""
        states = []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, rotary=rotary, mask=mask, cache=cache, slots=slots, span=span)
            states += [norm(x) for norm, height in zip(self.norms, self.heights, strict=True) if height == i + 1]
        return torch.stack(states, dim=-2)


@dataclass
class NeighboringState(State):
    """prefix (b, T, D): the embedded condition; readable bool (b, T + L), False at padded text slots, or None."""

    prefix: Tensor = None
    readable: Tensor | None = None
    caches: Sequence[KVCache] = ()


class Neighboring(Generator):
    """Transformer over the tokens of `spec`, diagonal by diagonal (plane by plane in a video).

    layout: (t, h, w) to read the tokens as, in raster order, where the tokenizer gives them no place or another one.
    num_classes or text_dim (with text_slots) says what it is conditioned by. depth: blocks below the first read-out.
    positions: rotary over the axes of the grid, or an absolute table, learned or of fixed sines, one row a slot, added to
    the embedded sequence. The other arguments are those of NextToken. Raises ValueError for a spec it cannot serve.
    """

    undecayed = ("position",)

    def __init__(
        self,
        spec: TokenSpec,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        text_dim: int | None = None,
        text_slots: int = 120,
        layout: tuple[int, int, int] | None = None,
        head: Callable[[int, TokenSpec], Head] = Neighbour,
        positions: Literal["rotary", "learned", "sincos"] = "rotary",
        axis_depth: int = 1,
        kv_heads: int | None = None,
        mlp_hidden: int | None = None,
        theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
        token_dropout: float = 0.1,
        drop_path: float = 0.0,
        condition_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (text_dim is None):
            raise ValueError(f"Neighboring: give num_classes or text_dim: got {num_classes} and {text_dim}")
        read = spec.read_as(None if layout is None else Grid(*layout))
        if not isinstance(read.layout, Grid) or read.vocab_size is None:
            raise ValueError(
                f"Neighboring predicts discrete tokens on a Grid, the tokenizer makes {read}; `layout` reads tokens as a grid"
            )
        if positions not in ("rotary", "learned", "sincos"):
            raise ValueError(f"Neighboring: positions is {positions!r}, must be rotary, learned or sincos")
        readout = head(dim, read)
        if not isinstance(readout, Neighbour):
            raise ValueError(
                f"Neighboring gives a state an axis, for a Neighbour head; {type(readout).__name__} reads one state"
            )
        self.spec, self.grid, self.condition_drop = spec, read.layout, condition_drop
        if num_classes is not None:
            self.condition = LabelEmbedding(num_classes, dim)
        else:
            self.condition = TextEmbedding(text_dim, text_slots, dim)
        self.embed = nn.Embedding(spec.vocab_size, dim)
        self.token_drop = nn.Dropout(token_dropout)
        slots = self.condition.slots + spec.length
        hidden = mlp_hidden or round_up(8 * dim // 3, 256)
        heights = [depth + axis_depth * axis for axis in range(readout.axes)]
        rates = torch.linspace(0, drop_path, heights[-1]).tolist()
        blocks = [Block(dim, heads, kv_heads, hidden, norm_eps, dropout, rate) for rate in rates]
        self.trunk = Trunk(blocks, heights, dim, norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head = readout
        rotary = position = None
        if positions == "rotary":
            rotary = with_zero_slots(rotary_table(layout_places(self.grid), dim // heads, theta), self.condition.slots)
        elif positions == "sincos":
            position = sincos(torch.arange(slots), dim)
        self.register_buffer("rotary", rotary, persistent=False)  # (T + L, d/2, 2)
        if positions == "learned":
            self.position = nn.Parameter(torch.randn(slots, dim) * 0.02)
        else:
            self.register_buffer("position", position)  # (T + L, D)
        self._lay_out(self.condition.slots)

    def _lay_out(self, first: int) -> None:
        """The tables of the order: who is made when, and whose states say so. Tokens have the slots from `first` on."""
        grid = self.grid
        places = torch.cartesian_prod(*(torch.arange(n) for n in (grid.t, grid.h, grid.w))).flip(1)  # column first
        distance = places.sum(1)
        order = distance.argsort(stable=True)
        self.ends = (0, *distance.bincount().cumsum(0).tolist())  # round r makes order[ends[r] : ends[r + 1]]
        self.reach = [first, *(first + 1 + int(order[:end].max()) for end in self.ends[1:])]  # slots in use by round r

        strides = torch.tensor([1, grid.w, grid.h * grid.w])
        known = (places > 0)[:, : self.head.axes]
        source = first + torch.arange(len(places))[:, None] - strides[: self.head.axes]
        source = source.where(known, source.where(known, 0).amax(1, keepdim=True))  # where there is none, another axis'
        known[0], source[0] = True, first - 1
        rank = torch.empty_like(distance)
        rank[order] = torch.arange(len(order)) - torch.tensor(self.ends)[distance[order]]
        tables = {
            "order": order,  # (L,) places of the raster
            "when": torch.cat((torch.arange(-first, 0), distance)),  # (T + L,) a slot sees those not later than itself
            "source": source,  # (L, A) the slots whose states say what a token is
            "known": known,  # (L, A)
            "rank": torch.cat((torch.arange(first), rank)),  # (T + L,) among the slots that enter in the same round
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Neighboring":
        """Moves and casts the module, but leaves the rotary table in float32: half precision would round its angles."""
        table = self.rotary
        super()._apply(fn, recurse)
        if table is not None:
            self.rotary = table.to(self.rotary.device)
        return self

    # ---- teacher forcing

    def states(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L) -> (B, T + L, A, D): what each slot says of the one that follows it along each axis."""
        slots = torch.arange(len(self.when), device=tokens.device)
        x = self._placed(torch.cat((self.condition(condition), self.embed(tokens)), dim=1), slots)
        return self.trunk(x, self._angles(slots), self.mask(condition))

    def hidden(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L) -> (B, L, A, D): row i has seen the condition and the tokens nearer than i."""
        return self._gather(self.states(tokens, condition), self.source, self.known)

    def logits(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L) -> (B, L, V): row i is the law of token i."""
        return self.head.logits(self.hidden(tokens, condition))

    def loss(
        self, tokens: Tensor, condition: Condition, keep: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats a token. keep bool (B,): where False the null condition is put; drawn when None."""
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        loss = self.head.loss(self.hidden(tokens, condition), tokens).mean()
        return loss, {"cross_entropy": loss.detach()}

    def mask(self, condition: Condition) -> Tensor:
        """Who sees whom: bool (b, 1, T + L, T + L), True where the slot of a row sees that of a column; b is 1 or B."""
        return self._mask(torch.arange(len(self.when), device=self.when.device), self._readable(condition))

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
    ) -> NeighboringState:
        """Raises LabelError for a class out of range, ValueError for a length that is not one of whole diagonals."""
        rows, device = branches[0].rows, self.embed.weight.device
        length = self.spec.length if length is None else length
        if length not in self.ends[1:]:
            raise ValueError(f"length is {length}, whole diagonals end at {', '.join(map(str, self.ends[1:]))}")
        if isinstance(self.condition, LabelEmbedding) and branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        joined = stack(list(branches))
        prefix = self.condition(joined)
        first, slots = self.trunk.blocks[0].attention, len(self.when)
        return NeighboringState(
            tokens=torch.zeros(rows, self.spec.length, dtype=torch.int64, device=device),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            rounds=self.ends.index(length),
            fixed=fixed,
            prefix=prefix,
            readable=self._readable(joined),
            caches=[
                KVCache.allocate(len(prefix), slots, first.kv_heads, first.head_dim, prefix) for _ in self.trunk.blocks
            ],
        )

    def step(self, state: NeighboringState, ahead: int | None = None) -> Prediction:
        """The laws of all tokens of the next diagonal. Raises ValueError for `ahead`: it is whole, never another number."""
        if ahead is not None:
            raise ValueError("Neighboring predicts one whole diagonal a step")
        now = state.round
        if now == state.rounds:
            raise ValueError(f"Neighboring: all {now} diagonals are committed")
        branches = len(state.prefix) // len(state.tokens)
        if now == 0:
            x, slots = state.prefix, torch.arange(self.condition.slots, device=self.when.device)
        else:
            newest = self._places(now - 1)
            x = repeat(self.embed(state.tokens[:, newest]), "B l d -> (R B) l d", R=branches)
            slots = self.condition.slots + newest
        span = min(round_up(self.reach[now], SPAN), len(self.when))
        z = self.trunk(
            self._placed(x, slots),
            self._angles(slots),
            self._mask(slots, state.readable, span),
            caches=state.caches,
            slots=slots.expand(len(x), -1),
            span=span,
        )
        state.nfe += 1
        places = self._places(now)
        z = self._gather(z, self.rank[self.source[places]], self.known[places])
        positions = places.expand(len(state.tokens), -1)
        return Prediction(
            self.head,
            rearrange(z, "(R B) m a d -> R B m a d", R=branches),
            positions,
            torch.full_like(positions, now),
            len(self.ends) - 1,
            keep=len(places),
        )

    def commit(self, state: NeighboringState, positions: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
        """The tokens (B, m) of the whole next diagonal. Raises ValueError for anything else."""
        places = self._places(state.round)
        if keep is not None or tokens.shape[1] != len(places):
            raise ValueError(
                f"Neighboring commits whole diagonals: the next has {len(places)} tokens, got {tokens.shape[1]}"
                f"{'' if keep is None else ', and keep, which would leave some out'}"
            )
        state.tokens[:, places] = tokens
        state.known[:, places] = True
        state.length = state.length + len(places)
        state.round += 1

    def _places(self, now: int) -> Tensor:
        """The places of the raster that a round makes, int64 (m,)."""
        return self.order[self.ends[now] : self.ends[now + 1]]

    def _placed(self, x: Tensor, slots: Tensor) -> Tensor:
        x = self.token_drop(x)
        return x if self.position is None else x + self.position[slots]

    def _angles(self, slots: Tensor) -> Tensor | None:
        return None if self.rotary is None else self.rotary[None, slots]

    def _gather(self, states: Tensor, source: Tensor, known: Tensor) -> Tensor:
        """states (b, l, A, D), source (m, A) among the l, known (m, A) -> (b, m, A, D): as the head reads them."""
        axis = torch.arange(source.shape[1], device=source.device)
        share = known.to(states.dtype) / known.sum(1, keepdim=True)
        return states[:, source, axis] * share[..., None]

    def _readable(self, condition: Condition) -> Tensor | None:
        if condition.text_mask is None:
            return None
        rest = condition.text_mask.new_ones(condition.rows, self.spec.length)
        return torch.cat((condition.text_mask, rest), dim=1)

    def _mask(self, slots: Tensor, readable: Tensor | None, span: int | None = None) -> Tensor:
        """Each query sees the readable slots that are not later than itself, and always itself: (b, 1, l, span)."""
        mask = self.when[slots, None] >= self.when[:span]
        if readable is None:
            return mask[None, None]
        own = torch.arange(mask.shape[1], device=slots.device) == slots[:, None]
        return (mask & readable[:, None, : mask.shape[1]] | own)[:, None]


# ---- published weights

NAR_CONFIG: dict[str, Any] = {  # their constructor arguments and the values they have when left out
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "rope_base": 10_000,
    "norm_eps": 1e-5,
    "token_dropout_p": 0.1,
    "resid_dropout_p": 0.1,
    "drop_path_rate": 0.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "caption_dim": 2048,
    "model_type": "c2i",
    "vocab_size": 16384,
    "cls_token_num": 1,
    "block_size": 256,
    "medusa_attention_num": 1,
    "downsample": 16,  # pixels a token, an argument of their training
    # not read: one dropout falls on both branches and none on attention; weights come from the file; caches have their size
    "ffn_dropout_p": 0.1,
    "attn_dropout_p": 0.0,
    "initializer_range": 0.02,
    "max_batch_size": 32,
    "max_seq_len": 2048,
}
NAR_VIDEO_CONFIG: dict[str, Any] = {**LARP_CONFIG, "latent_shape": (4, 16, 16)}


def _first(position: Tensor) -> Tensor:  # (1, T + L, D)
    return position.squeeze(0)


TRUNK_KEYS = {
    theirs: ours
    for theirs, ours in LLAMAGEN_KEYS.items()
    if theirs not in ("norm.weight", "output.weight", "freqs_cis")
}
NAR_KEYS: dict[str, Target] = {  # theirs -> ours
    **TRUNK_KEYS,
    "norm.weight": "trunk.norms.0.weight",
    "output.weight": Join("head.readout.weight", 0, 2, dim=1),
    "medusa_norm.weight": "trunk.norms.1.weight",
    "medusa_output.weight": Join("head.readout.weight", 1, 2, dim=1),
}
NAR_VIDEO_KEYS: dict[str, Target] = {**TRUNK_KEYS, "abs_pe": ("position", _first)}
for _axis, _name in enumerate("RDB"):  # right, down, back: the next frame
    NAR_VIDEO_KEYS[f"norm_{_name}.weight"] = f"trunk.norms.{_axis}.weight"
    NAR_VIDEO_KEYS[f"output_{_name}.weight"] = Join("head.readout.weight", _axis, 3, dim=1)


def nar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Neighboring:
    """A class- or text-conditional NAR generator of pictures, under the constructor arguments of the original.

    In eval mode and float32. Raises UnknownName for an argument it does not have, ValueError for a grid that is not
    square, CheckpointMismatch listing all keys that do not fit.
    """
    config = _complete(config, NAR_CONFIG, "NAR", ("c2i", "t2i"))
    side, slots = isqrt(config["block_size"]), config["cls_token_num"]
    if side * side != config["block_size"]:
        raise ValueError(f"NAR: block_size is {config['block_size']}, must be a square number of tokens")
    captions, pixels = config["model_type"] == "t2i", side * config["downsample"]

    def first_rows(null: Tensor) -> Tensor:  # the file keeps 120 rows whatever the number of condition slots
        return null[:slots]

    return _load(
        state,
        {**NAR_KEYS, "cls_embedding.uncond_embedding": ("condition.null", first_rows)},
        config,
        spec=TokenSpec(Grid(1, side, side), decoded=(1, pixels, pixels), vocab_size=config["vocab_size"]),
        num_classes=None if captions else config["num_classes"],
        text_dim=config["caption_dim"] if captions else None,
        text_slots=slots,
        axis_depth=config["medusa_attention_num"],
    )


def nar_video_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Neighboring:
    """A class-conditional NAR generator of clips on LARP's tokens, under the constructor arguments of the original.

    In eval mode and float32. Raises as nar_from_published, and ValueError for frame_prediction, which the original
    declares and whose mask hides all conditioning tokens but one: impose given frames by `fixed` instead.
    """
    config = _complete(config, NAR_VIDEO_CONFIG, "NAR video", ("class_cond",))
    if config["frame_prediction"]:
        raise ValueError("NAR video: frame_prediction is not supported; impose the tokens of given frames by `fixed`")
    pixels = (config["frame_num"], config["input_size"], config["input_size"])
    return _load(
        state,
        NAR_VIDEO_KEYS,
        config,
        spec=TokenSpec(Line(config["max_seq_len"]), decoded=pixels, vocab_size=config["vocab_size"]),
        layout=tuple(config["latent_shape"]),
        num_classes=config["num_classes"],
        head=partial(Neighbour, axes=3),
        positions="sincos" if config["use_fixed_pe"] else "learned",
    )


def _complete(config: Mapping[str, Any], known: Mapping[str, Any], what: str, kinds: Sequence[str]) -> dict[str, Any]:
    for name in config:
        look_up(name, known, f"{what}: argument")
    config = {**known, **config}
    if config["model_type"] not in kinds:
        raise ValueError(f"{what}: model_type is {config['model_type']!r}, must be {' or '.join(kinds)}")
    return config


def _load(
    state: Mapping[str, Tensor], keys: Mapping[str, Target], config: Mapping[str, Any], **arguments: Any
) -> Neighboring:
    def with_null(table: Tensor) -> Tensor:  # a model that never drops its condition has no row for the null class
        return table if config["class_dropout_prob"] else torch.cat((table, torch.zeros_like(table[:1])))

    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = Neighboring(**arguments, **llama_arguments(config))
    keys = {**keys, "cls_embedding.embedding_table.weight": ("condition.table.weight", with_null)}
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()
