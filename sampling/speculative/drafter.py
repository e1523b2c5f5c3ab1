"""The EAGLE drafter: one decoder layer that continues the target's own hidden states, and grows trees with them.

Sources: EAGLE (Li et al. 2024, arXiv:2401.15077) as LANTERN (Jang et al. 2024, arXiv:2410.03355) trains it for LlamaGen.

A feature is the target's last hidden state after its final norm, what its read-out takes. Input t joins feature t with the
token drawn from it; output t approximates feature t + 1, and the target's read-out makes a law of it.

Letters: R branches of guidance, B samples, b rows (R * B), T inputs, D width, N nodes of a tree, m nodes fed at once.

What to know:
- the first layer has no norm before attention, and none follows the last layer;
- the sequence is one shorter than the target's: of T condition slots the drafter has T - 1, at rotary rows of zeros.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from timm.layers import GluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from layers.attention import Attention, KVCache, causal_mask
from layers.keymap import Join, Target, translate
from layers.record import look_up
from layers.rotary import layout_places, rotary_table, with_zero_slots
from layers.spec import Grid, TokenSpec

ReadOut = Callable[[Tensor], Tensor]  # hidden (R, B, m, D) -> guided, filtered log-probabilities (B, m, V)
READ_OUT_WEIGHT = 0.1  # of the cross-entropy beside the distance of features


class Block(nn.Module):
    """h = x + Attention(RMS(x)), without the norm in the first block; out = h + SwiGLU(RMS(h))."""

    def __init__(self, dim: int, heads: int, kv_heads: int | None, hidden: int, eps: float, first: bool) -> None:
        super().__init__()
        self.attention_norm = nn.Identity() if first else nn.RMSNorm(dim, eps)
        self.attention = Attention(dim, heads, kv_heads)
        self.mlp_norm = nn.RMSNorm(dim, eps)
        self.mlp = GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, bias=False, gate_last=False)

    def forward(self, x: Tensor, **attend: Any) -> Tensor:
        h = x + self.attention(self.attention_norm(x), **attend)
        return h + self.mlp(self.mlp_norm(h))


@dataclass
class DrafterState:
    """caches: keys and values of the committed inputs, then of the tree under way, which is overwritten. length int64 (B,):
    committed inputs; root (b, D): output of the newest of them."""

    caches: list[KVCache]
    length: Tensor
    root: Tensor


class Drafter(nn.Module):
    """Drafts for a target of width dim over the tokens of `spec`.

    slots: condition slots before the tokens, one less than the target's. mlp_hidden: width of the MLP. The embedding is
    frozen. Raises ValueError for a spec of continuous tokens.
    """

    def __init__(
        self,
        spec: TokenSpec,
        dim: int,
        heads: int,
        mlp_hidden: int,
        slots: int = 0,
        depth: int = 1,
        kv_heads: int | None = None,
        bias: bool = True,
        theta: float = 10_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if spec.vocab_size is None:
            raise ValueError(f"Drafter drafts discrete tokens, the tokenizer makes continuous ones: {spec}")
        self.spec, self.slots = spec, slots
        self.embed = nn.Embedding(spec.vocab_size, dim)
        self.embed.weight.requires_grad_(False)
        self.fuse = nn.Linear(2 * dim, dim, bias=bias)
        self.blocks = nn.ModuleList(
            Block(dim, heads, kv_heads, mlp_hidden, norm_eps, first=i == 0) for i in range(depth)
        )
        table = with_zero_slots(rotary_table(layout_places(spec.layout), dim // heads, theta), slots)
        table = F.pad(table, (0, 0, 0, 0, 0, 1))  # a row of zeros for nodes beyond the last token
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing. features (b, T, D), tokens int64 (b, T), token t drawn from feature t -> (b, T, D)."""
        x = self._fused(features, tokens)
        for block in self.blocks:
            x = block(x, rotary=self.rotary[None, : x.shape[1]], causal=True)
        return x

    def loss(
        self, features: Tensor, tokens: Tensor, readout: Tensor, fed: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the outputs from the next features, and of the laws that both make under readout (V, D).

        features, tokens as in forward. Positions of the condition and the last one do not count; each term is summed over
        the others of the batch and divided by their number. fed (b, T, D): noisy features that are read in place of those
        aimed at.
        """
        out, target = self(features if fed is None else fed, tokens)[:, self.slots : -1], features[:, self.slots + 1 :]
        count = out.shape[0] * out.shape[1] + 1e-5
        distance = F.smooth_l1_loss(out, target, reduction="none").mean(-1).sum() / count
        aim, log_law = (F.linear(x, readout).float() for x in (target, out))
        crossed = -(aim.softmax(-1) * log_law.log_softmax(-1)).sum() / count
        return distance + READ_OUT_WEIGHT * crossed, {"feature": distance.detach(), "law": crossed.detach()}

    # ---- decoding

    def begin(self, rows: int, branches: int, room: int) -> DrafterState:
        """For `rows` samples under `branches` of guidance. room: the largest number of nodes of a tree."""
        attention, like = self.blocks[0].attention, self.embed.weight
        slots = self.slots + self.spec.length + room
        return DrafterState(
            [
                KVCache.allocate(rows * branches, slots, attention.kv_heads, attention.head_dim, like)
                for _ in self.blocks
            ],
            torch.zeros(rows, dtype=torch.int64, device=like.device),
            like.new_zeros(rows * branches, like.shape[1]),
        )

    def observe(self, state: DrafterState, features: Tensor, tokens: Tensor, count: Tensor | None = None) -> None:
        """Feed newly committed inputs: features (b, l, D), tokens int64 (b, l), of which the first count int64 (B,) are
        real; all when None. A row without any is done, its root means nothing."""
        if count is None:
            count = torch.full_like(state.length, tokens.shape[1])
        branches = len(tokens) // len(state.length)
        slots = repeat(state.length, "B -> (R B) 1", R=branches) + torch.arange(tokens.shape[1], device=tokens.device)
        mask = causal_mask(slots, state.caches[0].keys.shape[1])[:, None]
        x = self._cached(state, self._fused(features, tokens), slots, slots, mask)
        last = repeat((count - 1).clamp_min(0), "B -> (R B) 1 d", R=branches, d=x.shape[-1])
        state.root = x.gather(1, last).squeeze(1)
        state.length = state.length + count

    def grow(self, state: DrafterState, read: ReadOut) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """What trees.dynamic_tree and trees.fill_static_tree ask: the log-probabilities (B, V) below the root, and the
        function that feeds a level of nodes. The newest committed token must have been observed."""
        rows = len(state.length)
        outputs = state.root[:, None]  # (b, N, D) of the root and all nodes fed
        branches = len(outputs) // rows
        ancestors = torch.ones(rows, 1, 0, dtype=torch.bool, device=outputs.device)  # (B, N, N - 1), the root left out
        level = 0

        def law(x: Tensor) -> Tensor:
            return read(rearrange(x, "(R B) m d -> R B m d", R=branches))

        def expand(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal outputs, ancestors, level
            m, before = tokens.shape[1], ancestors.shape[2]
            own = torch.eye(m, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
            line = ancestors.gather(1, parents[..., None].expand(-1, -1, before))
            line = torch.cat((line, own), dim=2)  # (B, m, before + m)
            offset = torch.arange(state.caches[0].keys.shape[1], device=tokens.device) - state.length[:, None]  # (B, s)
            node = offset.clamp(0, before + m - 1)[:, None].expand(-1, m, -1)
            mask = (offset < 0)[:, None] | (offset < before + m)[:, None] & line.gather(2, node)
            slots = state.length[:, None] + before + torch.arange(m, device=tokens.device)
            places = (state.length[:, None] + level).expand(-1, m)
            several = repeat(tokens, "B m -> (R B) m", R=branches)
            below = repeat(parents, "B m -> (R B) m d", R=branches, d=outputs.shape[-1])
            x = self._cached(
                state,
                self._fused(outputs.gather(1, below), several),
                repeat(slots, "B m -> (R B) m", R=branches),
                repeat(places, "B m -> (R B) m", R=branches),
                repeat(mask, "B m s -> (R B) 1 m s", R=branches),
            )
            outputs = torch.cat((outputs, x), dim=1)
            ancestors = torch.cat((F.pad(ancestors, (0, m)), line), dim=1)
            level += 1
            return law(x)

        return law(outputs).squeeze(1), expand

    def _fused(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self.fuse(torch.cat((self.embed(tokens).to(features.dtype), features), dim=-1))

    def _cached(self, state: DrafterState, x: Tensor, slots: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """x (b, m, D) at cache slots and rotary rows int64 (b, m), mask bool (b, 1, m, s)."""
        rotary = self.rotary[places.clamp_max(len(self.rotary) - 1)]
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, rotary=rotary, mask=mask, cache=cache, slots=slots)
        return x


# ---- published weights

GRIDS = {"t2i": (16, 119), "t2i2": (32, 119), "c2i": (24, 0)}  # input_type -> side of the grid, condition slots
KEYS: dict[str, Target] = {  # theirs -> ours
    "embed_tokens.weight": "embed.weight",
    "fc.weight": "fuse.weight",
    "fc.bias": "fuse.bias",
    **{
        f"layers.{{i}}.self_attn.{name}_proj.weight": Join("blocks.{i}.attention.qkv.weight", part, 3)
        for part, name in enumerate("qkv")
    },
    "layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.out.weight",
    "layers.{i}.mlp.gate_proj.weight": Join("blocks.{i}.mlp.fc1.weight", 0, 2),
    "layers.{i}.mlp.up_proj.weight": Join("blocks.{i}.mlp.fc1.weight", 1, 2),
    "layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.fc2.weight",
    "layers.{i}.input_layernorm.weight": "blocks.{i}.attention_norm.weight",
    "layers.{i}.post_attention_layernorm.weight": "blocks.{i}.mlp_norm.weight",
}


def lantern_drafter_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Drafter:
    """A drafter of LlamaGen from `pytorch_model.bin` of a published drafter and its config.json, in eval mode.

    The file's embedding is kept, also where it is not the target's. Raises UnknownName for an input_type not known,
    ValueError for an activation other than SiLU.
    """
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"drafter: hidden_act is {config['hidden_act']!r}, published drafters use silu")
    side, slots = look_up(config["input_type"], GRIDS, "drafter: input_type")
    drafter = Drafter(
        TokenSpec(Grid(1, side, side), decoded=(1, 16 * side, 16 * side), vocab_size=config["vocab_size"]),
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp_hidden=config["intermediate_size"],
        slots=slots,
        depth=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads"),
        bias=config.get("bias", True),
        norm_eps=config["rms_norm_eps"],
    )
    drafter.load_state_dict(translate(state, KEYS, drafter.state_dict()))
    return drafter.eval()
