"""Noise: known answers, the law of its numbers, and that a number depends on where it is used and on nothing else.

Every statistical test has a fixed seed; true random numbers would fail it with the probability stated beside it.
"""

import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor
from torch.testing import assert_close

from layers.noise import Noise, philox

ERROR_RATE = 1e-4
SAMPLES = 1000


def chi_square_p(cells: Tensor, count: int) -> float:
    """p-value of cell numbers in [0, count) being uniform."""
    expected = cells.numel() / count
    observed = torch.bincount(cells.flatten(), minlength=count).double()
    return float(chi2.sf(((observed - expected).square() / expected).sum().item(), count - 1))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    words = tuple(torch.tensor(int(word, 16)) for word in counter.split())
    first, second = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(words, (first, second))] == answer.split()


def test_philox_is_elementwise() -> None:
    counters = torch.randint(2**32, (4, 50), generator=torch.Generator().manual_seed(0))
    together = torch.stack(philox(tuple(counters), (1, 2)))
    alone = [torch.stack(philox(tuple(counters[:, i]), (1, 2))) for i in range(50)]
    assert torch.equal(together, torch.stack(alone, dim=1))


def test_a_number_is_the_philox_word_of_its_place() -> None:
    """The counter is (sample, place, part, block), the key (seed, CRC-32 of the use); 53 bits of a pair of words."""
    noise = Noise(5, torch.tensor([7, 9]))
    numbers = noise.uniform("token", torch.tensor([3, 4]), part=2, size=(4,))
    words = philox(tuple(torch.tensor(word) for word in (9, 4, 2, 1)), (5, 0x5F37A13B))  # CRC-32 of b"token"
    pairs = [(int(words[0]), int(words[1])), (int(words[2]), int(words[3]))]
    expected = [((high >> 5) * 2**26 + (low >> 6)) / 2**53 for high, low in pairs]
    assert numbers[1, 1, 2:].tolist() == expected


@pytest.mark.parametrize("varied", ["sample", "place", "part", "block", "seed"])
def test_uniform_numbers_along_every_counter(varied: str) -> None:
    """Chi-square on 256 cells, on 256 cells of the low bits, on 16 x 16 cells of neighbours, and Kolmogorov-Smirnov.

    20 tests in all, of 200,000 numbers each (2,560 of the seeds); true uniforms would fail each with probability 1e-4.
    """
    many, few = torch.arange(200_000), torch.tensor([5])
    match varied:
        case "sample":
            numbers = Noise(1, many).uniform("token", few)
        case "place":
            numbers = Noise(1, few).uniform("token", many)
        case "part":
            numbers = Noise(1, few).uniform("token", few.expand(200_000), many[None])
        case "block":
            numbers = Noise(1, few).uniform("token", few, size=(200_000,))
        case _:
            numbers = torch.cat([Noise(seed, few).uniform("token", few) for seed in range(2_560)])
    numbers = numbers.flatten()
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert chi_square_p((numbers * 256).long(), 256) > ERROR_RATE
    assert chi_square_p((numbers * 2**53).long() % 256, 256) > ERROR_RATE
    cells = (numbers * 16).long()
    assert chi_square_p(cells[0::2] * 16 + cells[1::2], 256) > ERROR_RATE
    assert kstest(numbers.numpy(), "uniform").pvalue > ERROR_RATE


def test_uses_are_independent() -> None:
    """Pairs of the same place for two uses fill 16 x 16 cells evenly (error rate 1e-4, 200,000 pairs)."""
    noise, place = Noise(1, torch.tensor([0])), torch.arange(200_000)
    token, accept = ((noise.uniform(use, place) * 16).long() for use in ("token", "accept"))
    assert chi_square_p(token * 16 + accept, 256) > ERROR_RATE


def test_normal_numbers_follow_their_law() -> None:
    """Kolmogorov-Smirnov, and the first four moments within 3.9 standard errors: error rate 1e-4 each, 200,000 numbers."""
    numbers = Noise(2, torch.arange(SAMPLES)).normal("latent", torch.arange(50), size=(2, 2))
    assert numbers.shape == (SAMPLES, 50, 2, 2)
    assert numbers.isfinite().all()
    assert kstest(numbers.flatten().numpy(), "norm").pvalue > ERROR_RATE
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = 3.9 * (variance / numbers.numel()) ** 0.5
        assert_close(numbers.pow(power).mean().item(), float(moment), atol=error, rtol=0)
    latent = numbers.reshape(-1, 4)
    correlation = torch.corrcoef(latent.T) - torch.eye(4)
    assert correlation.abs().max() < 4.3 / len(latent) ** 0.5  # 6 pairs: error rate 1e-4


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    place = torch.arange(12).reshape(1, 12)
    whole = getattr(Noise(3, torch.arange(10)), kind)("token", place, size=(3,))
    for rows in ([3, 7], [7, 3], [9], list(range(10))):
        some = getattr(Noise(3, torch.tensor(rows)), kind)("token", place, size=(3,))
        assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_place_does_not_depend_on_what_is_asked_with_it(kind: str) -> None:
    """Places in common, a row's own places, and places in another order name the same numbers; so do the forms of part."""
    noise = Noise(3, torch.arange(4))
    draw = getattr(noise, kind)
    whole = draw("token", torch.arange(20), size=(3,))
    places = torch.tensor([[0, 5], [19, 2], [3, 3], [7, 8]])
    assert torch.equal(draw("token", places, size=(3,)), whole[torch.arange(4)[:, None], places])

    parts = torch.stack([draw("token", torch.arange(5), part) for part in range(6)])  # (part, B, m)
    row_parts = torch.tensor([5, 0, 2, 2])
    assert torch.equal(draw("token", torch.arange(5), row_parts), parts[row_parts, torch.arange(4)])
    cell_parts = torch.arange(20).reshape(4, 5) % 6
    expected = parts[cell_parts, torch.arange(4)[:, None], torch.arange(5)]
    assert torch.equal(draw("token", torch.arange(5), cell_parts), expected)
    assert torch.equal(draw("token", torch.arange(5), torch.tensor(4)), parts[4])


def test_every_word_of_the_address_matters() -> None:
    """All numbers of 4 seeds, 3 uses, 5 samples, 6 places, 3 parts and 4 blocks differ."""
    numbers = torch.cat(
        [
            Noise(seed, torch.arange(5)).uniform(use, torch.arange(6), part, (8,)).flatten()
            for seed in (0, 1, 2, 2**32 - 1)
            for use in ("token", "accept", "order")
            for part in range(3)
        ]
    )
    assert len(numbers) == 4 * 3 * 5 * 6 * 3 * 8
    assert len(numbers.unique()) == len(numbers)


def test_the_largest_addresses_are_served() -> None:
    noise = Noise(2**32 - 1, torch.tensor([2**32 - 1, 0]))
    numbers = noise.uniform("token", torch.tensor([2**32 - 1, 0]), part=2**32 - 1)
    assert len(numbers.unique()) == 4


def test_asking_changes_nothing() -> None:
    noise = Noise(1, torch.arange(2))
    first = noise.uniform("token", torch.arange(3))
    state = torch.get_rng_state()
    noise.normal("order", torch.arange(50))
    assert torch.equal(noise.uniform("token", torch.arange(3)), first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed is {seed}, must be in \[0, 2\^32\)"):
        Noise(seed, torch.arange(2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_bits_are_the_same_on_a_gpu() -> None:
    here, there = (
        Noise(1, torch.arange(100, device=device)).uniform("token", torch.arange(256, device=device), 3, (5,))
        for device in ("cpu", "cuda")
    )
    assert torch.equal(here, there.cpu())
