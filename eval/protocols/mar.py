"""MAR, xAR, HiMAR and CSpD: ADM's statistics of the training pictures, torch-fidelity's features and splits."""

from eval.gather import Moments
from eval.metrics import FID, IS_SHUFFLED
from eval.protocol import Protocol

MAR = Protocol(
    name="mar",
    source="Li et al. 2024, arXiv:2406.11838; github.com/LTH14/mar engine_mar.py, with its fork of torch-fidelity",
    metrics=(FID, IS_SHUFFLED),
    count=50_000,
    class_sampling="balanced",
    uint8="round",
    reference="adm_in256_stats.npz: mu and sigma of VIRTUAL_imagenet256_labeled.npz",
    arrays={Moments("2048"): ("mu", "sigma")},
)
