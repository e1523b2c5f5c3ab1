"""LPIPS: distance of two pictures in the features of a classifier, weighted to agree with human judgement.

Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1, version 0.1 with VGG16 features. The channel weights come with the
`lpips` package, the VGG16 weights from torchvision's download or a file. The package's own module is not used: it drops
features in training mode, builds all of VGG16, and gives its caller no say over how files are read.
"""

from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.models import VGG16_Weights, vgg16

from layers.checkpoint import CheckpointError, read_tensors
from layers.keymap import translate

TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3: where features are read
WIDTHS = (64, 128, 256, 512, 512)
KEYS = {
    "features.{i}.weight": "backbone.{i}.weight",
    "features.{i}.bias": "backbone.{i}.bias",
    "classifier.{i}.weight": None,  # VGG16 as a classifier of ImageNet: only its features are used
    "classifier.{i}.bias": None,
    "lin{i}.model.1.weight": "weight_{i}",
}


class PerceptualDistance(nn.Module):
    """images, reconstruction float (B, 3, H, W) in [-1, 1], H and W at least 16 -> (B,), 0 for equal pictures.

    The gradient goes to `reconstruction` alone, and nothing here trains.
    backbone_weights: a file with torchvision's vgg16 state dict; None: torchvision's own file, downloaded once.
    Raises CheckpointError when the weights cannot be had, CheckpointMismatch when they are not VGG16's.
    """

    def __init__(self, backbone_weights: str | Path | None = None) -> None:
        super().__init__()
        with torch.device("meta"):  # the classifier beside the features would be 0.5 GB
            self.backbone = vgg16(weights=None).features[: TAPS[-1] + 1]
            for tap, width in enumerate(WIDTHS):
                self.register_buffer(f"weight_{tap}", torch.empty(1, width, 1, 1))
        channel_weights = read_tensors(Path(distribution("lpips").locate_file("lpips/weights/v0.1/vgg.pth")))
        state = {**_backbone_tensors(backbone_weights), **channel_weights}
        self.load_state_dict(translate(state, KEYS, self.state_dict()), assign=True)
        self.requires_grad_(False)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._features(images)
        distances = [
            (self.get_buffer(f"weight_{tap}") * (found - goal).square()).sum(1).mean((1, 2))
            for tap, (found, goal) in enumerate(zip(self._features(reconstruction), wanted, strict=True))
        ]
        return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Five maps (B, width, h, w), each place a unit vector over the channels."""
        x, taps = (images - self.shift) / self.scale, []
        for place, layer in enumerate(self.backbone):
            x = layer(x)
            if place in TAPS:
                taps.append(normalize(x, dim=1, eps=1e-10))
        return taps


def _backbone_tensors(path: str | Path | None) -> Mapping[str, Tensor]:
    if path is not None:
        return read_tensors(path)
    source = VGG16_Weights.IMAGENET1K_V1
    try:
        return source.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # no connection; a file that does not match its checksum
        raise CheckpointError(
            f"the perceptual loss needs VGG16's weights, and {source.url} could not be had ({error}); download it "
            f"elsewhere (its sha256 starts with the 8 digits in its name) and give the file as backbone_weights"
        ) from error
