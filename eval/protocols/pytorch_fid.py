"""pytorch-fid: torch's bilinear resizer in the place of TensorFlow's."""

from eval.gather import Moments
from eval.metrics import FID_PYTORCH
from eval.protocol import Protocol

PYTORCH_FID = Protocol(
    name="pytorch-fid",
    source="Seitzer 2020, github.com/mseitzer/pytorch-fid 0.3.0",
    metrics=(FID_PYTORCH,),
    count=50_000,
    class_sampling="balanced",
    uint8="round",
    reference="the pictures that are given, or an npz with their mu and sigma",
    arrays={Moments("2048"): ("mu", "sigma")},
)
