"""From hidden state to token: interchangeable heads, each built as head(width, spec), and the published ones among them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heads.categorical import Categorical
from heads.diffusion import DiffusionHead, mar_diffloss_from_published
from heads.flow import FieldHead, FlowHead, RectifiedFlowHead
from heads.fourier import FourierBins, FourierDensity, fourier_head_from_published
from heads.mixture import MixtureHead
from heads.neighbour import Neighbour
from heads.protocol import Head
from layers.record import look_up

CLASSES = {
    made.__name__: made
    for made in (
        Categorical,
        DiffusionHead,
        FieldHead,
        FlowHead,
        FourierBins,
        FourierDensity,
        MixtureHead,
        Neighbour,
        RectifiedFlowHead,
    )
}
PUBLISHED = {"mar-diffloss": mar_diffloss_from_published, "fourier-head": fourier_head_from_published}


def from_published(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Head:
    """The head of `family` with the tensors of an original checkpoint, under its original constructor arguments.

    Raises layers.keymap.CheckpointMismatch naming every key that does not fit; UnknownName for a family or an argument
    that is not known.
    """
    return look_up(family, PUBLISHED, "published head family")(state, config)
