"""FlexTok: a picture as a line of tokens of which any beginning decodes, coarse to fine.

Paper: Bachmann et al. 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length" (arXiv:2502.13967).
Guidance: Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models"
(arXiv:2410.02416).

Dims: B batch, H x W pixels, y x x cells of C channels of an autoencoder, P patches of p x p cells, K tokens (registers), n of
them given, c channels of a code, D width of a transformer.

What to know:
- everything happens in the latent of a frozen autoencoder, another tokenizer of continuous tokens on a grid;
- the encoder reads [patches][registers]: patches see patches, a register sees them and the registers up to itself, so a
  token depends on no later one;
- the decoder is a velocity (layers/flow.py): it reads [noised patches][registers], everything sees everything, and the time
  scales, shifts and gates patches and registers by projections of their own;
- nested dropout: in training a random number of tokens is kept, the others are replaced by one learned vector, after
  their places were added. So the dropped rows are all equal, and stay equal through every block. They are computed as one
  row that counts K - n times: log(K - n) on its attention logits. Without condition all K rows are one. Short prefixes and
  guidance cost less for it, and the numbers are those of K rows;
- attention logits are scaled by 8 / head_dim, which is the usual 1 / sqrt(head_dim) at 64 only.
"""

from collections.abc import Callable, Sequence
from math import log
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import GluMlp
from torch import Tensor, nn

from layers.adaln import Modulation, modulate
from layers.flow import euler, interpolate, training_times, uniform_times
from layers.noise import Noise
from layers.sincos import sincos, sincos_2d
from layers.spec import Condition, Grid, TokenSpec
from layers.spec import Sequence as Line
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer

TIME_PERIOD = 256.0  # of the sinusoid of the time

# ---- laws


def projected_guidance(
    conditional: Tensor,
    unconditional: Tensor,
    scale: float,
    running: Tensor | float = 0.0,
    *,
    momentum: float = -0.5,
    threshold: float = 2.5,
    parallel: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance of one step, a sample (B, ...) at a time -> guided velocity, `running` for the next step.

    d = conditional - unconditional + momentum * running is cut to the length `threshold` (0: not cut); of what of it points
    along `conditional` only the share `parallel` stays. Source: arXiv:2410.02416, sec. 4, algorithm 1.
    """
    axes = tuple(range(1, conditional.dim()))
    running = conditional - unconditional + momentum * running
    change = running
    if threshold > 0:
        length = change.square().sum(axes, keepdim=True).sqrt()
        change = change * (threshold / length).clamp(max=1)
    along = conditional.double()
    along = along / along.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-12)
    shadow = (change.double() * along).sum(axes, keepdim=True) * along
    kept = change.double() - shadow + parallel * shadow
    return conditional + (scale - 1) * kept.to(change.dtype), running


def mode_times(uniform: Tensor, scale: float) -> Tensor:
    """Numbers in [0, 1) -> training times, more of them in the middle where scale > 0, at the ends where < 0.

    Source: Esser et al. 2024, arXiv:2403.03206, sec. 3.1, mode sampling with heavy tails.
    """
    return 1 - uniform - scale * ((torch.pi * uniform / 2).cos().square() - 1 + uniform)


def kept_tokens(law: str, uniform: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1) -> how many of `count` tokens nested dropout keeps, int64 in [1, count].

    law: uniform; powers, each power of two equally often; rounded, uniform and then up to a power of two.
    Raises ValueError for another law, and for powers where count is none.
    """
    if law == "powers":
        if count & (count - 1):
            raise ValueError(f"nested dropout: keep_law is powers, so tokens must be a power of two, not {count}")
        return 2 ** (uniform * count.bit_length()).long()
    if law not in ("uniform", "rounded"):
        raise ValueError(f"nested dropout: keep_law {law!r} is not known; known: uniform, powers, rounded")
    keep = 1 + (uniform * count).long()
    if law == "rounded":
        power = torch.tensor([1 << (k - 1).bit_length() for k in range(1, count + 1)], device=keep.device)
        keep = power[keep - 1].clamp(max=count)
    return keep


# ---- networks


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """x (B, l, D), bias broadcast to (B, heads, l, l) -> (B, l, D). Queries and keys have unit variance."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, d=self.head_dim)
        y = F.scaled_dot_product_attention(_norm(q), _norm(k), v, attn_mask=bias, scale=8 / self.head_dim)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


def gated_mlp(dim: int) -> nn.Module:
    """SwiGLU; two thirds of 4 D hidden channels."""
    return GluMlp(dim, 2 * int(2 * (4 * dim) / 3), act_layer=nn.SiLU, gate_last=False, bias=False)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The norms have no parameters."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, head_dim), gated_mlp(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(_norm(x), mask)
        return x + self.mlp(_norm(x))


class TimedBlock(nn.Module):
    """A block whose branches the time scales, shifts and gates: patches by the first six parts, registers by the rest."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(dim, head_dim), gated_mlp(dim)
        self.modulation = Modulation(dim, dim, 12)

    def forward(self, x: Tensor, time: Tensor, patches: int, bias: Tensor | None) -> Tensor:
        """x (B, patches + R, D), time (B or 1, D)."""
        of_patches, of_registers = self.modulation(time).chunk(2)  # (6, B or 1, 1, D) each
        parts = torch.cat(
            (of_patches.expand(-1, -1, patches, -1), of_registers.expand(-1, -1, x.shape[1] - patches, -1)), dim=2
        )
        gate_1, gate_2, shift_1, scale_1, shift_2, scale_2 = parts
        x = x + gate_1 * self.attention(modulate(_norm(x), scale_1, shift_1), bias)
        return x + gate_2 * self.mlp(modulate(_norm(x), scale_2, shift_2))


class Patches(nn.Module):
    """Cells (B, y x, C) of a grid -> patches (B, P, D), with their places.

    The table of places may be larger than the grid: its upper left corner is used. It is part of the state, as published.
    """

    def __init__(self, grid: Grid, table: tuple[int, int], channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.grid, self.patch = grid, patch
        self.project = nn.Linear(channels * patch**2, dim)
        places = rearrange(sincos_2d(*table, dim, column_first=False), "(h w) d -> h w d", h=table[0])
        self.register_buffer("places", places)

    def forward(self, cells: Tensor) -> Tensor:
        h, w, p = self.grid.h // self.patch, self.grid.w // self.patch, self.patch
        patches = rearrange(cells, "b (h p w q) c -> b (h w) (p q c)", h=h, w=w, p=p, q=p)
        return self.project(patches) + self.places[:h, :w].flatten(0, 1)

    def cells(self, patches: Tensor) -> Tensor:
        """What a readout says of the patches (B, P, p p C) -> (B, y x, C)."""
        w, p = self.grid.w // self.patch, self.patch
        return rearrange(patches, "b (h w) (p q c) -> b (h p w q) c", w=w, p=p, q=p)


class RegisterEncoder(nn.Module):
    """Cells (B, y x, C) -> K vectors (B, K, c)."""

    def __init__(self, patches: Patches, tokens: int, dim: int, depth: int, head_dim: int, out: int) -> None:
        super().__init__()
        self.patches = patches
        self.registers = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, dim), std=0.02))
        self.blocks = nn.ModuleList(Block(dim, head_dim) for _ in range(depth))
        self.readout = nn.Linear(dim, out)

    def forward(self, cells: Tensor) -> Tensor:
        patches = self.patches(cells)
        x = torch.cat((patches, self.registers.expand(len(cells), -1, -1)), dim=1)
        sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        sees[:, : patches.shape[1]] = True
        for block in self.blocks:
            x = block(x, sees)
        return self.readout(_norm(x[:, patches.shape[1] :]))


class FlowDecoder(nn.Module):
    """The velocity of noised cells under registers.

    Registers come as rows (B, R, D) and the logarithm of how often each counts, (B or 1, R); None: once each.
    """

    def __init__(
        self,
        patches: Patches,
        tokens: int,
        code_dim: int,
        dim: int,
        depth: int,
        head_dim: int,
        frequencies: int,
        time_scale: float,
    ) -> None:
        super().__init__()
        self.tokens, self.frequencies, self.time_scale = tokens, frequencies, time_scale
        self.patches = patches
        self.codes = nn.Linear(code_dim, dim)
        for name, shape in (("places", (tokens, dim)), ("dropped", (dim,)), ("null", (dim,))):
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))
        self.embed_time = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(TimedBlock(dim, head_dim) for _ in range(depth))
        self.modulation = Modulation(dim, dim, 2)
        self.readout = nn.Linear(dim, patches.project.in_features)

    def registers(self, codes: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """codes (B, n, c) of the first n tokens, keep int64 (B,) in [0, n], None: all n -> rows, counts."""
        n = codes.shape[1]
        rows = self.codes(codes) + self.places[:n]
        if keep is None and n == self.tokens:
            return rows, None
        rows = torch.cat((rows, self.dropped.expand(len(rows), 1, -1)), dim=1)
        if keep is None:
            keep = torch.full((1,), n, device=rows.device)
        kept = torch.arange(n, device=rows.device) < keep[:, None]
        counts = torch.cat((kept, (self.tokens - keep)[:, None]), dim=1)
        return rows, counts.to(rows.dtype).log()

    def unconditional(self, batch: int) -> tuple[Tensor, Tensor]:
        """Rows, counts."""
        return self.null.expand(batch, 1, -1), self.null.new_full((1, 1), log(self.tokens))

    def forward(self, x: Tensor, t: Tensor, rows: Tensor, counts: Tensor | None) -> Tensor:
        """x (B, y x, C), t (B,) or (1,) in [0, 1] -> dx/dt (B, y x, C)."""
        waves = sincos(self.time_scale * t, self.frequencies, TIME_PERIOD, dtype=self.null.dtype)
        time = self.embed_time(waves.roll(self.frequencies // 2, -1))  # cosines first
        patches = self.patches(x)
        bias, of_patches = None, patches.shape[1]
        if counts is not None:
            bias = F.pad(counts, (of_patches, 0))[:, None, None].expand(-1, 1, of_patches + rows.shape[1], -1)
        x = torch.cat((patches, rows), dim=1)
        for block in self.blocks:
            x = block(x, time, of_patches, bias)
        shift, scale = self.modulation(time)
        return self.patches.cells(self.readout(modulate(_norm(x[:, :of_patches]), scale, shift)))


def _start(encoder: RegisterEncoder, decoder: FlowDecoder) -> None:
    """As published: Xavier, and modulations and the decoder's readout at zero. But what enters the networks does so at unit
    deviation, pictures at twice it, and the gates are open: else small networks learn the mean picture and lose the
    registers on the way.
    """
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for entry, strength in ((encoder.patches.project, 2), (decoder.patches.project, 1), (decoder.codes, 1)):
        nn.init.normal_(entry.weight, std=strength * entry.in_features**-0.5)
    for rows in (encoder.registers, decoder.places):
        nn.init.normal_(rows)
    for module in decoder.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.project.weight)
    for block in decoder.blocks:
        gates = block.modulation.project.bias.unflatten(0, (2, 6, -1))[:, :2]
        nn.init.ones_(gates)
    nn.init.zeros_(decoder.readout.weight)


# ---- the tokenizer


class FlexTokTokenizer(Tokenizer):
    """Pictures <-> 1 to K discrete tokens.

    Raises ValueError for parts and sizes that do not fit together.

    Args:
        autoencoder: Tokenizer of continuous tokens on a grid, whose latent is coded; it rests.
        quantizer: Of the registers, one id a vector.
        tokens: K.
        patch: Side p of a patch in cells.
        encoder_dim: D of the encoder.
        encoder_depth: Its blocks.
        decoder_dim: D of the decoder.
        decoder_depth: Its blocks.
        head_dim: Channels of a head of attention, in both.
        frequencies: Channels of the sinusoid of the time.
        time_scale: What the time in [0, 1] is multiplied by before.
        table: Rows and columns of patches that there are places for; null: as many as the picture has.
        keep_law: How many tokens training keeps: uniform, powers, rounded (see `kept_tokens`).
        drop_condition: Share of the pictures that training decodes without any token, which guidance needs.
        time_law: Of the training times: uniform, logit_normal.
        mode_scale: Moves uniform times to the middle, a negative one to the ends (see `mode_times`).
        steps: Euler steps of `decode`.
        guidance: Scale of its guidance, u + scale (v - u); 1: none.
        projected: Whether that is `projected_guidance`.
    """

    def __init__(
        self,
        autoencoder: Tokenizer,
        quantizer: Quantizer,
        tokens: int = 256,
        patch: int = 2,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        head_dim: int = 64,
        frequencies: int = 256,
        time_scale: float = 1000.0,
        table: Sequence[int] | None = None,
        keep_law: str = "uniform",
        drop_condition: float = 0.2,
        time_law: str = "uniform",
        mode_scale: float = 0.25,
        steps: int = 20,
        guidance: float = 7.5,
        projected: bool = True,
    ) -> None:
        super().__init__()
        grid, channels = autoencoder.spec.layout, autoencoder.spec.channels
        if channels is None or not isinstance(grid, Grid) or grid.t != 1:
            raise ValueError(
                f"FlexTokTokenizer: needs an autoencoder of continuous tokens on a grid, {type(autoencoder).__name__} "
                f"makes {autoencoder.spec}"
            )
        if quantizer.depth != 1:
            raise ValueError(
                f"FlexTokTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector, not 1"
            )
        if grid.h % patch or grid.w % patch:
            raise ValueError(f"FlexTokTokenizer: {grid.h} x {grid.w} cells are not divisible by patch={patch}")
        if encoder_dim % head_dim or decoder_dim % head_dim:
            raise ValueError(
                f"FlexTokTokenizer: head_dim={head_dim} must divide encoder_dim={encoder_dim} and decoder_dim={decoder_dim}"
            )
        here = (grid.h // patch, grid.w // patch)
        table = here if table is None else (table[0], table[1])
        if table[0] < here[0] or table[1] < here[1]:
            raise ValueError(
                f"FlexTokTokenizer: there are places for {table[0]} x {table[1]} patches, the picture has "
                f"{here[0]} x {here[1]}"
            )
        kept_tokens(keep_law, torch.zeros(1), tokens)
        training_times(time_law, (1,), torch.device("cpu"))
        self.spec = TokenSpec(Line(tokens), decoded=autoencoder.spec.decoded, vocab_size=quantizer.vocab_size)
        self.prefixes = tuple(range(1, tokens + 1))
        self.keep_law, self.drop_condition = keep_law, drop_condition
        self.time_law, self.mode_scale = time_law, mode_scale
        self.steps, self.guidance, self.projected = steps, guidance, projected
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.quantizer = quantizer
        self.encoder = RegisterEncoder(
            Patches(grid, table, channels, patch, encoder_dim),
            tokens,
            encoder_dim,
            encoder_depth,
            head_dim,
            quantizer.dim,
        )
        self.decoder = FlowDecoder(
            Patches(grid, table, channels, patch, decoder_dim),
            tokens,
            quantizer.dim,
            decoder_dim,
            decoder_depth,
            head_dim,
            frequencies,
            time_scale,
        )
        _start(self.encoder, self.decoder)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.autoencoder.eval()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None, length: int | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> the first `length` tokens, int64 (B, length); None: all K.

        noise: the autoencoder's, for a sample of its posterior; None: its mean. Raises ValueError for images of another
        size than `spec.decoded`, and another length than 1 to K.
        """
        if length is not None and length not in self.prefixes:
            raise ValueError(f"FlexTokTokenizer: length is {length}, there are 1 to {self.spec.length} tokens")
        cells = self.autoencoder.encode(images, noise=noise)
        return self.quantizer.assign(self.encoder(cells))[:, :length]

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, n) in [0, V), n any of 1 to K -> images (B, 3, H, W), unclamped.

        present: bool (B, n), where samples have prefixes of different lengths. noise: standard normal (B, y x, C), as
        `start` makes; None: the same for every picture, so that a picture is a function of its tokens. `condition` has
        nothing to change here. Raises ValueError for another n, ids outside [0, V), `present` that is no prefix.
        """
        if noise is None:
            same = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
            noise = self.start(Noise(0, same))
        return self.autoencoder.decode(self.flow(tokens, noise, present=present))

    def start(self, noise: Noise) -> Tensor:
        """The noise that decoding starts from, (B, y x, C): a sample's depends on seed and index alone."""
        spec = self.autoencoder.spec
        place = torch.arange(spec.length, device=noise.index.device)
        return noise.normal("decode", place, size=(spec.channels,)).to(self.decoder.null.dtype)

    def flow(
        self,
        tokens: Tensor,
        noise: Tensor,
        *,
        present: Tensor | None = None,
        steps: int | None = None,
        guidance: float | Callable[[float], float] | None = None,
        projected: bool | None = None,
    ) -> Tensor:
        """From noise (B, y x, C) to the cells (B, y x, C) that the autoencoder decodes.

        guidance: a scale, or one for every time in (0, 1]. What is not given is as in the constructor. tokens, present
        and errors as `decode`.
        """
        steps = self.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        projected = self.projected if projected is None else projected
        times, running = uniform_times(steps), 0.0
        given = self.decoder.registers(*self._codes(tokens, present))
        null = self.decoder.unconditional(len(tokens))

        def velocity(x: Tensor, i: int) -> Tensor:
            nonlocal running
            t = torch.full((1,), times[i], dtype=torch.float64, device=x.device)
            v = self.decoder(x, t, *given)
            if guidance == 1:
                return v
            u, scale = self.decoder(x, t, *null), guidance(times[i]) if callable(guidance) else guidance
            if not projected:
                return u + scale * (v - u)
            guided, running = projected_guidance(v, u, scale, running)
            return guided

        return euler(velocity, noise, times)

    def velocity(self, x: Tensor, t: Tensor, tokens: Tensor | None, present: Tensor | None = None) -> Tensor:
        """dx/dt of cells x (B, y x, C) at t (B,), 1 for noise; tokens None: without condition. As `decode` otherwise."""
        if tokens is None:
            return self.decoder(x, t, *self.decoder.unconditional(len(x)))
        return self.decoder(x, t, *self.decoder.registers(*self._codes(tokens, present)))

    def forward(
        self,
        images: Tensor,
        *,
        posterior_noise: Tensor | None = None,
        noise: Tensor | None = None,
        t: Tensor | None = None,
        keep: Tensor | None = None,
        null: Tensor | None = None,
    ) -> tuple[None, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> None, parts. There is no reconstruction: a step makes a velocity.

        Drawn where not given: posterior_noise, the autoencoder's, and noise, both standard normal (B, y x, C); t (B,) in
        [0, 1]; keep int64 (B,) in [1, K]; null bool (B,), decoded without tokens.
        parts: "flow", the mean squared error of the velocity; "ids" (B, K); the quantiser's losses by name; "stats".
        """
        batch, device, spec = len(images), images.device, self.autoencoder.spec

        def normal() -> Tensor:
            return torch.randn(batch, spec.length, spec.channels, dtype=self.decoder.null.dtype, device=device)

        posterior_noise = normal() if posterior_noise is None else posterior_noise
        noise = normal() if noise is None else noise
        if t is None:
            t = training_times(self.time_law, (batch,), device)
            t = mode_times(t, self.mode_scale) if self.time_law == "uniform" else t
        if keep is None:
            keep = kept_tokens(self.keep_law, torch.rand(batch, device=device), self.spec.length)
        if null is None:
            null = torch.rand(batch, device=device) < self.drop_condition

        cells = self.autoencoder.encode(images, noise=posterior_noise)
        codes = self.quantizer(self.encoder(cells))
        rows, counts = self.decoder.registers(codes.z_q.to(cells.dtype), torch.where(null, self.spec.length, keep))
        rows = torch.where(null[:, None, None], self.decoder.null, rows)
        x = interpolate(cells, noise, t[:, None].expand(-1, spec.length))
        error = (noise - cells).float() - self.decoder(x, t, rows, counts).float()
        return None, {"flow": error.square().mean(), "ids": codes.ids, **codes.losses, "stats": codes.stats}

    def codebook(self) -> Tensor:
        """(V, c), as the decoder gets them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., c). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.quantizer.vocab_size:
            raise ValueError(
                f"FlexTokTokenizer: ids from {low} to {high}, the codebook has 0 to {self.quantizer.vocab_size - 1}"
            )
        return self.quantizer.embed(tokens)

    def _codes(self, tokens: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Codes (B, n, c), how many of them are kept (B,)."""
        if tokens.dim() != 2 or tokens.shape[1] not in self.prefixes:
            raise ValueError(
                f"FlexTokTokenizer: got tokens {tuple(tokens.shape)}, decodes (B, n), n from 1 to {self.spec.length}"
            )
        codes = self.embed(tokens).to(self.decoder.null.dtype)
        if present is None:
            return codes, None
        keep = present.sum(-1)
        prefix = torch.arange(tokens.shape[1], device=tokens.device) < keep[..., None]
        if present.shape != tokens.shape or not torch.equal(prefix, present) or int(keep.min()) < 1:
            raise ValueError(
                f"FlexTokTokenizer: present {tuple(present.shape)} must be True for a prefix of 1 token or more of every "
                f"row of tokens {tuple(tokens.shape)}, and False behind it"
            )
        return codes, keep
