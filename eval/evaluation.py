"""Several protocols on one set of samples: each side is looked at once, then every score that can be had is made.

networks = {name: open_network(name, device) for protocol in protocols for name in protocol.networks}
result = evaluate(protocols, samples, open_reference("VIRTUAL_imagenet256_labeled.npz"), networks)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from eval.audit import Audit
from eval.bootstrap import Interval
from eval.features import FeatureNetwork
from eval.look import Gathered, Seen, Want, look
from eval.page import all_intervals, evaluation_page, wanted_for_page
from eval.pictures import PictureError, PictureSet, read_pictures
from eval.protocol import Protocol
from eval.provenance import Score
from eval.references import StatisticsCache, npz_names, published_statistics, read_reference
from eval.report import Report
from eval.score import score, wanted_of_reference, wanted_of_samples


@dataclass(frozen=True)
class Reference:
    """Pictures, or a file of what networks said of some, or, as ADM publishes them, both."""

    pictures: PictureSet | None
    file: Path | None = None

    def statistics(
        self, protocol: Protocol, wants: Sequence[Want], networks: Mapping[str, FeatureNetwork]
    ) -> Mapping[Want, Gathered]:
        """What the file says. Raises PictureError or FeatureError where it is none for this protocol."""
        if self.file is None:
            return {}
        if self.file.suffix == ".npz":
            return published_statistics(self.file, protocol, networks)
        return read_reference(self.file, wants, networks)


@dataclass
class Evaluated:
    """scores in the order of protocols and metrics; left_out: protocol -> what -> why; audits: role -> audit.

    intervals: by `eval.markdown.score_key`, and pages, where a page was asked for.
    """

    scores: list[Score] = field(default_factory=list)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    pages: list[Report] = field(default_factory=list)

    def join(self, other: "Evaluated") -> None:
        """Take in what another evaluation has come to."""
        self.scores += other.scores
        self.left_out |= other.left_out
        self.intervals |= other.intervals
        self.pages += other.pages
        self.audits |= {
            f"{role} of {it.name}" if role in self.audits else role: it for role, it in other.audits.items()
        }

    def record(self) -> dict[str, Any]:
        """Plain values for JSON: every score under its name, or under PROTOCOL/NAME where there are several protocols."""
        protocols = {one.provenance.protocol.name for one in self.scores if one.provenance.protocol} | {*self.left_out}
        prefix = "{}/" if len(protocols) > 1 else ""
        scores = {prefix.format(one.provenance.protocol.name) + one.name: one.record() for one in self.scores}
        audits = {role: audit.record() for role, audit in self.audits.items()}
        intervals = {key: it.record() for key, it in self.intervals.items()}
        others = {"left_out": self.left_out, "intervals": intervals}
        return scores | {name: value for name, value in others.items() if value} | {"audit": audits}

    def lines(self) -> list[str]:
        """For the terminal: a table of scores, their protocols, what was left out, the audits."""
        width = max((len(one.name) for one in self.scores), default=0)
        found = []
        for one in self.scores:
            protocol = one.provenance.protocol
            found.append(f"{protocol.name:20} {one.name:{width}} {one.value:14.6g}   {one.provenance.definition}")
        for protocol in dict.fromkeys(one.provenance.protocol for one in self.scores):
            first = next(one for one in self.scores if one.provenance.protocol == protocol)
            found += [f"{protocol.name}: {first.provenance.line()}"]
        for protocol, metrics in self.left_out.items():
            found += [f"{protocol}: left out: {what}: {why}" for what, why in metrics.items()]
        return [*found, *(line for audit in self.audits.values() for line in audit.lines())]


def open_reference(path: str | Path) -> Reference:
    """A file of scripts/make_reference.py, an npz of statistics or pictures or both, or a folder of pictures.

    Raises PictureError for anything else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Reference(None, path)
    if path.suffix != ".npz" or path.is_dir():
        return Reference(read_pictures(path))
    names = npz_names(path)
    pictures = None if "mu" in names and "arr_0" not in names else read_pictures(path)
    return Reference(pictures, path if "mu" in names else None)


def evaluate(
    protocols: Sequence[Protocol],
    samples: PictureSet,
    reference: Reference,
    networks: Mapping[str, FeatureNetwork],
    *,
    missing: Mapping[str, str] | None = None,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    work: Path | None = None,
    cache: StatisticsCache | None = None,
    page: str | None = None,
) -> Evaluated:
    """Score samples under all protocols. networks: by the names that metrics give; missing: why some are not there.

    accelerator, work: as in `eval.look.look`, of which every process must call this; the first alone gets scores.
    cache: statistics of references. page: the title of a page with intervals, for which features are kept on disk.
    Raises PictureError and FeatureError; of several protocols, one that the reference cannot serve is left out instead.
    """
    result = Evaluated()
    seen_as = partial(look, networks=networks, batch_size=batch_size, accelerator=accelerator)
    served, known = [], {}
    for protocol in protocols:
        wants = [want for want in wanted_of_reference([protocol], reference.pictures) if want.network in networks]
        try:
            known |= reference.statistics(protocol, wants, networks)
            served.append(protocol)
        except (PictureError, RuntimeError) as error:
            if len(protocols) == 1:
                raise
            result.left_out[protocol.name] = {"all": str(error)}
    labels = [it.labels for it in (samples, reference.pictures) if it is not None and it.labels is not None]
    num_classes = int(torch.cat(labels).max()) + 1 if labels else None
    wants = [
        want
        for want in wanted_of_reference(served, reference.pictures)
        if want.network in networks and want not in known
    ]
    more = wanted_for_page(served, samples, reference.pictures, networks) if page else ([], [])
    wants += [want for want in more[1] if want not in known and want not in wants]
    theirs: Seen = known
    if wants and reference.pictures is not None:
        audit = Audit(reference.pictures.name, num_classes=num_classes)
        theirs = known | _seen_or_cached(
            reference.pictures, wants, audit, networks, cache, partial(seen_as, work=work and work / "reference")
        )
        result.audits["reference"] = audit
    counts = {protocol.count for protocol in served}
    audit = Audit(samples.name, counts.pop() if len(counts) == 1 else None, num_classes)
    ours = seen_as(
        samples,
        [*dict.fromkeys([it for it in wanted_of_samples(served, samples) if it.network in networks] + more[0])],
        audit=audit,
        originals=reference.pictures,
        work=work and work / "samples",
    )
    result.audits = {"samples": audit, **result.audits}
    if accelerator is not None and not accelerator.is_main_process:
        return result
    for protocol in served:
        scored = score(protocol, ours, theirs, missing)
        result.scores += scored.scores
        if scored.left_out:
            result.left_out[protocol.name] = dict(scored.left_out)
    if page:
        result.intervals = all_intervals(served, result.scores, ours, theirs)
        shown = evaluation_page(
            page, result.scores, result.intervals, result.audits, samples, reference.pictures, ours, theirs
        )
        result.pages.append(shown)
    return result


def _seen_or_cached(
    pictures: PictureSet,
    wants: Sequence[Want],
    audit: Audit,
    networks: Mapping[str, FeatureNetwork],
    cache: StatisticsCache | None,
    seen_as: Any,
) -> Seen:
    """With a cache the pictures are read once for their checksum, and only what it lacks is asked of the networks."""
    if cache is None or pictures.floats:
        return seen_as(pictures, wants, audit=audit)
    for number, batch in enumerate(pictures.batches(64)):
        labels = None if pictures.labels is None else pictures.labels[64 * number :][: len(batch)]
        audit.update(batch, labels)
    known = cache.known(audit.sha256(), wants, networks)
    made = seen_as(pictures, [want for want in wants if want not in known])
    cache.keep(made)
    named = {
        want: replace(each, pictures=replace(each.pictures, name=pictures.name, origin=pictures.origin))
        for want, each in known.items()
    }
    return {**named, **made}
