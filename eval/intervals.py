"""Intervals of the scores of a protocol, from the rows of its samples: what to gather for them, and which method is whose.

wants = [*wanted_of_samples([protocol], samples), *wanted_for_intervals([protocol], samples)]
...
found = score_intervals(protocol, seen, reference, scored.scores)
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from eval.bootstrap import (
    Interval,
    frechet_interval,
    inception_interval,
    jackknife_interval,
    kernel_interval,
    mean_interval,
    overlap_left_out,
    share_interval,
)
from eval.gather import Gathering, Moments, Right, Rows, Splits
from eval.kernel import gaussian_kernel, polynomial_kernel
from eval.look import Gathered, Seen, Want
from eval.markdown import score_key
from eval.pictures import PictureSet
from eval.protocol import Metric, Protocol
from eval.provenance import Score

BLOCK = 4096  # rows that are taken from disk at once
SUBSETS = 100  # of KID
BALLS = {"precision": (3, True), "recall": (3, True), "density": (5, False), "coverage": (5, False)}  # k, closed


def wanted_for_intervals(protocols: Iterable[Protocol], samples: PictureSet) -> list[Want]:
    """The rows of outputs of which a metric keeps sums only. Scores of pairs have no interval."""
    return [
        Want(metric.network, Rows(gathering.output), protocol.uint8 if samples.floats else None)
        for protocol in protocols
        for metric in protocol.metrics
        for gathering in metric.of_samples
        if isinstance(gathering, Moments | Splits) and not metric.pairs
    ]


def score_intervals(protocol: Protocol, samples: Seen, reference: Seen, scores: Sequence[Score]) -> dict[str, Interval]:
    """By `eval.markdown.score_key`, of those scores that have one: deviations do not, nor do means over pairs."""
    rule, rule_there = (
        protocol.uint8 if any(want.rule == protocol.uint8 for want in side) else None for side in (samples, reference)
    )
    found: dict[str, Interval] = {}
    for metric in protocol.metrics:
        ours = {it: samples.get(Want(metric.network, it, rule)) for it in _gatherings(metric)}
        theirs = {it: reference.get(Want(metric.network, it, rule_there)) for it in metric.of_reference}
        known = {it: seen for it, seen in ours.items() if seen is not None}
        if metric.pairs or not metric.of_samples or metric.of_samples[0] not in known or None in theirs.values():
            continue
        network, count = known[metric.of_samples[0]].network, known[metric.of_samples[0]].pictures.count
        named = {score.name: score for score in scores if score.provenance.definition == metric.definition}
        values = {}  # by its plain name: the score
        for plain in metric.published or named:
            name = metric.name(plain, network) if metric.published else plain
            score = named.get(f"{name}@{count}", named.get(name))
            if score is not None:
                values[plain] = score
        made = _intervals(metric.of_samples[0], known, theirs, {plain: it.value for plain, it in values.items()})
        found |= {score_key(values[plain]): interval for plain, interval in made.items()}
    return found


def _gatherings(metric: Metric) -> list[Gathering]:
    return [*metric.of_samples, *(Rows(it.output) for it in metric.of_samples if not isinstance(it, Rows))]


def _intervals(
    main: Gathering,
    ours: Mapping[Gathering, Gathered],
    theirs: Mapping[Gathering, Gathered],
    values: Mapping[str, float],
) -> dict[str, Interval]:
    """By the plain names of the values."""
    if isinstance(main, Right):
        count = ours[main].pictures.count
        return {plain: share_interval(round(value * count), count) for plain, value in values.items()}
    rows = ours.get(Rows(main.output))
    if rows is None or not values:
        return {}
    fake: Tensor = rows.value
    first = next(iter(values))
    if isinstance(main, Moments):
        a, b = ours[main].value, theirs[main].value
        return {first: frechet_interval(fake.split(BLOCK), a, b, len(fake), values[first])}
    if isinstance(main, Splits):
        return {first: inception_interval(fake, main.of_pictures(len(fake)), main.dtype)}
    real: Tensor = theirs[main].value
    if "kd" in values:
        scatter = values.get("kd_std", 0.0) / SUBSETS**0.5
        return {"kd": kernel_interval(fake, real, values["kd"], polynomial_kernel, scatter)}
    if "mmd" in values:
        return {"mmd": kernel_interval(fake, real, values["mmd"], lambda x, y: 1000 * gaussian_kernel(x, y))}
    return _overlap(fake, real, values)


def _overlap(fake: Tensor, real: Tensor, values: Mapping[str, float]) -> dict[str, Interval]:
    found = {}
    for k, closed in dict.fromkeys(BALLS[plain] for plain in values):
        left = overlap_left_out(fake, real, k, closed)
        made = {
            "precision": lambda value: share_interval(round(value * len(fake)), len(fake)),
            "recall": lambda value, left=left: jackknife_interval(value, left.recall),
            "density": lambda value, left=left, k=k: mean_interval(left.balls / k),
            "coverage": lambda value, left=left: jackknife_interval(value, left.coverage),
        }
        found |= {plain: made[plain](value) for plain, value in values.items() if BALLS[plain] == (k, closed)}
    return found
