"""Lookup-free quantisation: a code is the signs of a vector, its id their bits.

Sources: Yu et al. 2023, MAGVIT-v2 (arXiv:2310.05737, sec. 3.1); with spherical=True Zhao et al. 2024, BSQ
(arXiv:2406.07548): vectors on the unit sphere, codes at the corners of the cube inside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_vis.quantizers.entropy import sign_entropies
from tokenizers_vis.quantizers.protocol import Quantized, Quantizer, straight_through

MOST_BITS = 24  # for the entropy of the mean law, which is a tensor of 2^bits numbers


class LFQ(Quantizer):
    """bits: D, so V = 2^D; codes are +-1 per channel, +-1/sqrt(D) on the sphere; a channel at 0 counts as negative.

    msb_first: channel 0 is the most significant bit of the id (vector-quantize-pytorch, BSQ), else the least
    (Open-MAGVIT2). entropy_temperature: of the softmax over 2 z.c, the law of the entropy terms; None: no such terms.
    Raises ValueError for more bits than an id, or the entropy terms, can hold.
    """

    def __init__(
        self,
        bits: int,
        spherical: bool = False,
        msb_first: bool = False,
        entropy_temperature: float | None = 0.01,
    ) -> None:
        super().__init__()
        if entropy_temperature is not None and bits > MOST_BITS:
            raise ValueError(
                f"LFQ: {bits} bits are too many for entropy terms ({MOST_BITS} at most): entropy_temperature=None"
            )
        if not 1 <= bits <= 62:
            raise ValueError(f"LFQ: {bits} bits, an int64 id holds 1 to 62")
        self.dim, self.vocab_size = bits, 2**bits
        self.spherical, self.entropy_temperature = spherical, entropy_temperature
        self.height = bits**-0.5 if spherical else 1.0
        places = torch.arange(bits)
        self.register_buffer("places", places.flip(0) if msb_first else places, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        return ((ids[..., None] >> self.places & 1) * 2 - 1) * self.height

    def codebook(self) -> Tensor:
        return self.embed(torch.arange(self.vocab_size, device=self.places.device))

    def _space(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.spherical else z

    def _assign(self, z: Tensor, noise: Tensor | None) -> Tensor:
        return ((z > 0).long() << self.places).sum(-1)

    def _quantize(self, z: Tensor) -> Quantized:
        z = self._space(z)
        code = torch.where(z > 0, self.height, -self.height).to(z)
        losses = {"commitment": F.mse_loss(z, code)}
        if self.entropy_temperature is not None:
            # 2 z.c / T differs by 4 z_b height / T between the two signs of bit b
            logits = z.reshape(-1, self.dim) * (4 * self.height / self.entropy_temperature)
            losses["entropy_sample"], losses["entropy_codebook"] = sign_entropies(logits)
        return Quantized(straight_through(z, code), self._assign(z, None), losses)
