"""Vector quantisers: the nearest row of a codebook. They differ in what the codebook is made of and how it learns.

VectorQuantizer            rows are parameters      van den Oord et al. 2017, VQ-VAE (arXiv:1711.00937); with
                                                    normalize=True Yu et al. 2021, ViT-VQGAN (arXiv:2110.04627)
StochasticVectorQuantizer  the same, drawn          Wang et al. 2024, LARP (arXiv:2410.21264)
EMAVectorQuantizer         rows are running means   VQ-VAE, appendix A.1; Razavi et al. 2019 (arXiv:1906.00446)
SimVQ                      fixed rows x a matrix    Zhu et al. 2024 (arXiv:2411.02038)

Dims: D channels, V codes, N vectors. With normalize=True vectors and rows are brought to unit length at every use, so
that the nearest row has the largest cosine, and codes, losses and gradients belong to the normalised space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_vis.quantizers.entropy import softmax_entropies
from tokenizers_vis.quantizers.protocol import Quantized, Quantizer, at_least_float32, straight_through
from tokenizers_vis.quantizers.revival import add_over_processes, revive_dead_codes
from tokenizers_vis.quantizers.usage import code_counts

DISTANCES = 2**26  # distances held at a time


@torch.no_grad()
def nearest(z: Tensor, rows: Tensor) -> Tensor:
    """z (..., D), rows (V, D) -> ids (...) of the nearest rows, Euclidean; the first of equals."""
    flat, norms = z.reshape(-1, z.shape[-1]), rows.square().sum(-1)
    parts = flat.split(max(1, DISTANCES // len(rows)))
    ids = [torch.addmm(norms, part, rows.t(), alpha=-2).argmin(-1) for part in parts]  # |e|^2 - 2 z.e
    return torch.cat(ids).view(z.shape[:-1])


def rotate_to(z: Tensor, q: Tensor) -> Tensor:
    """The value of q; the gradient turns as z must turn to reach q, and stretches as z must stretch.

    Source: Fifty et al. 2024, the rotation trick (arXiv:2410.06424). z, q (..., D).
    """
    z0, q0 = z.detach(), q.detach()
    u, v = F.normalize(z0, dim=-1), F.normalize(q0, dim=-1)
    w = F.normalize(u + v, dim=-1)
    stretch = q0.norm(dim=-1, keepdim=True) / z0.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    turned = z - 2 * w * (w * z).sum(-1, keepdim=True) + 2 * v * (u * z).sum(-1, keepdim=True)
    return straight_through(stretch * turned, q0)


class NearestRow(Quantizer):
    """What the vector quantisers share: all but the making of `rows` (V, D), the codebook before normalisation.

    vocab_size: V; dim: D. normalize: see above. rotation: the gradient to z by the rotation trick, else straight
    through. entropy_temperature: also give the entropy terms of softmax(-|z - e|^2 / T); costs N x V.
    """

    rows: Tensor

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        normalize: bool = False,
        rotation: bool = False,
        entropy_temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.dim = vocab_size, dim
        self.normalize, self.rotation, self.entropy_temperature = normalize, rotation, entropy_temperature

    def codebook(self) -> Tensor:
        return self._space(at_least_float32(self.rows))

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.codebook())

    def _space(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalize else x

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        return nearest(self._space(z), self.codebook())

    def _quantize(self, z: Tensor) -> Quantized:
        z, rows = self._space(z), self.codebook()
        ids = self._choose(z, rows)
        q = F.embedding(ids, rows)
        losses = {"codebook": F.mse_loss(q, z.detach()), "commitment": F.mse_loss(z, q.detach())}
        if self.entropy_temperature is not None:
            norms = rows.square().sum(-1)  # |z|^2 is the same for all codes: the softmax does not see it
            losses["entropy_sample"], losses["entropy_codebook"] = softmax_entropies(
                z.reshape(-1, self.dim), len(rows), lambda part: 2 * part @ rows.t() - norms, self.entropy_temperature
            )
        return Quantized(rotate_to(z, q) if self.rotation else straight_through(z, q), ids, losses)

    def _choose(self, z: Tensor, rows: Tensor) -> Tensor:
        return nearest(z, rows)


class VectorQuantizer(NearestRow):
    """Rows are parameters, moved by the "codebook" loss.

    revive_below: a code used less than this share of a uniform use (a running mean, decay usage_decay a batch) gets a
    vector of the batch, at the start of a forward in training mode; 0: never, and no usage is kept.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        normalize: bool = False,
        rotation: bool = False,
        entropy_temperature: float | None = None,
        revive_below: float = 0.0,
        usage_decay: float = 0.99,
    ) -> None:
        super().__init__(vocab_size, dim, normalize, rotation, entropy_temperature)
        self.rows = nn.Parameter(_first_rows(vocab_size, dim, normalize))
        self.revive_below, self.usage_decay = revive_below, usage_decay
        if revive_below:
            self.register_buffer("share", torch.full((vocab_size,), 1 / vocab_size))

    def _quantize(self, z: Tensor) -> Quantized:
        if not (self.training and self.revive_below):
            return super()._quantize(z)
        revived = self._revive(self._space(z.detach()).reshape(-1, self.dim))
        out = super()._quantize(z)
        counts = add_over_processes(code_counts(out.ids, self.vocab_size).float())
        self.share.lerp_(counts / counts.sum(), 1 - self.usage_decay)
        return Quantized(out.z_q, out.ids, out.losses, {"revived": revived})

    @torch.no_grad()
    def _revive(self, z: Tensor) -> Tensor:
        rows = self.codebook()
        found = revive_dead_codes(self.share, z, (z - rows[nearest(z, rows)]).square().sum(-1), self.revive_below)
        if found is None:
            return z.new_zeros(())
        dead, fresh = found
        self.rows.copy_(torch.where(dead[:, None], fresh, self.rows))
        self.share.masked_fill_(dead, 1 / self.vocab_size)
        return dead.sum()


class StochasticVectorQuantizer(VectorQuantizer):
    """In training the code is drawn from softmax(cosine / temperature); `assign` draws where it is given noise."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        temperature: float = 0.03,
        revive_below: float = 0.0,
        usage_decay: float = 0.99,
    ) -> None:
        super().__init__(vocab_size, dim, normalize=True, revive_below=revive_below, usage_decay=usage_decay)
        self.temperature = temperature

    def probs(self, z: Tensor) -> Tensor:
        """z (..., D) -> the law of its code (..., V)."""
        with torch.autocast(z.device.type, enabled=False):
            return self._law(self._space(at_least_float32(z)), self.codebook())

    def _law(self, z: Tensor, rows: Tensor) -> Tensor:
        return (z @ rows.t() / self.temperature).softmax(-1)

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        return super()._assign(z, None) if noise is None else _draw(self.probs(z), noise)

    def _choose(self, z: Tensor, rows: Tensor) -> Tensor:
        if not self.training:
            return nearest(z, rows)
        return _draw(self._law(z.detach(), rows.detach()), torch.rand(z.shape[:-1], device=z.device))


class EMAVectorQuantizer(NearestRow):
    """Rows are running means of the vectors assigned to them; they move after each forward in training mode.

    decay g: counts <- g counts + (1 - g) n, sums <- g sums + (1 - g) sum of the vectors, rows <- sums / counts, the
    counts smoothed by eps (Laplace). revive_below as in VectorQuantizer, on the running counts.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        normalize: bool = False,
        rotation: bool = False,
        entropy_temperature: float | None = None,
        decay: float = 0.99,
        eps: float = 1e-5,
        revive_below: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, dim, normalize, rotation, entropy_temperature)
        self.decay, self.eps, self.revive_below = decay, eps, revive_below
        self.register_buffer("rows", _first_rows(vocab_size, dim, normalize))
        self.register_buffer("sums", self.rows.clone())
        self.register_buffer("counts", torch.ones(vocab_size))

    def _quantize(self, z: Tensor) -> Quantized:
        flat = self._space(z.detach()).reshape(-1, self.dim)
        revived = self._revive(flat) if self.training and self.revive_below else flat.new_zeros(())
        out = super()._quantize(z)
        if self.training:
            self._learn(flat, out.ids.reshape(-1))
        return Quantized(
            out.z_q, out.ids, {k: v for k, v in out.losses.items() if k != "codebook"}, {"revived": revived}
        )

    @torch.no_grad()
    def _learn(self, z: Tensor, ids: Tensor) -> None:
        n = add_over_processes(code_counts(ids, self.vocab_size).to(z))
        total = add_over_processes(torch.zeros_like(self.sums, dtype=z.dtype).index_add_(0, ids, z))
        self.counts.lerp_(n.to(self.counts), 1 - self.decay)
        self.sums.lerp_(total.to(self.sums), 1 - self.decay)
        mass = self.counts.sum()
        smooth = (self.counts + self.eps) / (mass + self.vocab_size * self.eps) * mass
        self.rows.copy_(self._space(self.sums / smooth[:, None]))

    @torch.no_grad()
    def _revive(self, z: Tensor) -> Tensor:
        rows, mean = self.codebook(), self.counts.mean()
        error = (z - rows[nearest(z, rows)]).square().sum(-1)
        found = revive_dead_codes(self.counts / self.counts.sum(), z, error, self.revive_below)
        if found is None:
            return z.new_zeros(())
        dead, fresh = found
        self.rows.copy_(torch.where(dead[:, None], fresh, self.rows))
        self.sums.copy_(torch.where(dead[:, None], fresh * mean, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))
        return dead.sum()


class SimVQ(NearestRow):
    """Rows are fixed random vectors times one learned matrix: every code moves when any is used, so none dies."""

    def __init__(self, vocab_size: int, dim: int, normalize: bool = False, rotation: bool = False) -> None:
        super().__init__(vocab_size, dim, normalize, rotation)
        self.register_buffer("frozen", torch.randn(vocab_size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)

    @property
    def rows(self) -> Tensor:
        with torch.autocast(self.frozen.device.type, enabled=False):
            return self.transform(self.frozen)


def _first_rows(vocab_size: int, dim: int, normalize: bool) -> Tensor:
    rows = torch.empty(vocab_size, dim).uniform_(-1 / vocab_size, 1 / vocab_size)
    return F.normalize(rows, dim=-1) if normalize else rows


def _draw(law: Tensor, uniform: Tensor) -> Tensor:
    """law (..., V), uniform (...) in [0, 1) -> ids (...) by the inverse of the cumulated law."""
    cumulated = law.double().cumsum(-1)
    below = uniform[..., None].double() * cumulated[..., -1:]
    return torch.searchsorted(cumulated, below, right=True).squeeze(-1).clamp_max(law.shape[-1] - 1)
