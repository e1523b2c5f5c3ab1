"""Pixels to tokens and back: what a record may name, and the families whose published weights load."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from layers.record import look_up
from tokenizers_vis import quantizers
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.vq import VQTokenizer, llamagen_vq_from_published

CLASSES = {"VQTokenizer": VQTokenizer, **quantizers.CLASSES}
PUBLISHED = {"llamagen-vq": llamagen_vq_from_published}


def from_published(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `family` with the tensors of an original checkpoint, under its original constructor arguments.

    Raises layers.keymap.CheckpointMismatch naming every key that does not fit; UnknownName for a family or an argument
    that is not known.
    """
    return look_up(family, PUBLISHED, "published tokenizer family")(state, config)
