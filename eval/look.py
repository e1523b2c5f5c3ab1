"""One pass over a set of pictures: every network runs once, whatever is asked of it is kept, and the set is audited.

    wants = [Want("inception/tf1", Moments("2048")), Want("inception/tf1", Splits("logits", splits=10, seed=2020))]
    seen = look(pictures, wants, {"inception/tf1": network}, audit=audit)
    seen[wants[0]].value                                            # a Gaussian, beside all that it depends on

Several processes each take a share; their sums are added up, and rows go by number into one file of the work folder,
so the outcome is the same. With a work folder an interrupted pass is taken up where it was last saved.
"""

import hashlib
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from eval.audit import Audit, Facts, facts
from eval.features import FeatureNetwork, NetworkRecord
from eval.gather import Gathering, Keeper, RowFile
from eval.pictures import PictureError, PictureSet, check_pictures, checksums, rounded
from eval.pixels import UINT8_RULES
from eval.progress import Part, Span, joined, missing, read_parts, share, write_part
from eval.protocol import UNROUNDED
from eval.provenance import Computation, PicturesRecord, library_versions

T = TypeVar("T")
SAVE_EVERY = 4096  # pictures
ORIGINALS = "originals"  # in the place of a rule, where their audit is kept
AHEAD = 2  # batches that are read while the networks are at work


@dataclass(frozen=True)
class Want:
    """A gathering of what a network says of pictures. rule: how float pictures become uint8; None: they are uint8."""

    network: str
    gathering: Gathering
    rule: str | None = None
    pairs: bool = False


@dataclass(frozen=True)
class Gathered:
    """What was wanted, and all that it depends on. originals: of pairs."""

    value: Any
    network: NetworkRecord
    pictures: PicturesRecord
    computation: Computation
    originals: PicturesRecord | None = None


Seen = Mapping[Want, Gathered]


@torch.inference_mode()
def look(
    pictures: PictureSet,
    wants: Iterable[Want],
    networks: Mapping[str, FeatureNetwork],
    batch_size: int = 64,
    *,
    audit: Audit | None = None,
    originals: PictureSet | None = None,
    accelerator: Accelerator | None = None,
    work: Path | None = None,
) -> Seen:
    """Run all pictures through the networks. Every process calls it, and every one gets the whole.

    audit: takes in the set under the first rule. originals: what wants of pairs show beside each picture. work: a
    folder of this pass alone, where it is saved every SAVE_EVERY pictures and taken up; several processes need one.
    Raises PictureError where the set does not hold what it says or cannot be scored, naming the picture.
    """
    wants = list(dict.fromkeys(wants))
    if not wants:
        return {}
    if not any(want.pairs for want in wants):
        originals = None
    elif originals is None or originals.count != pictures.count:
        theirs = "none" if originals is None else f"{originals.count} in {originals.name}"
        raise PictureError(
            f"{pictures.name}: {pictures.count} reconstructions need as many originals in the same order, got {theirs}"
        )
    if accelerator is not None and accelerator.num_processes > 1 and work is None:
        raise ValueError("look: several processes need a work folder that all of them see")
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        walk = _Walk(pictures, wants, networks, batch_size, audit, originals, folder, save=work is not None)
        walk.go(accelerator)
        walk.join(accelerator)
        return walk.results(audit)


class _Walk:
    """A pass under way in one process."""

    def __init__(
        self,
        pictures: PictureSet,
        wants: list[Want],
        networks: Mapping[str, FeatureNetwork],
        batch_size: int,
        audit: Audit | None,
        originals: PictureSet | None,
        folder: Path,
        save: bool,
    ) -> None:
        self.pictures, self.wants, self.networks, self.batch_size = pictures, wants, networks, batch_size
        self.originals, self.save = originals, save
        self.asked = Audit(pictures.name) if audit is None else audit
        self.rules = list(dict.fromkeys(want.rule for want in wants))
        plan = [
            pictures.name,
            pictures.count,
            pictures.origin,
            wants,
            [networks[want.network].record for want in wants],
        ]
        key = hashlib.sha256(repr(plan).encode()).hexdigest()[:16]
        self.folder = folder / key
        self.folder.mkdir(exist_ok=True)
        self.part = self.folder / f"{uuid.uuid4().hex}.part"
        self.spans: list[Span] = []
        self.keepers: dict[Want, Keeper] = {}
        self.audits = self._new_audits()
        self.shape: torch.Size | None = None
        self.pending: deque[tuple[Future[Facts], str | None, Tensor]] = deque()

    def go(self, accelerator: Accelerator | None) -> None:
        """Take up what is on disk, and look at this process's share of the rest."""
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        parts = read_parts(self.folder)
        done = [span for part in parts for span in part.spans]
        if rank == 0:
            self._take_up(parts)
        if accelerator is not None:
            accelerator.wait_for_everyone()  # all have read the parts before the first new one is written
        mine = share(missing(self.pictures.count, done), rank, world, self.batch_size)
        total = sum(stop - start for start, stop in mine)
        bar = tqdm(
            total=total, desc=self.pictures.name, unit="picture", disable=None if rank == 0 else True, leave=False
        )
        with bar, ThreadPoolExecutor() as pool:
            since = 0
            for start, stop in mine:
                for batch, originals in self._batches(start, stop):
                    self._see(batch, originals, start, pool)
                    self.spans.append((start, start + len(batch)))
                    start, since = start + len(batch), since + len(batch)
                    bar.update(len(batch))
                    if self.save and since >= SAVE_EVERY:
                        self._save()
                        since = 0
            self._take_in(0)
            if self.save and since:
                self._save()

    def join(self, accelerator: Accelerator | None) -> None:
        """Add up what all processes have gathered."""
        if accelerator is None or accelerator.num_processes == 1:
            return
        widths = {want: keeper.width for want, keeper in self.keepers.items()}
        for known in gather_object([widths]):  # of a process without a share
            for want, width in known.items():
                self._keeper(want, width)
        for want in self.wants:
            mine = self.keepers.pop(want)
            total = {
                name: accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)
                for name, tensor in mine.sums().items()
            }
            self._keeper(want, mine.width).add(total)
        mine = {rule: audit.sums() for rule, audit in self.audits.items()}
        self.audits = self._new_audits()
        for known in gather_object([mine]):
            for rule, sums in known.items():
                self.audits[rule].add(sums)
        accelerator.wait_for_everyone()  # rows of the others are written

    def results(self, audit: Audit | None) -> Seen:
        first = self.audits[self.rules[0]]
        if audit is not None:
            audit.add(first.sums())
        if first.count != self.pictures.count:
            raise PictureError(f"{self.pictures.name}: said to hold {self.pictures.count} pictures, gave {first.count}")
        records = {rule: self._record(rule) for rule in self.audits}
        seen = {}
        for want in self.wants:
            network = self.networks[want.network]
            dtype = str(network.dtype).removeprefix("torch.")
            computation = Computation(str(network.device), dtype, self.batch_size, library_versions())
            try:
                value = self.keepers[want].result()
            except ValueError as error:
                raise PictureError(f"{self.pictures.name}: {error}") from error
            originals = records[ORIGINALS] if want.pairs else None
            seen[want] = Gathered(value, network.record, records[want.rule], computation, originals)
        return seen

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        mine = self.pictures.batches(self.batch_size, start, stop)
        theirs = self.originals and self.originals.batches(self.batch_size, start, stop)
        both = ((batch, None) for batch in mine) if theirs is None else zip(mine, theirs, strict=True)
        return _ahead(both, AHEAD)

    def _see(self, batch: Tensor, originals: Tensor | None, start: int, pool: ThreadPoolExecutor) -> None:
        name, index = self.pictures.name, torch.arange(start, start + len(batch))
        labels = None if self.pictures.labels is None else self.pictures.labels[index]
        self.shape = batch.shape[1:] if self.shape is None else self.shape
        if batch.shape[1:] != self.shape:
            raise PictureError(
                f"{name}: picture {start} is {_by(batch.shape[1:])}, those before are {_by(self.shape)}; "
                "a score needs one size: bring all to it by a stated rule first"
            )
        for rule in self.rules:
            grey = batch if rule is None else rounded(name, batch, "round" if rule == UNROUNDED else rule, start)
            check_pictures(name, grey)
            self.pending.append((pool.submit(facts, name, grey), rule, index))
            shown = ((batch.float().clamp(-1, 1) + 1) * 127.5) if rule == UNROUNDED else grey
            self._ask(shown, originals, rule, index, labels)
        if originals is not None:
            self.pending.append((pool.submit(facts, self.originals.name, originals), ORIGINALS, index))
        self._take_in(2 * (os.cpu_count() or 1))

    def _ask(
        self, shown: Tensor, originals: Tensor | None, rule: str | None, index: Tensor, labels: Tensor | None
    ) -> None:
        """Run every network that is wanted under the rule, once on the pictures and once on pairs."""
        wants = [want for want in self.wants if want.rule == rule]
        for name, pairs in dict.fromkeys((want.network, want.pairs) for want in wants):
            network = self.networks[name]
            if pairs and originals.shape != shown.shape:
                raise PictureError(
                    f"{self.pictures.name}: reconstructions {tuple(shown.shape)} of originals {tuple(originals.shape)}"
                )
            given = torch.stack((shown, originals.to(shown)), dim=1) if pairs else shown
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                outputs = network.extract(given.to(network.device, non_blocking=True))
            for want in wants:
                if (want.network, want.pairs) == (name, pairs):
                    output = outputs[want.gathering.output]
                    try:
                        self._keeper(want, output[0].numel()).update(output, index, labels)
                    except ValueError as error:
                        raise PictureError(f"{self.pictures.name}: {error}") from error

    def _keeper(self, want: Want, width: int) -> Keeper:
        if want not in self.keepers:
            network = self.networks[want.network]
            file = RowFile(self.folder / f"{self.wants.index(want)}.rows", network.dtype)
            self.keepers[want] = want.gathering.keeper(self.pictures.count, width, network.device, file)
        return self.keepers[want]

    def _take_in(self, left: int) -> None:
        """Facts that are ready go into the audits, in order, until `left` are under way."""
        while len(self.pending) > left:
            found, rule, index = self.pending.popleft()
            theirs = self.originals if rule == ORIGINALS else self.pictures
            labels = None if theirs.labels is None else theirs.labels[index]
            self.audits[rule].take(found.result(), labels, index)

    def _save(self) -> None:
        self._take_in(0)
        tensors = {"shape": torch.tensor(self.shape)}
        for number, want in enumerate(self.wants):
            tensors[f"{number}.width"] = torch.tensor(self.keepers[want].width)
            tensors |= {f"{number}.{name}": tensor for name, tensor in self.keepers[want].sums().items()}
        for number, audit in enumerate(self.audits.values()):
            tensors |= {f"audit{number}.{name}": tensor for name, tensor in audit.sums().items()}
        self.spans = joined(self.spans)
        write_part(self.part, Part(tuple(self.spans), tensors))

    def _take_up(self, parts: list[Part]) -> None:
        for part in parts:
            self._check_unchanged(part)
            self.shape = torch.Size(part.tensors["shape"].tolist())
            for number, want in enumerate(self.wants):
                keeper = self._keeper(want, int(part.tensors[f"{number}.width"]))
                keeper.add(_under(part.tensors, f"{number}."))
            for number, audit in enumerate(self.audits.values()):
                audit.add(_under(part.tensors, f"audit{number}."))
            self.spans += part.spans

    def _check_unchanged(self, part: Part) -> None:
        """The first picture of a part must be what it was. Samples that are decoded now are what their origin says."""
        if self.pictures.floats:
            return
        number = part.spans[0][0]
        before = Audit(self.pictures.name)
        before.add(_under(part.tensors, "audit0."))
        if before.checksum(number) != checksums(next(self.pictures.batches(1, number, number + 1)))[0]:
            raise PictureError(
                f"{self.pictures.name}: picture {number} is another than when this evaluation was interrupted; "
                f"remove {self.folder.parent} to begin anew"
            )

    def _new_audits(self) -> dict[str | None, Audit]:
        """One for what each rule makes of the pictures, and one for the originals beside them."""
        asked = self.asked
        of_rules = {rule: Audit(self.pictures.name, asked.expected, asked.num_classes) for rule in self.rules}
        return of_rules | ({ORIGINALS: Audit(self.originals.name)} if self.originals is not None else {})

    def _record(self, rule: str | None) -> PicturesRecord:
        audit = self.audits[rule]
        origin = self.originals.origin if rule == ORIGINALS else self.pictures.origin
        if rule not in (None, ORIGINALS):
            rounding = "none, floats clamped to their range" if rule == UNROUNDED else UINT8_RULES[rule]
            origin = replace(origin, quantisation=rounding)
        *frames, height, width = next(iter(audit.sizes()))
        frames = frames[0] if frames else 1
        return PicturesRecord(audit.name, audit.sha256(), audit.count, height, width, origin, frames)


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, made in another thread up to `depth` before they are asked for."""
    with ThreadPoolExecutor(1) as reader:
        queue = deque(reader.submit(next, items, None) for _ in range(depth))
        while (item := queue.popleft().result()) is not None:
            queue.append(reader.submit(next, items, None))
            yield item


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, list(shape)[1:]))
