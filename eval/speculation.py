"""What a comparison of decoding methods says, from plain numbers: records of images, costs of calls, counts of tests.

A call is one forward of the target over some new positions, all branches of guidance in one; the prefill is a call. A round
is a call and the tokens it commits. Two conventions of the mean accepted length tau are in use, and both are given: tokens
committed a round (EAGLE's, the correction or bonus token included), and accepted drafts alone, one less or so.

    records = [ImageRecord(method="sjd", image=0, ...), ...]      # images.jsonl holds them, a line each
    rows = [summary(name, of_it, of_baseline) for ...]            # the table is made from them
    theory = expected_tokens(alpha) / (call_cost + drafter_calls * cost)

Letters: n drafts of a round, alpha the share of tests that accept, by place in the draft.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import gammaincc
from torch import Tensor

from eval.bootstrap import frechet_interval, share_interval
from eval.efficiency import Interval, Machine, bootstrap_ratio
from eval.files import write_whole
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.manifold import precision_recall

SLOWEST = 0.05  # share of images that the tail is of
LEAST = 5.0  # expected counts of a cell of a chi-square test, fewer are joined
GAP = 0.2  # between theory and measurement, above which the page asks why


@dataclass(frozen=True)
class ImageRecord:
    """One image of one method, decoded alone.

    image: its number, which with the seed gives its noise and its condition, the same for all methods. calls: of the target;
    positions: new positions of each call; drafter_calls; committed: tokens of each round, of which the first undrafted had
    no drafts; tested, accepted: by place in the draft. seconds, processor: of the token loop with its prefill, without the
    pixel decoder; wall clock, and time of the process on all threads.
    """

    method: str
    image: int
    seed: int
    condition: int
    tokens: tuple[int, ...]
    calls: int
    positions: tuple[int, ...]
    drafter_calls: int
    committed: tuple[int, ...]
    undrafted: int
    tested: tuple[int, ...]
    accepted: tuple[int, ...]
    seconds: float
    processor: float


def write_records(path: Path, records: Iterable[ImageRecord], head: Mapping[str, Any]) -> None:
    """JSON lines, the first of which is `head`: commit, versions, conditions."""
    lines = [json.dumps({"head": dict(head)}), *(json.dumps(asdict(record)) for record in records)]
    write_whole(path, ("\n".join(lines) + "\n").encode())


def read_records(path: Path) -> tuple[dict[str, Any], list[ImageRecord]]:
    """What `write_records` wrote: the head, and the records."""
    head, *lines = map(json.loads, path.read_text().splitlines())
    fields = dict.fromkeys(("tokens", "positions", "committed", "tested", "accepted"), tuple)
    return head["head"], [
        ImageRecord(**{name: fields.get(name, lambda value: value)(value) for name, value in line.items()})
        for line in lines
    ]


# ---- speed


@dataclass(frozen=True)
class Summary:
    """A method over its images.

    tokens, calls, drafter_calls: of an image, means. compression: tokens a call, over all images. tau: tokens a round that
    had drafts; tau_drafts: accepted drafts of it. alpha: accepted of performed tests by place in the draft, nan where none
    was performed. rounds: how many images took so many. latency, p10, p90: seconds of an image. speedup: median of the
    baseline over its own, paired by image. fewer_calls: the baseline's calls over its own. slowest: mean seconds of the
    slowest 5 % of images, and of their calls.
    """

    method: str
    images: int
    tokens: float
    calls: float
    drafter_calls: float
    compression: float
    tau: float
    tau_drafts: float
    alpha: tuple[float, ...]
    rounds: Mapping[int, int]
    latency: float
    p10: float
    p90: float
    processor: float
    speedup: Interval
    fewer_calls: float
    slowest: float
    slowest_calls: float


def summary(records: Sequence[ImageRecord], baseline: Sequence[ImageRecord]) -> Summary:
    """Raises ValueError where the two do not hold the same images."""
    if [it.image for it in records] != [it.image for it in baseline] or not records:
        raise ValueError("summary: a method and its baseline must have decoded the same images, one at least")
    seconds, calls = [it.seconds for it in records], [it.calls for it in records]
    rounds = [count for it in records for count in it.committed[it.undrafted :]]
    tested, accepted = (
        np.sum([getattr(it, name) for it in records], axis=0).astype(int).tolist() for name in ("tested", "accepted")
    )
    return Summary(
        method=records[0].method,
        images=len(records),
        tokens=float(np.mean([len(it.tokens) for it in records])),
        calls=float(np.mean(calls)),
        drafter_calls=float(np.mean([it.drafter_calls for it in records])),
        compression=sum(len(it.tokens) for it in records) / sum(calls),
        tau=float(np.mean(rounds)) if rounds else 1.0,
        tau_drafts=sum(accepted) / len(rounds) if rounds else 0.0,
        alpha=acceptance(tested, accepted),
        rounds=dict(sorted(Counter(calls).items())),
        latency=float(np.median(seconds)),
        p10=float(np.quantile(seconds, 0.1)),
        p90=float(np.quantile(seconds, 0.9)),
        processor=float(np.median([it.processor for it in records])),
        speedup=bootstrap_ratio([it.seconds for it in baseline], seconds),
        fewer_calls=sum(it.calls for it in baseline) / sum(calls),
        slowest=tail_mean(seconds),
        slowest_calls=tail_mean(calls),
    )


def acceptance(tested: Sequence[int], accepted: Sequence[int]) -> tuple[float, ...]:
    """alpha by place in the draft; nan where nothing was tested."""
    return tuple(a / t if t else math.nan for t, a in zip(tested, accepted, strict=True))


def tail_mean(values: Sequence[float], share: float = SLOWEST) -> float:
    """The mean of the largest `share` of values, of one at least."""
    ordered = sorted(values, reverse=True)
    return float(np.mean(ordered[: max(1, math.ceil(share * len(ordered) - 1e-9))]))


# ---- theory


def expected_tokens(alpha: Sequence[float]) -> float:
    """Tokens a round brings, with its correction: 1 + a_1 + a_1 a_2 + ... (Leviathan et al. 2023, arXiv:2211.17192, where all
    are equal). A place that was never tested adds nothing."""
    line = [0.0 if math.isnan(a) else a for a in alpha]
    return 1.0 + float(np.sum(np.cumprod(line)))


def theory(alpha: Sequence[float], drafter_calls: float, cost: float, call_cost: float = 1.0) -> float:
    """The speed-up that alpha allows: expected_tokens / (call_cost + drafter_calls x cost).

    drafter_calls: a round; cost: of one, in plain calls of the target; call_cost: of a call over all drafts, 1 where a call
    costs the same whatever it reads, as the theory has it and a CPU has not.
    """
    return expected_tokens(alpha) / (call_cost + drafter_calls * cost)


@dataclass(frozen=True)
class CallCost:
    """Seconds of a call over so many new positions, by length, at each cache length."""

    seconds: Mapping[int, Mapping[int, float]]  # cache length -> new positions -> seconds

    def at(self, positions: int) -> float:
        """Between two lengths linearly, beyond the last in proportion; the mean over the cache lengths."""
        return float(np.mean([_interpolated(curve, positions) for curve in self.seconds.values()]))

    def relative(self, positions: int) -> float:
        """In calls over one position."""
        return self.at(positions) / self.at(1)


def _interpolated(curve: Mapping[int, float], positions: int) -> float:
    lengths = sorted(curve)
    if positions > lengths[-1]:
        return curve[lengths[-1]] * positions / lengths[-1]
    return float(np.interp(positions, lengths, [curve[length] for length in lengths]))


def overhead(records: Sequence[ImageRecord], cost: CallCost, drafter_step: float) -> float:
    """Seconds a call that are in no network, the mean over images: what tests, trees and draws of noise take."""
    extra = [
        it.seconds - sum(map(cost.at, it.positions)) - it.drafter_calls * drafter_step for it in records if it.calls
    ]
    return float(np.sum(extra) / sum(it.calls for it in records))


def call_costs(
    works: Mapping[tuple[int, int], Callable[[], object]],
    device: torch.device | str,
    repeats: int = 15,
    machine: Machine | None = None,
) -> CallCost:
    """works: (cache length, new positions) -> a call. The fastest of `repeats` rounds through all of them, after one more: what
    else runs on the machine can only add to it."""
    machine, device = machine or Machine(), torch.device(device)
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in works}
    for turn in range(repeats + 1):
        for key, work in works.items():
            machine.synchronize(device)
            start = machine.clock()
            work()
            machine.synchronize(device)
            if turn:
                seconds[key].append(machine.clock() - start)
    curves: dict[int, dict[int, float]] = {}
    for (cache, length), values in seconds.items():
        curves.setdefault(cache, {})[length] = min(values)
    return CallCost(curves)


# ---- exactness


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's test: how probable it is that draws of the law itself lie as far from it as these."""

    statistic: float
    freedom: int
    p_value: float
    draws: int


def chi_square(counts: Sequence[float], law: Sequence[float], least: float = LEAST) -> ChiSquare:
    """counts (K,) of outcomes, law (K,) their probabilities. Cells that expect fewer than `least` are one; that one too is
    joined to the next smallest where it expects fewer.

    An outcome that the law excludes makes the statistic infinite. Raises ValueError for fewer than two cells.
    """
    seen, law = np.asarray(counts, dtype=float), np.asarray(law, dtype=float)
    draws = int(seen.sum())
    if np.any((law <= 0) & (seen > 0)):
        return ChiSquare(math.inf, int((law > 0).sum()) - 1, 0.0, draws)
    order = np.argsort(law)
    expected, seen = (law * draws)[order], seen[order]
    few = int(np.searchsorted(np.cumsum(expected), least)) + 1 if expected[0] < least else 0
    few = max(few, int((expected < least).sum()))
    if few:
        expected, seen = (np.concatenate(([part[:few].sum()], part[few:])) for part in (expected, seen))
    if len(expected) < 2:
        raise ValueError(f"chi_square: {draws} draws leave {len(expected)} cells of {least:g} or more; draw more")
    statistic = float(np.sum((seen - expected) ** 2 / expected))
    freedom = len(expected) - 1
    return ChiSquare(statistic, freedom, float(gammaincc(freedom / 2, statistic / 2)), draws)


# ---- what is gathered of a method


@dataclass(frozen=True)
class Quality:
    """Of the same conditions as the baseline's images, drawn with other noise.

    distance: Fréchet, to the baseline's images; to_reference: to the reference, None without one; each with its interval.
    accuracy: share recognised as their class, None without a classifier. precision, recall: beside the baseline.
    """

    count: int
    distance: float
    low: float
    high: float
    precision: float
    recall: float
    to_reference: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


def judged(
    layer: str,
    own: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    reference: Tensor | None = None,
    labels: Tensor | None = None,
) -> Quality:
    """own, base: what a network says of pictures of a method and of the baseline, (N, d) by output name, the main one `layer`;
    "logits" among them where it is a classifier. reference (M, d): of real pictures. labels int64 (N,): what own was made
    for. Raises ValueError for fewer than four pictures."""
    features, others = own[layer].double(), base[layer].double()
    count, (mine, its) = len(features), map(_gaussian, (features, others))
    distance, beside = frechet_interval([features], mine, its, count), precision_recall(features, others)
    more: dict[str, float] = {}
    if reference is not None:
        more["to_reference"] = frechet_distance(mine, _gaussian(reference.double()))
    if labels is not None and "logits" in own:
        share = share_interval(int((own["logits"].argmax(1) == labels).sum()), count)
        more |= {"accuracy": share.value, "accuracy_low": share.low, "accuracy_high": share.high}
    return Quality(count, distance.value, distance.low, distance.high, beside.precision, beside.recall, **more)


def _gaussian(rows: Tensor) -> Gaussian:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics.gaussian()


@dataclass(frozen=True)
class MethodFacts:
    """Everything of a method beside its records. exactness: exact, bounded or biased; knob: its settings in words; test: of
    exact ones; step_tv: of others, the mean distance in total variation of one tested token's law from the target's.
    throughput: images a second by batch size; last_round: rounds of the slowest image of such a batch. peak_bytes: of
    tensors, beyond the weights; extra_parameters: of what drafts."""

    method: str
    about: str
    exactness: str
    knob: str
    drafter: str | None
    control: bool = False
    test: ChiSquare | None = None
    step_tv: float | None = None
    quality: Quality | None = None
    throughput: Mapping[int, float] = field(default_factory=dict)
    last_round: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    extra_parameters: int = 0


@dataclass(frozen=True)
class SweepPoint:
    """A method at one setting of its knob. fewer_calls, speedup: over the baseline; quality: at this setting."""

    method: str
    knob: str
    value: float
    fewer_calls: float
    speedup: float
    quality: Quality
