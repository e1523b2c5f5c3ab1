"""Token filters: definitions by hand, the orders of the families, and what holds for every one of them."""

from collections.abc import Callable
from itertools import pairwise
from math import inf, nan

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.record import UnknownName
from sampling.filters import (
    CONVENTIONS,
    Filter,
    epsilon,
    eta,
    min_p,
    temper,
    top_k,
    top_p_ascending,
    top_p_descending,
    typical,
)

Step = Callable[[Tensor, float], Tensor]
NESTED: dict[Step, tuple[float, ...]] = {  # values from the strictest to off
    top_k: (1, 2, 7, 40, 96, 1000, 0),
    top_p_descending: (0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
    top_p_ascending: (0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
    min_p: (1.0, 0.5, 0.1, 0.02, 0.0),
    typical: (0.05, 0.2, 0.5, 0.95, 1.0),
    epsilon: (1.0, 0.3, 0.03, 0.001, 0.0),
    eta: (1.0, 0.3, 0.03, 0.001, 0.0),
}
SINGLE = [(step, value) for step, values in NESTED.items() for value in values]
COMBINED = [
    Filter(0.7, top_k=12, top_p=0.8, min_p=0.02, typical=0.9, epsilon=1e-3, eta=1e-3, convention=convention)
    for convention in CONVENTIONS
]


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    """(4, 3, 97) logits without ties, from flat to sharp."""
    logits = torch.randn(4, 3, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (logits * torch.tensor([0.1, 1.0, 3.0, 30.0], dtype=torch.float64)[:, None, None]).to(dtype)


def law(*probs: float) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def kept(logits: Tensor) -> list[int]:
    """The tokens of one row that are left."""
    return logits.isfinite().nonzero().flatten().tolist()


def test_top_k_keeps_what_ties_with_the_kth() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert [kept(top_k(logits, k)) for k in (1, 2, 3, 4)] == [[1], [1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert kept(top_k(logits, 9)) == kept(top_k(logits, 0)) == [0, 1, 2, 3, 4]


def test_the_two_top_p_rules_differ_only_at_the_threshold() -> None:
    flat = torch.zeros(4)  # sums of 0.25 are exact: the threshold 0.5 is met exactly
    assert kept(top_p_descending(flat, 0.5)) == [0, 1, 2]
    assert kept(top_p_ascending(flat, 0.5)) == [2, 3]
    for top_p in (0.05, 0.3, 0.7, 0.97):
        assert torch.equal(top_p_descending(rows(), top_p), top_p_ascending(rows(), top_p))


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = law(0.1, 0.4, 0.2, 0.3)
    for rule in (top_p_descending, top_p_ascending):
        assert [kept(rule(logits, p)) for p in (0.0, 0.39, 0.41, 0.71, 0.91)] == [
            [1],
            [1],
            [1, 3],
            [1, 2, 3],
            [0, 1, 2, 3],
        ]


def test_min_p_and_epsilon_keep_what_is_likely_enough() -> None:
    logits = law(0.5, 0.26, 0.2, 0.04)
    assert [kept(min_p(logits, share)) for share in (1.0, 0.5, 0.1, 0.05)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [kept(epsilon(logits, floor)) for floor in (0.9, 0.25, 0.1, 0.03)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_eta_lowers_its_floor_where_the_row_is_flat() -> None:
    flat = torch.zeros(1000)  # sqrt(0.09) exp(-H) = 0.3 / 1000 is below the 1 / 1000 of every token
    assert len(kept(eta(flat, 0.09))) == 1000 and len(kept(epsilon(flat + torch.arange(1000) * 1e-6, 0.09))) == 1
    assert kept(eta(law(0.9, 0.05, 0.05), 0.09)) == kept(epsilon(law(0.9, 0.05, 0.05), 0.09)) == [0]


def test_typical_may_drop_the_most_probable_token() -> None:
    logits = law(0.4, *[0.05] * 12)  # H = 2.16 nats: 1.25 from the first token's surprisal, 0.83 from the others'
    assert kept(typical(logits, 0.3)) == list(range(1, 13))  # six would reach 0.3; the other six are as close
    assert kept(typical(logits, 0.7)) == list(range(13))


def test_the_order_of_operations_is_the_convention() -> None:
    logits = law(0.4, 0.3, 0.2, 0.1)
    settings = {"top_k": 2, "top_p": 0.5}  # of the two that top-k leaves, the first has 0.57; of all four, 0.4
    left = {convention: kept(Filter(**settings, convention=convention)(logits)) for convention in CONVENTIONS}
    assert left == {"llamagen": [0], "var": [0], "lantern": [0, 1], "transformers": [0]}


def test_temperature_comes_before_top_p() -> None:
    logits = law(0.5, 0.3, 0.2)
    for convention in CONVENTIONS:
        assert kept(Filter(temperature=0.3, top_p=0.6, convention=convention)(logits)) == [0]
        assert kept(Filter(temperature=3.0, top_p=0.6, convention=convention)(logits)) == [0, 1]


def test_top_p_of_zero_is_off_where_the_family_says_so() -> None:
    count = {name: int(Filter(top_p=0.0, convention=name)(rows()[0, 0]).isfinite().sum()) for name in CONVENTIONS}
    assert count == {"llamagen": 1, "var": 97, "lantern": 97, "transformers": 1}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_off_is_the_law_itself(convention: str) -> None:
    assert torch.equal(Filter(convention=convention)(rows()), rows())


def test_temperature_divides_and_zero_is_nearly_greedy() -> None:
    assert_close(Filter(temperature=2.0).probs(rows()), (rows() / 2).softmax(-1))
    greedy = torch.nn.functional.one_hot(rows().argmax(-1), 97).double()
    assert_close(Filter(temperature=0.0).probs(rows()), greedy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("step", "value"), SINGLE)
def test_a_filter_drops_and_changes_nothing_else(step: Step, value: float, dtype: torch.dtype) -> None:
    logits = rows(dtype)
    out = step(logits, value)
    assert torch.equal(logits, rows(dtype))  # not in place
    assert out.dtype == dtype and out.shape == logits.shape
    assert torch.equal(out, torch.where(out == -inf, -inf, logits))
    assert bool(out.isfinite().any(-1).all())


@pytest.mark.parametrize("step", NESTED)
def test_a_looser_value_keeps_a_superset(step: Step) -> None:
    sets = [step(rows(), value).isfinite() for value in NESTED[step]]
    assert all(bool((looser | ~stricter).all()) for stricter, looser in pairwise(sets))
    assert bool(sets[-1].all()) and not bool(sets[0].all())


@pytest.mark.parametrize("filtering", COMBINED, ids=lambda f: f.convention)
def test_probabilities_sum_to_one_over_the_kept(filtering: Filter) -> None:
    probs, logits = filtering.probs(rows()), filtering(rows())
    assert_close(probs.sum(-1), torch.ones(4, 3, dtype=torch.float64))
    assert torch.equal(probs > 0, logits.isfinite())


@pytest.mark.parametrize("filtering", COMBINED, ids=lambda f: f.convention)
def test_names_of_tokens_do_not_matter(filtering: Filter) -> None:
    shuffle = torch.randperm(97, generator=torch.Generator().manual_seed(1))
    assert_close(filtering(rows()[..., shuffle]), filtering(rows())[..., shuffle])


@pytest.mark.parametrize("filtering", COMBINED, ids=lambda f: f.convention)
def test_a_row_does_not_know_its_batch(filtering: Filter) -> None:
    alone = torch.stack([filtering(row[None])[0] for row in rows().flatten(0, 1)]).unflatten(0, (4, 3))
    assert torch.equal(filtering(rows()), alone)


@pytest.mark.parametrize(("step", "value"), SINGLE)
def test_tokens_forbidden_before_stay_forbidden(step: Step, value: float) -> None:
    forbidden = torch.arange(97) % 3 > 0
    logits = rows().masked_fill(forbidden, -inf)
    out = step(logits, value)
    assert bool((out[..., forbidden] == -inf).all()) and bool(out.isfinite().any(-1).all())
    assert torch.equal(out[..., ~forbidden], step(rows()[..., ~forbidden], value))  # as if they did not exist


@pytest.mark.parametrize(("step", "value"), [*SINGLE, (temper, 0.5)])
def test_the_host_never_asks_for_contents(step: Step, value: float) -> None:
    """A meta tensor has no contents: reading one raises. The same question would be a wait for the device on a GPU."""
    assert step(torch.empty(2, 97, device="meta"), value).shape == (2, 97)


@pytest.mark.parametrize(
    ("setting", "value", "interval"),
    [
        ("temperature", -0.1, "[0, inf)"),
        ("temperature", inf, "[0, inf)"),
        ("top_k", -1, "{0, 1, 2, ...}"),
        ("top_k", 1.5, "{0, 1, 2, ...}"),
        ("top_p", 1.01, "[0, 1]"),
        ("top_p", nan, "[0, 1]"),
        ("min_p", -0.1, "[0, 1]"),
        ("typical", 0.0, "(0, 1]"),
        ("epsilon", 2.0, "[0, 1]"),
        ("eta", -1.0, "[0, 1]"),
    ],
)
def test_bad_values_are_named_with_their_range(setting: str, value: float, interval: str) -> None:
    with pytest.raises(ValueError) as error:
        Filter(**{setting: value})
    assert str(error.value) == f"{setting} is {value}, must be in {interval}"
    for steps in CONVENTIONS.values():
        with pytest.raises(ValueError, match=f"{setting} is"):
            dict(steps)[setting](rows(), value)


def test_an_unknown_convention_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match="did you mean 'llamagen'"):
        Filter(convention="llama_gen")
