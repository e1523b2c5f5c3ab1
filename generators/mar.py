"""MAR: masked autoregression. Continuous tokens in a random order of each sample's own, several a round.

Source: "Autoregressive Image Generation without Vector Quantization" (Li et al. 2024, arXiv:2406.11838), sec. 3.3 to 4.
An encoder reads the tokens that are known, a decoder all positions, with a mask token at the unknown ones; what comes out
at a position, z, is the condition of a head that models the token itself.

Letters: R branches of guidance, B samples, b rows (R * B), L tokens, n known ones, m predicted ones, S buffer slots, C
channels of a token, D width of the encoder, E of the decoder and of z.

What to know:
- the class enters through S buffer slots before the tokens, all of them its embedding, and nowhere else;
- of the last block only the predicted positions are computed: nothing else is asked of it;
- an order tells in which sequence tokens become known; under a mask of a count c its last c are the masked ones;
- a round reveals the same number of tokens in every row. Rows that know different numbers of tokens (in-painting, rejected
  drafts) go through the encoder padded to the longest, and no token reads the padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil, cos, floor, pi
from typing import Any

import torch
from accelerate import init_empty_weights
from einops import rearrange, repeat
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from generators.protocol import Generator, Prediction, State
from heads.diffusion import DiffusionHead, diffusion_keys
from heads.flow import FieldHead
from heads.protocol import Head
from layers.condition import LabelEmbedding, check_labels, drop_condition
from layers.keymap import Join, Target, translate
from layers.noise import Noise
from layers.record import look_up
from layers.spec import Condition, Grid, TokenSpec, stack

SPREAD = 0.25  # standard deviation of the law of the masked share, before it is cut off


def unmasking(length: int, rounds: int) -> list[int]:
    """How many of `length` tokens are still masked after each round: floor(length cos(pi/2 (i + 1) / rounds)), fewer than
    before, at least 1. The last round predicts all that are left nevertheless. Source: MaskGIT (arXiv:2202.04200).

    Raises ValueError for rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, must be at least 1")
    masked = [length]
    for i in range(rounds):
        masked.append(max(1, min(masked[-1] - 1, floor(length * cos(pi / 2 * (i + 1) / rounds)))))
    return masked[1:]


def masked_share(u: float, least: float) -> float:
    """The quantile u in [0, 1] of a normal law of mean 1 and deviation 0.25, cut off to [least, 1]."""
    low = torch.special.ndtr(torch.tensor((least - 1) / SPREAD, dtype=torch.float64))
    return min(1.0, max(least, 1 + SPREAD * float(torch.special.ndtri(low + u * (0.5 - low)))))


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (b, l, c), index int64 (b, m) -> (b, m, c)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)); everything sees everything."""

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, eps: float, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (b, l, D) -> the same, or only the rows int64 (b, m) of it. mask bool (b, 1, 1, l): what may be read."""
        h = (x if rows is None else take(x, rows)) + self.drop(self._attend(self.attention_norm(x), mask, rows))
        return h + self.mlp(self.mlp_norm(h))

    def _attend(self, x: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if rows is not None:
            q = take(q, rows)
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.heads) for y in (q, k, v))
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


class Trunk(nn.Module):
    """Blocks and a norm; `rows` are those of the last block."""

    def __init__(self, blocks: list[Block], dim: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        return self.norm(last(x, mask, rows))


@dataclass(frozen=True)
class Seen:
    """The known tokens of each row in layout order: index int64 (b, n); real bool (b, n), False at padding, or None."""

    index: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, known: Tensor, most: int, even: bool) -> "Seen":
        """known bool (b, L), of which no row has more than `most` True, and every row as many if `even`."""
        index = known.logical_not().argsort(dim=1, stable=True)[:, :most]
        return cls(index, None if even else known.gather(1, index))

    def repeat(self, branches: int) -> "Seen":
        index, real = (None if x is None else repeat(x, "B n -> (R B) n", R=branches) for x in (self.index, self.real))
        return Seen(index, real)


@dataclass
class MARState(State):
    """label (b, 1, D): the class of each row, embedded; order int64 (B, L); turn int64 (L,): the round, of `total`, in which
    each place of the order is revealed; plan: how many tokens each round reveals; most: no row knows more tokens than this,
    and if `even` every row knows exactly as many (both on the host)."""

    label: Tensor = None
    order: Tensor = None
    turn: Tensor = None
    plan: Sequence[int] = ()
    total: int = 0
    most: int = 0
    even: bool = True


class MAR(Generator):
    """Class-conditional masked transformer over the continuous tokens of `spec`, in any layout.

    dim, depth, heads: of the encoder, and of the decoder where decoder_dim, decoder_depth, decoder_heads are left out.
    head: any head of continuous tokens, but FieldHead, whose z is a velocity. buffer: slots of the class. rounds: of
    sampling, where `begin` is told nothing; a round that would reveal no token, for there are fewer than rounds, is left out.
    mask_least: least share of tokens masked in training. dropout falls on both residual branches and inside the MLP,
    condition_drop is the share of classes replaced by the null one in `loss`, in training mode.
    Raises ValueError for a spec or a head it cannot serve, naming both sides.
    """

    undecayed = ("head.",)

    def __init__(
        self,
        spec: TokenSpec,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        head: Callable[[int, TokenSpec], Head] = DiffusionHead,
        decoder_dim: int | None = None,
        decoder_depth: int | None = None,
        decoder_heads: int | None = None,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        buffer: int = 64,
        rounds: int = 64,
        mask_least: float = 0.7,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        condition_drop: float = 0.1,
    ) -> None:
        super().__init__()
        if num_classes is None:
            raise ValueError("MAR is class-conditional: give num_classes")
        if spec.channels is None:
            raise ValueError(f"MAR predicts continuous tokens, the tokenizer makes discrete ones: {spec}")
        width = decoder_dim or dim
        for wide, many in ((dim, heads), (width, decoder_heads or heads)):
            if wide % many:
                raise ValueError(f"MAR: heads={many} must divide dim={wide}")
        if rounds < 1 or buffer < 1 or not 0 < mask_least <= 1:
            raise ValueError(
                f"MAR: rounds={rounds} and buffer={buffer} must be at least 1, mask_least={mask_least} in (0, 1]"
            )
        self.spec, self.buffer, self.rounds = spec, buffer, rounds
        self.mask_least, self.condition_drop = mask_least, condition_drop

        def trunk(dim: int, depth: int, heads: int) -> Trunk:
            block = partial(Block, dim, heads, mlp_ratio, norm_eps, dropout, attention_dropout)
            return Trunk([block() for _ in range(depth)], dim, norm_eps)

        self.condition = LabelEmbedding(num_classes, dim)
        self.embed = nn.Linear(spec.channels, dim)
        self.encoder_position = nn.Parameter(torch.empty(buffer + spec.length, dim))
        self.embed_norm = nn.LayerNorm(dim, eps=1e-6)
        self.encoder = trunk(dim, depth, heads)
        self.bridge = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.decoder_position = nn.Parameter(torch.empty(buffer + spec.length, width))
        self.decoder = trunk(width, decoder_depth or depth, decoder_heads or heads)
        self.head_position = nn.Parameter(torch.empty(spec.length, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = (self.encoder_position, self.decoder_position, self.head_position)
        for table in (self.condition.table.weight, self.mask_token, *tables):
            nn.init.normal_(table, std=0.02)
        self.head = head(width, spec)
        if isinstance(self.head, FieldHead):
            raise ValueError(
                "MAR computes one hidden state a token, FieldHead needs a velocity for every step of a solver"
            )

    # ---- teacher forcing

    def hidden(self, tokens: Tensor, mask: Tensor, condition: Condition) -> Tensor:
        """tokens (B, L, C), mask bool (B, L), True where a token is hidden -> z (B, L, E) of every position."""
        seen = Seen.of(~mask.bool(), *_counts(~mask.bool()))
        return self._hidden(tokens, seen, self.condition(condition))

    def encoded(self, tokens: Tensor, mask: Tensor, condition: Condition) -> Tensor:
        """What the encoder makes of the buffer and the tokens that are not hidden, in layout order: (B, S + n, D).

        n is the largest number of any row; what stands beyond a row's own has no meaning.
        """
        seen = Seen.of(~mask.bool(), *_counts(~mask.bool()))
        return self._encode(tokens, seen, self.condition(condition))

    def loss(
        self,
        tokens: Tensor,
        condition: Condition,
        order: Tensor | None = None,
        share: float | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        **given: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's loss, mean over the masked tokens. tokens (B, L, C).

        What is not given is drawn: order int64 (B, L), by row; share in (0, 1], one for the batch; or mask bool (B, L), True
        where hidden, in place of both; keep bool (B,), False where the null class is put, in training mode only. The rest
        of `given` goes to the head's loss.
        """
        condition = drop_condition(condition, keep, self.condition_drop if self.training else 0.0)
        if mask is None:
            if order is None:
                order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
            if share is None:
                share = masked_share(torch.rand(()).item(), self.mask_least)
            count = ceil(self.spec.length * share)
            mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, self.spec.length - count :], True)
            seen = Seen.of(~mask, self.spec.length - count, even=True)
        else:
            mask = mask.bool()
            seen = Seen.of(~mask, *_counts(~mask))
        z = self._hidden(tokens, seen, self.condition(condition))
        loss = self.head.loss(z, tokens, mask=mask, **given).sum() / mask.sum()
        return loss, {"masked": loss.detach()}

    # ---- decoding

    def begin(
        self,
        branches: Sequence[Condition],
        noise: Noise,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        length: int | None = None,
        rounds: int | None = None,
    ) -> MARState:
        """fixed: tokens (B, L, C) and mask bool (B, L); those tokens are read from the first round on. rounds: in place of
        the generator's own.

        Raises LabelError for a class out of range, ValueError for rounds below 1, and for a length other than L: any order
        needs all places.
        """
        rows, device = branches[0].rows, self.mask_token.device
        if length not in (None, self.spec.length):
            raise ValueError(f"length is {length}, MAR makes all {self.spec.length} tokens: its orders are random")
        if branches[0].label is not None:
            check_labels(branches[0].label, self.condition.num_classes)
        rounds = self.rounds if rounds is None else rounds
        dtype = torch.promote_types(self.mask_token.dtype, torch.float32)
        masked = [self.spec.length, *unmasking(self.spec.length, rounds)]
        masked[-1] = 0
        plan = [before - after for before, after in pairwise(masked)]
        turn = torch.arange(rounds).repeat_interleave(torch.tensor(plan))
        state = MARState(
            tokens=torch.zeros(rows, self.spec.length, self.spec.channels, dtype=dtype, device=device),
            known=torch.zeros(rows, self.spec.length, dtype=torch.bool, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            rounds=sum(count > 0 for count in plan),
            fixed=fixed,
            label=self.condition(stack(list(branches))),
            order=noise.uniform("order", torch.arange(self.spec.length, device=device)).argsort(dim=1, stable=True),
            turn=turn.to(device),
            plan=[count for count in plan if count],
            total=rounds,
        )
        if fixed is not None:
            state.known = fixed[1].bool()
            state.tokens = torch.where(state.known[..., None], fixed[0].to(dtype), state.tokens)
            self._recount(state)
        return state

    def step(self, state: MARState, ahead: int | None = None) -> Prediction:
        """The laws of the next tokens of every row's order, blind to each other: of this round, or the next `ahead`.

        A row with fewer tokens left idles in the places beyond them. Raises ValueError when all rounds are done, or for
        `ahead` outside of [1, L].
        """
        rows, length = state.known.shape
        if ahead is None and state.round >= state.rounds:
            raise ValueError(f"MAR: all {state.rounds} rounds are done; ask for the next tokens by number, with ahead")
        if ahead is not None and not 1 <= ahead <= length:
            raise ValueError(f"ahead is {ahead}, must be 1 to {length}")
        count = state.plan[state.round] if ahead is None else ahead
        places = state.length[:, None] + torch.arange(count, device=state.order.device)
        positions = state.order.gather(1, places % length)
        branches = len(state.label) // rows
        z = self._hidden(
            repeat(state.tokens, "B l c -> (R B) l c", R=branches),
            Seen.of(state.known, state.most, state.even).repeat(branches),
            state.label,
            repeat(positions, "B m -> (R B) m", R=branches),
        )
        state.nfe += 1
        return Prediction(
            head=self.head,
            z=rearrange(z, "(R B) m d -> R B m d", R=branches),
            positions=positions,
            index=state.turn[places.clamp_max(length - 1)],
            total=state.total,
            keep=count,
        )

    def commit(self, state: MARState, positions: Tensor, tokens: Tensor, keep: Tensor | None = None) -> None:
        """positions must continue each row's order; keep (B, m) True on a prefix of them."""
        length, m = self.spec.length, positions.shape[1]
        fresh = state.length[:, None] + torch.arange(m, device=positions.device) < length
        enters = fresh if keep is None else fresh & keep
        new = torch.where(enters[..., None], tokens.to(state.tokens.dtype), take(state.tokens, positions))
        state.tokens = state.tokens.scatter(1, positions[..., None].expand_as(new), new)
        state.known = state.known.scatter(1, positions, enters | state.known.gather(1, positions))
        state.length = state.length + enters.sum(1)
        state.round += 1
        if keep is None:
            state.most = min(state.most + m, length)
        else:
            self._recount(state)

    def rewind(self, state: MARState, length: Tensor) -> None:
        """Forget all but the first length[b] tokens of row b's order, int64 (B,), and the fixed ones.

        Rounds are not counted back: from here on say how many tokens with `ahead`.
        """
        state.length = torch.minimum(state.length, length)
        state.known = state.order.argsort(dim=1) < state.length[:, None]
        if state.fixed is not None:
            state.known = state.known | state.fixed[1].bool()
        state.tokens = torch.where(state.known[..., None], state.tokens, 0)
        self._recount(state)

    def _recount(self, state: MARState) -> None:
        """Where tokens are given a commit brings nothing new at some of its positions, so that rows grow unevenly."""
        state.most, even = _counts(state.known)
        state.even = even and state.fixed is None

    def _encode(self, tokens: Tensor, seen: Seen, label: Tensor) -> Tensor:
        """tokens (b, L, C), label (b, 1, D) -> (b, S + n, D)."""
        x = self.embed(take(tokens, seen.index).to(self.embed.weight.dtype))
        table = self.encoder_position
        x = torch.cat((label + table[: self.buffer], x + table[self.buffer :][seen.index]), dim=1)
        return self.encoder(self.embed_norm(x), self._readable(seen))

    def _hidden(self, tokens: Tensor, seen: Seen, label: Tensor, positions: Tensor | None = None) -> Tensor:
        """z (b, m, E) of the positions int64 (b, m), of all when None."""
        y = self.bridge(self._encode(tokens, seen, label))
        buffer, known = y.split((self.buffer, y.shape[1] - self.buffer), dim=1)
        mask_token = self.mask_token.to(y.dtype)
        if seen.real is not None:
            known = torch.where(seen.real[..., None], known, mask_token)
        rest = mask_token.expand(len(y), self.spec.length, -1)
        x = torch.cat((buffer, rest.scatter(1, seen.index[..., None].expand_as(known), known)), dim=1)
        if positions is None:
            positions = torch.arange(self.spec.length, device=y.device).expand(len(y), -1)
        z = self.decoder(x + self.decoder_position, rows=self.buffer + positions)
        return z + self.head_position[positions]

    def _readable(self, seen: Seen) -> Tensor | None:
        return None if seen.real is None else F.pad(seen.real, (self.buffer, 0), value=True)[:, None, None]


def _counts(known: Tensor) -> tuple[int, bool]:
    """The largest number of True in a row (b, L), and whether all rows have it. Waits for the device."""
    least, most = known.sum(1).aminmax()
    return int(most), bool(least == most)


# ---- published weights


def _first(tensor: Tensor) -> Tensor:
    return tensor.squeeze(0)


def _block_keys(theirs: str, ours: str) -> dict[str, Target]:
    layers = {
        "norm1": "attention_norm",
        "attn.qkv": "qkv",
        "attn.proj": "out",
        "norm2": "mlp_norm",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return {f"{theirs}.{{i}}.{their}": f"{ours}.{{i}}.{our}" for their, our in layers.items()}


LAYERS = {
    "z_proj": "embed",
    "z_proj_ln": "embed_norm",
    **_block_keys("encoder_blocks", "encoder.blocks"),
    "encoder_norm": "encoder.norm",
    "decoder_embed": "bridge",
    **_block_keys("decoder_blocks", "decoder.blocks"),
    "decoder_norm": "decoder.norm",
}
MAR_KEYS: dict[str, Target] = {  # theirs -> ours
    "class_emb.weight": Join("condition.table.weight", 0, 2),
    "fake_latent": Join("condition.table.weight", 1, 2),
    "mask_token": ("mask_token", _first),
    "encoder_pos_embed_learned": ("encoder_position", _first),
    "decoder_pos_embed_learned": ("decoder_position", _first),
    "diffusion_pos_embed_learned": ("head_position", _first),
    **{f"{their}.{kind}": f"{our}.{kind}" for their, our in LAYERS.items() for kind in ("weight", "bias")},
}
MAR_CONFIG: dict[str, Any] = {  # their constructor's arguments and defaults
    "img_size": 256,
    "vae_stride": 16,
    "patch_size": 1,
    "encoder_embed_dim": 1024,
    "encoder_depth": 16,
    "encoder_num_heads": 16,
    "decoder_embed_dim": 1024,
    "decoder_depth": 16,
    "decoder_num_heads": 16,
    "mlp_ratio": 4.0,
    "norm_eps": 1e-6,  # of `norm_layer`, as all published models have it
    "vae_embed_dim": 16,
    "mask_ratio_min": 0.7,
    "label_drop_prob": 0.1,
    "class_num": 1000,
    "attn_dropout": 0.1,
    "proj_dropout": 0.1,
    "buffer_size": 64,
    "diffloss_d": 3,
    "diffloss_w": 1024,
    "num_sampling_steps": "100",
    "diffusion_batch_mul": 4,
    "grad_checkpointing": False,  # moves memory and no number
}


def mar_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> MAR:
    """A MAR generator under the constructor arguments of the original configuration, in eval mode and float32.

    It takes the tensors of `state` as they are, without a copy, where they are float32 already. Raises UnknownName for an
    argument that is not known.
    """
    for name in config:
        look_up(name, MAR_CONFIG, "mar: config key")
    config = MAR_CONFIG | dict(config)
    side = config["img_size"] // config["vae_stride"] // config["patch_size"]
    pixels = side * config["patch_size"] * config["vae_stride"]
    channels = config["vae_embed_dim"] * config["patch_size"] ** 2
    with init_empty_weights(include_buffers=False):  # no memory and no time for weights that are replaced at once
        model = MAR(
            TokenSpec(Grid(1, side, side), decoded=(1, pixels, pixels), channels=channels),
            dim=config["encoder_embed_dim"],
            depth=config["encoder_depth"],
            heads=config["encoder_num_heads"],
            num_classes=config["class_num"],
            head=partial(
                DiffusionHead,
                hidden=config["diffloss_w"],
                depth=config["diffloss_d"],
                steps=config["num_sampling_steps"],
                repeats=config["diffusion_batch_mul"],
            ),
            decoder_dim=config["decoder_embed_dim"],
            decoder_depth=config["decoder_depth"],
            decoder_heads=config["decoder_num_heads"],
            mlp_ratio=config["mlp_ratio"],
            norm_eps=config["norm_eps"],
            buffer=config["buffer_size"],
            mask_least=config["mask_ratio_min"],
            dropout=config["proj_dropout"],
            attention_dropout=config["attn_dropout"],
            condition_drop=config["label_drop_prob"],
        )
    keys = MAR_KEYS | diffusion_keys(config["diffloss_d"], "diffloss.net.", "head.net.")
    model.load_state_dict(translate(state, keys, model.state_dict()), assign=True)
    return model.float().eval()
