"""Fourier heads: a density on an interval as the squared modulus of a trigonometric polynomial that a linear layer gives.

Source: Gillman et al. 2025, arXiv:2410.22269. With amplitudes a_0..a_N the density on [-1, 1] is
|sum_j a_j e^(i pi j x)|^2 / (2 sum_j |a_j|^2): never negative, of mass one. Its Fourier coefficients are the
autocorrelation c_k = sum_j a_(j+k) conj(a_j). More frequencies fit more closely, fewer are smoother.

Letters: R branches of guidance, B samples, L positions of a picture, m positions drawn, D width of z, C channels of a
token, V bins, N frequencies. Amplitudes are real (..., 2, N + 1): real parts, then imaginary parts.
"""

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from heads.protocol import Draw, Head
from layers.keymap import translate
from layers.record import look_up
from layers.spec import Sequence, TokenSpec

# ---- densities on [-1, 1]


def waves(x: Tensor, frequencies: int) -> Tensor:
    """x (...) -> (..., 2, N + 1): cosines, then sines, of pi j x for j = 0..N."""
    angle = pi * x[..., None] * torch.arange(frequencies + 1, dtype=x.dtype, device=x.device)
    return torch.stack((angle.cos(), angle.sin()), dim=-2)


def density(amplitudes: Tensor, at: Tensor) -> Tensor:
    """amplitudes (..., 2, N + 1), waves at the points (..., 2, N + 1) -> (...), axes broadcast together."""
    (a, b), (cos, sin) = amplitudes.unbind(-2), at.unbind(-2)
    real = torch.linalg.vecdot(a, cos) - torch.linalg.vecdot(b, sin)
    imaginary = torch.linalg.vecdot(a, sin) + torch.linalg.vecdot(b, cos)
    return (real.square() + imaginary.square()) / (2 * amplitudes.square().sum((-2, -1)))


def coefficients(amplitudes: Tensor) -> Tensor:
    """amplitudes (..., 2, N + 1) -> c_0..c_N, complex (..., N + 1), c_0 real and positive."""
    count = amplitudes.shape[-1]
    spectrum = torch.fft.fft(torch.complex(*amplitudes.unbind(-2)), n=2 * count)
    return torch.fft.ifft(spectrum.abs().square().to(spectrum.dtype))[..., :count]


def roughness(amplitudes: Tensor) -> Tensor:
    """amplitudes (..., 2, N + 1) -> (...): 4 pi^2 sum_k k^2 |c_k|^2, twice the squared norm of the slope of the density
    before it is normalised. It also keeps the amplitudes small, which the density does not depend on."""
    c = coefficients(amplitudes)
    k = torch.arange(c.shape[-1], dtype=amplitudes.dtype, device=amplitudes.device)
    return 4 * pi**2 * (k.square() * c.abs().square()).sum(-1)


def cdf(c: Tensor, x: Tensor) -> Tensor:
    """coefficients (..., N + 1), x (...) in [-1, 1] -> (...): the mass below x."""
    k = torch.arange(1, c.shape[-1], dtype=x.dtype, device=x.device)
    cos, sin = waves(x, len(k))[..., 1:].unbind(-2)
    start = 1 - 2 * (k % 2)  # e^(i pi k x) at x = -1
    share = c[..., 1:] / c[..., :1].real
    return (x + 1) / 2 + ((share.real * sin + share.imag * (cos - start)) / (pi * k)).sum(-1)


def inverse_cdf(c: Tensor, u: Tensor, halvings: int = 25) -> Tensor:
    """coefficients (..., N + 1), u (...) in [0, 1) -> x (...) with mass u below, by halving the interval."""
    lower, upper = torch.full_like(u, -1), torch.ones_like(u)
    for _ in range(halvings):
        middle = (lower + upper) / 2
        short = cdf(c, middle) < u
        lower, upper = torch.where(short, middle, lower), torch.where(short, upper, middle)
    return (lower + upper) / 2


def small_linear(width: int, out: int, shrink_weight: float, shrink_bias: float) -> nn.Linear:
    """torch's default start, divided: small amplitudes. The published starts are (100, 100) and (1000, 10)."""
    linear = nn.Linear(width, out)
    with torch.no_grad():
        linear.weight /= shrink_weight
        linear.bias /= shrink_bias
    return linear


def as_amplitudes(out: Tensor, frequencies: int) -> Tensor:
    """Output of a layer (..., 2 (N + 1)) -> (..., 2, N + 1), float32 at least."""
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    return rearrange(out, "... (two n) -> ... two n", two=2, n=frequencies + 1)


# ---- heads


class FourierBins(Head):
    """z (..., D) -> a law over V ordered tokens: the density at V bin centres, made to sum to one.

    penalty: weight of `roughness` in the loss. floor: added to every probability before the logarithm.
    Raises ValueError for a spec of continuous tokens.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        frequencies: int = 12,
        penalty: float = 0.0,
        floor: float = 1e-5,
        shrink_weight: float = 100.0,
        shrink_bias: float = 100.0,
    ) -> None:
        super().__init__()
        if spec.vocab_size is None:
            raise ValueError(f"FourierBins needs discrete, ordered tokens, the tokenizer makes continuous ones: {spec}")
        self.frequencies, self.penalty, self.floor = frequencies, penalty, floor
        self.readout = small_linear(width, 2 * (frequencies + 1), shrink_weight, shrink_bias)
        edges = torch.linspace(-1, 1, spec.vocab_size + 1, dtype=torch.float64)
        centres = (edges[:-1] + edges[1:]) / 2
        self.register_buffer("waves", waves(centres, frequencies).float(), persistent=False)  # (V, 2, N + 1)

    def amplitudes(self, z: Tensor) -> Tensor:
        """z (..., D) -> (..., 2, N + 1)."""
        return as_amplitudes(self.readout(z), self.frequencies)

    def _logits(self, amplitudes: Tensor) -> Tensor:
        (a, b), (cos, sin) = amplitudes.unbind(-2), self.waves.to(amplitudes.dtype).unbind(-2)
        at = (a @ cos.T - b @ sin.T).square() + (a @ sin.T + b @ cos.T).square()  # the density, but for its mass
        return (at / at.sum(-1, keepdim=True) + self.floor).log()

    def logits(self, z: Tensor) -> Tensor:
        """z (..., D) -> (..., V), float32 at least."""
        return self._logits(self.amplitudes(z))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """z (..., D), target int64 (...) -> (...) nats."""
        return self.logits(z).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)

    def loss(self, z: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats and the penalty: (B, L), 0 where mask (B, L) is False."""
        amplitudes = self.amplitudes(z)
        loss = functional.cross_entropy(self._logits(amplitudes).movedim(-1, 1), target, reduction="none")
        if self.penalty:
            loss = loss + self.penalty * roughness(amplitudes)
        return loss if mask is None else loss * mask

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m)."""
        return draw.token(self.logits(z))


class FourierDensity(Head):
    """z (..., D) -> a law over tokens of C channels, each in [-bound, bound], a Fourier density a channel.

    hidden: None: the channels are independent given z, one linear layer. A number: the amplitudes of a channel also read
    the channels before it, by an MLP of that width. penalty: weight of `roughness` in the loss. cells: the grid on which a
    guided or tempered density is drawn.
    Raises ValueError for a spec of discrete tokens.
    """

    def __init__(
        self,
        width: int,
        spec: TokenSpec,
        frequencies: int = 12,
        bound: float = 1.0,
        hidden: int | None = None,
        penalty: float = 0.0,
        cells: int = 1024,
        shrink_weight: float = 100.0,
        shrink_bias: float = 100.0,
    ) -> None:
        super().__init__()
        if spec.channels is None:
            raise ValueError(f"FourierDensity needs continuous tokens, the tokenizer makes discrete ones: {spec}")
        self.channels, self.frequencies = spec.channels, frequencies
        self.bound, self.penalty, self.cells = bound, penalty, cells
        out = spec.channels * 2 * (frequencies + 1)
        self.readout = small_linear(width, out, shrink_weight, shrink_bias)
        self.before = None
        if hidden is not None:
            seen = 2 * spec.channels  # the channels before this one, and which one this is
            self.before = nn.Sequential(
                nn.Linear(width + seen, hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, 2 * (frequencies + 1)),
            )

    def amplitudes(self, z: Tensor, value: Tensor, channels: slice = slice(None)) -> Tensor:
        """z (..., D), value (..., C) in [-1, 1] -> (..., c, 2, N + 1) for the c channels of the slice, each reading the
        values of the channels before it."""
        out = rearrange(self.readout(z), "... (c f) -> ... c f", c=self.channels)[..., channels, :]
        if self.before is not None:
            which = torch.eye(self.channels, dtype=z.dtype, device=z.device)
            seen = value[..., None, :].to(z.dtype) * torch.ones_like(which).tril(-1)  # (..., C, C)
            parts = [part[..., channels, :] for part in (seen, which.expand(*z.shape[:-1], -1, -1))]
            told = z[..., None, :].expand(*z.shape[:-1], parts[0].shape[-2], -1)
            out = out + self.before(torch.cat((told, *parts), dim=-1))
        return as_amplitudes(out, self.frequencies)

    def _log_density(self, amplitudes: Tensor, value: Tensor) -> Tensor:
        p = density(amplitudes, waves(value.to(amplitudes.dtype), self.frequencies))
        return p.clamp_min(torch.finfo(p.dtype).tiny).log() - log(self.bound)

    def _read(self, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        value = target / self.bound
        if bool((value.abs() > 1).any()):
            raise ValueError(
                f"FourierDensity: a token has a channel of size {float(target.abs().max()):.4g}, outside of "
                f"[-{self.bound}, {self.bound}]; give a larger bound"
            )
        return self.amplitudes(z, value), value

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """z (..., D), target (..., C) -> (...) nats. Raises ValueError for a token outside of the bound."""
        return self._log_density(*self._read(z, target)).sum(-1)

    def loss(self, z: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Minus the log-density in nats, and the penalty, summed over channels: (B, L), 0 where mask (B, L) is False.

        Raises ValueError for a token outside of the bound.
        """
        amplitudes, value = self._read(z, target)
        loss = -self._log_density(amplitudes, value)
        if self.penalty:
            loss = loss + self.penalty * roughness(amplitudes)
        loss = loss.sum(-1)
        return loss if mask is None else loss * mask

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m, C), channel by channel, each by its inverse distribution function.

        Guidance mixes log-densities, part c for channel c, which is the exact tilt p_c^s p_u^(1-s); a temperature divides
        them. Both are drawn on a grid of cells, evenly within a cell. Noise is part 0.
        """
        normal = draw.normal((self.channels,))
        u = 0.5 * (1 + torch.erf(normal / sqrt(2)))
        tokens = torch.zeros(
            *u.shape[:2], self.channels, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device
        )
        if not tokens.numel():
            return tokens  # a Fourier transform refuses an empty tensor
        for channel in range(self.channels):
            here = slice(channel, channel + 1)
            amplitudes = self.amplitudes(z, tokens.expand(len(z), -1, -1, -1), here).squeeze(-3)  # (R, B, m, 2, N + 1)
            if len(z) == 1 and draw.temperature == 1:
                tokens[..., channel] = inverse_cdf(coefficients(amplitudes[0]), u[..., channel].to(tokens.dtype))
            else:
                tokens[..., channel] = self._on_cells(amplitudes, u[..., channel], draw, channel).to(tokens.dtype)
        return self.bound * tokens

    def _on_cells(self, amplitudes: Tensor, u: Tensor, draw: Draw, channel: int) -> Tensor:
        centres = (2 * torch.arange(self.cells, dtype=amplitudes.dtype, device=u.device) + 1) / self.cells - 1
        (a, b), (cos, sin) = amplitudes.unbind(-2), waves(centres, self.frequencies).unbind(-2)
        at = (a @ cos.T - b @ sin.T).square() + (a @ sin.T + b @ cos.T).square()  # (R, B, m, cells)
        logits = at.clamp_min(torch.finfo(at.dtype).tiny).log()
        mass = (draw.mix(logits, part=channel) / draw.temperature).double().softmax(-1)
        total = mass.cumsum(-1)
        cell = torch.searchsorted(total, u[..., None] * total[..., -1:], right=True).clamp_max(self.cells - 1)
        inside = (u[..., None] - total.gather(-1, cell)) / mass.gather(-1, cell) + 1
        return ((cell + inside.clamp(0, 1)) * 2 / self.cells - 1).squeeze(-1)


# ---- published weights

ARGUMENTS = {  # theirs -> ours
    "num_frequencies": "frequencies",
    "regularizion_gamma": "penalty",
    "const_inverse_softmax": "floor",
    "init_denominator_weight": "shrink_weight",
    "init_denominator_bias": "shrink_bias",
}
KEYS = {f"fc_extract_autocorrelation_params.{kind}": f"readout.{kind}" for kind in ("weight", "bias")}


def fourier_head_from_published(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FourierBins | FourierDensity:
    """The head from the original constructor's arguments: of bins where they hold dim_output, else the continuous one.

    dtype and device are read over: a module here is moved by whoever owns it.
    """
    arguments = {theirs: value for theirs, value in config.items() if theirs not in ("dtype", "device")}
    width, bins = arguments.pop("dim_input"), arguments.pop("dim_output", None)
    ours = {look_up(theirs, ARGUMENTS, "Fourier_Head: argument"): value for theirs, value in arguments.items()}
    if bins is None:
        head = FourierDensity(width, TokenSpec(Sequence(1), decoded=(1, 1, 1), channels=1), **ours)
    else:
        head = FourierBins(width, TokenSpec(Sequence(1), decoded=(1, 1, 1), vocab_size=bins), **ours)
    head.load_state_dict(translate(state, KEYS, head.state_dict()))
    return head
