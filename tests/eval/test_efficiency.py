"""Costs against closed forms, on a clock that only the measured work moves on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.efficiency import (
    Comparison,
    ForwardCounter,
    Machine,
    Timing,
    Work,
    bootstrap_ratio,
    compare,
    flop_counter,
    measure,
    time_runs,
)
from eval.provenance import library_versions


@dataclass
class Bench:
    """A machine whose time stands still but for the work done on it; what happened is in `events`."""

    now: float = 0.0
    events: list[str] = field(default_factory=list)
    loads: Iterator[float] = field(default_factory=lambda: cycle([0.5]))

    def machine(self) -> Machine:
        return Machine(self._clock, lambda: 2 * self.now, lambda: next(self.loads), 2, self._synchronize)

    def work(self, name: str, seconds: Sequence[float], passes: int | None = None) -> Work:
        durations = cycle(seconds)

        def run(batch_size: int) -> int | None:
            self.events.append(f"{name}{batch_size}")
            self.now += next(durations) * batch_size
            return passes

        return run

    def _clock(self) -> float:
        self.events.append("clock")
        return self.now

    def _synchronize(self, device: torch.device) -> None:
        self.events.append("synchronize")


def test_percentiles_of_known_runs() -> None:
    timing = Timing(4, tuple(float(second) for second in (10, *range(10))), (1.0,) * 11)  # 0 .. 10, out of order
    assert (timing.median, timing.p10, timing.p90) == (5, 1, 9)
    assert timing.spread == 8 / 5
    assert timing.images_per_second == 4 / 5
    assert json.loads(json.dumps(timing.record()))["p90"] == 9


def test_warm_up_is_not_timed_and_the_clock_is_read_between_synchronizations() -> None:
    bench = Bench()
    timing = time_runs(bench.work("w", [100, 100, 1, 3]), 1, "cpu", runs=2, warmup=2, machine=bench.machine())
    assert timing.wall == (1, 3)
    assert timing.processor == (2, 6)
    assert bench.events == ["w1", "w1"] + 2 * ["synchronize", "clock", "w1", "synchronize", "clock"]


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 5), (7.0, 7), (6.5, 7), (100.0, 20)])
def test_a_slow_point_ends_early_but_not_before_five_runs(seconds: float, runs: int) -> None:
    bench = Bench()
    timing = time_runs(bench.work("w", [1]), 1, "cpu", runs=20, seconds=seconds, machine=bench.machine())
    assert len(timing.wall) == runs


def test_fewer_runs_than_five_are_as_many_as_asked_for() -> None:
    bench = Bench()
    assert len(time_runs(bench.work("w", [1]), 1, "cpu", runs=1, seconds=0, machine=bench.machine()).wall) == 1


def test_methods_take_turns_run_by_run() -> None:
    bench = Bench()
    methods = {name: bench.work(name, [1]) for name in "ABC"}
    compare(methods, "cpu", "float32", batch_size=2, runs=3, warmup=1, machine=bench.machine())
    assert [event for event in bench.events if event[0] in "ABC"] == ["A2", "B2", "C2"] * 4


def compared(baseline: Sequence[float], other: Sequence[float], loads: Sequence[float] = (0.5,)) -> Comparison:
    bench = Bench(loads=cycle(loads))
    methods = {"plain": bench.work("p", baseline, 256), "fast": bench.work("f", other)}
    return compare(methods, "cpu", "float32", runs=len(baseline), warmup=0, machine=bench.machine())


def test_a_speedup_is_the_first_method_over_the_other() -> None:
    result = compared([4] * 5, [2] * 5)
    assert result.unstable == ()
    assert result.forward_passes == {"plain": 256, "fast": None}
    record = json.loads(json.dumps(result.record()))
    assert record["methods"]["plain"]["speedup"]["value"] == 1
    assert record["methods"]["fast"]["speedup"] == {"value": 2, "low": 2, "high": 2, "confidence": 0.95}


def test_a_baseline_that_spreads_gives_no_speedup() -> None:
    at_the_edge = [9.5, 10.5] * 10  # percentiles 10 and 90 are the two values: 10 % of the median
    assert compared(at_the_edge, [5] * 20).unstable == ()
    (reason,) = compared([9.4, 10.6] * 10, [5] * 20).unstable
    assert reason.startswith("plain: its runs spread over 12%")
    record = compared([9.4, 10.6] * 10, [5] * 20).record()
    assert record["methods"]["fast"]["speedup"] == "unstable"
    assert record["methods"]["fast"]["median"] == 5
    assert compared([10] * 20, [1, 9] * 10).unstable == ()  # the spread of the other is in its interval


@pytest.mark.parametrize(("loads", "stable"), [((2.0, 2.0), True), ((2.1, 0.0), False), ((0.0, 2.1), False)])
def test_a_crowded_machine_gives_no_speedup(loads: tuple[float, float], stable: bool) -> None:
    result = compared([4] * 5, [2] * 5, loads)
    assert (result.conditions.load_before, result.conditions.load_after) == loads
    assert (result.unstable == ()) is stable
    assert stable or "on 2 cores" in result.unstable[0]


def test_few_runs_give_no_speedup() -> None:
    (reason,) = compared([4] * 4, [2] * 4).unstable
    assert reason.startswith("4 runs cannot tell")


def test_what_slows_both_runs_of_a_pair_down_leaves_the_ratio_alone() -> None:
    above = np.random.default_rng(0).lognormal(size=31)
    interval = bootstrap_ratio(above, above / 4)
    assert (interval.value, interval.low, interval.high) == (4, 4, 4)


def test_bootstrap_of_two_pairs_has_three_outcomes() -> None:
    """Medians of resamples of (1, 3): 1, 2, 3 with probabilities 1/4, 1/2, 1/4."""
    for confidence, low, high in ((0.95, 1, 3), (0.6, 1, 3), (0.4, 2, 2)):
        interval = bootstrap_ratio([1, 3], [1, 1], confidence)
        assert (interval.value, interval.low, interval.high) == (2, low, high)


def test_a_bootstrap_interval_covers_the_true_ratio() -> None:
    """95 % intervals of 300 data sets: at least 90 %, four standard errors below the nominal share, hold the truth."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        drift, first, second = rng.normal(scale=(0.5, 0.05, 0.05), size=(25, 3)).T  # (run,) each, in logarithms
        interval = bootstrap_ratio(np.exp(drift + first), np.exp(drift + second) / 2, resamples=500)
        held += interval.low <= 2 <= interval.high
    assert held >= 270


def test_pairs_are_asked_for() -> None:
    with pytest.raises(ValueError, match="2 runs above, 1 below"):
        bootstrap_ratio([1, 2], [1])
    with pytest.raises(ValueError, match=r"1 methods \(plain\)"):
        compare({"plain": lambda size: None}, "cpu", "float32")
    with pytest.raises(ValueError, match="0 runs"):
        time_runs(lambda size: None, 1, "cpu", runs=0)
    with pytest.raises(ValueError, match="device meta"):
        time_runs(lambda size: None, 1, "meta")
    with pytest.raises(ValueError, match="batch sizes"):
        measure(lambda size: None, "cpu", "float32", batch_sizes=(0, 4))


def flops(module: nn.Module, *inputs: Tensor) -> int:
    with torch.no_grad(), flop_counter() as counter:
        module(*inputs)
    return counter.get_total_flops()


def test_flops_of_layers() -> None:
    assert flops(nn.Linear(64, 128), torch.zeros(8, 64)) == 2 * 8 * 64 * 128
    assert flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 16, 16)) == 2 * 256 * 8 * 27


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_in_full(causal: bool) -> None:
    """Two products of (L, S, dim) for every head, also on a CPU, whose fused kernel has no formula."""
    query, key = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 64, 32)
    with torch.no_grad(), flop_counter() as counter:
        F.scaled_dot_product_attention(query, key, key, is_causal=causal)
    assert counter.get_total_flops() == 2 * 2 * 2 * 4 * 64 * 64 * 32


def test_a_fused_encoder_layer_counts_in_full() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    linears = 2 * 16 * (32 * 96 + 32 * 32 + 2 * 32 * 64)  # 2 sequences of 8 tokens: qkv, out, feed-forward
    assert flops(layer, torch.zeros(2, 8, 32)) == linears + 2 * 2 * 2 * 4 * 8 * 8 * 8
    assert torch.backends.mha.get_fastpath_enabled()  # left as it was found


def test_forward_passes_and_their_rows() -> None:
    model = nn.Linear(3, 3)
    with ForwardCounter(model) as counter:
        model(torch.zeros(2, 3))
        model(input=torch.zeros(4, 3))
    model(torch.zeros(8, 3))
    assert (counter.calls, counter.rows) == (2, 6)


def test_the_counter_leaves_the_module_after_an_error() -> None:
    model = nn.Linear(3, 3)
    counter = ForwardCounter(model)
    with pytest.raises(RuntimeError), counter:
        model(torch.zeros(2, 5))
    model(torch.zeros(2, 3))
    assert counter.calls == 0


def test_a_measurement_of_a_small_generator() -> None:
    """16 guided steps (2 rows a picture) of one Linear, 0.25 s a picture."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)).eval()
    bench = Bench()
    sleep = bench.work("w", [0.25])

    def work(batch_size: int) -> None:
        sleep(batch_size)
        with torch.inference_mode():
            for _ in range(16):
                model(torch.zeros(2 * batch_size, 8))

    settings = {"guidance": 4.0, "pixel decoder inside": False}
    result = measure(work, "cpu", "float32", model, model[0], (1, 4), 3, settings=settings, machine=bench.machine())
    assert result.latency.wall == (0.25,) * 3
    assert result.throughput == {1: 4, 4: 4}
    assert (result.forward_passes, result.rows, result.flops) == (16, 32, 16 * 2 * 2 * 8 * 8)
    assert (result.parameters, result.weight_bytes) == (72, 4 * (72 + 16) + 8)  # and running statistics, a count
    assert result.out_of_memory is None
    assert 0 < result.peak_bytes[1] <= result.peak_bytes[4]  # a high-water mark
    record = json.loads(json.dumps(result.record()))
    assert record["images_per_second"] == {"1": 4, "4": 4}
    assert record["peak_meaning"].startswith("host, high-water mark")
    conditions = record["conditions"]
    assert conditions["settings"] == settings
    assert conditions["versions"] == library_versions()
    assert (conditions["dtype"], conditions["warmup"], conditions["load_after"]) == ("float32", 3, 0.5)
    assert conditions["threads"] == torch.get_num_threads()


def test_forward_passes_that_the_work_counts_itself() -> None:
    bench = Bench()
    result = measure(bench.work("w", [1], 7), "cpu", "float32", count_flops=False, machine=bench.machine())
    assert (result.forward_passes, result.rows, result.flops, result.parameters) == (7, None, None, None)


def test_other_results_are_no_counts() -> None:
    result = measure(lambda size: torch.zeros(size), "cpu", "float32", runs=1, machine=Bench().machine())
    assert result.forward_passes is None


def test_the_curve_ends_where_memory_does() -> None:
    bench = Bench()
    sleep = bench.work("w", [1])

    def work(batch_size: int) -> None:
        if batch_size > 8:
            raise torch.OutOfMemoryError("full")
        sleep(batch_size)

    result = measure(work, "cpu", "float32", batch_sizes=(8, 32, 2), runs=1, machine=bench.machine())
    assert [point.batch_size for point in result.points] == [1, 8]
    assert result.out_of_memory == 32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu_is_of_each_batch_size() -> None:
    held = torch.cuda.memory_allocated()
    peaks = measure(
        lambda size: torch.zeros(size, 2**20, device="cuda"),
        "cuda",
        "float32",
        batch_sizes=(8, 2),
        runs=1,
    ).peak_bytes
    for size in (1, 2, 8):
        assert peaks[size] - held == pytest.approx(4 * size * 2**20, rel=1e-2)
