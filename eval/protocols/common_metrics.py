"""FVD of the package common_metrics_on_video_quality: TensorFlow's I3D, shorter side resized, covariances over n - 1.

Its other method, the torch port, is the protocol `videogpt`. The package compares two arrays of equal shape and asks
for no number of clips, so its numbers compare only at an equal number.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.i3d import LAYER
from eval.metrics import frechet
from eval.protocol import UNROUNDED

COMMON_METRICS = ClipProtocol(
    name="common-metrics",
    source="github.com/JunyaoHu/common_metrics_on_video_quality calculate_fvd.py, method styleganv",
    metrics=(frechet("i3d/common-metrics", LAYER, "fvd"),),
    count=None,
    class_sampling=None,
    uint8=UNROUNDED,
    reference="as many real clips as samples, of the same number of frames",
    made=Cut("whole", None),
    cut=Cut("whole", None),
)
