"""FVD of the torch port of I3D, as VideoGPT and TATS report it: clips floored to uint8, covariances over n - 1.

Sources: VideoGPT (arXiv:2104.10157), whose script compares 256 clips and averages trials; TATS (arXiv:2204.03638),
2,048 clips. Both take the matrix square root in float32, which moves the value by up to 1e-3 of it; here it is float64.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.i3d import LAYER
from eval.metrics import frechet

VIDEOGPT = ClipProtocol(
    name="videogpt",
    source="TATS, arXiv:2204.03638, after VideoGPT, arXiv:2104.10157; github.com/wilson1yan/VideoGPT scripts/compute_fvd.py",
    metrics=(frechet("i3d-videogpt/videogpt", LAYER, "fvd"),),
    count=2048,
    class_sampling="random",
    uint8="trunc",
    reference="a 16-frame clip from a random start in each of 2,048 videos",
    made=Cut("whole"),
    cut=Cut("random", count=2048),
    fit="videogpt",
)
