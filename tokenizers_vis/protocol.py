"""What a tokenizer is asked: pixels to tokens and back."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from layers.spec import Condition, TokenSpec


class Tokenizer(nn.Module, ABC):
    """Pixels <-> tokens. Images float (B, 3, H, W) in [-1, 1] (video (B, 3, T, H, W)); tokens as `spec` says.

    spec: what the tokens are. prefixes: the numbers of leading tokens that `decode` accepts; a plain grid: (L,).
    """

    spec: TokenSpec
    prefixes: tuple[int, ...]

    @property
    def last_layer(self) -> Tensor | None:
        """The weight at which an adaptive adversarial loss compares gradients (the decoder's last); None: none such."""
        return None

    @abstractmethod
    def encode(self, images: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """-> tokens (B, L). noise None: deterministic (argmax code, posterior mode)."""

    @abstractmethod
    def decode(
        self,
        tokens: Tensor,
        *,
        present: Tensor | None = None,
        condition: Condition | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, n), n one of `prefixes` -> images, unclamped. Raises ValueError for another n."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Training: reconstruction, and the family's own unweighted loss terms by name (scalars with gradient),
        beside what logs need ("ids" int64 (B, L) where there is a codebook)."""
