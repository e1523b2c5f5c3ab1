"""FID of single frames: every frame of the clips as a picture, blind to motion; the part of FVD that stills explain.

The network and the covariance are those of torch-fidelity; samples are videos of any length.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.metrics import frechet

FRAME_FID = ClipProtocol(
    name="frame-fid",
    source="Heusel et al. 2017, arXiv:1706.08500, on the frames of clips",
    metrics=(frechet("inception/tf1", "2048", "frame_fid"),),
    count=None,
    class_sampling=None,
    uint8="round",
    reference="all 16-frame clips that lie end to end in the real videos",
    made=Cut("whole", None),
    cut=Cut("consecutive"),
    fit="larp",
    single_frames=True,
)
