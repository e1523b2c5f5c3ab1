"""What making pictures costs: seconds, pictures a second, memory, parameters, FLOPs, forward passes.

    measured = measure(work, device="cuda", dtype="bfloat16", model=model, backbone=model.trunk, batch_sizes=(1, 8, 32))
    compared = compare({"plain": plain, "speculative": drafted}, device="cpu", dtype="float32")

What is measured comes in as a function of a batch size: it makes so many pictures, and may return, as an int, how
many forward passes of its network that took; anything else it returns is let go. A time is taken between two
synchronisations of the device. Two methods are compared run by run, A B C A B C, so that a drifting machine hits all
of them, and run k of one is paired with run k of another.

One multiply-add is 2 FLOP; only matrix products, convolutions and attention count, and attention counts in full
whatever its mask. One forward pass is one call, with however many rows: a guided pass of 2B rows is one call.
"""

import os
import platform
import resource
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from eval.provenance import library_versions

Work = Callable[[int], object]  # batch size -> int: forward passes, or anything else where it does not count them

SPREAD = 0.1  # of the baseline's median, between its percentiles 10 and 90: above it a comparison is unstable
FEWEST = 5  # runs of a point, however long they take, unless fewer were asked for
CUDA_PEAK = "CUDA, most bytes allocated to tensors during the runs of this batch size"
HOST_PEAK = "host, high-water mark of the resident set since the process began: one process a model, or it says little"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Machine:
    """What is read of the machine. clock, processor: seconds, of the wall and of this process on all of its threads.

    load: the load average of the last minute. cores: physical ones, where the system tells.
    """

    clock: Callable[[], float] = time.perf_counter
    processor: Callable[[], float] = time.process_time
    load: Callable[[], float] = lambda: os.getloadavg()[0]
    cores: int = field(default_factory=lambda: psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    synchronize: Callable[[torch.device], None] = synchronize


@dataclass(frozen=True)
class Timing:
    """Seconds of every run at one batch size, in the order of the runs: of the wall clock and of processor time."""

    batch_size: int
    wall: tuple[float, ...]
    processor: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.wall))

    @property
    def p10(self) -> float:
        return float(np.quantile(self.wall, 0.1))

    @property
    def p90(self) -> float:
        return float(np.quantile(self.wall, 0.9))

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90 - self.p10) / self.median

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; percentiles between two runs are interpolated linearly."""
        figures = ("median", "p10", "p90", "spread", "images_per_second")
        return asdict(self) | {"runs": len(self.wall)} | {name: getattr(self, name) for name in figures}


@dataclass(frozen=True)
class Conditions:
    """Where and how times were taken. settings: what the caller says of the work, such as guidance, attention
    backend, compilation, and whether the pixel decoder is inside. float32_matmul: PyTorch's precision of such products.
    """

    device: str
    dtype: str
    float32_matmul: str
    threads: int
    cores: int
    load_before: float
    load_after: float
    warmup: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def crowded(self) -> bool:
        return max(self.load_before, self.load_after) > self.cores


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds between which it lies with the given confidence."""

    value: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Efficiency:
    """What one picture costs, and how that changes with the batch.

    points: one a batch size, the first of them of batch 1: its times are the latency. peak_bytes: batch size -> bytes,
    in the sense of peak_meaning. out_of_memory: the first batch size that did not fit, where the curve ends.
    forward_passes, rows, flops: of one picture. None: not counted.
    """

    points: tuple[Timing, ...]
    peak_bytes: Mapping[int, int]
    peak_meaning: str
    out_of_memory: int | None
    forward_passes: int | None
    rows: int | None
    flops: int | None
    parameters: int | None
    weight_bytes: int | None
    conditions: Conditions

    @property
    def latency(self) -> Timing:
        return self.points[0]

    @property
    def throughput(self) -> dict[int, float]:
        """Batch size -> pictures a second."""
        return {point.batch_size: point.images_per_second for point in self.points}

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; keys that are batch sizes become text."""
        return asdict(self) | {
            "points": [point.record() for point in self.points],
            "latency": self.latency.record(),
            "images_per_second": {str(size): value for size, value in self.throughput.items()},
            "peak_bytes": {str(size): value for size, value in self.peak_bytes.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Methods timed in turn. speedups: median of the first method over the method's own, above 1 where it is faster.

    forward_passes: mean of a run, None where the method does not count them. unstable: why the speedups are not to be
    quoted, empty where they may be.
    """

    timings: Mapping[str, Timing]
    forward_passes: Mapping[str, float | None]
    speedups: Mapping[str, Interval]
    unstable: tuple[str, ...]
    conditions: Conditions

    def record(self) -> dict[str, Any]:
        """Plain values for JSON. An unstable comparison says so in place of each speedup; its times stay."""
        methods = {
            name: {
                **timing.record(),
                "forward_passes": self.forward_passes[name],
                "speedup": "unstable" if self.unstable else asdict(self.speedups[name]),
            }
            for name, timing in self.timings.items()
        }
        return {"methods": methods, "unstable": list(self.unstable), "conditions": asdict(self.conditions)}


class ForwardCounter:
    """Counts the calls of a module while it is entered, and their rows: axis 0 of the first tensor each is given.

        with ForwardCounter(model.trunk) as counter:
            generate(model, ...)
        counter.calls, counter.rows

    Only calls of the module itself pass its hooks, not calls of its methods. A call without a tensor has no rows.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = 0
        self.rows = 0

    def __enter__(self) -> Self:
        self._hook = self.module.register_forward_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        self.calls += 1
        tensors = (it for it in (*args, *kwargs.values()) if isinstance(it, Tensor) and it.ndim)
        self.rows += next((len(it) for it in tensors), 0)


@contextmanager
def flop_counter() -> Iterator[FlopCounterMode]:
    """Counts FLOPs of what runs while it is entered, with nothing hidden from it; `.get_total_flops()` tells them.

    Attention runs unfused meanwhile, since PyTorch has no formula for its fused CPU kernels and counts them as 0, and
    nn.MultiheadAttention keeps off its fused path likewise. Compiled code stays invisible: count it eager.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def time_runs(
    work: Work,
    batch_size: int,
    device: torch.device | str,
    runs: int = 30,
    warmup: int = 3,
    seconds: float = 60.0,
    machine: Machine | None = None,
) -> Timing:
    """Seconds of `runs` runs after `warmup` untimed ones; `seconds` of runs end it earlier, but not before FEWEST.

    Raises ValueError for less than one run, and for a device that is neither a CPU nor CUDA.
    """
    timings, _ = _in_turn({"work": work}, batch_size, _device(device), runs, warmup, seconds, machine or Machine())
    return timings["work"]


def measure(
    work: Work,
    device: torch.device | str,
    dtype: str,
    model: nn.Module | None = None,
    backbone: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1,),
    runs: int = 30,
    warmup: int = 3,
    seconds: float = 60.0,
    count_flops: bool = True,
    settings: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
) -> Efficiency:
    """Latency at batch 1, pictures a second and peak memory over `batch_sizes`, and what one picture takes.

    model: whose parameters are counted. backbone: whose calls are the forward passes; without it they are what `work`
    returns. Both are counted, and FLOPs, in one untimed run of batch 1. runs, warmup, seconds: of every batch size, as
    in `time_runs`. count_flops: False for compiled code. settings: see Conditions. On CUDA the curve ends at the
    first batch size that does not fit.
    Raises ValueError for less than one run or picture, and for a device that is neither a CPU nor CUDA.
    """
    device, machine = _device(device), machine or Machine()
    if min(batch_sizes, default=1) < 1:
        raise ValueError(f"measure: batch sizes {tuple(batch_sizes)}; each must be 1 or more")
    before = machine.load()
    passes, rows, flops = _count(work, backbone, count_flops)
    points, peaks, refused = [], {}, None
    for size in dict.fromkeys((1, *batch_sizes)):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            points.append(time_runs(work, size, device, runs, warmup, seconds, machine))
        except torch.OutOfMemoryError:
            if not points:
                raise
            refused = size
            break
        peaks[size] = _peak_bytes(device)
    weights = None if model is None else [*model.parameters(), *model.buffers()]
    return Efficiency(
        points=tuple(points),
        peak_bytes=peaks,
        peak_meaning=CUDA_PEAK if device.type == "cuda" else HOST_PEAK,
        out_of_memory=refused,
        forward_passes=passes,
        rows=rows,
        flops=flops,
        parameters=None if model is None else sum(it.numel() for it in model.parameters()),
        weight_bytes=None if weights is None else sum(it.nbytes for it in weights),
        conditions=_conditions(device, dtype, before, warmup, settings, machine),
    )


def compare(
    methods: Mapping[str, Work],
    device: torch.device | str,
    dtype: str,
    batch_size: int = 1,
    runs: int = 30,
    warmup: int = 3,
    seconds: float = 60.0,
    settings: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
) -> Comparison:
    """Time methods in turn, run by run, against the first of them.

    runs, warmup: of each method. It ends earlier, as in `time_runs`, once the methods took `seconds` each on average.
    Raises ValueError for less than two methods or one run, and for a device that is neither a CPU nor CUDA.
    """
    device, machine = _device(device), machine or Machine()
    if len(methods) < 2:
        raise ValueError(f"compare: {len(methods)} methods ({', '.join(methods)}); give the baseline and one more")
    before = machine.load()
    timings, passes = _in_turn(methods, batch_size, device, runs, warmup, seconds, machine)
    conditions = _conditions(device, dtype, before, warmup, settings, machine)
    baseline, first = next(iter(timings.items()))
    return Comparison(
        timings=timings,
        forward_passes={name: None if None in counts else float(np.mean(counts)) for name, counts in passes.items()},
        speedups={name: bootstrap_ratio(first.wall, timing.wall) for name, timing in timings.items()},
        unstable=_faults(baseline, first, conditions),
        conditions=conditions,
    )


def peak_tensor_bytes(work: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that tensors take during one run of `work`, beyond those that are there before it.

    On a CPU from what its operators return, which slows the run down; on CUDA from the allocator.
    """
    device = _device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Tally() as tally:
        work()
    return tally.most


class _Tally(TorchDispatchMode):
    """Adds up the storages that operators return, until each is freed; most: what they came to at once. What an operator
    takes and frees within itself stays unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if storage._cdata not in self.sizes and storage._cdata not in given:  # neither a view nor written in place
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return made

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in nested values; packed weights have none."""
    for it in tree_leaves(values):
        if isinstance(it, Tensor) and it.layout == torch.strided:
            yield it.untyped_storage()


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """median(above) / median(below) of runs made in pairs, with its percentile interval (Efron 1979).

    A resample draws pairs with replacement, so what slowed both runs of a pair down does not widen the interval.
    Raises ValueError for unequal or no runs.
    """
    if len(above) != len(below) or not len(above):
        raise ValueError(f"bootstrap_ratio: {len(above)} runs above, {len(below)} below; pairs are needed")
    drawn = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    ratios = np.median(above[drawn], axis=1) / np.median(below[drawn], axis=1)
    low, high = np.quantile(ratios, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high), confidence)


def _in_turn(
    methods: Mapping[str, Work],
    batch_size: int,
    device: torch.device,
    runs: int,
    warmup: int,
    seconds: float,
    machine: Machine,
) -> tuple[dict[str, Timing], dict[str, list[int | None]]]:
    """The times of each method, and the forward passes that its runs returned."""
    if runs < 1 or warmup < 0:
        raise ValueError(f"{runs} runs after {warmup} to warm up; at least 1 and 0 are needed")
    for _ in range(warmup):
        for work in methods.values():
            work(batch_size)
    walls: dict[str, list[float]] = {name: [] for name in methods}
    processors: dict[str, list[float]] = {name: [] for name in methods}
    passes: dict[str, list[int | None]] = {name: [] for name in methods}
    for run in range(runs):
        if run >= FEWEST and sum(map(sum, walls.values())) >= seconds * len(methods):
            break
        for name, work in methods.items():
            machine.synchronize(device)
            wall, processor = machine.clock(), machine.processor()
            passes[name].append(_passes(work(batch_size)))
            machine.synchronize(device)
            walls[name].append(machine.clock() - wall)
            processors[name].append(machine.processor() - processor)
    return {name: Timing(batch_size, tuple(walls[name]), tuple(processors[name])) for name in methods}, passes


def _passes(returned: object) -> int | None:
    return returned if isinstance(returned, int) else None


def _count(work: Work, backbone: nn.Module | None, flops: bool) -> tuple[int | None, int | None, int | None]:
    """Forward passes, their rows and FLOPs of one run of batch 1."""
    with ExitStack() as scope:
        calls = None if backbone is None else scope.enter_context(ForwardCounter(backbone))
        counter = scope.enter_context(flop_counter()) if flops else None
        returned = _passes(work(1))
    total = None if counter is None else counter.get_total_flops()
    return (returned, None, total) if calls is None else (calls.calls, calls.rows, total)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _conditions(
    device: torch.device,
    dtype: str,
    load_before: float,
    warmup: int,
    settings: Mapping[str, Any] | None,
    machine: Machine,
) -> Conditions:
    return Conditions(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        dtype=dtype,
        float32_matmul=torch.get_float32_matmul_precision(),
        threads=torch.get_num_threads(),
        cores=machine.cores,
        load_before=load_before,
        load_after=machine.load(),
        warmup=warmup,
        versions=library_versions(),
        settings=dict(settings or {}),
    )


def _processor_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _faults(baseline: str, timing: Timing, conditions: Conditions) -> tuple[str, ...]:
    """Why a comparison is not to be trusted."""
    faults = []
    if len(timing.wall) < FEWEST:
        faults.append(f"{len(timing.wall)} runs cannot tell their own spread; take {FEWEST} or more")
    if timing.spread > SPREAD:
        faults.append(
            f"{baseline}: its runs spread over {timing.spread:.0%} of their median, {SPREAD:.0%} at most; take more "
            "warm-up and a quiet machine"
        )
    if conditions.crowded:
        loads = f"{conditions.load_before:.1f} before and {conditions.load_after:.1f} after"
        faults.append(f"load average {loads} on {conditions.cores} cores; wait until the machine is free")
    return tuple(faults)


def _device(device: torch.device | str) -> torch.device:
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device {found}: times are taken on cpu and cuda")
    return found
