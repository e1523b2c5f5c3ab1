"""From what was seen to scores: a protocol's metrics on samples and reference, each number with all it depends on.

wants = wanted_of_samples([protocol], pictures), wanted_of_reference([protocol])
seen, reference = look(pictures, wants[0], networks), look(real, wants[1], networks)
scored = score(protocol, seen, reference)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eval.features import FeatureError
from eval.frechet import Gaussian
from eval.gather import Gathering, Right
from eval.look import Gathered, Seen, Want
from eval.pictures import PictureError, PictureSet
from eval.pixels import UINT8_RULES
from eval.protocol import UNROUNDED, Metric, Protocol, ProtocolRecord
from eval.provenance import NOT_RECORDED, PicturesRecord, Provenance, Score


@dataclass(frozen=True)
class Scored:
    """scores in the protocol's order; left_out: metric's definition -> why it has no value."""

    scores: tuple[Score, ...]
    left_out: Mapping[str, str]


def wanted_of_samples(protocols: Iterable[Protocol], samples: PictureSet) -> list[Want]:
    """What to gather of samples; floats are brought to uint8 by each protocol's own rule."""
    return [
        Want(metric.network, gathering, protocol.uint8 if samples.floats else None, metric.pairs)
        for protocol in protocols
        for metric in protocol.metrics
        for gathering in metric.of_samples
        if _can_be_had(metric, gathering, samples)
    ]


def wanted_of_reference(protocols: Iterable[Protocol], reference: PictureSet | None = None) -> list[Want]:
    """What to gather of a reference, of uint8 unless `reference` is of floats; None: it is a file of statistics."""
    return [
        Want(metric.network, gathering, protocol.uint8 if reference is not None and reference.floats else None)
        for protocol in protocols
        for metric in protocol.metrics
        for gathering in metric.of_reference
        if _can_be_had(metric, gathering, reference)
    ]


def _can_be_had(metric: Metric, gathering: Gathering, pictures: PictureSet | None) -> bool:
    """Whether there are pictures enough, and labels where they are needed."""
    if isinstance(gathering, Right):
        return pictures is not None and pictures.labels is not None
    return pictures is None or pictures.count >= metric.least


def score(protocol: Protocol, samples: Seen, reference: Seen, missing: Mapping[str, str] | None = None) -> Scored:
    """All values of the protocol's metrics; those with a published name are called name@count, after the number of samples.

    A metric that is not defined for so few pictures is left out with the reason, and so is one of which a side has not
    been looked at; missing: the reason why a network was not at hand. Raises FeatureError where the two sides were seen
    by different networks, PictureError where their sizes differ.
    """
    found: list[Score] = []
    left_out: dict[str, str] = {}
    for metric in protocol.metrics:
        ours = _side(protocol, metric, metric.of_samples, samples, metric.pairs)
        theirs = _side(protocol, metric, metric.of_reference, reference)
        reason = _too_few(metric, samples if metric.of_samples else {}, reference if metric.of_reference else {})
        if reason is None and (ours is None or theirs is None):
            side = "the samples" if ours is None else "pictures of the reference"
            of_labels = any(isinstance(it, Right) for it in (*metric.of_samples, *metric.of_reference))
            lacking = "have no labels" if of_labels else "were not seen by its network"
            reason = (missing or {}).get(metric.network, f"{side} {lacking}")
        if reason is None:
            _check_comparable([*ours.values(), *theirs.values()])
            found += _values(protocol, metric, ours, theirs)
        else:
            left_out[metric.definition] = reason
    return Scored(tuple(found), left_out)


def departures(protocol: Protocol, samples: PicturesRecord, gathered: Iterable[Gathered] = ()) -> tuple[str, ...]:
    """In what samples are not as the protocol asks, and what bends a score of them, in words."""
    found = []
    if protocol.count not in (None, samples.count):
        found.append(f"{samples.count} samples, the protocol asks for {protocol.count}")
    rule = "none, floats clamped to their range" if protocol.uint8 == UNROUNDED else UINT8_RULES[protocol.uint8]
    for what, made, asked in (
        ("uint8", samples.origin.quantisation, rule),
        ("classes", samples.origin.class_sampling, protocol.class_sampling),
    ):
        if asked is not None and made not in (NOT_RECORDED, "none", asked):
            found.append(f"{what} {made}, the protocol's are {asked}")
    for each in gathered:
        if isinstance(each.value, Gaussian) and isinstance(each.pictures.count, int):
            count, dim = each.pictures.count, len(each.value.mean)
            if count <= dim:
                found.append(
                    f"the covariance of {count} pictures of {each.pictures.name} in {dim} features is rank deficient, "
                    "the distance far above that of more pictures"
                )
    return tuple(found)


def _values(
    protocol: Protocol, metric: Metric, ours: Mapping[Gathering, Gathered], theirs: Mapping[Gathering, Gathered]
) -> list[Score]:
    values = metric.compute(_plain(ours), _plain(theirs))
    some = next(iter({**theirs, **ours}.values()))
    made = next(iter(ours.values())).pictures if ours else some.pictures
    against = next(iter(theirs.values())).pictures if ours and theirs else some.originals
    record = ProtocolRecord(
        protocol.name,
        protocol.source,
        protocol.count,
        protocol.count in (None, made.count),
        protocol.class_sampling,
        protocol.uint8,
        protocol.reference,
        departures(protocol, made, [*ours.values(), *theirs.values()]) if ours else (),
    )
    provenance = Provenance(metric.definition, some.network, made, against, some.computation, record)
    scores = []
    for value, number in values.items():
        name = metric.name(value, some.network)
        scores.append(Score(f"{name}@{made.count}" if value in metric.published else name, number, provenance))
    return scores


def _side(
    protocol: Protocol, metric: Metric, gatherings: Iterable[Gathering], seen: Seen, pairs: bool = False
) -> dict[Gathering, Gathered] | None:
    """What was gathered, of floats under the protocol's rule or of uint8; None where something was not."""
    side = {}
    for gathering in gatherings:
        wants = [Want(metric.network, gathering, rule, pairs) for rule in (protocol.uint8, None)]
        want = next((want for want in wants if want in seen), None)
        if want is None:
            return None
        side[gathering] = seen[want]
    return side


def _plain(side: Mapping[Gathering, Gathered]) -> dict[Gathering, object]:
    return {gathering: each.value for gathering, each in side.items()}


def _check_comparable(gathered: list[Gathered]) -> None:
    first = gathered[0]
    for other in gathered[1:]:
        ours, theirs = first.pictures, other.pictures
        if first.network != other.network:
            pairs = zip(vars(first.network).items(), vars(other.network).values(), strict=True)
            differ = "; ".join(f"{field}: {here} / {there}" for (field, here), there in pairs if here != there)
            raise FeatureError(
                f"{ours.name} and {theirs.name} were seen by different networks ({differ}); look at both with one"
            )
        sizes = [(it.frames, it.height, it.width) for it in (ours, theirs)]
        if NOT_RECORDED not in sizes[1] and NOT_RECORDED not in sizes[0] and sizes[0] != sizes[1]:
            raise PictureError(
                f"{ours.name} is {_by(sizes[0])}, {theirs.name} is {_by(sizes[1])}; "
                "bring both to one size by a stated rule first"
            )


def _too_few(metric: Metric, *sides: Seen) -> str | None:
    for side in sides:
        for each in side.values():
            if isinstance(each.pictures.count, int) and each.pictures.count < metric.least:
                return f"{each.pictures.count} pictures of {each.pictures.name}, it needs at least {metric.least}"
    return None


def _by(size: tuple[int | str, ...]) -> str:
    return "x".join(map(str, size[1:] if size[0] == 1 else size))
