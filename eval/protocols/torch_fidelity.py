"""torch-fidelity 0.4.0: FID, Inception Score, KID, and precision and recall on the same features.

Its own precision and recall are on VGG16 unless told otherwise; here they are on Inception, in one pass with the rest.
"""

from eval.metrics import FID, IS_SHUFFLED, kernel_distance, kynkaanniemi
from eval.protocol import Protocol

TORCH_FIDELITY = Protocol(
    name="torch-fidelity",
    source="Obukhov et al. 2020, github.com/toshas/torch-fidelity 0.4.0",
    metrics=(FID, IS_SHUFFLED, kernel_distance("inception/tf1", "2048"), kynkaanniemi("inception/tf1", "2048")),
    count=50_000,
    class_sampling="balanced",
    uint8="round",
    reference="the pictures that are given",
)
