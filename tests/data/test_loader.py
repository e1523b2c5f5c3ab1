"""The order of samples: a function of the seed, not of workers, resuming or processes."""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import batches, batches_per_epoch, evaluation_batches
from data.sets import PictureSet, open_set


class Numbers:
    """Samples that tell what they drew: N of them, classes of given sizes."""

    def __init__(self, *sizes: int) -> None:
        self.labels = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "label": int(self.labels[index]), "drawn": -1.0}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"index": index, "label": int(self.labels[index]), "drawn": rng.random()}


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def emoji() -> PictureSet:
    return open_set("emoji32", split="val", size=24, transform="random", flip=True)


@pytest.mark.parametrize("balanced", [False, True])
def test_workers_and_resuming_change_nothing(emoji: PictureSet, balanced: bool) -> None:
    whole = list(islice(batches(emoji, 40, seed=5, balanced=balanced), 10))  # 4 batches an epoch
    assert same(whole, list(islice(batches(emoji, 40, seed=5, balanced=balanced, workers=2), 10)))
    for start in (1, 4, 7):
        resumed = batches(emoji, 40, seed=5, start_step=start, balanced=balanced, workers=start % 2)
        assert same(whole[start:], list(islice(resumed, 10 - start)))
    assert not same(whole, list(islice(batches(emoji, 40, seed=6, balanced=balanced), 10)))


@pytest.mark.parametrize("balanced", [False, True])
def test_processes_share_the_global_batch(balanced: bool) -> None:
    numbers = Numbers(30, 7, 11)
    alone = islice(batches(numbers, 12, seed=0, balanced=balanced), 9)
    shares = [batches(numbers, 4, seed=0, rank=rank, world=3, balanced=balanced) for rank in range(3)]
    for batch in alone:
        parts = [next(share) for share in shares]
        for key, whole in batch.items():
            assert torch.equal(torch.stack([part[key] for part in parts], 1).flatten(), whole)


def test_an_epoch_is_a_permutation_and_what_is_drawn_changes_with_it() -> None:
    numbers = Numbers(10, 14)
    stream = batches(numbers, 8, seed=1)
    epochs = [list(islice(stream, 3)) for _ in range(2)]
    orders = [torch.cat([batch["index"] for batch in epoch]).tolist() for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24)) and orders[0] != orders[1]
    drawn = torch.cat([batch["drawn"] for epoch in epochs for batch in epoch])
    assert len(drawn.unique()) == 48


def test_the_remainder_of_an_epoch_is_dropped_and_too_small_a_set_refused() -> None:
    assert batches_per_epoch(26, 4, world=3) == 2
    indices = torch.cat([batch["index"] for batch in islice(batches(Numbers(26), 12, seed=0), 2)])
    assert len(indices.unique()) == 24
    with pytest.raises(DataError, match="5 samples do not fill one batch of 3 on each of 2 processes"):
        batches(Numbers(5), 3, seed=0, world=2)


def test_balanced_sampling_shows_every_class_equally_and_every_sample_of_a_class_equally() -> None:
    numbers = Numbers(2, 20, 0, 5)  # the third class is empty
    seen = list(islice(batches(numbers, 6, seed=3, balanced=True), 40))  # 80 turns of 3 classes
    for batch in seen:
        assert Counter(batch["label"].tolist()) == {0: 2, 1: 2, 3: 2}
    counts = Counter(torch.cat([batch["index"] for batch in seen]).tolist())
    assert [counts[i] for i in range(27)] == [40] * 2 + [4] * 20 + [16] * 5
    assert len(torch.cat([batch["drawn"] for batch in seen]).unique()) == 240  # a repeated sample is drawn anew


def test_evaluation_takes_every_sample_once_in_order_without_padding() -> None:
    numbers = Numbers(23)
    for world in (1, 2, 5, 30):
        shares = [list(evaluation_batches(numbers, 4, rank, world, workers=world % 2)) for rank in range(min(world, 5))]
        for rank, share in enumerate(shares):
            indices = [index for batch in share for index in batch["index"].tolist()]
            assert indices == list(range(rank, 23, world))
            assert all((batch["drawn"] == -1).all() for batch in share)


def test_loading_leaves_the_random_state_of_the_process_alone() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(batches(Numbers(20), 4, seed=0))
    next(evaluation_batches(Numbers(20), 4))
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)
