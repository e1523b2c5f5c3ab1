"""Label accuracy and a distance of its own name, by a classifier trained on the reference's training split.

For data that no published network knows. Numbers compare only between runs that share the classifier's checksum.
"""

from eval.metrics import frechet, label_accuracy, real_accuracy
from eval.protocol import Protocol

CLASSIFIER = Protocol(
    name="classifier",
    source="this project",
    metrics=(
        frechet("classifier", "penultimate", "fd_classifier"),
        label_accuracy("classifier"),
        real_accuracy("classifier"),
    ),
    count=None,
    class_sampling="balanced",
    uint8="trunc_128",
    reference="held-out pictures of the data set that the classifier was trained on",
)
