"""Orders of prediction: interchangeable generators, and the published ones among them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from generators.next_token import NextToken, llamagen_from_published
from generators.protocol import Generator
from layers.record import look_up

CLASSES = {made.__name__: made for made in (NextToken,)}
PUBLISHED = {"llamagen": llamagen_from_published}


def from_published(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Generator:
    """The generator of `family` with the tensors of an original checkpoint, under its original constructor arguments.

    Raises layers.keymap.CheckpointMismatch naming every key that does not fit; UnknownName for a family not known.
    """
    return look_up(family, PUBLISHED, "published generator family")(state, config)
