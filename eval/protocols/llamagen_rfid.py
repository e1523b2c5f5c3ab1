"""Reconstruction as LlamaGen scores its tokenizers: rFID against the very pictures that were reconstructed.

PSNR is of quantised reconstructions. SSIM has scikit-image's window and twice the true range, which raises it.
"""

from eval.metrics import frechet, of_pairs
from eval.protocol import Protocol

LLAMAGEN_RFID = Protocol(
    name="llamagen-rfid",
    source="Sun et al. 2024, arXiv:2406.06525, table 1; github.com/FoundationVision/LlamaGen tokenizer/validation",
    metrics=(
        frechet("inception/tf1", "2048", "rfid"),
        of_pairs("pixels/llamagen", "psnr", "psnr_db", "PSNR 10 log10(255^2 / MSE) in dB, mean over pictures"),
        of_pairs("pixels/llamagen", "ssim", "ssim", "SSIM, uniform window 7, range 510, mean over pictures"),
    ),
    count=50_000,
    class_sampling=None,
    uint8="trunc_128",
    reference="ImageNet's 50,000 validation pictures, centre crops: the originals",
)
