"""How much of a codebook is used. Counts add up over batches and processes; the numbers are made of counts."""

import torch
from torch import Tensor


def code_counts(ids: Tensor, vocab_size: int) -> Tensor:
    """ids int64, any shape, in [0, V) -> how often each code occurs, int64 (V,)."""
    flat = ids.reshape(-1)
    return torch.zeros(vocab_size, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def usage_metrics(counts: Tensor) -> dict[str, Tensor]:
    """counts (V,), not all zero -> scalars: with p the shares of the codes and H their entropy in nats,

    usage: the part of the codes that occur, in (0, 1]; perplexity: exp H, in [1, V]; kl_uniform: log V - H.
    """
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum()
    metrics = {
        "usage": (counts > 0).double().mean(),
        "perplexity": entropy.exp(),
        "kl_uniform": torch.tensor(len(counts), device=counts.device).double().log() - entropy,
    }
    return {name: value.float() for name, value in metrics.items()}
