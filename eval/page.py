"""The page of an evaluation from what the networks have seen: what to gather for it, and all that it shows.

wants = wanted_for_page(protocols, samples, reference, networks)
ours, theirs = look(samples, [..., *wants[0]], networks), look(reference, [..., *wants[1]], networks)
evaluation_page("AR-B", protocols, scores, audits, samples, reference, ours, theirs).save("report.html")
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from eval.audit import Audit
from eval.bootstrap import Interval
from eval.features import FeatureNetwork
from eval.gather import Rows
from eval.intervals import score_intervals, wanted_for_intervals
from eval.look import Seen, Want
from eval.markdown import Intervals
from eval.pictures import PictureSet
from eval.pixels import to_uint8
from eval.protocol import Protocol
from eval.provenance import Score
from eval.report import Neighbours, Report, evaluation_report, nearest_pictures, pictures_at

CLASSES, EACH = 10, 8  # pictures shown of labelled samples; of others as many in all
BATCH = 64


def wanted_for_page(
    protocols: Sequence[Protocol],
    samples: PictureSet,
    reference: PictureSet | None,
    networks: Mapping[str, FeatureNetwork],
) -> tuple[list[Want], list[Want]]:
    """Of samples: rows for intervals, neighbours and classes; of the reference, pictures: those for neighbours."""
    ours = wanted_for_intervals(protocols, samples)
    if samples.labels is not None:
        ours += [
            Want(name, Rows("logits"), _rule(protocol, samples))
            for protocol in protocols
            for name in protocol.networks
            if name == "classifier"
        ]
    theirs = []
    if reference is not None and not any(protocol.reconstructs for protocol in protocols):
        for protocol, name, rows in _spaces(protocols, networks)[:1]:
            ours.append(Want(name, rows, _rule(protocol, samples)))
            theirs.append(Want(name, rows, _rule(protocol, reference)))
    return [want for want in dict.fromkeys(ours) if want.network in networks], theirs


def evaluation_page(
    title: str,
    scores: Sequence[Score],
    intervals: Intervals,
    audits: Mapping[str, Audit],
    samples: PictureSet,
    reference: PictureSet | None,
    ours: Seen,
    theirs: Seen,
    class_names: Sequence[str] | None = None,
) -> Report:
    """Of scores of pictures. What was not gathered has no section. reference: None where it is a file of statistics."""
    guesses = next((ours[want].value for want in ours if want.gathering == Rows("logits")), None)
    index = _shown(samples)
    return evaluation_report(
        title,
        scores,
        pictures_at(_uint8(samples), index),
        intervals,
        {audit.name: audit.findings() for audit in audits.values()},
        samples.labels if guesses is not None else None,
        None if guesses is None else guesses.argmax(1),
        class_names,
        _neighbours(samples, reference, ours, theirs),
        None if samples.labels is None else samples.labels[index],
    )


def all_intervals(
    protocols: Sequence[Protocol], scores: Sequence[Score], ours: Seen, theirs: Seen
) -> dict[str, Interval]:
    """Of the scores of all protocols, by `eval.markdown.score_key`."""
    found: dict[str, Interval] = {}
    for protocol in protocols:
        of_it = [it for it in scores if it.provenance.protocol and it.provenance.protocol.name == protocol.name]
        found |= score_intervals(protocol, ours, theirs, of_it)
    return found


def _spaces(protocols: Sequence[Protocol], networks: Mapping[str, FeatureNetwork]) -> list[tuple[Protocol, str, Rows]]:
    """The main output of every network, the first of which neighbours are sought in."""
    return [
        (protocol, name, Rows(networks[name].record.layer))
        for protocol in protocols
        for name in protocol.networks
        if name in networks
    ]


def _neighbours(samples: PictureSet, reference: PictureSet | None, ours: Seen, theirs: Seen) -> Neighbours | None:
    if reference is None:
        return None
    for want, seen in theirs.items():
        same = [it for it in ours if (it.network, it.gathering, it.pairs) == (want.network, want.gathering, False)]
        if isinstance(want.gathering, Rows) and want.gathering.output == seen.network.layer and same:
            space = f"{seen.network.layer} of {seen.network.name}"
            features = ours[same[0]].value, seen.value
            return nearest_pictures(*features, _uint8(samples), _uint8(reference), space, reference.name)
    return None


def _shown(samples: PictureSet) -> Tensor:
    """Numbers of some samples of some classes, or of some spread over all."""
    if samples.labels is None:
        return torch.arange(0, samples.count, -(-samples.count // (CLASSES * EACH)))
    classes = samples.labels.unique()
    classes = classes[:: -(-len(classes) // CLASSES)]
    return torch.cat([(samples.labels == label).nonzero().flatten()[:EACH] for label in classes])


def _uint8(pictures: PictureSet) -> Iterator[Tensor]:
    for batch in pictures.batches(BATCH):
        yield (to_uint8(batch) if pictures.floats else batch).cpu()


def _rule(protocol: Protocol, pictures: PictureSet) -> str | None:
    return protocol.uint8 if pictures.floats else None
