"""The reconstruction FVD of Open-MAGVIT2's video tokenizer: the torch port of I3D, 17 frames, covariances over n - 1.

Source: SEED-Voken (Open-MAGVIT2, arXiv:2409.04410), evaluation_video.py. There the originals are 10,000 clips of
UCF-101, drawn with repeats, cropped at random, and the matrix square root is in float32; the originals of the very
reconstructions that are scored must be given here.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.i3d import LAYER
from eval.metrics import frechet

SEED_VOKEN_VIDEO = ClipProtocol(
    name="seed-voken-video",
    source="Open-MAGVIT2, arXiv:2409.04410; github.com/TencentARC/SEED-Voken evaluation_video.py",
    metrics=(frechet("i3d-videogpt/seed-voken", LAYER, "rfvd"),),
    count=10_000,
    class_sampling=None,
    uint8="trunc",
    reference="the originals of the reconstructions: the 17 frames around the middle of UCF-101's training videos",
    made=Cut("whole", 17),
    cut=Cut("centre", 17, count=10_000),
    fit="videogpt",
)
