"""Entropy terms: each vector sure of its code, the batch spread over all codes.

Source: Yu et al. 2023, MAGVIT-v2 (arXiv:2310.05737, sec. 3.1). With p_n = softmax(logits_n / T) over V codes:
  sample = mean_n H(p_n), codebook = H(mean_n p_n); a training objective adds w1 * sample - w2 * codebook.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ELEMENTS = 2**24  # logits held at a time
EPS = 1e-5  # inside the logarithm of the mean law


def codebook_entropy(mean_law: Tensor) -> Tensor:
    """mean_law: the law of V codes, in any shape -> its entropy in nats, scalar."""
    return -(mean_law * (mean_law + EPS).log()).sum()


def softmax_entropies(
    z: Tensor, vocab_size: int, logits: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """z (N, D), logits: (n, D) -> (n, V). Returns sample and codebook entropy, scalars with gradient.

    No more than ELEMENTS logits live at a time: the rows are taken in parts, recomputed on the way back.
    """

    def part_sums(part: Tensor) -> tuple[Tensor, Tensor]:
        log_law = (logits(part) / temperature).log_softmax(-1)  # (n, V)
        law = log_law.exp()
        return -(law * log_law).sum(), law.sum(0)

    sample, law = z.new_zeros(()), z.new_zeros(vocab_size)
    for part in z.split(max(1, ELEMENTS // vocab_size)):
        part_sample, part_law = checkpoint(part_sums, part, use_reentrant=False, preserve_rng_state=False)
        sample, law = sample + part_sample, law + part_law
    return sample / len(z), codebook_entropy(law / len(z))


def sign_entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same two entropies over all 2^D sign patterns, exactly, without an (N, 2^D) tensor.

    logits (N, D): of the D independent signs being +1. A softmax over sums of per-bit terms is a product of Bernoulli
    laws: H(p_n) is a sum over bits, and p_n the outer product of the laws of the upper and the lower half of the bits,
    so that the mean over n is one matrix product (2^(D/2), N) x (N, 2^(D/2)).
    """
    plus, minus = logits.sigmoid(), (-logits).sigmoid()
    log_plus, log_minus = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    sample = -(plus * log_plus + minus * log_minus).sum(-1).mean()
    both = torch.stack((minus, plus), -1)  # (N, D, 2)
    middle = both.shape[1] // 2
    lower, upper = _outer(both[:, :middle]), _outer(both[:, middle:])
    return sample, codebook_entropy(lower.t() @ upper / len(logits))


def _outer(laws: Tensor) -> Tensor:
    """laws (N, d, 2) of d independent bits -> their joint law (N, 2^d)."""
    joint = laws.new_ones(len(laws), 1)
    for law in laws.unbind(1):
        joint = (joint[:, :, None] * law[:, None]).flatten(1)
    return joint
