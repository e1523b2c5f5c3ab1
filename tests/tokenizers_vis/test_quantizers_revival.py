"""Dead codes: who is dead, what they become, that usage rises, and that all processes agree."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from tokenizers_vis.quantizers import EMAVectorQuantizer, Quantizer, VectorQuantizer
from tokenizers_vis.quantizers.revival import revive_dead_codes
from tokenizers_vis.quantizers.usage import code_counts, usage_metrics


def test_codes_below_the_threshold_become_distinct_vectors_of_the_batch() -> None:
    share = torch.tensor([0.5, 0.02, 0.02, 0.46])  # of a uniform use: 2, 0.08, 0.08, 1.84
    z = torch.arange(10.0)[:, None] * torch.ones(1, 2)
    dead, fresh = revive_dead_codes(share, z, torch.ones(10), threshold=0.1)
    assert dead.tolist() == [False, True, True, False]
    first, second = fresh[dead]
    assert (z == first).all(-1).any()
    assert (z == second).all(-1).any()
    assert not torch.equal(first, second)
    assert revive_dead_codes(share, z, torch.ones(10), threshold=0.05) is None


def test_badly_coded_vectors_are_preferred_and_few_vectors_repeat() -> None:
    share = torch.tensor([1.0, 0.0, 0.0, 0.0])
    z = torch.arange(6.0)[:, None]
    error = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 2.0])
    dead, fresh = revive_dead_codes(share, z, error, threshold=0.5)
    assert set(fresh[dead].flatten().tolist()) > {3.0, 5.0}
    dead, fresh = revive_dead_codes(share, z[:2], error[:2], threshold=0.5)
    assert set(fresh[dead].flatten().tolist()) == {0.0, 1.0}


def clusters(batch: int) -> Tensor:
    """Half of all vectors in one place, the others spread evenly over 31 more."""
    generator = torch.Generator().manual_seed(batch)
    centres = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    places = torch.randint(0, 32, (400,), generator=generator) * (torch.rand(400, generator=generator) < 0.5)
    return centres[places] + 0.01 * torch.randn(400, 4, generator=generator)


def used_after(quantizer: Quantizer, batches: int) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    for batch in range(batches):
        quantizer(clusters(batch))
    ids = quantizer.eval().assign(torch.cat([clusters(batch) for batch in range(1000, 1010)]))
    return usage_metrics(code_counts(ids, quantizer.vocab_size))["usage"].item(), quantizer.codebook().detach()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("made", [VectorQuantizer, EMAVectorQuantizer])
def test_revival_raises_usage_and_repeats_under_the_same_seed(
    made: type[VectorQuantizer] | type[EMAVectorQuantizer], normalize: bool
) -> None:
    decay = {"usage_decay": 0.9} if made is VectorQuantizer else {"decay": 0.9}

    def make(revive_below: float) -> Quantizer:
        torch.manual_seed(1)
        quantizer = made(32, 4, normalize=normalize, revive_below=revive_below, **decay)
        for rows in (value for name, value in quantizer.state_dict().items() if name in ("rows", "sums")):
            rows[1:] = rows[:1].clone()  # collapsed: the first of equals takes all
        return quantizer

    collapsed, _ = used_after(make(0.0), 60)
    used, rows = used_after(make(0.2), 60)
    _, again = used_after(make(0.2), 60)
    assert collapsed <= 10 / 32
    assert used >= 30 / 32
    assert torch.equal(rows, again)


def test_without_revival_nothing_is_kept() -> None:
    assert VectorQuantizer(8, 2).state_dict().keys() == {"rows"}
    assert VectorQuantizer(8, 2, revive_below=0.1).state_dict().keys() == {"rows", "share"}


def four_quantisers() -> list[Quantizer]:
    torch.manual_seed(0)
    return [
        made
        for below in (0.0, 0.2)
        for made in (
            EMAVectorQuantizer(32, 4, decay=0.9, revive_below=below),
            VectorQuantizer(32, 4, usage_decay=0.9, revive_below=below),
        )
    ]


def on_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    quantizers = four_quantisers()
    torch.manual_seed(rank)  # what a process draws is its own
    for batch in range(30):
        for quantizer in quantizers:
            quantizer(clusters(batch)[rank::2])
    torch.save([quantizer.state_dict() for quantizer in quantizers], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_keep_one_codebook(tmp_path: Path) -> None:
    mp.spawn(on_one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    starts = [quantizer.state_dict() for quantizer in four_quantisers()]
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    moved = [not torch.equal(end["rows"], start["rows"]) for end, start in zip(first, starts, strict=True)]
    assert moved == [True, False, True, True]  # the second moves by gradient alone
    alone = four_quantisers()[0]  # nothing is drawn: the same as one process with the whole batch
    for batch in range(30):
        alone(clusters(batch))
    assert_close(first[0], dict(alone.state_dict()))
