"""The order in which samples come, and their batches: every random choice is a function of where it is made.

The order of an epoch is a function of (seed, epoch); crops, flips and choices of a sample are a function of (seed,
epoch, index). So batch k is the same whether the run was resumed at k or not, for any number of workers, and the global
batch is the same for any number of processes. An index is a sample's number in its set.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol

import numpy as np
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from data.errors import DataError

ORDER, CLASS_ORDER, ORDER_IN_CLASS, DRAWS = range(4)  # independent streams of random numbers


class Samples(Protocol):
    """What is loaded: pictures, clips, or cached tokens."""

    labels: np.ndarray  # int64 (N,)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Without randomness: the sample as evaluation sees it."""

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """As training sees it: crops and the like are drawn from `rng`."""


def sample_rng(seed: int = 0, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """What sample `index` draws from in an epoch."""
    return np.random.default_rng((DRAWS, seed, epoch, index))


def batches_per_epoch(samples: int, batch_size: int, world: int = 1) -> int:
    """Whole global batches in so many samples; the rest waits for the next epoch's order. Raises DataError for none."""
    if samples < batch_size * world:
        raise DataError(
            f"{samples} samples do not fill one batch of {batch_size} on each of {world} processes; "
            "give a smaller batch_size, or balanced=True, which repeats samples"
        )
    return samples // (batch_size * world)


def batches(
    dataset: Samples,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    balanced: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Training batches without end: dicts of stacked samples, every field (B, ...).

    batch_size: B, of this process; the global batch is world * B, process `rank` has every world-th of it.
    start_step: batches already taken (resuming). balanced: every class equally often, whatever its size.
    """
    total = batch_size * world
    if balanced:
        order = _balanced_order(dataset.labels, total, seed, start_step)
    else:
        order = _shuffled_order(
            len(dataset), total, batches_per_epoch(len(dataset), batch_size, world), seed, start_step
        )
    return iter(
        DataLoader(
            _Drawn(dataset, seed),
            batch_sampler=(places[rank::world] for places in order),
            num_workers=workers,
            generator=Generator(),  # its own: loading leaves the process's random state alone
        )
    )


def evaluation_batches(
    dataset: Samples, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Every sample with index % world == rank once, in order; the last batch may be smaller, nothing is padded."""
    mine = Subset(dataset, range(rank, len(dataset), world))
    return iter(DataLoader(mine, batch_size=batch_size, num_workers=workers, generator=Generator()))


class _Drawn(Dataset):
    """Samples addressed by (epoch, index)."""

    def __init__(self, dataset: Samples, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        return self.dataset.sample(index, sample_rng(self.seed, epoch, index))


def _shuffled_order(samples: int, total: int, per_epoch: int, seed: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Global batches of (epoch, index): every epoch a new permutation, its remainder dropped."""
    while True:
        epoch, done = divmod(step, per_epoch)
        order = np.random.default_rng((ORDER, seed, epoch)).permutation(samples)
        for place in range(done, per_epoch):
            yield [(epoch, int(index)) for index in order[place * total : (place + 1) * total]]
        step = (epoch + 1) * per_epoch


def _balanced_order(labels: np.ndarray, total: int, seed: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Global batches of (epoch, index): each turn takes one sample of every class, the classes in a new order.

    The epoch counts the passes over the sample's own class, so a sample that comes again is cropped anew.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    passes: list[tuple[int, np.ndarray]] = [(-1, members[0])] * len(members)  # of each class: epoch, its order
    turn_of_order, class_order = -1, np.arange(len(members))
    for batch_number in count(step):
        batch = []
        for number in range(batch_number * total, (batch_number + 1) * total):
            turn, seat = divmod(number, len(members))
            if turn != turn_of_order:
                rng = np.random.default_rng((CLASS_ORDER, seed, turn))
                turn_of_order, class_order = turn, rng.permutation(len(members))
            label = class_order[seat]
            epoch, place = divmod(turn, len(members[label]))
            if passes[label][0] != epoch:
                rng = np.random.default_rng((ORDER_IN_CLASS, seed, epoch, label))
                passes[label] = epoch, rng.permutation(members[label])
            batch.append((epoch, int(passes[label][1][place])))
        yield batch
