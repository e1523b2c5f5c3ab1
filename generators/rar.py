"""Randomised autoregression: a causal transformer trained on shuffled orders that end up raster, and sampled in raster. RAR.

Source: "Randomized Autoregressive Visual Generation" (Yu et al. 2024, arXiv:2411.00776).

Letters: R branches of guidance, B samples, b rows (R * B), L tokens, l new slots, D width; s a slot of the sequence, pi an
order, pi(i) the place in the layout of the i-th token.

What to know:
- the network reads [start][class][token pi(0)][token pi(1)]...; slot 1 + i predicts token pi(i), so the last is not fed;
- every slot is told two places: its own (`position`), and that of the token it must predict (`target`). Without the second
  no law given a set of tokens could depend on which place is asked for;
- the class is embedded twice: as slot 1, and, with one row of `time` a slot, as the condition of every adaptive norm;
- in a block the chunks are shift, scale, gate, before the read-out scale, shift; only norms in blocks have weights.

Decoding keeps a static cache of 2 + L slots a layer, as next_token.py says. What modulates the blocks depends on class and
slot alone, not on tokens: it is made for many slots at once, since a third of the weights lie there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from generators.next_token import (
    SPAN,
    NextTokenState,
    append,
    draft_mask,
    family_tree,
    follow,
    round_up,
    spread,
    truncate,
)
from generators.protocol import Generator, Prediction, one_state
from heads.categorical import Categorical
from heads.protocol import Head
from layers.adaln import Modulation, modulate
from layers.attention import KVCache
from layers.condition import LabelEmbedding, check_labels, drop_condition
from layers.keymap import Target, translate
from layers.noise import Noise
from layers.spec import Condition, Grid, TokenSpec, stack
from layers.spec import Sequence as Line

PREFIX = 2  # slots before the tokens
MODULATED = 64  # rows that are modulated at once while decoding


class NormedAttention(nn.Module):
    """Causal self-attention with a norm, of its own weights, over the channels of each head's queries and keys."""

    def __init__(self, dim: int, heads: int, eps: float, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dropout = heads, dim // heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim, eps), nn.LayerNorm(self.head_dim, eps)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        """x (b, l, D) -> (b, l, D). With a cache the new keys go to `slots`, (b, l), and the queries look at the first
        `span` slots as `mask` allows; without one each looks back over the whole of x."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b l h d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            cache.write(slots, k, v)
            k, v = cache.keys[:, :span], cache.values[:, :span]
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (b, h, l, d)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None, dropout_p=dropout)
        return self.drop(self.out(rearrange(y, "b h l d -> b l (h d)")))


class Block(nn.Module):
    """x + g1 Attention(LN(x) (1 + s1) + b1), then x + g2 MLP(LN(x) (1 + s2) + b2)."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.modulation = Modulation(dim, dim, 6)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.attention = NormedAttention(dim, heads, eps, dropout, attention_dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, hidden, drop=dropout)

    def forward(self, x: Tensor, chunks: Tensor | None, condition: Tensor | None, **attend: Any) -> Tensor:
        """x (b, l, D); chunks (6, b, l, D), or None: made here of condition (b, l, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition) if chunks is None else chunks
        x = torch.addcmul(x, self.attention(modulate(self.attention_norm(x), scale_1, shift_1), **attend), gate_1)
        return torch.addcmul(x, self.mlp(modulate(self.mlp_norm(x), scale_2, shift_2)), gate_2)


class Trunk(nn.Module):
    """All blocks."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x: Tensor,
        chunks: Sequence[Tensor] | None = None,
        condition: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[KVCache] | None = None,
        slots: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            given = None if chunks is None else chunks[i]
            x = block(x, given, condition, mask=mask, cache=cache, slots=slots, span=span)
        return x


@dataclass
class RARState(NextTokenState):
    """prefix (b, 2, D): start and class; places (2 + L, D): what every slot is told of places, in raster; even: all rows
    have as many tokens, so that their number is known on the host; chunks: what modulates every block (6, b, w, D), and
    the read-out (2, b, w, D), in the w slots from `chunks_from` on."""

    places: Tensor = None
    even: bool = True
    chunks: Sequence[Tensor] = ()
    chunks_from: int = 0


class RAR(Generator):
    """Class-conditional causal transformer over the tokens of `spec`, whatever their layout; raster is layout order.

    mlp_hidden None: 4 dim. dropout falls on both residual branches, condition_drop is the share of classes replaced by the
    null one in `loss`, in training mode. anneal: the shares of training at which the share of shuffled orders begins to
    fall from 1, along a line, and at which it is 0. Raises ValueError for a spec or a setting it cannot serve.
    """

    undecayed = ("embed", "condition", "position", "target", "time")

    def __init__(
        self,
        spec: TokenSpec,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        head: Callable[[int, TokenSpec], Head] = Categorical,
        mlp_hidden: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_drop: float = 0.1,
        anneal: tuple[float, float] = (0.5, 0.75),
    ) -> None:
        super().__init__()
        if num_classes is None:
            raise ValueError("RAR is class-conditional: give num_classes")
        if spec.vocab_size is None:
            raise ValueError(f"RAR predicts discrete tokens, the tokenizer makes continuous ones: {spec}")
        if dim % heads:
            raise ValueError(f"RAR: heads={heads} must divide dim={dim}")
        if not 0 <= anneal[0] <= anneal[1] <= 1:
            raise ValueError(f"RAR: anneal is {tuple(anneal)}, must be two shares of training, the first no larger")
        self.spec, self.condition_drop, self.anneal = spec, condition_drop, tuple(anneal)
        self.embed = nn.Embedding(spec.vocab_size, dim)
        self.condition = LabelEmbedding(num_classes, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.position = nn.Parameter(torch.empty(PREFIX + spec.length, dim))  # a row a slot in raster
        self.target = nn.Parameter(torch.empty(spec.length, dim))  # a row a token
        self.time = nn.Parameter(torch.empty(PREFIX + spec.length, dim))  # a row a slot in any order
        hidden = mlp_hidden or 4 * dim
        self.trunk = Trunk([Block(dim, heads, hidden, norm_eps, dropout, attention_dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, norm_eps, elementwise_affine=False)
        self.norm_modulation = Modulation(dim, dim, 2)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and "modulation" not in name:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.position, self.target, self.time):
            nn.init.trunc_normal_(table, std=0.02)
        self.head = one_state(self, head(dim, spec))

    # ---- teacher forcing

    def hidden(self, tokens: Tensor, condition: Condition, orders: Tensor | None = None) -> Tensor:
        """tokens (B, L) in layout order; orders int64 (B, L), a permutation a row (None: raster) -> (B, L, D): row i has
        seen the class, the tokens orders[:i] and the place orders[i]."""
        if orders is None:
            orders = torch.arange(self.spec.length, device=tokens.device).expand(len(tokens), -1)
        label = self.condition(condition)
        fed = self.embed(tokens.gather(1, orders[:, :-1])) + F.embedding(orders[:, :-1], self.position[PREFIX:])
        told = torch.cat((label + self.position[1], fed), dim=1) + F.embedding(orders, self.target)
        start = (self.start + self.position[0]).expand(len(tokens), 1, -1)
        c = label + self.time[: 1 + self.spec.length]
        x = self.trunk(torch.cat((start, told), dim=1), condition=c)
        return self._finish(x[:, 1:], self.norm_modulation(c[:, 1:]))

    def logits(self, tokens: Tensor, condition: Condition, orders: Tensor | None = None) -> Tensor:
        """tokens, orders as in `hidden` -> (B, L, V): row i is the law of token orders[i]."""
        return self.head.logits(self.hidden(tokens, condition, orders))

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        orders: Tensor | None = None,
        shuffled: float = 0.0,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy in nats a token.

        orders: as in `hidden`; drawn when None, a row shuffled with probability `shuffled`. keep bool (B,): where False the
        null class is put; drawn when None.
        """
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        if orders is None:
            orders = self.draw_orders(len(tokens), shuffled, tokens.device)
        loss = self.head.loss(self.hidden(tokens, condition, orders), tokens.gather(1, orders)).mean()
        return loss, {"cross_entropy": loss.detach()}

    def draw_orders(self, rows: int, shuffled: float, device: torch.device | str | None = None) -> Tensor:
        """int64 (rows, L): each row, with probability `shuffled`, any permutation alike; raster otherwise."""
        order = torch.rand(rows, self.spec.length, device=device).argsort(dim=-1)
        chosen = torch.rand(rows, 1, device=device) < shuffled
        return torch.where(chosen, order, torch.arange(self.spec.length, device=device))

    def curriculum(self, step: int, steps: int) -> dict[str, Any]:
        """`shuffled` is 1 up to the first bound of `anneal`, and falls along a line to 0 at the second."""
        (first, last), done = self.anneal, step / steps
        return {"shuffled": min(1.0, max(0.0, (last - done) / (last - first))) if last > first else float(done < last)}

    def _finish(self, x: Tensor, chunks: Tensor) -> Tensor:
        scale, shift = chunks
        return modulate(self.norm(x), scale, shift)

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
        room: int = 0,
    ) -> RARState:
        """room: as NextToken. Raises LabelError for a class id out of range, ValueError for a length outside [1, L]."""
        rows, device = branches[0].rows, self.embed.weight.device
        length = self.spec.length if length is None else length
        if not 1 <= length <= self.spec.length:
            raise ValueError(f"length is {length}, this generator makes 1 to {self.spec.length} tokens")
        if branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        label = self.condition(stack(list(branches)))
        prefix = torch.cat((self.start.expand_as(label), label), dim=1)
        attention, slots = self.trunk.blocks[0].attention, PREFIX + length + room
        return RARState(
            tokens=torch.zeros(rows, self.spec.length, dtype=torch.int64, device=device),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            rounds=length,
            fixed=fixed,
            prefix=prefix,
            caches=[
                KVCache.allocate(len(prefix), slots, attention.heads, attention.head_dim, prefix)
                for _ in self.trunk.blocks
            ],
            places=self.position + F.pad(self.target, (0, 0, 1, 1)),
        )

    def step(self, state: RARState, ahead: int | None = None) -> Prediction:
        """The law of the next token of every row. Raises ValueError for `ahead`: a state is decoded in raster."""
        if ahead is not None:
            raise ValueError("RAR predicts one token a step; to test a draft ask `score`")
        return self.score(state, state.tokens[:, :0])

    def score(self, state: RARState, draft: Tensor, parents: Tensor | None = None) -> Prediction:
        """draft (B, n) of the next n tokens -> the n + 1 laws: of each given those before it, and of the one after.
        parents: the draft is a tree, as NextToken says."""
        total, nodes = state.rounds, draft.shape[1] + 1
        branches, last = len(state.prefix) // len(state.tokens), 1 + total  # where a finished row idles
        family, depth = family_tree(parents, nodes, draft.device)
        newest = state.tokens.gather(1, (state.length - 1).clamp_min(0)[:, None])
        x = repeat(self.embed(torch.cat((newest, draft), dim=1)), "B l d -> (R B) l d", R=branches)
        slots, places = spread(state, depth, nodes, PREFIX)
        if state.prefilled:
            empty = repeat(state.length == 0, "B -> (R B) 1 1", R=branches)  # after a rewind to the start
            x = torch.cat((torch.where(empty, state.prefix[:, 1:], x[:, :1]), x[:, 1:]), dim=1)
        else:
            x = torch.cat((state.prefix, x[:, 1:]), dim=1)
            slots, places = (torch.cat((torch.zeros_like(own[:, :1]), own), dim=1) for own in (slots, places))
        slots, places = slots.clamp_max(state.caches[0].slots - 1), places.clamp_max(last)
        if state.even and family is None:
            chunks, condition = self._modulation(state, 1 + state.reach if state.prefilled else 0, x.shape[1]), None
        else:
            chunks, condition = None, state.prefix[:, 1:] + self.time[places]
        span = min(round_up(PREFIX + state.reach + nodes - 1, SPAN), state.caches[0].slots)
        mask = draft_mask(slots, span, family)[:, None]
        x = x + state.places[places]
        z = self.trunk(x, chunks, condition, mask, state.caches, slots, span)
        z = self._finish(z, self.norm_modulation(condition) if chunks is None else chunks[-1])
        z = rearrange(z[:, -nodes:], "(R B) l d -> R B l d", R=branches)
        state.nfe += 1
        positions = (state.length[:, None] + depth).clamp_max(total - 1)
        return Prediction(self.head, z, positions, positions, total, keep=1)

    def commit(
        self,
        state: RARState,
        positions: Tensor,
        tokens: Tensor,
        keep: Tensor | None = None,
        path: Tensor | None = None,
    ) -> None:
        """positions must continue each row; keep (B, m) True on a prefix of them; path: as NextToken."""
        state.even = state.even and keep is None
        if path is not None:
            follow(state, path, PREFIX)
        append(state, tokens, keep)

    def rewind(self, state: RARState, length: Tensor) -> None:
        """Forget all but the first length[b] tokens of row b, int64 (B,)."""
        state.even = False
        truncate(state, length)

    def _modulation(self, state: RARState, first: int, count: int) -> list[Tensor]:
        """Of `count` slots from `first` on, of every block and of the read-out; made ahead as long as rows are few."""
        start = first - state.chunks_from
        if not state.chunks or start < 0 or start + count > state.chunks[0].shape[2]:
            width = max(count, MODULATED // len(state.prefix))
            slots = torch.arange(first, first + width, device=self.time.device).clamp_max(len(self.time) - 1)
            c = state.prefix[:, 1:] + self.time[slots]
            made = [*(block.modulation for block in self.trunk.blocks), self.norm_modulation]
            state.chunks, state.chunks_from, start = [modulation(c) for modulation in made], first, 0
        return [chunks[:, :, start : start + count] for chunks in state.chunks]


# ---- published weights

RAR_KEYS: dict[str, Target] = {  # theirs -> ours
    "cls_token": ("start", torch.Tensor.squeeze),
    "tokens": "embed.weight",
    "classes": "condition.table.weight",
    **{
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in {
            "blocks.{i}.norm1": "trunk.blocks.{i}.attention_norm",
            "blocks.{i}.attn.qkv": "trunk.blocks.{i}.attention.qkv",
            "blocks.{i}.attn.q_norm": "trunk.blocks.{i}.attention.q_norm",
            "blocks.{i}.attn.k_norm": "trunk.blocks.{i}.attention.k_norm",
            "blocks.{i}.attn.proj": "trunk.blocks.{i}.attention.out",
            "blocks.{i}.norm2": "trunk.blocks.{i}.mlp_norm",
            "blocks.{i}.mlp.fc1": "trunk.blocks.{i}.mlp.fc1",
            "blocks.{i}.mlp.fc2": "trunk.blocks.{i}.mlp.fc2",
            "blocks.{i}.adaLN_modulation.1": "trunk.blocks.{i}.modulation.project",
            "adaln_before_head.adaLN_modulation.1": "norm_modulation.project",
            "lm_head": "head.readout",
        }.items()
        for part in ("weight", "bias")
    },
}


def rar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> RAR:
    """A RAR generator under the sections `model`, `dataset` and `training` of the original configuration.

    In eval mode and float32. Its tokens are a square where their number is one, else a sequence. Raises CheckpointMismatch
    for keys that do not fit.
    """
    sizes, vocab = config["model"]["generator"], config["model"]["vq_model"]["codebook_size"]
    length, dim = sizes["image_seq_len"], sizes["hidden_size"]
    side = isqrt(length)
    pixels = config.get("dataset", {}).get("preprocessing", {}).get("crop_size", 16 * side)
    steps = config.get("training", {}).get("max_train_steps", 250_000)
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = RAR(
            TokenSpec(
                Grid(1, side, side) if side * side == length else Line(length),
                decoded=(1, pixels, pixels),
                vocab_size=vocab,
            ),
            dim=dim,
            depth=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            num_classes=sizes.get("condition_num_classes", 1000),
            head=partial(Categorical, bias=True),
            mlp_hidden=int(dim * (sizes["intermediate_size"] / dim)),  # theirs is made of a ratio, and rounded
            dropout=sizes.get("dropout", 0.1),
            attention_dropout=sizes.get("attn_drop", 0.1),
            condition_drop=sizes.get("class_label_dropout", 0.1),
            anneal=(
                sizes.get("randomness_anneal_start", 0.5 * steps) / steps,
                sizes.get("randomness_anneal_end", 0.75 * steps) / steps,
            ),
        )

    def slots(table: Tensor) -> Tensor:  # the file keeps more rows than any sequence has slots
        return table[0, : PREFIX + length].clone()

    def tokens(table: Tensor) -> Tensor:  # the rows of the prefix are never read
        return table[0, PREFIX : PREFIX + length].clone()

    state = dict(state)
    if "embeddings.weight" in state:  # theirs is one table; row V, the mask, is never read
        rows = state.pop("embeddings.weight")
        state["tokens"], state["classes"] = rows[:vocab].clone(), rows[vocab + 1 :].clone()
    keys = {
        **RAR_KEYS,
        "pos_embed": ("position", slots),
        "target_aware_pos_embed": ("target", tokens),
        "timesteps_embeddings": ("time", slots),
    }
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()
