"""How far a walk over many pictures has come: shares for processes, and parts on disk to go on from.

A part is what one process has gathered, as sums, with the numbers of the pictures that are in them. Parts that do not
overlap are added up, whoever made them; a later part of a process takes the place of the earlier ones it contains.
So a walk that was interrupted goes on with any number of processes.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.files import write_file

Span = tuple[int, int]  # the numbers from the first to before the second


@dataclass(frozen=True)
class Part:
    spans: tuple[Span, ...]
    tensors: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        return sum(stop - start for start, stop in self.spans)


def write_part(path: Path, part: Part) -> None:
    """Atomically, in the place of an earlier state of the same part."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}
    write_file(path, lambda draft: save_file(tensors, draft, {"spans": json.dumps(part.spans)}))


def read_parts(folder: Path) -> list[Part]:
    """The parts of a folder that add up: none overlaps another."""
    found = []
    for path in sorted(folder.glob("*.part")):
        with safe_open(path, framework="pt") as file:
            spans = tuple(map(tuple, json.loads(file.metadata()["spans"])))
            found.append(Part(spans, {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    kept: list[Part] = []
    for part in sorted(found, key=lambda part: -part.count):
        taken = [span for other in kept for span in other.spans]
        if not any(start < end and begin < stop for start, stop in part.spans for begin, end in taken):
            kept.append(part)
    return kept


def missing(count: int, spans: Iterable[Span]) -> list[Span]:
    """What `spans` leave of 0 .. count - 1, in order."""
    left, place = [], 0
    for start, stop in sorted(spans):
        if place < start:
            left.append((place, start))
        place = max(place, stop)
    return [*left, (place, count)] if place < count else left


def share(spans: Iterable[Span], rank: int, world: int, block: int) -> list[Span]:
    """What process `rank` of `world` takes of them: whole blocks, those that begin at multiples of `block`, in a row.

    So every block passes as one batch, whatever the number of processes.
    """
    blocks = []
    for start, stop in spans:
        cuts = [start, *range((start // block + 1) * block, stop, block), stop]
        blocks += pairwise(cuts)
    mine = blocks[rank * len(blocks) // world : (rank + 1) * len(blocks) // world]
    return joined(mine)


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same numbers in order, in as few spans as can be."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found
