"""FD-DINOv2 features: the class token of DINOv2 ViT-L/14, after its last normalisation, of pictures at 224x224.

Sources: Stein et al. 2023 (FD-DINOv2, arXiv:2306.04675), whose preprocessing this is: PIL bicubic whatever the aspect;
Oquab et al. 2023 (DINOv2, arXiv:2304.07193). The network is timm's; the weights are Meta's file or timm's copy of it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of
from eval.resize import resize
from eval.weights import cure, fill, find_weights, is_published, read_state

NETWORK = "dinov2"
ARCHITECTURE = "vit_large_patch14_dinov2"
LAYER, DIM = "class_token", 1024
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
OFFSET = 0.1  # of a cell, added to the side of the grid before the scale of its interpolation is computed


def dinov2_network(
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    allow_download: bool = False,
    strict: bool = False,
) -> FeatureNetwork:
    """The network of FD-DINOv2 on `device`, in float32; its output "class_token" is (B, 1024).

    weights: a local file of Meta's or timm's layout; without it, what eval/weights.py finds. strict: a file with another
    checksum than the published one is an error; else its distance bears another name, for no table can vouch for it.
    Raises MetricWeightsMissing where there is no file, FeatureError for one that is damaged or of another network.
    """
    path = find_weights(NETWORK, weights, allow_download)
    sha256 = sha256_of(path)
    published = is_published(NETWORK, path, sha256, strict)
    model = load_dinov2(path).to(device)
    record = NetworkRecord(
        name="DINOv2 ViT-L/14" + ("" if published else " (unverified weights)"),
        layer=LAYER,
        dim=DIM,
        weights_sha256=sha256,
        preprocessing=f"PIL bicubic of uint8 to {SIDE}x{SIDE} whatever the aspect, ImageNet mean and deviation",
        distance="fd_dinov2" if published else "fd_dinov2_unverified",
        comparable_to_papers=published,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        return {LAYER: model(dinov2_input(pictures))}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def dinov2_input(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 224, 224), normalised."""
    mean, std = (torch.tensor(it, device=pictures.device).view(3, 1, 1) for it in (MEAN, STD))
    return (resize(pictures, (SIDE, SIDE), "pil_uint8") / 255 - mean) / std


def load_dinov2(path: Path, architecture: str = ARCHITECTURE, **sizes: Any) -> nn.Module:
    """timm's network for pictures of 224x224, in eval mode, with the tensors of a file. sizes: other widths for timm.

    Raises FeatureError for a file that is damaged or holds another network.
    """
    with torch.device("meta"):
        model = timm.create_model(architecture, img_size=SIDE, num_classes=0, **sizes)
    state = {name: tensor for name, tensor in read_state(path, NETWORK).items() if name != "mask_token"}
    fill(model, _with_places(state, model.patch_embed.grid_size[0], path), path, NETWORK)
    return model.eval().requires_grad_(False)


def place_embedding(trained: Tensor, side: int) -> Tensor:
    """Embeddings of the class token and of a square grid of places (1, 1 + N, d) -> the same for side x side places.

    Bicubic without antialiasing, by the scale (side + 0.1) / sqrt(N), as the published code does it at any other
    resolution than that of the training; timm's own resampling differs in both points and moves the features.
    Raises ValueError where the places are no square.
    """
    class_token, places = trained[:, :1].float(), trained[:, 1:].float()
    grid = math.isqrt(places.shape[1])
    if grid**2 != places.shape[1]:
        raise ValueError(f"place_embedding: {places.shape[1]} places are no square grid")
    if grid == side:
        return trained
    picture = rearrange(places, "1 (h w) d -> 1 d h w", h=grid)
    scale = (side + OFFSET) / grid
    picture = F.interpolate(picture, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat((class_token, rearrange(picture, "1 d h w -> 1 (h w) d")), dim=1)


def _with_places(state: Mapping[str, Tensor], side: int, path: Path) -> dict[str, Tensor]:
    trained = state.get("pos_embed")
    if trained is None:
        return dict(state)
    try:
        return {**state, "pos_embed": place_embedding(trained, side)}
    except (ValueError, IndexError, RuntimeError) as error:
        raise FeatureError(
            f"{path}: its pos_embed {tuple(trained.shape)} is none of DINOv2 ({error}).{cure(NETWORK)}"
        ) from error
