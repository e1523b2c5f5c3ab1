"""How much of a codebook is in use, over a whole evaluation set."""

import torch
from torch import Tensor


class CodebookUsage:
    """Counts of codes, gathered batch by batch: counts int64 (V,)."""

    def __init__(self, vocab_size: int) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64)

    def update(self, tokens: Tensor) -> None:
        """tokens int64, any shape. Raises ValueError for a code outside [0, V), naming it."""
        codes = tokens.detach().flatten().cpu()
        size = len(self.counts)
        outside = codes[(codes < 0) | (codes >= size)]
        if len(outside):
            raise ValueError(f"CodebookUsage: code {int(outside[0])} is outside a codebook of {size}")
        self.counts += codes.bincount(minlength=size)

    def usage(self) -> float:
        """The share of codes that occur at least once, in [0, 1]."""
        return float((self.counts > 0).double().mean())

    def entropy(self, inside: float = 0.0) -> float:
        """Of the code frequencies, in nats, at most log V. Raises ValueError before the first code.

        inside: a constant added inside the logarithm, -sum p log(p + inside); published code has 1e-8.
        """
        if not self.counts.any():
            raise ValueError("CodebookUsage: no codes yet, so no frequencies")
        share = self.counts.double() / self.counts.sum()
        return float(-torch.special.xlogy(share, share + inside).sum())

    def perplexity(self) -> float:
        """exp of the entropy: the number of codes that would be in use were all equally frequent, at most V."""
        return float(torch.tensor(self.entropy(), dtype=torch.float64).exp())
