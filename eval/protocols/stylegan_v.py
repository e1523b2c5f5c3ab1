"""FVD as StyleGAN-V reports it, in its three lengths: TensorFlow's I3D, uint8 clips, covariances over n.

Source: StyleGAN-V (arXiv:2112.14683), metrics fvd2048_16f, fvd2048_128f and fvd2048_128f_subsample8f. The real videos
are frames of the samples' size; a video gives one clip from a random start, which is drawn without a seed there. The
first 2,048 videos with length * stride frames are taken.
"""

from eval.clip_sets import Cut
from eval.fvd import ClipProtocol
from eval.i3d import LAYER
from eval.metrics import frechet


def _preset(name: str, value: str, length: int, stride: int = 1) -> ClipProtocol:
    return ClipProtocol(
        name=name,
        source="StyleGAN-V, arXiv:2112.14683; github.com/universome/stylegan-v src/metrics/frechet_video_distance.py",
        metrics=(frechet("i3d/stylegan-v", LAYER, value, divisor="n"),),
        count=2048,
        class_sampling="random",
        uint8="trunc_128",
        reference=f"a clip from each of the first 2,048 training videos that have {length * stride} frames",
        made=Cut("first", length, stride),
        cut=Cut("random", length, stride, count=2048),
        fit="stylegan-v",
    )


STYLEGAN_V = _preset("stylegan-v", "fvd_16f", 16)
STYLEGAN_V_128 = _preset("stylegan-v-128f", "fvd_128f", 128)
STYLEGAN_V_EVERY_8TH = _preset("stylegan-v-128f-subsample8f", "fvd_128f_subsample8f", 16, 8)
