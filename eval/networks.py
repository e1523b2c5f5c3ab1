"""The networks that metrics name, and how each is made of weights files on a device.

Pictures come as uint8 (B, 3, H, W) or, unrounded, as float grey levels; clips as (B, 3, T, H, W); pairs of a sample and
its original as (B, 2, 3, H, W).
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval import fvd
from eval.clip import clip_network
from eval.dinov2 import dinov2_network
from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of
from eval.inception import PREPROCESSING, inception_network
from eval.perceptual import lpips_layers, lpips_network
from eval.pixels import from_uint8, to_uint8
from eval.reconstruction import psnr, ssim
from eval.standins import i3d2d_network, rc512_network
from eval.weights import find_weights, is_published, read_state

Device = torch.device | str
Maker = Callable[[Mapping[str, Path], Device], FeatureNetwork]  # weights by their names in `eval.weights.SOURCES`


def pixels_network(variant: str, device: Device = "cpu") -> FeatureNetwork:
    """PSNR and SSIM of pairs, which need no network: outputs "psnr" and "ssim", (B,) each.

    "grey": in grey levels, SSIM with a Gaussian window. "llamagen": SSIM with scikit-image's window and twice the true
    range. "truncated": both sides as 255 (x + 1) / 2, truncated, which darkens 63 of the originals' 256 levels by one.
    """
    record = NetworkRecord(f"pixels, {variant}", "psnr", 1, "none", "grey levels", "none", True)

    def extract(pairs: Tensor) -> dict[str, Tensor]:
        made, real = pairs.unbind(1)
        if variant == "truncated":
            made, real = made.floor(), to_uint8(from_uint8(real), "trunc")
        window, data_range = {
            "grey": ("gaussian11", 255.0),
            "llamagen": ("uniform7", 510.0),
            "truncated": ("uniform7", 255.0),
        }[variant]
        return {"psnr": psnr(made, real), "ssim": ssim(made, real, window, data_range)}

    return FeatureNetwork(record, torch.device(device), torch.float64, extract)


def _inception(preprocessing: str, weights: Mapping[str, Path], device: Device) -> FeatureNetwork:
    return inception_network(weights["inception"], device, preprocessing)


def _pixels(variant: str, weights: Mapping[str, Path], device: Device) -> FeatureNetwork:
    return pixels_network(variant, device)


def _lpips(name: str, weights: Mapping[str, Path], device: Device) -> FeatureNetwork:
    key = f"lpips-{name}"
    path = weights[key]
    sha256 = sha256_of(path)
    published = is_published(key, path, sha256)
    model = lpips_network(name, read_state(path, key)).to(device)
    distance = f"lpips_{name}" if published else f"lpips_{name}_other_weights"
    record = NetworkRecord(f"LPIPS 0.1, {name}", "lpips", 1, sha256, "x / 127.5 - 1", distance, published)

    def extract(pairs: Tensor) -> dict[str, Tensor]:
        return {"lpips": lpips_layers(model, *from_uint8(pairs).unbind(1)).sum(1)}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


NETWORKS: dict[str, Maker] = {
    **{f"inception/{preprocessing}": partial(_inception, preprocessing) for preprocessing in PREPROCESSING},
    **{f"lpips/{name}": partial(_lpips, name) for name in ("alex", "vgg")},
    **fvd.NETWORKS,
    "dinov2": lambda weights, device: dinov2_network(weights["dinov2"], device),
    "clip": lambda weights, device: clip_network(weights["clip"], device),
    **{f"pixels/{variant}": partial(_pixels, variant) for variant in ("grey", "llamagen", "truncated")},
    "rc512": lambda weights, device: rc512_network(device),
    "i3d2d": lambda weights, device: i3d2d_network(weights["i3d"], device),
}
FILES = {
    "inception": "inception",
    "i3d": "i3d",
    "i3d-videogpt": "i3d",
    "i3d2d": "i3d",
    "dinov2": "dinov2",
    "clip": "clip",
}


def open_network(
    name: str, device: Device = "cpu", given: Mapping[str, Path] | None = None, allow_download: bool = False
) -> FeatureNetwork:
    """given: weights files by name, looked at before anything else (`eval.weights.find_weights`).

    Raises FeatureError for a name that is not in NETWORKS, MetricWeightsMissing where its weights cannot be had.
    """
    if name not in NETWORKS:
        raise FeatureError(f"unknown feature network {name!r}; known: {', '.join(NETWORKS)}")
    family, _, variant = name.partition("/")
    file = f"lpips-{variant}" if family == "lpips" else FILES.get(family)
    found = {} if file is None else {file: find_weights(file, (given or {}).get(file), allow_download)}
    return NETWORKS[name](found, device)
