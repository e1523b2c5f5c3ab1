"""D-AR: a picture as a line of tokens that are its own denoising, a stretch of the way from noise for every group of them.

Paper: Gao & Shou 2025, "D-AR: Diffusion via Autoregressive Models" (arXiv:2505.23660).

Dims: B batch, H x W pixels, P patches that are read, K tokens in G groups, w tokens of a window, N patches that are made,
C channels of a code, D width of a transformer.

What to know:
- the encoder reads [patches][queries]: patches see patches, a query sees them and the queries up to itself. The codes go
  through a causal stack of their own. So neither a token nor what is made of it depends on a later one;
- the decoder is a velocity of pixels (layers/flow.py). `progress` p in [0, 1) counts the way from noise evenly, the time is
  1 - p, shifted towards noise. At p it sees one window of w tokens: the one that begins at round(p G) K / G;
- so the first n tokens give the steps whose windows they fill, and one more that jumps to the end: a preview;
- a patch looks at its window, and what it sees, with the time, is the modulation of its block: every patch has its own, and
  nothing of the window is added to the patches themselves;
- pictures are scaled by `data_std` before noise is added.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from layers.adaln import Modulation, modulate
from layers.flow import Velocity, interpolate, shifted
from layers.noise import Noise
from layers.rotary import layout_places, rotary_table, rotate
from layers.sincos import sincos
from layers.spec import Condition, Grid, TokenSpec
from layers.spec import Sequence as Line
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers import Quantizer

TIME_SCALE = 1000.0  # what the time in [0, 1] is multiplied by before its sinusoid
EPS = 1e-6  # of all norms


def adams(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """x at times[0] -> x at times[-1] by the two-step method of Adams and Bashforth, one evaluation a step.

    The first step is Euler's. The weights 3/2 and -1/2 are those of equal strides, whatever the strides are, as published.
    """
    before = None
    for i in range(len(times) - 1):
        here = velocity(x, i)
        x = x + (times[i + 1] - times[i]) * (here if before is None else 1.5 * here - 0.5 * before)
        before = here
    return x


# ---- networks


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _mlp(dim: int) -> nn.Module:
    return Mlp(dim, 4 * dim, act_layer=nn.SiLU)


def _embedding(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class Attention(nn.Module):
    """x (B, l, D) looks at `context` (B, s, D), at itself where there is none -> (B, l, D).

    Queries and keys are normalised in every head, then turned by rotary (l, d/2, 2): queries alone where there is a context.
    """

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(head_dim, EPS), nn.LayerNorm(head_dim, EPS)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        q = rearrange(self.q(x), "b l (h d) -> b l h d", d=self.head_dim)
        kv = self.kv(x if context is None else context)
        k, v = rearrange(kv, "b s (two h d) -> two b s h d", two=2, d=self.head_dim)
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary) if context is None else k
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


class Block(nn.Module):
    """x += gate attention(norm(x)); x += gate mlp(norm(x)). The gates, a number a channel, begin closed."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(dim, EPS), Attention(dim, head_dim)
        self.norm_2, self.mlp = nn.LayerNorm(dim, EPS), _mlp(dim)
        self.gate_1, self.gate_2 = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, **attend: Any) -> Tensor:
        x = x + self.gate_1 * self.attention(self.norm_1(x), **attend)
        return x + self.gate_2 * self.mlp(self.norm_2(x))


class QueryEncoder(nn.Module):
    """Images (B, 3, H, W) -> the vectors of the first n queries (B, n, C). rank: of the table of queries; None: full."""

    def __init__(
        self,
        grid: Grid,
        patch: int,
        tokens: int,
        rank: int | None,
        dim: int,
        depth: int,
        head_dim: int,
        theta: float,
        out: int,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, stride=patch)
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank or dim), std=1.0 if rank else 0.02))
        self.query = nn.Identity() if rank is None else nn.Linear(rank, dim)
        self.blocks = nn.ModuleList(Block(dim, head_dim) for _ in range(depth))
        self.out = nn.Linear(dim, out, bias=False)
        table = rotary_table(layout_places(grid), head_dim, theta)
        still = torch.tensor([1.0, 0.0]).expand(tokens, head_dim // 2, 2)  # a query has no place: it is not turned
        self.register_buffer("rotary", torch.cat((table, still)), persistent=False)

    def forward(self, images: Tensor, n: int) -> Tensor:
        patches = _norm(rearrange(self.patch(images), "b d h w -> b (h w) d"))
        queries = self.query(self.queries[:n])
        x = torch.cat((patches, queries.expand(len(images), -1, -1).to(patches.dtype)), dim=1)
        sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        sees[:, : patches.shape[1]] = True
        for block in self.blocks:
            x = block(x, rotary=self.rotary[: x.shape[1]], mask=sees)
        return self.out(_norm(x[:, patches.shape[1] :]))


class CodeStack(nn.Module):
    """Codes (B, n, C) of the first n tokens -> what the velocity may see of them (B, n, D); causal."""

    def __init__(self, tokens: int, channels: int, dim: int, depth: int, head_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, dim, bias=False)
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, dim), std=0.02))
        self.blocks = nn.ModuleList(Block(dim, head_dim) for _ in range(depth))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embed(codes) + self.places[: codes.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return _norm(x)


class FlowBlock(nn.Module):
    """A block of the velocity: what each patch sees of the window, with the time, modulates it.

    own_time: it embeds the waves of the time itself; else it is given the embedding.
    """

    def __init__(self, dim: int, head_dim: int, own_time: bool) -> None:
        super().__init__()
        self.time = _embedding(dim) if own_time else nn.Identity()
        self.window = _embedding(dim)
        self.look, self.attention, self.mlp = Attention(dim, head_dim), Attention(dim, head_dim), _mlp(dim)
        self.modulation = Modulation(dim, dim, 6)

    def forward(self, x: Tensor, time: Tensor, window: Tensor, rotary: Tensor) -> Tensor:
        """x (B, N, D), time (B or 1, D), window (B, w, D)."""
        seen = self.look(_norm(x), _norm(self.window(window)), rotary)
        parts = self.modulation(self.time(time)[:, None] + seen)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        x = x + gate_1 * self.attention(modulate(_norm(x), scale_1, shift_1), rotary=rotary)
        return x + gate_2 * self.mlp(modulate(_norm(x), scale_2, shift_2))


class PixelFlow(nn.Module):
    """The velocity of noised pixels under a window of tokens.

    shared_time: the time is embedded once for all blocks. timed_readout: it also shifts and scales the last patches, which
    needs shared_time. features_at: the block before which the patches are handed out; None where there is none such.
    """

    def __init__(
        self,
        grid: Grid,
        patch: int,
        window_dim: int,
        dim: int,
        depth: int,
        head_dim: int,
        theta: float,
        shared_time: bool,
        timed_readout: bool,
        features_at: int,
    ) -> None:
        super().__init__()
        self.grid, self.patch, self.features_at = grid, patch, features_at
        self.embed = nn.Linear(3 * patch**2, dim)
        self.window = nn.Linear(window_dim, dim)
        self.time = _embedding(dim) if shared_time else nn.Identity()
        self.blocks = nn.ModuleList(FlowBlock(dim, head_dim, not shared_time) for _ in range(depth))
        self.modulation = Modulation(dim, dim, 2) if timed_readout else None
        self.readout = nn.Linear(dim, 3 * patch**2)
        self.register_buffer("rotary", rotary_table(layout_places(grid), head_dim, theta), persistent=False)

    def forward(self, x: Tensor, t: Tensor, window: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, 3, H, W), t (B,) or (1,) in [0, 1], 1 for noise, window (B, w, D') -> dx/dt like x, the patches before
        block features_at (B, D, h, w)."""
        h, w, p = self.grid.h, self.grid.w, self.patch
        dim, dtype = self.embed.out_features, self.embed.weight.dtype
        waves = sincos(TIME_SCALE * (1 - t.double()), dim, dtype=dtype).roll(dim // 2, -1)  # cosines first
        time, window, features = self.time(waves), _norm(self.window(window)), None
        x = self.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        for i, block in enumerate(self.blocks):
            if i == self.features_at:
                features = rearrange(x, "b (h w) d -> b d h w", h=h)
            x = block(x, time, window, self.rotary)
        x = _norm(x)
        if self.modulation is not None:
            shift, scale = self.modulation(time)
            x = modulate(_norm(x), scale, shift)
        towards_data = rearrange(self.readout(x), "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
        return -towards_data, features


def _start(network: nn.Module) -> None:
    """Normal, of deviation 0.55 / sqrt(inputs): at the width of the paper its 0.02, and not too little at smaller ones."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.55 * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ---- the tokenizer


class DARTokenizer(Tokenizer):
    """Pictures <-> K discrete tokens of which the first groups alone give a preview.

    Raises ValueError for parts and sizes that do not fit together.

    Args:
        image_size: Height and width in pixels, or one number for both.
        quantizer: Of the queries, one id a vector.
        tokens: K.
        groups: G, into which the way from noise to picture is cut.
        window: Tokens w that the velocity sees at a time; null: those of a group.
        steps: Of `decode` with all tokens; null: one a group.
        encoder_patch: Pixels a side of a patch that is read.
        encoder_dim: D of the encoder.
        encoder_depth: Its blocks.
        query_rank: Of its table of queries; null: full, and queries that begin small beside the patches.
        code_dim: D of the causal stack that reads the codes.
        code_depth: Its blocks; 0 is allowed.
        flow_patch: Pixels a side of a patch of the velocity.
        flow_dim: Its D.
        flow_depth: Its blocks.
        head_dim: Channels of a head of attention, in all of them.
        theta: Base of the encoder's rotary places.
        flow_theta: And of the velocity's.
        shared_time: Whether the velocity embeds the time once for all its blocks.
        timed_readout: Whether the time also modulates its last patches; needs shared_time.
        features_at: Block of the velocity before which its patches are handed out, for a term of training.
        data_std: What pictures are multiplied by before they are noised.
        time_shift: Above 1 training and decoding spend more of their times near noise.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        quantizer: Quantizer,
        tokens: int = 256,
        groups: int = 8,
        window: int | None = None,
        steps: int | None = None,
        encoder_patch: int = 16,
        encoder_dim: int = 768,
        encoder_depth: int = 8,
        query_rank: int | None = 8,
        code_dim: int = 768,
        code_depth: int = 8,
        flow_patch: int = 8,
        flow_dim: int = 768,
        flow_depth: int = 12,
        head_dim: int = 64,
        theta: float = 10_000.0,
        flow_theta: float = 10_000.0,
        shared_time: bool = False,
        timed_readout: bool = False,
        features_at: int = 8,
        data_std: float = 0.6,
        time_shift: float = 2.0,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for name, patch in (("encoder_patch", encoder_patch), ("flow_patch", flow_patch)):
            if height % patch or width % patch:
                raise ValueError(f"DARTokenizer: image_size {height} x {width} is not divisible by {name}={patch}")
        for name, dim in (("encoder_dim", encoder_dim), ("code_dim", code_dim), ("flow_dim", flow_dim)):
            if dim % head_dim:
                raise ValueError(f"DARTokenizer: head_dim={head_dim} must divide {name}={dim}")
        if quantizer.depth != 1:
            raise ValueError(
                f"DARTokenizer: {type(quantizer).__name__} gives {quantizer.depth} ids a vector; a token is 1"
            )
        window = tokens // groups if window is None else window
        if not 1 <= window <= tokens:
            raise ValueError(
                f"DARTokenizer: window is {window} of tokens={tokens} in groups={groups}, must be 1 to {tokens}"
            )
        if timed_readout and not shared_time:
            raise ValueError("DARTokenizer: timed_readout reads the shared embedding of the time: it needs shared_time")
        self.spec = TokenSpec(Line(tokens), decoded=(1, height, width), vocab_size=quantizer.vocab_size)
        self.groups, self.window, self.steps = groups, window, groups if steps is None else steps
        self.data_std, self.time_shift = data_std, time_shift
        self.prefixes = tuple(sorted({*self._ends(self.steps), tokens}))
        self.quantizer = quantizer
        self.encoder = QueryEncoder(
            Grid(1, height // encoder_patch, width // encoder_patch),
            encoder_patch,
            tokens,
            query_rank,
            encoder_dim,
            encoder_depth,
            head_dim,
            theta,
            quantizer.dim,
        )
        self.code_stack = CodeStack(tokens, quantizer.dim, code_dim, code_depth, head_dim)
        self.flow = PixelFlow(
            Grid(1, height // flow_patch, width // flow_patch),
            flow_patch,
            code_dim,
            flow_dim,
            flow_depth,
            head_dim,
            flow_theta,
            shared_time,
            timed_readout,
            features_at,
        )
        for network in (self.encoder, self.code_stack, self.flow):
            _start(network)
        zero = [self.flow.readout, *(m.project for m in self.flow.modules() if isinstance(m, Modulation))]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance adversarial and other losses (VQGAN, eq. 7)."""
        return self.flow.readout.weight

    @property
    def feature_channels(self) -> int:
        """Of the "features" that `forward` hands out."""
        return self.flow.embed.out_features

    @torch.no_grad()
    def encode(self, images: Tensor, *, noise: Tensor | None = None, length: int | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> the first `length` tokens, int64 (B, length); None: all K.

        noise: uniforms in [0, 1), (B, length), for a quantiser that draws; None: the nearest codes. Raises ValueError for
        images of another size than `spec.decoded`, and for a length that is none of `prefixes`.
        """
        length = self.spec.length if length is None else length
        self._check_length(length)
        return self.quantizer.assign(self._vectors(images, length), noise)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens int64 (B, n) in [0, V), n one of `prefixes` -> images (B, 3, H, W), unclamped; a preview for n < K.

        present: bool (B, n), where samples have prefixes of different lengths. noise: standard normal (B, 3, H, W), as
        `start` makes; None: the same for every picture, so that a picture is a function of its tokens. `condition` has
        nothing to change here. Raises ValueError for another n, ids outside [0, V), `present` that is no such prefix.
        """
        self._check_length(tokens.shape[1])
        if noise is None:
            noise = self.start(Noise(0, torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)))
        if present is None:
            return self.pixels(tokens, noise)
        lengths = present.sum(-1)
        if not torch.equal(torch.arange(tokens.shape[1], device=tokens.device) < lengths[..., None], present):
            raise ValueError("DARTokenizer: present must be True for the first tokens of a row and False behind them")
        images = torch.empty_like(noise)
        for n in lengths.unique().tolist():
            self._check_length(n)
            rows = lengths == n
            images[rows] = self.pixels(tokens[rows, :n], noise[rows])
        return images

    def start(self, noise: Noise) -> Tensor:
        """The noise that decoding starts from, (B, 3, H, W): a sample's depends on seed and index alone."""
        _, height, width = self.spec.decoded
        place = torch.arange(height * width, device=noise.index.device)
        pixels = noise.normal("decode", place, size=(3,)).to(self.flow.embed.weight.dtype)
        return rearrange(pixels, "b (h w) c -> b c h w", h=height)

    @torch.no_grad()
    def pixels(self, tokens: Tensor, noise: Tensor, *, steps: int | None = None, taken: int | None = None) -> Tensor:
        """From noise (B, 3, H, W) to images, in the first `taken` of `steps` steps, the last of which goes to the end.

        steps: None, as in the constructor; taken: None, all whose windows lie within tokens (B, n). Raises ValueError
        where not even the first does, or one that is asked for.
        """
        steps = self.steps if steps is None else steps
        ends, n = self._ends(steps), tokens.shape[1]
        taken = sum(end <= n for end in ends) if taken is None else min(taken, steps)
        if not taken or ends[taken - 1] > n:
            raise ValueError(
                f"DARTokenizer: {n} tokens, step {max(taken, 1)} of {steps} sees {ends[max(taken, 1) - 1]}"
            )
        progress = [i / steps for i in range(taken)]
        times = [shifted(1 - p, self.time_shift) for p in progress] + [0.0]
        seen = self.condition(self.embed(tokens[:, : ends[taken - 1]]))
        starts = self._window_start(torch.tensor(progress, dtype=torch.float64)).tolist()

        def velocity(x: Tensor, i: int) -> Tensor:
            t = torch.full((1,), times[i], dtype=torch.float64, device=x.device)
            return self.velocity(x, t, seen[:, starts[i] : starts[i] + self.window])

        return adams(velocity, noise, times) / self.data_std

    def condition(self, codes: Tensor) -> Tensor:
        """codes (B, n, C) of the first n tokens -> (B, n, D), of which the velocity sees a window at a time."""
        return self.code_stack(codes.to(self.code_stack.places.dtype))

    def velocity(self, x: Tensor, t: Tensor, window: Tensor) -> Tensor:
        """dx/dt of scaled pixels x (B, 3, H, W) at the shifted time t (B,) or (1,), 1 for noise; window (B, w, D)."""
        return self.flow(x, t, window)[0]

    def fit(
        self, images: Tensor, window: Tensor, progress: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The flow's loss under a window (B, w, D) at progress (B,), its guess of the images, features (B, D, h, w).

        images (B, 3, H, W) in [-1, 1]; noise like them. The loss is in units of the images' own variance.
        """
        t = shifted(1 - progress.double(), self.time_shift)[:, None, None]
        data = self.data_std * images
        x = interpolate(data, noise, t)
        velocity, features = self.flow(x, t[:, 0, 0], window)
        error = (noise - data).float() - velocity.float()
        guess = (x - t[..., None].to(x.dtype) * velocity) / self.data_std
        return error.square().mean() / self.data_std**2, guess, features

    def forward(
        self, images: Tensor, *, progress: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """images (B, 3, H, W) in [-1, 1] -> what one step makes of them, parts.

        Drawn where not given: progress (B,) in [0, 1), which says the window of each picture; noise, standard normal like
        the images. parts: "flow"; "ids" (B, K), 0 behind a picture's window, where nothing is read or learned; the
        quantiser's losses by name; "features" (B, D, h, w), None in a shallow flow; "stats".
        """
        if progress is None:
            progress = torch.rand(len(images), device=images.device)
        noise = torch.randn_like(images) if noise is None else noise
        start = self._window_start(progress)
        vectors = self._vectors(images, self.spec.length)
        read = torch.arange(self.spec.length, device=images.device) < start[:, None] + self.window  # (B, K)
        coded = self.quantizer(vectors[read])
        codes = vectors.new_zeros(*vectors.shape).masked_scatter(read[..., None], coded.z_q.to(vectors.dtype))
        ids = torch.zeros_like(read, dtype=torch.int64).masked_scatter(read, coded.ids)
        flow, guess, features = self.fit(images, self._cut(self.condition(codes), start), progress, noise)
        parts = {"flow": flow, **coded.losses, "ids": ids, "features": features, "stats": coded.stats}
        return guess, parts

    def windows(self, condition: Tensor, progress: Tensor) -> Tensor:
        """What the velocity sees at progress (B,) of the condition (B, K, D) of all tokens -> (B, w, D)."""
        return self._cut(condition, self._window_start(progress))

    def codebook(self) -> Tensor:
        """(V, C), as the decoder gets them."""
        return self.quantizer.codebook()

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64, any shape -> codes (..., C). Raises ValueError for ids outside [0, V)."""
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.quantizer.vocab_size:
            raise ValueError(
                f"DARTokenizer: ids from {low} to {high}, the codebook has 0 to {self.quantizer.vocab_size - 1}"
            )
        return self.quantizer.embed(tokens)

    def _vectors(self, images: Tensor, n: int) -> Tensor:
        expected = (3, *self.spec.decoded[1:])
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"DARTokenizer: got images {tuple(images.shape)}, made for (B, {', '.join(map(str, expected))})"
            )
        return self.encoder(images, n)

    def _window_start(self, progress: Tensor) -> Tensor:
        """The first token that is seen at each progress, int64."""
        group = (progress.double() * self.groups + 0.5).floor()
        return (group / self.groups * self.spec.length).long().clamp(max=self.spec.length - self.window)

    def _ends(self, steps: int) -> list[int]:
        """How many tokens each step of `decode` needs."""
        progress = torch.arange(steps, dtype=torch.float64) / steps
        return (self._window_start(progress) + self.window).tolist()

    def _cut(self, condition: Tensor, start: Tensor) -> Tensor:
        place = start[:, None] + torch.arange(self.window, device=start.device)
        return condition.gather(1, place[..., None].expand(-1, -1, condition.shape[-1]))

    def _check_length(self, length: int) -> None:
        if length not in self.prefixes:
            raise ValueError(f"DARTokenizer: got {length} tokens, takes {', '.join(map(str, self.prefixes))}")
