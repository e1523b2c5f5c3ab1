"""Numeric cases of the image metrics: features or pictures in, values out."""

import io
import math
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from lpips import LPIPS
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.codebook import CodebookUsage
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.i3d import I3D, i3d_network
from eval.inception import inception_features, load_inception
from eval.inception_score import chunks, equal_splits, inception_scores
from eval.kernel import cmmd, draw_subsets, gaussian_kernel, kid, polynomial_kernel
from eval.manifold import Overlap, density_coverage, overlap, squared_double, squared_half, squared_radii
from eval.perceptual import lpips_layers, lpips_network
from eval.pixels import to_uint8
from eval.reconstruction import psnr, ssim
from eval.resize import resize
from tests.goldens import Case, Check


def _values(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


def _statistics(features: Tensor, batch: int) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        statistics.update(part)
    return statistics


def _mean_cov(case: Case, check: Check) -> dict[str, Tensor]:
    statistics = _statistics(check.inputs["features"], 64)
    return {"mu": statistics.mean(), "sigma": statistics.cov()}


def _fid(case: Case, check: Check) -> dict[str, Tensor]:
    divisor = {"n": "n", "n-1": "n - 1"}[check.params.get("cov_divisor", "n-1")]
    sides = [
        _statistics(check.inputs[name], check.params.get("batch", 64)).gaussian(divisor) for name in ("fake", "real")
    ]
    return _values(fid=frechet_distance(*sides))


def _frechet_distance(case: Case, check: Check) -> dict[str, Tensor]:
    sides = [Gaussian(check.inputs[f"mu{i}"].double(), check.inputs[f"sigma{i}"].double()) for i in (1, 2)]
    return _values(fid=frechet_distance(*sides))


def _codes(case: Case, check: Check) -> CodebookUsage:
    codes = CodebookUsage(check.params["codebook_size"])
    codes.update(check.inputs["codes"])
    return codes


def _codebook_usage(case: Case, check: Check) -> dict[str, Tensor]:
    return _values(usage=_codes(case, check).usage())


def _codebook_entropy(case: Case, check: Check) -> dict[str, Tensor]:
    return _values(entropy=_codes(case, check).entropy(inside=1e-8) / math.log(2))


def _kid(case: Case, check: Check) -> dict[str, Tensor]:
    params, fake, real = check.params, check.inputs["fake"], check.inputs["real"]
    if params.get("kernel") == "rbf":
        kernel = partial(gaussian_kernel, sigma=params["sigma"])
    else:
        kernel = partial(
            polynomial_kernel,
            degree=params.get("degree", 3),
            gamma=params.get("gamma"),
            shift=params.get("coef0", 1.0),
        )
    if "idx_fake" in check.inputs:
        rows = check.inputs["idx_fake"], check.inputs["idx_real"]
    else:
        rng = np.random.RandomState(params["seed"])
        rows = draw_subsets(len(fake), len(real), rng, params["subsets"], params["subset_size"])
    subsets = kid(fake, real, *rows, kernel)
    return {"per_subset": subsets, **_values(mean=float(subsets.mean()), std=float(subsets.std(correction=0)))}


def _inception_score(case: Case, check: Check) -> dict[str, Tensor]:
    logits, permutation = check.inputs["logits"], check.inputs.get("permutation")
    if permutation is None and check.params.get("shuffle"):
        permutation = torch.from_numpy(np.random.RandomState(check.params["seed"]).permutation(len(logits)))
    scores = inception_scores(logits, equal_splits(len(logits), check.params["splits"], permutation))
    return _values(mean=float(scores.mean()), std=float(scores.std(correction=0)))


def _inception_score_from_features(case: Case, check: Check) -> dict[str, Tensor]:
    logits = check.inputs["features"] @ check.inputs["class_weight"]
    scores = inception_scores(logits, chunks(len(logits), check.params["split_size"]), torch.float32)
    return _values(mean=float(scores.mean()))


def _overlap(found: Overlap) -> dict[str, Tensor]:
    return _values(**vars(found), f_score=found.f_score)


def _precision_recall(case: Case, check: Check) -> dict[str, Tensor]:
    squared = squared_half if check.params.get("dtype") == "float16" else squared_double
    found = overlap(check.inputs["fake"], check.inputs["real"], check.params["k"], closed=True, squared=squared)
    return _overlap(found)


def _knn_radii_squared(case: Case, check: Check) -> dict[str, Tensor]:
    squared = squared_half if check.params.get("dtype") == "float16" else squared_double
    return {"radii": squared_radii(check.inputs["features"], check.params["k"], squared)}


def _prdc(case: Case, check: Check) -> dict[str, Tensor]:
    return _overlap(density_coverage(check.inputs["fake"], check.inputs["real"], check.params["k"]))


def _cmmd(case: Case, check: Check) -> dict[str, Tensor]:
    return _values(cmmd=cmmd(check.inputs["x"], check.inputs["y"], check.params["sigma"], check.params["scale"]))


def _to_uint8(case: Case, check: Check) -> dict[str, Tensor]:
    return {"images": to_uint8(check.inputs["images"], check.params["mode"])}


def _sides(check: Check) -> tuple[Tensor, Tensor]:
    """Reconstruction and original in grey levels, as the protocol has them."""
    made, real = check.inputs["images"], check.inputs["reference"]
    if check.params["protocol"] == "llamagen":
        return to_uint8(made, "trunc_128"), (real + 1) / 2 * 255
    return to_uint8(made, "trunc"), to_uint8(real, "trunc")


def _psnr(case: Case, check: Check) -> dict[str, Tensor]:
    return {"per_image": psnr(*_sides(check))}


def _ssim(case: Case, check: Check) -> dict[str, Tensor]:
    window, data_range = check.params.get("window", "uniform7"), 255 * check.params["data_range"]
    return {"per_image": ssim(*_sides(check), window, data_range)}


def _resize(case: Case, check: Check) -> dict[str, Tensor]:
    return {"images": resize(check.inputs["images"], tuple(check.params["size"]), check.params["mode"])}


def _normal(key: str, shape: torch.Size, seed: int) -> Tensor:
    rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def _inception_tensor(key: str, shape: torch.Size, seed: int) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    z = _normal(key, shape, seed)
    if key.endswith("bn.weight"):
        return 1 + 0.1 * z
    if key.endswith("running_var"):
        return 1 + 0.5 * z.abs()
    return z * math.sqrt(2 / shape[1:].numel()) if key.endswith(".weight") else 0.1 * z


@cache
def _inception(seed: int) -> FeatureExtractorInceptionV3:
    """With weights by rule, through a file, as users have it."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        empty = FeatureExtractorInceptionV3("empty", ["2048"], feature_extractor_weights_path=nothing)
    state = {key: _inception_tensor(key, tensor.shape, seed) for key, tensor in empty.state_dict().items()}
    with TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pth")
        return load_inception(Path(folder) / "weights.pth")


@torch.inference_mode()
def _inception_features(case: Case, check: Check) -> dict[str, Tensor]:
    model = _inception(case.config["weights_rule"]["seed"])
    return inception_features(model, check.inputs["images"], check.params["preprocess"])


def _lpips_state(name: str, seed: int) -> Mapping[str, Tensor]:
    """Weights by rule over the package's names, under torchvision's names for the classifier's features."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package speaks to torchvision in its old tongue
        empty = LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False).state_dict()
    state = {}
    for key, tensor in empty.items():
        if key.startswith(("scaling_layer.", "lins.")):
            continue
        z = _normal(key, tensor.shape, seed)
        if key.startswith("lin"):
            z = z.abs() / math.sqrt(tensor.shape[1])
        else:
            z = z * (0.1 if key.endswith("bias") else math.sqrt(2 / tensor.shape[1:].numel()))
        state[re.sub(r"^net\.slice\d+\.", "features.", key)] = z
    return state


def _lpips(case: Case, check: Check) -> dict[str, Tensor]:
    state = _lpips_state(check.params["net"], case.config["weights_rule"]["seed"])
    layers = lpips_layers(
        lpips_network(check.params["net"], state, state), check.inputs["x"], check.inputs["y"]
    )  # (B, taps)
    return {"per_image": layers.sum(1), "per_layer": layers}


@torch.inference_mode()
def _i3d_features(case: Case, check: Check) -> dict[str, Tensor]:
    """All that the network of FVD computes on its way, from the published weights and the preprocessing of FVD."""
    outputs = {}

    def keep(module: nn.Module, _: tuple[Tensor, ...], found: dict[str, Tensor]) -> None:
        if isinstance(module, I3D):
            outputs.update({name.lower(): output for name, output in found.items()})

    with register_module_forward_hook(keep):
        i3d_network(rule="common-metrics").extract(check.inputs["video"])
    return outputs


@torch.inference_mode()
def _fvd_constant_videos(case: Case, check: Check) -> dict[str, Tensor]:
    """Two equal clips a side: their covariance is 0."""
    frames, size = check.params["T"], check.params["size"]
    network, sides = i3d_network(), []
    for level in (0, 255):
        clip = torch.full((1, 3, frames, size, size), level, dtype=torch.uint8)
        features = network.extract(clip)[network.record.layer]
        sides.append(_statistics(features.expand(2, -1), 1).gaussian())
    return _values(fvd=frechet_distance(*sides))


CALLS: dict[str, Callable[[Case, Check], dict[str, Tensor]]] = {
    "cmmd": _cmmd,
    "codebook_entropy": _codebook_entropy,
    "codebook_usage": _codebook_usage,
    "fid": _fid,
    "frechet_distance": _frechet_distance,
    "fvd_constant_videos": _fvd_constant_videos,
    "i3d_features": _i3d_features,
    "inception_features": _inception_features,
    "inception_score": _inception_score,
    "inception_score_from_features": _inception_score_from_features,
    "kid": _kid,
    "knn_radii_squared": _knn_radii_squared,
    "lpips": _lpips,
    "mean_cov": _mean_cov,
    "prdc": _prdc,
    "precision_recall": _precision_recall,
    "precision_recall_adm": _precision_recall,
    "psnr": _psnr,
    "resize": _resize,
    "ssim": _ssim,
    "to_uint8": _to_uint8,
}
