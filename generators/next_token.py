"""Next-token prediction in raster order: the LlamaGen transformer, conditioned by prefix tokens.

Source: "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (Sun et al. 2024, arXiv:2406.06525).
A Llama decoder (RMSNorm, SwiGLU, no biases, 2-D rotary) reads [condition][tokens]; a class is one condition token, a
caption up to 120. The rotary table is zero at the condition slots (cos = sin = 0): what follows sees them with logit 0.
LARP (Wang et al. 2024, arXiv:2410.21264, sec. 3.4): the same on the tokens of clips, with an absolute table instead; it
continues a clip whose tokens, and a separator after them, are the condition. D-AR (Gao & Shou 2025, arXiv:2505.23660): the
same on a line of tokens, with 1-D rotary places that count the condition's slots.

Letters: R branches of guidance, B samples, b rows (R * B), T condition slots, L tokens, l new positions, D width.

Decoding keeps, in the state, a static cache of T + L slots a layer. Slot T - 1 + j holds the j-th committed token (j from
1); exactly one input is always still to be fed: the newest committed token, or the condition when there is none yet. So
`step` is one forward over that input, `score` one over it and a draft, and rejected slots are simply written again. The
nodes of a tree take a slot each after the newest token, and are placed by their depth; those accepted move up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import DropPath, GluMlp
from torch import Tensor, nn

from generators.protocol import Generator, Prediction, State, one_state
from heads.categorical import Categorical
from heads.protocol import Head
from layers.attention import Attention, KVCache, ancestor_mask, causal_mask, tree_mask
from layers.condition import LabelEmbedding, TextEmbedding, check_labels, drop_condition
from layers.keymap import Join, Target, translate
from layers.noise import Noise
from layers.record import look_up
from layers.rotary import layout_places, rotary_table, with_zero_slots
from layers.sincos import sincos
from layers.spec import Condition, Grid, Pyramid, TokenSpec, stack
from layers.spec import Sequence as Line

SPAN = 64  # attention reads the cache in multiples of this many slots: few shapes to compile, little waste


class Block(nn.Module):
    """h = x + Attention(RMS(x)); out = h + SwiGLU(RMS(h))."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None, hidden: int, eps: float, dropout: float, drop_path: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps)
        self.attention = Attention(dim, heads, kv_heads)
        self.mlp_norm = nn.RMSNorm(dim, eps)
        self.mlp = GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, bias=False, gate_last=False)
        self.drop = nn.Sequential(nn.Dropout(dropout), DropPath(drop_path))

    def forward(self, x: Tensor, **attend: Any) -> Tensor:
        h = x + self.drop(self.attention(self.attention_norm(x), **attend))
        return h + self.drop(self.mlp(self.mlp_norm(h)))


class Trunk(nn.Module):
    """All blocks and the last norm. This is the part that `torch.compile` is for: `generator.trunk.compile()`."""

    def __init__(self, blocks: list[Block], dim: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        mask: Tensor | None = None,
        causal: bool = False,
        caches: Sequence[KVCache] | None = None,
        slots: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, rotary=rotary, mask=mask, causal=causal, cache=cache, slots=slots, span=span)
        return self.norm(x)


class GivenClip(nn.Module):
    """clip int64 (b, tokens), in the generator's own vocabulary -> ids int64 (b, tokens + 1), a separator at the end.

    Raises ValueError for a condition without such a clip, and for `keep`: no clip stands for none.
    """

    def __init__(self, tokens: int, separator: int) -> None:
        super().__init__()
        self.slots, self.separator = tokens + 1, separator

    def forward(self, condition: Condition) -> Tensor:
        clip = condition.clip
        if clip is None or clip.shape[1] != self.slots - 1:
            found = "no clip" if clip is None else f"{clip.shape[1]} tokens"
            raise ValueError(
                f"this generator continues a clip of {self.slots - 1} tokens: the condition has {found} (clip)"
            )
        if condition.keep is not None:
            raise ValueError("this generator continues clips and has no null condition: sample without guidance")
        return torch.cat((clip, torch.full_like(clip[:, :1], self.separator)), dim=1)


@dataclass
class NextTokenState(State):
    """prefix (b, T, D): the embedded condition; readable bool (b, slots), False at padded text slots, or None;
    reach: no row has more committed tokens than this (a number on the host); prefilled: the condition is in the cache;
    told (b, T - 1, D): last hidden states of the condition, once it is, but for the slot that predicts the first token."""

    prefix: Tensor = None
    readable: Tensor | None = None
    told: Tensor | None = None
    caches: Sequence[KVCache] = ()
    reach: int = 0
    prefilled: bool = False


class NextToken(Generator):
    """Causal transformer over the tokens of `spec`, in layout order.

    num_classes, text_dim (with text_slots) or clip_tokens, the number of tokens of a given clip, says what it is
    conditioned by. positions: rotary over the axes of the layout; rotary_line, over the whole sequence as one axis, condition
    included; or an absolute table, learned or of fixed sines (sincos), one row a slot, added to the embedded sequence.
    mlp_hidden None: 8/3 dim, rounded up to 256. dropout falls on both residual branches, token_dropout on the embedded
    sequence, condition_drop is the share of conditions replaced by the null one in `loss`, in training mode; a clip has none.
    Raises ValueError for a spec it cannot serve.
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
        clip_tokens: int | None = None,
        head: Callable[[int, TokenSpec], Head] = Categorical,
        positions: Literal["rotary", "rotary_line", "learned", "sincos"] = "rotary",
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
        given = {"num_classes": num_classes, "text_dim": text_dim, "clip_tokens": clip_tokens}
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(f"NextToken: give num_classes or text_dim or clip_tokens, one of them: got {given}")
        if spec.vocab_size is None:
            raise ValueError(f"NextToken predicts discrete tokens, the tokenizer makes continuous ones: {spec}")
        if isinstance(spec.layout, Pyramid):
            raise ValueError(f"NextToken needs a Grid or a Sequence, the tokenizer makes a Pyramid: {spec}")
        if positions not in ("rotary", "rotary_line", "learned", "sincos"):
            raise ValueError(f"NextToken: positions is {positions!r}, must be rotary, rotary_line, learned or sincos")
        self.spec, self.condition_drop = spec, condition_drop
        if num_classes is not None:
            self.condition = LabelEmbedding(num_classes, dim)
        elif text_dim is not None:
            self.condition = TextEmbedding(text_dim, text_slots, dim)
        else:
            self.condition, self.condition_drop = GivenClip(clip_tokens, spec.vocab_size), 0.0
        self.embed = nn.Embedding(spec.vocab_size + (clip_tokens is not None), dim)  # the last row is the separator
        self.token_drop = nn.Dropout(token_dropout)
        hidden = mlp_hidden or round_up(8 * dim // 3, 256)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.trunk = Trunk([Block(dim, heads, kv_heads, hidden, norm_eps, dropout, p) for p in rates], dim, norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head = one_state(self, head(dim, spec))
        rotary, slots = None, self.condition.slots + spec.length - 1  # the last token is never fed
        if positions == "rotary":
            table = rotary_table(layout_places(spec.layout), dim // heads, theta)
            rotary = with_zero_slots(table, self.condition.slots)[None]
        elif positions == "rotary_line":
            rotary = rotary_table(torch.arange(slots + 1)[:, None], dim // heads, theta)[None]
        self.register_buffer("rotary", rotary, persistent=False)  # (1, T + L, d/2, 2)
        if positions == "learned":
            self.position = nn.Parameter(torch.randn(slots, dim) * 0.02)
        else:
            self.register_buffer("position", sincos(torch.arange(slots), dim) if positions == "sincos" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NextToken":
        """Moves and casts the module, but leaves the rotary table in float32: half precision would round its angles."""
        table = self.rotary
        super()._apply(fn, recurse)
        if table is not None:
            self.rotary = table.to(self.rotary.device)
        return self

    # ---- teacher forcing

    def hidden(self, tokens: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L) -> (B, L, D): row i has seen the condition and the tokens before i."""
        prefix = self._prefix(condition)
        x = self.token_drop(torch.cat((prefix, self.embed(tokens[:, :-1])), dim=1))
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
        rotary = None if self.rotary is None else self.rotary[:, : x.shape[1]]
        readable = self._readable(condition, x.shape[1])
        mask = None if readable is None else self._mask(torch.arange(x.shape[1], device=x.device)[None], readable)
        x = self.trunk(x, rotary, mask=mask, causal=mask is None)
        return x[:, self.condition.slots - 1 :]

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

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
        room: int = 0,
    ) -> NextTokenState:
        """room: slots of the cache beyond the tokens, one for each node of a tree but the first.

        Raises ValueError for a class id out of range, or a length outside [1, L]."""
        rows, device = branches[0].rows, self.embed.weight.device
        length = self.spec.length if length is None else length
        if not 1 <= length <= self.spec.length:
            raise ValueError(f"length is {length}, this generator makes 1 to {self.spec.length} tokens")
        if isinstance(self.condition, LabelEmbedding) and branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        joined = stack(list(branches))
        prefix = self._prefix(joined)
        slots = self.condition.slots + length + room
        first = self.trunk.blocks[0].attention
        return NextTokenState(
            tokens=torch.zeros(rows, self.spec.length, dtype=torch.int64, device=device),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            rounds=length,
            fixed=fixed,
            prefix=prefix,
            readable=self._readable(joined, slots),
            caches=[
                KVCache.allocate(len(prefix), slots, first.kv_heads, first.head_dim, prefix) for _ in self.trunk.blocks
            ],
        )

    def step(self, state: NextTokenState, ahead: int | None = None) -> Prediction:
        """The law of the next token of every row. Raises ValueError for `ahead`: this order has no blind positions."""
        if ahead is not None:
            raise ValueError("NextToken predicts one token a step; to test a draft ask `score`")
        return self.score(state, state.tokens[:, :0])

    def score(self, state: NextTokenState, draft: Tensor, parents: Tensor | None = None) -> Prediction:
        """draft (B, n) of the next n tokens -> the n + 1 laws: of each given those before it, and of the one after.

        parents int64 (n + 1,) or (B, n + 1): of a tree whose node 0, of parent -1, is the newest committed token, and whose
        other nodes are the draft, a parent before its children -> the law after each node. It needs `room` for n.
        """
        condition_slots, total = self.condition.slots, state.rounds
        branches, nodes = len(state.prefix) // len(state.tokens), draft.shape[1] + 1
        family, depth = family_tree(parents, nodes, draft.device)
        newest = state.tokens.gather(1, (state.length - 1).clamp_min(0)[:, None])
        x = repeat(self.embed(torch.cat((newest, draft), dim=1)), "B l d -> (R B) l d", R=branches)
        slots, places = spread(state, depth, nodes, condition_slots)
        if state.prefilled:
            empty = repeat(state.length == 0, "B -> (R B) 1 1", R=branches)  # after a rewind to the start
            x = torch.cat((torch.where(empty, state.prefix[:, -1:], x[:, :1]), x[:, 1:]), dim=1)
        else:
            x = torch.cat((state.prefix, x[:, 1:]), dim=1)
            before = torch.arange(condition_slots - 1, device=x.device).expand(len(x), -1)
            slots, places = (torch.cat((before, own), dim=1) for own in (slots, places))
        slots = slots.clamp_max(state.caches[0].slots - 1)  # what lies beyond the last token idles there
        places = places.clamp_max(condition_slots + total - 1)
        if self.position is not None:
            x = x + self.position[places.clamp_max(len(self.position) - 1)]
        rotary = None if self.rotary is None else self.rotary[0][places]
        span = min(round_up(condition_slots + state.reach + nodes - 1, SPAN), state.caches[0].slots)
        mask = self._mask(slots, state.readable, span, family)
        z = self.trunk(x, rotary, mask=mask, caches=state.caches, slots=slots, span=span)
        if not state.prefilled:
            state.told = z[:, : condition_slots - 1]
        z = rearrange(z[:, -nodes:], "(R B) l d -> R B l d", R=branches)
        state.nfe += 1
        positions = (state.length[:, None] + depth).clamp_max(total - 1)
        return Prediction(self.head, z, positions, positions, total, keep=1)

    def commit(
        self,
        state: NextTokenState,
        positions: Tensor,
        tokens: Tensor,
        keep: Tensor | None = None,
        path: Tensor | None = None,
    ) -> None:
        """positions must continue each row; keep (B, m) True on a prefix of them.

        path int64 (B, depth): the nodes of the tree scored last that tokens are, in order, -1 beyond them.
        """
        if path is not None:
            follow(state, path, self.condition.slots)
        append(state, tokens, keep)

    def rewind(self, state: NextTokenState, length: Tensor) -> None:
        """Forget all but the first length[b] tokens of row b, int64 (B,)."""
        truncate(state, length)

    def _prefix(self, condition: Condition) -> Tensor:
        """(b, T, D): the embedded condition."""
        if isinstance(self.condition, GivenClip):
            return self.embed(self.condition(condition))
        return self.condition(condition)

    def _readable(self, condition: Condition, slots: int) -> Tensor | None:
        if condition.text_mask is None:
            return None
        rest = condition.text_mask.new_ones(condition.rows, slots - self.condition.slots)
        return torch.cat((condition.text_mask, rest), dim=1)

    def _mask(
        self, slots: Tensor, readable: Tensor | None, span: int | None = None, family: Tensor | None = None
    ) -> Tensor:
        """Each query sees the readable slots up to its own, and always itself: (b, 1, l, span). family: of `draft_mask`."""
        mask = draft_mask(slots, span or slots.shape[1], family)
        if readable is not None:
            own = torch.arange(mask.shape[-1], device=slots.device) == slots[..., None]
            mask = mask & readable[:, None, : mask.shape[-1]] | own
        return mask[:, None]


def family_tree(parents: Tensor | None, nodes: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """parents int64 (N,) or (B, N), or None for a chain -> bool (1 or B, N, N) of `ancestor_mask`, None for a chain; and
    the depth of each node (1 or B, N), or (N,)."""
    if parents is None:
        return None, torch.arange(nodes, device=device)
    family = ancestor_mask(parents if parents.dim() == 2 else parents[None])
    return family, family.sum(-1) - 1


def spread(state: NextTokenState, depth: Tensor, nodes: int, condition_slots: int) -> tuple[Tensor, Tensor]:
    """For the newest token and a draft after it: the slots that they take, and those of the tokens whose places they have,
    int64 (b, N) each."""
    first = condition_slots - 1 + state.length[:, None]
    order, branches = torch.arange(nodes, device=first.device), len(state.prefix) // len(state.tokens)
    slots, places = (repeat(first + ahead, "B l -> (R B) l", R=branches) for ahead in (order, depth))
    return slots, places


def draft_mask(slots: Tensor, span: int, family: Tensor | None) -> Tensor:
    """slots int64 (b, l) of the queries -> bool (b, l, span): each sees what is before it. family bool (1 or B, N, N): the
    last N queries are a tree, and see of it what this says."""
    mask = causal_mask(slots, span)
    if family is None:
        return mask
    nodes, branches = family.shape[-1], len(slots) // len(family) if len(family) > 1 else 1
    tree = tree_mask(slots[:, -nodes], family.repeat(branches, 1, 1), span)
    return torch.cat((mask[:, :-nodes], tree), dim=1)


def append(state: NextTokenState, tokens: Tensor, keep: Tensor | None) -> None:
    """tokens (B, m) continue each row of a state of raster order; keep (B, m) is True on a prefix of them. Those beyond
    the last place are dropped."""
    m = tokens.shape[1]
    count = torch.full_like(state.length, m) if keep is None else keep.sum(1)
    count = torch.minimum(count, state.rounds - state.length)
    offset = torch.arange(state.tokens.shape[1], device=tokens.device) - state.length[:, None]
    fresh = (offset >= 0) & (offset < count[:, None])
    state.tokens = torch.where(fresh, tokens.gather(1, offset.clamp(0, m - 1)), state.tokens)
    state.known = state.known | fresh
    state.length = state.length + count
    state.reach = min(state.reach + m, state.rounds)
    state.round += 1
    state.prefilled = True


def follow(state: NextTokenState, path: Tensor, condition_slots: int) -> None:
    """Move what the cache holds of the accepted nodes of a tree, path int64 (B, depth), to where committed tokens stand."""
    order = 1 + torch.arange(path.shape[1], device=path.device)
    first = condition_slots - 1 + state.length[:, None]
    source = first + torch.where(path >= 0, path, order)  # what was not accepted stays where it is
    branches = len(state.prefix) // len(path)
    source, target = (repeat(slots, "B l -> (R B) l", R=branches) for slots in (source, first + order))
    for cache in state.caches:
        cache.move(source, target)


def truncate(state: NextTokenState, length: Tensor) -> None:
    """Forget all but the first length[b] tokens of row b, int64 (B,)."""
    state.length = torch.minimum(state.length, length)
    state.known = torch.arange(state.tokens.shape[1], device=length.device) < state.length[:, None]
    state.tokens = torch.where(state.known, state.tokens, 0)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- published weights

LLAMAGEN_CODES = 16384  # of its tokenizer's codebook, and of D-AR's
LLAMAGEN_KEYS = {  # theirs -> ours; None: ignored, for the reason beside it
    "cls_embedding.embedding_table.weight": "condition.table.weight",
    "cls_embedding.cap_proj.fc1.weight": "condition.mlp.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "condition.mlp.fc2.weight",
    "tok_embeddings.weight": "embed.weight",
    "layers.{i}.attention.wqkv.weight": "trunk.blocks.{i}.attention.qkv.weight",
    "layers.{i}.attention.wo.weight": "trunk.blocks.{i}.attention.out.weight",
    "layers.{i}.feed_forward.w1.weight": Join("trunk.blocks.{i}.mlp.fc1.weight", 0, 2),
    "layers.{i}.feed_forward.w3.weight": Join("trunk.blocks.{i}.mlp.fc1.weight", 1, 2),
    "layers.{i}.feed_forward.w2.weight": "trunk.blocks.{i}.mlp.fc2.weight",
    "layers.{i}.attention_norm.weight": "trunk.blocks.{i}.attention_norm.weight",
    "layers.{i}.ffn_norm.weight": "trunk.blocks.{i}.mlp_norm.weight",
    "norm.weight": "trunk.norm.weight",
    "output.weight": "head.readout.weight",
    "freqs_cis": None,  # the rotary table, recomputed from the layout
}


def llama_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor arguments of the transformer, from the names and defaults of the original and of what grew from it."""
    hidden = int((config.get("ffn_dim_multiplier") or 1) * int(2 * 4 * config["dim"] / 3))
    return {
        "dim": config["dim"],
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "kv_heads": config.get("n_kv_head"),
        "mlp_hidden": round_up(hidden, config.get("multiple_of", 256)),
        "theta": config.get("rope_base", 10_000.0),
        "norm_eps": config.get("norm_eps", 1e-5),
        "dropout": config.get("resid_dropout_p", 0.1),
        "token_dropout": config.get("token_dropout_p", 0.1),
        "drop_path": config.get("drop_path_rate", 0.0),
        "condition_drop": config.get("class_dropout_prob", 0.1),
    }


def llamagen_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> NextToken:
    """A class- or text-conditional LlamaGen generator under the constructor arguments of the original configuration.

    In float32; it takes the tensors of `state` as they are, without a copy, where they are float32 already.
    """
    side = int(config.get("block_size", 256) ** 0.5)
    pixels = side * config.get("downsample", 16)
    spec = TokenSpec(
        Grid(1, side, side), decoded=(1, pixels, pixels), vocab_size=config.get("vocab_size", LLAMAGEN_CODES)
    )
    return _llama(state, config, spec, LLAMAGEN_KEYS, "rotary")


def d_ar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> NextToken:
    """D-AR's generator of the tokens of a line, under the constructor arguments of the original configuration; `image_size`
    beside them says what the tokens decode to. As `llamagen_from_published` otherwise.
    """
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}  # of a compiled model
    pixels = config.get("image_size", 256)
    spec = TokenSpec(
        Line(config.get("block_size", 256)),
        decoded=(1, pixels, pixels),
        vocab_size=config.get("vocab_size", LLAMAGEN_CODES),
    )
    keys = {key: ours for key, ours in LLAMAGEN_KEYS.items() if key != "freqs_cis"}
    return _llama(state, config, spec, keys, "rotary_line")


def _llama(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    spec: TokenSpec,
    keys: Mapping[str, Target],
    positions: Literal["rotary", "rotary_line"],
) -> NextToken:
    captions = config.get("model_type", "c2i") == "t2i"
    slots = config.get("cls_token_num", 120 if captions else 1)
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = NextToken(
            spec,
            num_classes=None if captions else config.get("num_classes", 1000),
            text_dim=config.get("caption_dim", 2048) if captions else None,
            text_slots=slots,
            positions=positions,
            **llama_arguments(config),
        )

    def first_rows(null: Tensor) -> Tensor:  # the file keeps 120 rows whatever the number of condition slots
        return null[:slots]

    keys = {**keys, "cls_embedding.uncond_embedding": ("condition.null", first_rows)}
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()


LARP_CONFIG: dict[str, Any] = {  # the original constructor's arguments, and the values they have when left out
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "token_dropout_p": 0.1,
    "resid_dropout_p": 0.1,
    "drop_path_rate": 0.0,
    "num_classes": 101,
    "class_dropout_prob": 0.1,
    "model_type": "class_cond",
    "vocab_size": 8192,
    "cls_token_num": 1,
    "max_seq_len": 1024,
    "use_fixed_pe": False,
    "frame_prediction": False,
    "frame_num": 16,  # of the tokenizer: frames and pixels of a clip
    "input_size": 128,
    # not read: one dropout falls on both branches and none on attention; weights come from the file; caches have their
    # size; there are no rotary positions
    "ffn_dropout_p": 0.1,
    "attn_dropout_p": 0.0,
    "initializer_range": 0.02,
    "max_batch_size": 32,
    "rope_base": 10_000,
}


def larp_ar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> NextToken:
    """LARP's generator of clips from a class, or from the tokens of their first frames (frame_prediction).

    In eval mode and float32. Raises UnknownName for an argument it does not have, ValueError for condition slots that fit
    no condition, CheckpointMismatch listing all keys that do not fit.
    """
    for name in config:
        look_up(name, LARP_CONFIG, "LARP: argument")
    config = {**LARP_CONFIG, **config}
    slots, continues = config["cls_token_num"], config["frame_prediction"]
    if not continues and (config["model_type"] != "class_cond" or slots != 1):
        raise ValueError(
            f"LARP: model_type is {config['model_type']!r} with cls_token_num={slots}, must be 'class_cond' with 1"
        )
    pixels = (config["frame_num"], config["input_size"], config["input_size"])

    def with_null(table: Tensor) -> Tensor:  # a model that never drops its condition has no row for the null class
        return table if config["class_dropout_prob"] else torch.cat((table, torch.zeros_like(table[:1])))

    def flat(table: Tensor) -> Tensor:  # (1, T + L - 1, D)
        return table.squeeze(0)

    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = NextToken(
            TokenSpec(Line(config["max_seq_len"]), decoded=pixels, vocab_size=config["vocab_size"]),
            num_classes=None if continues else config["num_classes"],
            clip_tokens=slots - 1 if continues else None,
            positions="sincos" if config["use_fixed_pe"] else "learned",
            **llama_arguments(config),
        )
    keys: dict[str, Target] = {key: ours for key, ours in LLAMAGEN_KEYS.items() if key != "freqs_cis"}
    keys |= {
        "abs_pe": ("position", flat),
        "cls_embedding.embedding_table.weight": ("condition.table.weight", with_null),
    }
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()
