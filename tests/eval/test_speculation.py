"""Numbers of a comparison of decoding methods, against closed forms and planted values."""

import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from eval.efficiency import Machine, peak_tensor_bytes
from eval.report import Report
from eval.speculation import (
    CallCost,
    ChiSquare,
    ImageRecord,
    MethodFacts,
    Quality,
    SweepPoint,
    acceptance,
    call_costs,
    chi_square,
    expected_tokens,
    overhead,
    read_records,
    summary,
    tail_mean,
    theory,
    write_records,
)
from eval.speculation_page import Comparison, comparison_page, speed_table

COST = CallCost({4: {1: 0.010, 4: 0.016, 8: 0.024}, 8: {1: 0.012, 4: 0.018, 8: 0.026}})


def record(image: int, seconds: float, committed: tuple[int, ...], **more: Any) -> ImageRecord:
    """Of 8 tokens; drafts of two places in every round but the first `undrafted`."""
    given = {
        "method": "m",
        "image": image,
        "seed": 0,
        "condition": image % 3,
        "tokens": tuple(range(8)),
        "calls": len(committed),
        "positions": (3,) * len(committed),
        "drafter_calls": 0,
        "committed": committed,
        "undrafted": 0,
        "tested": (len(committed), 2),
        "accepted": (2, 1),
        "seconds": seconds,
        "processor": seconds / 2,
    }
    return ImageRecord(**{**given, **more})


# ---- counts and theory


@pytest.mark.parametrize(("alpha", "n"), [(0.0, 4), (0.4, 2), (0.7, 4), (0.9, 8), (1.0, 5)])
def test_equal_acceptance_brings_the_geometric_sum(alpha: float, n: int) -> None:
    wanted = n + 1 if alpha == 1 else (1 - alpha ** (n + 1)) / (1 - alpha)
    assert expected_tokens([alpha] * n) == pytest.approx(wanted, rel=1e-12)
    assert theory([alpha] * n, n, 0.25) == pytest.approx(wanted / (n * 0.25 + 1), rel=1e-12)
    assert theory([alpha] * n, n, 0.25, 3.0) == pytest.approx(wanted / (n * 0.25 + 3), rel=1e-12)


def test_expected_tokens_is_the_mean_of_simulated_rounds() -> None:
    alpha = np.array([0.8, 0.5, 0.3])
    passed = np.random.default_rng(0).random((200_000, 3)) < alpha
    rounds = 1 + passed.cumprod(1).sum(1)
    tested = np.concatenate((np.ones((200_000, 1)), passed.cumprod(1)[:, :2]), axis=1).sum(0)
    measured = acceptance(tested.tolist(), passed.cumprod(1).sum(0).tolist())
    assert measured == pytest.approx(alpha, abs=0.01)
    assert expected_tokens(measured) == pytest.approx(rounds.mean(), rel=1e-9)  # an identity of counts


def test_a_place_that_was_never_tested_adds_nothing() -> None:
    assert math.isnan(acceptance([5, 0], [0, 0])[1])
    assert expected_tokens(acceptance([5, 0], [0, 0])) == 1.0


def test_a_summary_counts_both_conventions_of_tau() -> None:
    records = [record(0, 1.0, (1, 3, 2, 2), undrafted=1), record(1, 3.0, (1, 1, 3, 3), undrafted=1)]
    plain = [record(i, 4.0, (1,) * 8, tested=(), accepted=()) for i in range(2)]
    found = summary(records, plain)
    assert found.calls == 4 and found.fewer_calls == 2 and found.compression == 2
    assert found.tau == pytest.approx(14 / 6) and found.tau_drafts == pytest.approx(6 / 6)
    assert found.alpha == (4 / 8, 2 / 4)
    assert found.rounds == {4: 2} and found.latency == 2.0 and found.speedup.value == 2.0
    assert summary(plain, plain).speedup == replace(found.speedup, value=1.0, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="the same images"):
        summary(records, plain[:1])


def test_the_tail_is_the_slowest_twentieth() -> None:
    assert tail_mean(range(1, 101)) == 98.0  # of 96 to 100
    assert tail_mean([3.0, 1.0]) == 3.0


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    records = [record(i, 0.1 * i, (2, 3, 3)) for i in range(3)]
    write_records(tmp_path / "images.jsonl", records, {"commit": "abc"})
    assert read_records(tmp_path / "images.jsonl") == ({"commit": "abc"}, records)
    assert len((tmp_path / "images.jsonl").read_text().splitlines()) == 4


# ---- costs


def test_costs_lie_between_those_that_were_measured() -> None:
    assert COST.at(1) == pytest.approx(0.011) and COST.at(4) == pytest.approx(0.017)
    assert COST.at(2) == pytest.approx(0.013)  # a third of the way from 1 to 4
    assert COST.at(16) == pytest.approx(0.050)  # twice that of 8
    assert COST.relative(8) == pytest.approx(25 / 11)


def test_overhead_is_what_no_network_takes() -> None:
    planted, step = 0.002, 0.003
    records = [
        record(i, calls * (COST.at(3) + planted) + 5 * step, (2,) * calls, drafter_calls=5)
        for i, calls in enumerate((3, 4, 7))
    ]
    assert overhead(records, COST, step) == pytest.approx(planted, rel=1e-9)


def test_calls_are_timed_in_turn() -> None:
    order: list[tuple[int, int]] = []
    ticks = count()
    machine = Machine(clock=lambda: float(next(ticks) ** 2))
    keys = [(1, 1), (1, 4), (2, 1)]
    found = call_costs({key: lambda key=key: order.append(key) for key in keys}, "cpu", 3, machine)
    assert order == keys * 4  # once to warm up
    starts = [[3 + turn * 6 + 2 * place for turn in range(3)] for place in range(3)]
    wanted = [min(2 * start + 1 for start in its) for its in starts]  # (t + 1)^2 - t^2, warm-up: one tick
    assert [found.seconds[1][1], found.seconds[1][4], found.seconds[2][1]] == wanted


def test_peak_memory_is_that_of_tensors_alive_together() -> None:
    mib = 2**18  # float32 numbers

    def work() -> None:
        a = torch.zeros(2 * mib)
        b = a + 1
        del a
        c = b[:mib] * 2
        del b, c

    assert 4 * 2**20 <= peak_tensor_bytes(work, "cpu") < 4.1 * 2**20


# ---- the chi-square test


def test_chi_square_has_its_error_rate() -> None:
    """400 sets of draws of the law: p below 0.05 in 0.05 of them; 33 or more come by chance once in 1,000 (binomial)."""
    rng = np.random.default_rng(1)
    law = rng.dirichlet(np.full(81, 0.3))
    small = [chi_square(rng.multinomial(2000, law), law).p_value < 0.05 for _ in range(400)]
    assert sum(small) < stats.binom.isf(0.001, 400, 0.05) + 1


def test_chi_square_is_pearsons_where_no_cell_is_small() -> None:
    law, seen = np.array([0.2, 0.3, 0.5]), np.array([25, 30, 45])
    wanted = stats.chisquare(seen, 100 * law)
    found = chi_square(seen, law)
    assert found == ChiSquare(pytest.approx(wanted.statistic), 2, pytest.approx(wanted.pvalue), 100)


def test_chi_square_sees_another_law_and_what_cannot_be() -> None:
    law = np.full(10, 0.1)
    shifted = law + np.array([0.02, -0.02] * 5)
    assert chi_square(np.random.default_rng(0).multinomial(20_000, shifted), law).p_value < 1e-6
    assert chi_square([5, 5, 1], [0.5, 0.5, 0.0]).p_value == 0
    with pytest.raises(ValueError, match="draw more"):
        chi_square([1, 1], [0.5, 0.5])


# ---- the page


def comparison(unstable: tuple[str, ...] = ()) -> Comparison:
    plain = [record(i, 0.1, (1,) * 8, tested=(), accepted=(), positions=(1,) * 8, undrafted=8) for i in range(6)]
    quick = [record(i, 0.05 + 0.001 * i, (3, 3, 2)) for i in range(6)]
    quality = Quality(100, 0.5, 0.4, 0.6, 0.9, 0.8, 1.2, 0.97, 0.95, 0.99)
    common = {"quality": quality, "throughput": {4: 20.0}, "last_round": {4: 3.0}, "peak_bytes": 2**20}
    facts = {
        "ar": MethodFacts("ar", "plain decoding", "exact", "", None, **common),
        "quick": MethodFacts("quick", "a chain", "biased", "drafts 2", None, step_tv=0.125, **common),
    }
    records = {"ar": plain, "quick": quick}
    return Comparison(
        title="Decoding <methods>",
        conditions={"commit": "abc", "versions": {"torch": "2"}},
        facts=facts,
        summaries={name: summary(rows, plain) for name, rows in records.items()},
        unstable=unstable,
        processor={"ar": 1.0, "quick": 1.9},
        cost=COST,
        draft_steps={},
        overheads=dict.fromkeys(records, 0.001),
        positions={"ar": 1.0, "quick": 3.0},
        floor=[0.4, 0.5],
        distance="frechet_classifier_distance@100",
        decoder_seconds=0.01,
        sweeps=[SweepPoint("quick", "half", value, 2.0 + value, 1.5, quality) for value in (1, 3)],
    )


def page(found: Comparison) -> Report:
    rows = torch.zeros(2, 3, 8, 8)
    return comparison_page(found, {"ar": rows, "quick": rows})


def test_the_page_says_everything_of_every_method() -> None:
    text = page(comparison()).html()
    for words in ("quick", "biased", "0.125", "drafts 2", "frechet classifier distance@100", "half = 3", "abc"):
        assert words in text, words
    assert "Decoding &lt;methods&gt;" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_the_theory_is_of_the_measured_acceptance() -> None:
    found = comparison()
    alpha = found.summaries["quick"].alpha
    assert found.promised("quick") == (
        pytest.approx(expected_tokens(alpha)),
        pytest.approx(expected_tokens(alpha) / COST.relative(3)),
    )
    assert found.promised("ar") == (1.0, 1.0)


def test_speedups_are_withheld_where_the_clock_is_not_to_be_trusted() -> None:
    told = {row["method"]: row["x ar"] for row in speed_table(comparison())}
    assert told["quick"].startswith("1.9") and "[" in told["quick"]
    crowded = comparison(("load average 9.0 on 2 cores",))
    assert {row["x ar"] for row in speed_table(crowded)} == {"unstable"}
    text = page(crowded).html()
    assert "withheld as unstable: load average 9.0 on 2 cores" in text and told["quick"] not in text
    assert {row["processor x"] for row in speed_table(crowded)} == {"1.00", "1.90"}
