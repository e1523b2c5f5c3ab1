"""Reconstruction as Open-MAGVIT2 and IBQ score their tokenizers: floats reach the network of pytorch-fid unrounded.

PSNR and SSIM are of both sides brought to uint8 by truncation. LPIPS is of floats.
"""

from eval.metrics import frechet, of_pairs
from eval.protocol import UNROUNDED, Protocol

LPIPS = "LPIPS 0.1 ({}), mean over pictures"

SEED_VOKEN_RFID = Protocol(
    name="seed-voken-rfid",
    source="Open-MAGVIT2, arXiv:2409.04410; IBQ, arXiv:2412.02692; github.com/TencentARC/SEED-Voken evaluation_image.py",
    metrics=(
        frechet("inception/pytorch", "2048", "rfid"),
        of_pairs("pixels/truncated", "psnr", "psnr_db", "PSNR 10 log10(255^2 / MSE) in dB, mean over pictures"),
        of_pairs("pixels/truncated", "ssim", "ssim", "SSIM, uniform window 7, range 255, mean over pictures"),
        of_pairs("lpips/alex", "lpips", "lpips_alex", LPIPS.format("alex")),
        of_pairs("lpips/vgg", "lpips", "lpips_vgg", LPIPS.format("vgg")),
    ),
    count=50_000,
    class_sampling=None,
    uint8=UNROUNDED,
    reference="ImageNet's 50,000 validation pictures, centre crops: the originals",
)
