"""CMMD: a kernel distance of CLIP embeddings, without the assumption of Gaussians and with little bias."""

from eval.metrics import clip_discrepancy
from eval.protocol import Protocol

CMMD = Protocol(
    name="cmmd",
    source="Jayasumana et al. 2024, arXiv:2401.09603; github.com/google-research/google-research cmmd",
    metrics=(clip_discrepancy("clip", "image_embedding"),),
    count=30_000,
    class_sampling="balanced",
    uint8="round",
    reference="the pictures that are given",
)
