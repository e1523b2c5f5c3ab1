"""clean-fid in its mode "clean": an antialiased resizer in float, and KID on the same features."""

from eval.gather import Moments
from eval.metrics import frechet, kernel_distance
from eval.protocol import Protocol

CLEAN_FID = Protocol(
    name="clean-fid",
    source="Parmar et al. 2022, arXiv:2104.11222; github.com/GaParmar/clean-fid 0.1.35",
    metrics=(
        frechet("inception/clean", "2048", "clean_fid"),
        kernel_distance("inception/clean", "2048", prefix="clean_", deviation=False),
    ),
    count=50_000,
    class_sampling="balanced",
    uint8="round",
    reference="the pictures that are given, or an npz with their mu and sigma",
    arrays={Moments("2048"): ("mu", "sigma")},
)
