"""Dead codes get new vectors from the batch, the same on every process."""

import torch
import torch.distributed as dist
from torch import Tensor


def add_over_processes(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place; x itself where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def revive_dead_codes(share: Tensor, z: Tensor, error: Tensor, threshold: float) -> tuple[Tensor, Tensor] | None:
    """New vectors for the codes that are used less than `threshold` times the share of a uniform use.

    share (V,): running shares of the codes, equal on all processes; z (N, D): encoder vectors of the batch; error (N,):
    their squared distances to their codes. A vector is drawn with a probability that grows with its error, as in
    k-means++ (Arthur & Vassilvitskii 2007), without replacement while there are enough: a plain draw would copy the
    commonest vector (an empty background) again and again. The global torch RNG draws; process 0 decides for all.
    Returns dead, bool (V,), and fresh (V, D), of which the dead rows are meant; None where no code is dead.
    """
    dead = share * len(share) < threshold
    if not dead.any():
        return None
    race = error.clamp_min(torch.finfo(error.dtype).tiny) / torch.empty_like(error).exponential_()
    drawn = race.argsort(descending=True)  # (N,)
    turn = dead.long().cumsum(0) - 1  # (V,) the how manieth dead code this is
    fresh = z[drawn[turn.clamp_min(0) % len(drawn)]].contiguous()
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(fresh, src=0)
    return dead, fresh
