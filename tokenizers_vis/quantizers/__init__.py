"""Vectors to codes of a finite set and back, one file a scheme.

Each is a `Quantizer` (protocol.py), built from plain values: `vector` (VQ, cosine, stochastic, EMA, SimVQ), `fsq`,
`lfq` (LFQ and BSQ), `residual`. Beside them, as pure functions: `usage` (how much of a codebook is used), `entropy`
(the entropy terms), `revival` (new vectors for dead codes).
"""

from tokenizers_vis.quantizers.fsq import FSQ
from tokenizers_vis.quantizers.lfq import LFQ
from tokenizers_vis.quantizers.protocol import Quantized, Quantizer
from tokenizers_vis.quantizers.residual import ResidualQuantizer
from tokenizers_vis.quantizers.vector import (
    EMAVectorQuantizer,
    SimVQ,
    StochasticVectorQuantizer,
    VectorQuantizer,
)

CLASSES = {
    made.__name__: made
    for made in (
        VectorQuantizer,
        StochasticVectorQuantizer,
        EMAVectorQuantizer,
        SimVQ,
        FSQ,
        LFQ,
        ResidualQuantizer,
    )
}

__all__ = ["CLASSES", "Quantized", "Quantizer", *CLASSES]
