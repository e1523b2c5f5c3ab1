"""Masked prediction: all unknown tokens at once, of which the most confident stay; a few rounds fill the picture. MaskGIT.

Source: "MaskGIT: Masked Generative Image Transformer" (Chang et al. 2022, arXiv:2202.04200), with the two backbones, loss
and schedules that TiTok ships it with ("An Image is Worth 32 Tokens", Yu et al. 2024, arXiv:2406.07550).

Letters: R branches of guidance, B samples, b rows (R * B), L tokens, m of them unknown, D width, V vocabulary.

What to know:
- the network reads [class][tokens], a mask id (V) where a token is hidden; position i predicts token i, without a shift;
- backbones have one interface. BERT normalises after each residual branch, with an epsilon of 1e-12; U-ViT before it, has
  no bias on queries, keys and values, and feeds the output of each block of its first half to its mirror in the second;
- one table of schedules says what share is masked: of a training picture at a random u, and of a picture being decoded
  after step i of n, at (i + 1) / n;
- tokens that are given (in-painting) are known before the first round, so that every prediction sees them, and the
  schedule is over the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import floor, pi
from typing import Any

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from generators.protocol import Generator, Prediction, State, one_state
from heads.categorical import Categorical
from heads.protocol import Head
from layers.condition import LabelEmbedding, check_labels, drop_condition
from layers.keymap import Join, Target, translate
from layers.noise import Noise
from layers.record import look_up
from layers.spec import Condition, TokenSpec, stack
from layers.spec import Sequence as Line

# ---- what share of the tokens is masked, falling from 1 at r = 0 to 0 at r = 1

SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "arccos": lambda r: torch.acos(r) / (pi / 2),  # TiTok
    "cosine": lambda r: torch.cos(pi / 2 * r),  # MaskGIT
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "cubic": lambda r: 1 - r**3,
    "root": lambda r: 1 - r**0.5,
}


def reveal_plan(unknown: int, rounds: int, schedule: str) -> tuple[tuple[int, int], ...]:
    """(i, tokens still unknown after step i) for every step i of `rounds` that reveals any; the last reveals the rest.

    With more rounds than tokens, one token waits for the last step; the steps that it only waits in are left out.
    Raises ValueError for rounds below 1, UnknownName for the schedule.
    """
    share = look_up(schedule, SCHEDULES, "mask schedule")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, must be at least 1")
    plan, left = [], unknown
    for step in range(rounds):
        wanted = floor(unknown * share(torch.tensor((step + 1) / rounds, dtype=torch.float64)).item())
        after = 0 if step == rounds - 1 else max(1, min(left - 1, wanted))
        if after < left:
            plan.append((step, after))
            left = after
    return tuple(plan)


# ---- backbones


class BertLayer(nn.Module):
    """h = LN(x + Attention(x)); LN(h + MLP(h))."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, qkv_bias=True, attn_drop=attention_dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = Mlp(dim, hidden, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x + self.drop(self.attention(x)))
        return self.mlp_norm(h + self.drop(self.mlp(h)))


class Bert(nn.Module):
    """x (b, 1 + L, D), embedded tokens at their places -> the same shape. Source: Devlin et al. 2019, arXiv:1810.04805."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.kind = nn.Parameter(torch.zeros(dim))  # BERT's row for the one kind of segment there is
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(dropout)
        self.layers = nn.Sequential(*(BertLayer(dim, heads, hidden, dropout, attention_dropout) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.drop(self.norm(x + self.kind)))


class UViTBlock(nn.Module):
    """With a skip, x = Linear([x, skip]) first; then h = x + Attention(LN(x)); h + MLP(LN(h))."""

    def __init__(
        self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float, skips: bool = False
    ) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * dim, dim) if skips else None
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, qkv_bias=False, attn_drop=attention_dropout)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat((x, skip), dim=-1))
        h = x + self.drop(self.attention(self.attention_norm(x)))
        return h + self.drop(self.mlp(self.mlp_norm(h)))


class UViT(nn.Module):
    """x (b, 1 + L, D), embedded tokens at their places -> the same shape. Source: Bao et al. 2023, arXiv:2209.12152.

    depth // 2 blocks, one in the middle, and depth // 2 that read the outputs of the first ones, the newest first.
    """

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        block = partial(UViTBlock, dim, heads, hidden, dropout, attention_dropout)
        self.first = nn.ModuleList(block() for _ in range(depth // 2))
        self.middle = block()
        self.second = nn.ModuleList(block(skips=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.first:
            x = block(x)
            skips.append(x)
        x = self.middle(x)
        for block in self.second:
            x = block(x, skips.pop())
        return self.norm(x)


BACKBONES: dict[str, type[nn.Module]] = {"bert": Bert, "uvit": UViT}


# ---- the generator


@dataclass
class MaskedState(State):
    """prefix (b, 1, D): the embedded class; plan: of every round its step and how many are unknown after it, of `steps`;
    left: how many tokens of a row are unknown (a number on the host, the same in every row)."""

    prefix: Tensor = None
    plan: tuple[tuple[int, int], ...] = ()
    steps: int = 0
    left: int = 0


class Masked(Generator):
    """Bidirectional transformer over the tokens of `spec`, class-conditional; tokens enter in the order of confidence.

    backbone: bert or uvit; mlp_hidden None: 4 dim. dropout falls on both residual branches (with bert on the embedded
    sequence too). In `loss`, in training mode, condition_drop is the share of conditions replaced by the null one.
    mask_schedule: the law of the share that is hidden in training; label_smoothing, and visible_weight beside the weight 1
    of hidden tokens, belong to the loss. rounds and reveal (a schedule): how it is decoded where `begin` is told nothing.
    Raises ValueError for a spec it cannot serve, UnknownName for a backbone or schedule.
    """

    undecayed = ("embed", "position", "condition")

    def __init__(
        self,
        spec: TokenSpec,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        head: Callable[[int, TokenSpec], Head] = Categorical,
        backbone: str = "bert",
        mlp_hidden: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_drop: float = 0.1,
        mask_schedule: str = "arccos",
        label_smoothing: float = 0.1,
        visible_weight: float = 0.1,
        rounds: int = 8,
        reveal: str = "arccos",
    ) -> None:
        super().__init__()
        if num_classes is None:
            raise ValueError("Masked is class-conditional: give num_classes")
        if spec.vocab_size is None:
            raise ValueError(f"Masked predicts discrete tokens, the tokenizer makes continuous ones: {spec}")
        for schedule in (mask_schedule, reveal):
            reveal_plan(spec.length, rounds, schedule)  # refuses what is out of range
        self.spec, self.rounds, self.reveal, self.mask_schedule = spec, rounds, reveal, mask_schedule
        self.condition_drop, self.label_smoothing, self.visible_weight = condition_drop, label_smoothing, visible_weight
        self.condition = LabelEmbedding(num_classes, dim)
        self.embed = nn.Embedding(spec.vocab_size + 1, dim)  # the last row is the mask
        self.position = nn.Parameter(torch.empty(1 + spec.length, dim))
        made = look_up(backbone, BACKBONES, "Masked: backbone")
        self.trunk = made(dim, depth, heads, mlp_hidden or 4 * dim, dropout, attention_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.position, std=0.02)
        self.head = one_state(self, head(dim, spec))
        if label_smoothing and not hasattr(self.head, "logits"):
            raise ValueError(f"{type(self.head).__name__} has no logits to smooth; set label_smoothing to 0")

    # ---- teacher forcing

    def hidden(self, tokens: Tensor, condition: Condition, mask: Tensor | None = None) -> Tensor:
        """tokens (B, L); mask bool (B, L), True where they are hidden (None: nowhere) -> (B, L, D)."""
        mask = torch.zeros_like(tokens, dtype=torch.bool) if mask is None else mask
        return self._read(self.condition(condition), tokens, mask)

    def logits(self, tokens: Tensor, condition: Condition, mask: Tensor | None = None) -> Tensor:
        """tokens, mask as in `hidden` -> (B, L, V): row i is the law of token i given all that are not hidden."""
        return self.head.logits(self.hidden(tokens, condition, mask))

    def loss(
        self, tokens: Tensor, condition: Condition, mask: Tensor | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean of the smoothed cross-entropy in nats over all positions; parts: over the hidden, the visible.

        mask bool (B, L): what is hidden; keep bool (B,): where False the null condition is put. Drawn when None.
        """
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        if mask is None:
            mask = self.draw_mask(len(tokens), tokens.device)
        z = self.hidden(tokens, condition, mask)
        if self.label_smoothing:
            rows = self.head.logits(z).movedim(-1, 1)
            nats = F.cross_entropy(rows, tokens, label_smoothing=self.label_smoothing, reduction="none")
        else:
            nats = self.head.loss(z, tokens)
        hidden, visible = ((nats * part).sum() / part.sum().clamp_min(1) for part in (mask, ~mask))
        weight = torch.where(mask, 1.0, self.visible_weight)
        loss = (nats * weight).sum() / weight.sum()
        return loss, {"hidden": hidden.detach(), "visible": visible.detach()}

    def draw_mask(self, rows: int, device: torch.device) -> Tensor:
        """bool (rows, L): in each row its own share is hidden, at least one token, anywhere."""
        share = SCHEDULES[self.mask_schedule](torch.rand(rows, device=device))
        count = (self.spec.length * share).round().clamp_min(1)
        rank = torch.rand(rows, self.spec.length, device=device).argsort(dim=-1)
        return rank < count[:, None]

    def _read(self, prefix: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """prefix (b, 1, D), tokens and mask (b, L) -> (b, L, D)."""
        x = self.embed(torch.where(mask, self.spec.vocab_size, tokens))
        return self.trunk(torch.cat((prefix, x), dim=1) + self.position)[:, 1:]

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
        rounds: int | None = None,
        reveal: str | None = None,
    ) -> MaskedState:
        """rounds, reveal: in place of the generator's own. Fixed tokens are known at once, in every row as many.

        Raises LabelError for a class id out of range, ValueError for a length other than L, for rows that differ in the
        number of fixed tokens, and as `reveal_plan`.
        """
        rows, total, device = branches[0].rows, self.spec.length, self.embed.weight.device
        if length not in (None, total):
            raise ValueError(f"length is {length}, this generator always makes all {total} tokens")
        if branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        tokens = torch.zeros(rows, total, dtype=torch.int64, device=device)
        known, left = torch.zeros_like(tokens, dtype=torch.bool), total
        if fixed is not None:
            known = fixed[1].clone()
            tokens = torch.where(known, fixed[0], 0)
            counts = sorted(set((~known).sum(1).tolist()))
            if len(counts) > 1:
                raise ValueError(
                    f"fixed leaves {counts[0]} to {counts[-1]} tokens of a row to make; the rows of a batch are revealed "
                    "together, so give each its own call, or rows with one number"
                )
            left = counts[0]
        steps = self.rounds if rounds is None else rounds
        plan = reveal_plan(left, steps, self.reveal if reveal is None else reveal)
        return MaskedState(
            tokens=tokens,
            known=known,
            length=known.sum(1),
            rounds=len(plan),
            prefix=self.condition(stack(list(branches))),
            plan=plan,
            steps=steps,
            left=left,
        )

    def step(self, state: MaskedState, ahead: int | None = None) -> Prediction:
        """The laws of all unknown tokens, each given the known ones. Raises ValueError for `ahead`, and after the last."""
        if ahead is not None:
            raise ValueError("Masked predicts all unknown tokens a step")
        if state.round == state.rounds:
            raise ValueError(f"Masked: all {state.rounds} rounds are committed")
        branches = len(state.prefix) // len(state.tokens)
        tokens, known = (repeat(part, "B l -> (R B) l", R=branches) for part in (state.tokens, state.known))
        z = rearrange(self._read(state.prefix, tokens, ~known), "(R B) l d -> R B l d", R=branches)
        state.nfe += 1
        positions = state.known.to(torch.uint8).argsort(dim=1, stable=True)[:, : state.left]  # the unknown, in order
        z = z.gather(2, repeat(positions, "B m -> R B m d", R=branches, d=z.shape[-1]))
        step, after = state.plan[state.round]
        index = torch.full_like(positions, step)
        return Prediction(self.head, z, positions, index, state.steps, keep=max(0, state.left - after))

    def commit(self, state: MaskedState, positions: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
        """positions: unknown ones; keep (B, m): True at as many of each row as the step's prediction said.

        What is known stays as it is.
        """
        new = ~state.known.gather(1, positions)
        if keep is None:
            state.left -= positions.shape[1]
        else:
            new &= keep
            state.left = min(state.left, state.plan[state.round][1])
        state.tokens.scatter_(1, positions, torch.where(new, tokens, state.tokens.gather(1, positions)))
        state.known.scatter_(1, positions, new | state.known.gather(1, positions))
        state.length = state.known.sum(1)
        state.round += 1


# ---- published weights


def _first_row(kinds: Tensor) -> Tensor:
    """BERT's table of two segments; all tokens are of the first."""
    return kinds[0]


def _linear(theirs: str, ours: str) -> dict[str, Target]:
    """The weight and bias of a layer, or of a norm."""
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


BERT_KEYS: dict[str, Target] = {  # theirs -> ours; None: ignored, for the reason beside it
    "model.embeddings.position_ids": None,  # 0, 1, 2, ...; files of old versions of transformers hold it
    "model.embeddings.position_embeddings.weight": "position",
    "model.embeddings.token_type_embeddings.weight": ("trunk.kind", _first_row),
    **_linear("model.embeddings.LayerNorm", "trunk.norm"),
    **{
        f"model.encoder.layer.{{i}}.attention.self.{name}.{part}": Join(
            f"trunk.layers.{{i}}.attention.qkv.{part}", j, 3
        )
        for j, name in enumerate(("query", "key", "value"))
        for part in ("weight", "bias")
    },
    **_linear("model.encoder.layer.{i}.attention.output.dense", "trunk.layers.{i}.attention.proj"),
    **_linear("model.encoder.layer.{i}.attention.output.LayerNorm", "trunk.layers.{i}.attention_norm"),
    **_linear("model.encoder.layer.{i}.intermediate.dense", "trunk.layers.{i}.mlp.fc1"),
    **_linear("model.encoder.layer.{i}.output.dense", "trunk.layers.{i}.mlp.fc2"),
    **_linear("model.encoder.layer.{i}.output.LayerNorm", "trunk.layers.{i}.mlp_norm"),
    **_linear("model.lm_head", "head.readout"),
}


def _uvit_block(theirs: str, ours: str) -> dict[str, Target]:
    return {
        **_linear(f"{theirs}.norm1", f"{ours}.attention_norm"),
        f"{theirs}.attn.qkv.weight": f"{ours}.attention.qkv.weight",
        **_linear(f"{theirs}.attn.proj", f"{ours}.attention.proj"),
        **_linear(f"{theirs}.norm2", f"{ours}.mlp_norm"),
        **_linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1"),
        **_linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2"),
    }


UVIT_KEYS: dict[str, Target] = {
    "pos_embed": ("position", torch.Tensor.squeeze),
    **_uvit_block("in_blocks.{i}", "trunk.first.{i}"),
    **_uvit_block("mid_block", "trunk.middle"),
    **_uvit_block("out_blocks.{i}", "trunk.second.{i}"),
    **_linear("out_blocks.{i}.skip_linear", "trunk.second.{i}.skip"),
    **_linear("norm", "trunk.norm"),
    **_linear("lm_head", "head.readout"),
}
LAYOUTS = {  # their model_type -> backbone, key map, name of the table of [tokens, mask, classes, null class]
    "ViT": ("bert", BERT_KEYS, "model.embeddings.word_embeddings.weight"),
    "UViT": ("uvit", UVIT_KEYS, "embeddings.weight"),
}


def maskgit_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Masked:
    """A MaskGIT generator of TiTok tokens under the sections `model` and `dataset` of the original configuration.

    In float32. Raises UnknownName for a model_type that is not known, CheckpointMismatch for keys that do not fit.
    """
    sizes, vocab = config["model"]["generator"], config["model"]["vq_model"]["codebook_size"]
    backbone, keys, table = look_up(sizes.get("model_type", "ViT"), LAYOUTS, "maskgit: model_type")
    pixels = config.get("dataset", {}).get("preprocessing", {}).get("crop_size", 256)
    dim, hidden, plain = sizes["hidden_size"], sizes["intermediate_size"], backbone == "uvit"
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = Masked(
            TokenSpec(Line(sizes["image_seq_len"]), decoded=(1, pixels, pixels), vocab_size=vocab),
            dim=dim,
            depth=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            num_classes=sizes.get("condition_num_classes", 1000),
            head=partial(Categorical, bias=True),
            backbone=backbone,
            mlp_hidden=int(dim * (hidden / dim)) if plain else hidden,  # theirs is made of a ratio, and rounded
            dropout=0.0 if plain else sizes.get("dropout", 0.1),
            attention_dropout=0.0 if plain else sizes.get("attn_drop", 0.1),
            condition_drop=sizes.get("class_label_dropout", 0.1),
        )
    state = dict(state)
    if table in state:  # theirs is one table; ours are two, whose last rows are the mask and the null class
        rows = state.pop(table)
        state["tokens"], state["classes"] = rows[: vocab + 1].clone(), rows[vocab + 1 :].clone()
    keys = {**keys, "tokens": "embed.weight", "classes": "condition.table.weight"}
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()
