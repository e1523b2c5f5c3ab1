"""Categorical head: one linear read-out over the vocabulary.

Letters: R branches of guidance, B samples, m positions, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.protocol import Draw, Head
from layers.spec import TokenSpec


class Categorical(Head):
    """z (..., D) -> a law over V tokens. The read-out starts at zero, so that an untrained model is uniform.

    Raises ValueError for a spec of continuous tokens.
    """

    def __init__(self, width: int, spec: TokenSpec, bias: bool = False) -> None:
        super().__init__()
        if spec.vocab_size is None:
            raise ValueError(
                f"{type(self).__name__} needs discrete tokens, the tokenizer makes continuous ones: {spec}"
            )
        self.readout = nn.Linear(width, spec.vocab_size, bias=bias)
        nn.init.zeros_(self.readout.weight)
        if bias:
            nn.init.zeros_(self.readout.bias)

    def logits(self, z: Tensor) -> Tensor:
        """z (..., D) -> (..., V), float32 at least."""
        logits = self.readout(z)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_prob(self, z: Tensor, target: Tensor) -> Tensor:
        """z (..., D), target (...) -> (...) nats."""
        return self.logits(z).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats, (B, L)."""
        return F.cross_entropy(self.logits(z).movedim(-1, 1), target, reduction="none")

    def sample(self, z: Tensor, draw: Draw) -> Tensor:
        return draw.token(self.logits(z))
