"""The evaluator of ADM (guided-diffusion), by which LlamaGen, VAR, TiTok, RAR, PAR, NAR and D-AR report.

Its reference file holds the statistics of all training pictures, which the distances are made with, and 10,000 pictures
for precision and recall. The Inception Score is of consecutive chunks of 5,000 samples in the order of their file.
"""

import torch

from eval.gather import Moments, Splits
from eval.manifold import precision_recall_adm
from eval.metrics import FID, frechet, inception_score, manifold
from eval.protocol import Protocol

CHUNKS = Splits("logits_unbiased", chunk=5000, dtype=torch.float32)

ADM = Protocol(
    name="adm",
    source="Dhariwal and Nichol 2021, arXiv:2105.05233; github.com/openai/guided-diffusion evaluations/evaluator.py",
    metrics=(
        FID,
        frechet("inception/tf1", "spatial", "sfid", value="fd_spatial"),
        inception_score("inception/tf1", CHUNKS, "chunks of 5000 in stored order, float32, logits without bias"),
        manifold(
            "inception/tf1",
            "2048",
            "k = 3, closed balls, squared distances in half precision",
            precision_recall_adm,
            ("precision", "recall"),
        ),
    ),
    count=50_000,
    class_sampling=None,  # LlamaGen, PAR, NAR, D-AR draw classes at random, VAR, TiTok, RAR take 50 of each
    uint8="trunc_128",
    reference="VIRTUAL_imagenet256_labeled.npz: statistics of ImageNet's training pictures, 10,000 pictures of them",
    arrays={Moments("2048"): ("mu", "sigma"), Moments("spatial"): ("mu_s", "sigma_s")},
)
