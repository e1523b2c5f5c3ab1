"""The room's error, and the one way it says that a name is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


class DataError(ValueError):
    """Data that is missing, damaged, or not what was asked for. The message names the place and the cure."""


class CorruptImage(DataError):
    """One picture that cannot be decoded."""


class CorruptVideo(DataError):
    """One video that cannot be decoded, or holds less than it says."""


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """Raises DataError with the nearest valid names when `name` is not one of `known`."""
    known = list(known)
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        raise DataError(f"{what} {name!r} is not known; {hint}")
