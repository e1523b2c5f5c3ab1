"""Orders of prediction: interchangeable generators, and the published ones among them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from generators.mar import MAR, mar_from_published
from generators.masked import Masked, maskgit_from_published
from generators.neighboring import Neighboring, nar_from_published, nar_video_from_published
from generators.next_entity import ENTITIES, XAR, xar_from_published
from generators.next_scale import NextScale, mvar_from_published, var_from_published
from generators.next_token import NextToken, d_ar_from_published, larp_ar_from_published, llamagen_from_published
from generators.protocol import Generator
from generators.rar import RAR, rar_from_published
from layers.record import look_up

CLASSES = {**{made.__name__: made for made in (NextToken, NextScale, MAR, Masked, XAR, Neighboring, RAR)}, **ENTITIES}
PUBLISHED = {
    "llamagen": llamagen_from_published,
    "larp": larp_ar_from_published,
    "var": var_from_published,
    "mvar": mvar_from_published,
    "mar": mar_from_published,
    "maskgit": maskgit_from_published,
    "xar": xar_from_published,
    "nar": nar_from_published,
    "nar-video": nar_video_from_published,
    "rar": rar_from_published,
    "d-ar": d_ar_from_published,
}


def from_published(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any], **given: Any) -> Generator:
    """The generator of `family` with the tensors of an original checkpoint, under its original constructor arguments.

    given: what no checkpoint of the generator holds (`reader`, for those that feed on one).
    Raises layers.keymap.CheckpointMismatch naming every key that does not fit; UnknownName for a family not known.
    """
    return look_up(family, PUBLISHED, "published generator family")(state, config, **given)
