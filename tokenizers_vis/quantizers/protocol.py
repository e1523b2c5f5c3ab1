"""What a quantiser is asked: vectors to codes of a finite set, their ids, and back."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tokenizers_vis.quantizers.usage import code_counts, usage_metrics

COUNTED = 2**20  # a larger vocabulary is not counted batch by batch


@dataclass(frozen=True)
class Quantized:
    """z_q (..., D): the codes, exactly, with a gradient to z. ids int64 (...), or (..., S) where a vector has S codes.

    losses: scalars with gradient, unweighted; "codebook", "commitment", "entropy_sample" (to be minimised) and
    "entropy_codebook" (to be maximised), as the scheme has them. stats: scalars for the logs, of this batch.
    """

    z_q: Tensor
    ids: Tensor
    losses: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """A finite set of codes in R^D and a way to the code of a vector. Computes in float32 or better, autocast off.

    dim: D. vocab_size: V. depth: S, the number of codes that stand for one vector; 1 but for residual schemes.
    Where some vectors are padding, quantise `z[present]` (N, D): nothing else then enters losses and statistics.
    """

    dim: int
    vocab_size: int
    depth: int = 1

    def forward(self, z: Tensor) -> Quantized:
        """z (..., D). In training mode codebooks that learn without gradient move here, after they were used.

        Raises ValueError for another number of channels.
        """
        z = self._checked(z)
        with torch.autocast(z.device.type, enabled=False):
            out = self._quantize(z)
        if self.vocab_size > COUNTED:
            return out
        counts = code_counts(out.ids, self.vocab_size)
        return Quantized(out.z_q, out.ids, out.losses, {**out.stats, **usage_metrics(counts)})

    @torch.no_grad()
    def assign(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """z (..., D) -> ids (...) or (..., S); changes nothing, in training mode either.

        noise: uniforms in [0, 1) of the ids' shape, read by stochastic schemes alone; None: the likeliest code.
        """
        z = self._checked(z)
        with torch.autocast(z.device.type, enabled=False):
            return self._assign(z, noise)

    def _checked(self, z: Tensor) -> Tensor:
        if z.shape[-1] != self.dim:
            raise ValueError(f"{type(self).__name__}: got vectors of {z.shape[-1]} channels, made for {self.dim}")
        return at_least_float32(z)

    @abstractmethod
    def _quantize(self, z: Tensor) -> Quantized: ...

    @abstractmethod
    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor: ...

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """ids (...) or (..., S) -> codes (..., D), what `forward` gave as z_q."""

    @abstractmethod
    def codebook(self) -> Tensor:
        """All codes (V, D), in the order of their ids; (S, V, D) where depth is S > 1."""


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """The value of q, bit for bit, with the gradient of z (Bengio et al. 2013, arXiv:1308.3432)."""
    return q.detach() + (z - z.detach())
