"""Gaussian mixture head: one linear read-out of weights, means and scales; its density is a closed form.

Source: GIVT (Tschannen et al. 2024, arXiv:2312.02116, sec. 3.2). Letters: R branches of guidance, B samples, L positions of
a picture, m positions drawn, D width of z, C channels of a token, K components with diagonal covariances.
"""

from math import log, pi

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from heads.protocol import Draw, Head
from layers.spec import TokenSpec


class MixtureHead(Head):
    """z (..., D) -> a mixture of K Gaussians over tokens of C channels. No scale is below `floor`.

    An untrained head does not read z; its means are spread by a standard normal law, its scales are 1.
    Raises ValueError for a spec of discrete tokens.
    """

    def __init__(self, width: int, spec: TokenSpec, components: int = 16, floor: float = 1e-3) -> None:
        super().__init__()
        if spec.channels is None:
            raise ValueError(f"MixtureHead needs continuous tokens, the tokenizer makes discrete ones: {spec}")
        self.channels, self.components, self.floor = spec.channels, components, floor
        self.readout = nn.Linear(width, components * (1 + 2 * spec.channels))
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        nn.init.normal_(self.readout.bias[components : components * (1 + spec.channels)])
        nn.init.constant_(self.readout.bias[components * (1 + spec.channels) :], log(torch.e - 1))

    def mixture(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., D) -> logits (..., K), means (..., K, C), logarithms of the scales (..., K, C), float32 at least."""
        out = self.readout(z)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        logits, rest = out[..., : self.components], out[..., self.components :]
        mean, scale = rearrange(rest, "... (two k c) -> two ... k c", two=2, c=self.channels)
        return logits, mean, (functional.softplus(scale) + self.floor).log()

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """z (..., D), target (..., C) -> (...) nats."""
        logits, mean, log_scale = self.mixture(z)
        distance = (target[..., None, :] - mean) * (-log_scale).exp()
        gaussian = -(0.5 * distance.square() + log_scale + 0.5 * log(2 * pi)).sum(-1)  # (..., K)
        return (logits.log_softmax(-1) + gaussian).logsumexp(-1)

    def loss(self, z: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Minus the log-density in nats: z (B, L, D), target (B, L, C) -> (B, L), 0 where mask (B, L) is False."""
        loss = -self.log_prob(z, target)
        return loss if mask is None else loss * mask

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        """z (R, B, m, D) -> tokens (B, m, C): a component, then a point of it.

        Guidance mixes the logits of the components, then the mean and the logarithm of the scale of the one drawn: for
        one component of equal scales the law is the exact tilt p_c^s p_u^(1-s). The temperature acts on the components
        and multiplies the scale.
        """
        logits, mean, log_scale = self.mixture(z)
        component = draw.token(logits)[None, ..., None, None].expand(len(z), -1, -1, 1, self.channels)
        mean, log_scale = (draw.mix(rows.gather(-2, component).squeeze(-2)) for rows in (mean, log_scale))
        return mean + log_scale.exp() * draw.temperature * draw.normal((self.channels,)).to(mean.dtype)
