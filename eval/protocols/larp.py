"""FVD as LARP and NAR report it: TensorFlow's I3D, clips kept as floats, covariances over n.

Source: LARP (arXiv:2410.21264, table 1), whose file NAR (arXiv:2503.10696) uses unchanged.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.i3d import LAYER
from eval.metrics import frechet
from eval.protocol import UNROUNDED

SOURCE = "LARP, arXiv:2410.21264; github.com/hywang66/LARP sample.py, eval/rfvd_evaluator.py"

LARP = ClipProtocol(
    name="larp",
    source=SOURCE,
    metrics=(frechet("i3d/larp", LAYER, "fvd", divisor="n"),),
    count=10_000,
    class_sampling="random",
    uint8=UNROUNDED,
    reference="10,000 of all 16-frame clips that lie end to end in UCF-101's training videos of split 1, seed 42",
    made=Cut("whole"),
    cut=Cut("larp", count=10_000, seed=42),
    fit="larp",
)

LARP_RECONSTRUCTION = ClipProtocol(
    name="larp-reconstruction",
    source=SOURCE,
    metrics=(frechet("i3d/larp", LAYER, "rfvd", divisor="n"),),
    count=None,
    class_sampling=None,
    uint8=UNROUNDED,
    reference="the originals of the reconstructions: a 16-frame window from each of UCF-101's training videos of split 1",
    made=Cut("whole"),
    cut=Cut("random"),
    fit="larp",
)
