"""Samples that cannot be read: in training they are named, counted and passed over, up to a limit."""

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from data.errors import CorruptImage, CorruptVideo, DataError, check_name

log = logging.getLogger(__name__)
Content = TypeVar("Content")


class Skips:
    """Which of `count` samples could not be read, in one table for all workers of a process.

    name: of the set; what: one of its samples is called; filename: of a sample. on_corrupt, max_corrupt: see open_set.
    """

    def __init__(
        self, name: str, what: str, count: int, on_corrupt: Literal["skip", "error"], max_corrupt: int
    ) -> None:
        check_name(on_corrupt, ("skip", "error"), "on_corrupt")
        self.name, self.what = name, what
        self.on_corrupt, self.max_corrupt = on_corrupt, max_corrupt
        self._corrupt = torch.zeros(count, dtype=torch.bool).share_memory_()

    @property
    def numbers(self) -> list[int]:
        """The unreadable samples met so far."""
        return self._corrupt.nonzero().flatten().tolist()

    def read(self, index: int, read: Callable[[int], Content], filename: Callable[[int], str]) -> tuple[int, Content]:
        """Sample `index`, or the next one that can be read, and its number.

        Raises CorruptImage or CorruptVideo where nothing is to be skipped, DataError listing the files when they are
        more than `max_corrupt`.
        """
        if self.on_corrupt == "error":
            return index, read(index)
        for place in ((index + step) % len(self._corrupt) for step in range(len(self._corrupt))):
            if not self._corrupt[place]:
                try:
                    return place, read(place)
                except (CorruptImage, CorruptVideo) as error:
                    self._count(place, error, filename)
        raise DataError(f"{self.name}: not one {self.what} can be read, the first is {filename(0)}; copy them again")

    def _count(self, index: int, error: DataError, filename: Callable[[int], str]) -> None:
        self._corrupt[index] = True
        count = int(self._corrupt.sum())
        log.warning("%s; skipped, %d of at most %d", error, count, self.max_corrupt)
        if count > self.max_corrupt:
            raise DataError(
                f"{self.name}: {count} {self.what}s cannot be read, max_corrupt is {self.max_corrupt}; "
                "replace them, or allow more:\n  " + "\n  ".join(map(filename, self.numbers))
            ) from error
