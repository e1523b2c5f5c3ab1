"""Pixels to tokens and back: what a record may name, and the families whose published weights load."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from layers.record import look_up
from tokenizers_vis import quantizers
from tokenizers_vis.d_ar import DARTokenizer
from tokenizers_vis.d_ar_published import d_ar_from_published
from tokenizers_vis.flextok import FlexTokTokenizer
from tokenizers_vis.flextok_published import flextok_from_published
from tokenizers_vis.kl import KLTokenizer, kl16_from_published
from tokenizers_vis.larp import LARPTokenizer, larp_from_published
from tokenizers_vis.maskgit_vq import MaskGITVQTokenizer, maskgit_vqgan_from_published
from tokenizers_vis.multiscale_vq import DirectionQuantizer, MultiScaleVQTokenizer, var_vqvae_from_published
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.titok import CodeMixture, TiTokTokenizer, titok_from_published
from tokenizers_vis.vq import VQTokenizer, llamagen_vq_from_published

CLASSES = {
    **{
        made.__name__: made
        for made in (
            VQTokenizer,
            MultiScaleVQTokenizer,
            DirectionQuantizer,
            KLTokenizer,
            MaskGITVQTokenizer,
            LARPTokenizer,
            TiTokTokenizer,
            FlexTokTokenizer,
            DARTokenizer,
            CodeMixture,
        )
    },
    **quantizers.CLASSES,
}
PUBLISHED = {
    "llamagen-vq": llamagen_vq_from_published,
    "var-vqvae": var_vqvae_from_published,
    "kl16-vae": kl16_from_published,
    "maskgit-vqgan": maskgit_vqgan_from_published,
    "larp": larp_from_published,
    "titok": titok_from_published,
    "flextok": flextok_from_published,
    "d-ar": d_ar_from_published,
}


def from_published(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of `family` with the tensors of an original checkpoint, under its original constructor arguments.

    Raises layers.keymap.CheckpointMismatch naming every key that does not fit; UnknownName for a family or an argument
    that is not known.
    """
    return look_up(family, PUBLISHED, "published tokenizer family")(state, config)
