"""Counter-based noise: every random number is a function of where it is used, not of when it is drawn.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC11), Philox 4x32-10. The four counter
words are (sample number, place in the layout, part, block), the two key words (seed, use). So sample i of a run is the
same whatever the batch size, the order of work, the number of processes or the device.
"""

from dataclasses import dataclass
from math import prod
from zlib import crc32

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of 32 random bits for every counter. Words are int64 tensors in [0, 2^32), broadcast together.

    Products wrap modulo 2^64 in int64, so the upper half is the arithmetic shift, masked.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & WORD ^ c1 ^ k0, p1 & WORD, (p0 >> 32) & WORD ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Noise:
    """The randomness of B samples of one run.

    seed in [0, 2^32); index int64 (B,): the samples' numbers in the run, in [0, 2^32). `use` names what a number is for
    ("token", "accept", "order", ...): numbers of different uses are independent.
    """

    seed: int
    index: Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= WORD:
            raise ValueError(f"Noise: seed is {self.seed}, must be in [0, 2^32)")

    def uniform(self, use: str, place: Tensor, part: int | Tensor = 0, size: tuple[int, ...] = ()) -> Tensor:
        """Numbers of 53 random bits in [0, 1), float64 (B, m, *size).

        place int64 (B, m) or (m,); part: a number, or int64 (B,) or (B, m). Both in [0, 2^32).
        """
        flat = prod(size)
        blocks = (flat + 1) // 2  # a block of four words makes two numbers
        index = self.index[:, None, None]
        place = (place if place.dim() == 2 else place[None])[..., None].expand(len(index), -1, 1)
        if isinstance(part, int):
            part = torch.full((), part, device=place.device)  # filled there: no copy for the device to wait for
        else:
            part = part.reshape(part.shape + (1,) * (3 - part.dim()))
        block = torch.arange(blocks, device=place.device)
        index, place, part, block = torch.broadcast_tensors(index, place, part, block)
        words = philox((index, place, part, block), (self.seed, crc32(use.encode())))
        high, low = torch.stack(words[0::2], -1), torch.stack(words[1::2], -1)  # (B, m, blocks, 2) each
        numbers = ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53
        return numbers.flatten(-2)[..., :flat].reshape(*place.shape[:2], *size)

    def normal(self, use: str, place: Tensor, part: int | Tensor = 0, size: tuple[int, ...] = ()) -> Tensor:
        """Standard normal numbers, float64 (B, m, *size): Box-Muller on two uniforms each."""
        radius, angle = self.uniform(use, place, part, (2, *size)).unbind(2)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * torch.pi * angle)
