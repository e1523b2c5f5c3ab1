"""The Fréchet distance on DINOv2's class token, which human judgement agrees with better than with FID."""

from eval.metrics import frechet
from eval.protocol import Protocol

FD_DINOV2 = Protocol(
    name="fd-dinov2",
    source="Stein et al. 2023, arXiv:2306.04675; github.com/layer6ai-labs/dgm-eval",
    metrics=(frechet("dinov2", "class_token", "fd_dinov2"),),
    count=50_000,
    class_sampling="balanced",
    uint8="round",
    reference="the training pictures that are given",
)
