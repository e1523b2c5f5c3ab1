"""LPIPS against the lpips package on random VGG16 weights, its invariances, and how its weights are had."""

import pickle
import warnings
from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models import vgg16

from layers.checkpoint import CheckpointError, save_tensors
from layers.keymap import CheckpointMismatch
from training.perceptual import PerceptualDistance


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random VGG16 features under torchvision's names; of the classifier, which is ignored, only a token."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {f"features.{key}": value.shape for key, value in vgg16(weights=None).features.state_dict().items()}
    state = {
        key: torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        if key.endswith("weight")
        else torch.randn(shape, generator=generator) * 0.1
        for key, shape in shapes.items()
    }
    return {**state, "classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_tensors(path, weights)
    return path


@pytest.fixture(scope="module")
def distance(weights_file: Path) -> PerceptualDistance:
    return PerceptualDistance(weights_file)


@pytest.fixture(scope="module")
def package(weights: dict[str, Tensor]) -> lpips.LPIPS:
    """The package's module on the same features, with the channel weights that it ships."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # it calls torchvision by an old name
        module = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    folder = Path(lpips.__file__).parent
    shipped = torch.load(folder / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    shipped |= {f"lins.{key[3:]}": value for key, value in shipped.items()}
    backbone = {
        key: weights[f"features.{key.split('.', 2)[2]}"] for key in module.state_dict() if key.startswith("net.")
    }
    scaling = {key: value for key, value in module.state_dict().items() if key.startswith("scaling_layer.")}
    module.load_state_dict(shipped | backbone | scaling, assign=True)
    return module.eval()


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_value_and_gradient_are_the_package_s(distance: PerceptualDistance, package: lpips.LPIPS) -> None:
    images, reconstruction = pictures(0), pictures(1).requires_grad_()
    ours = distance(images, reconstruction)
    theirs = package(images, reconstruction).flatten()
    assert ours.min() > 0.01
    assert_close(ours, theirs)
    gradients = [torch.autograd.grad(value.sum(), reconstruction)[0] for value in (ours, theirs)]
    assert_close(*gradients)


def test_zero_for_equal_pictures_symmetric_and_the_same_in_training(distance: PerceptualDistance) -> None:
    images, reconstruction = pictures(0), pictures(1)
    assert_close(distance(images, images), torch.zeros(2), atol=0, rtol=0)
    value = distance(images, reconstruction)
    assert_close(distance(reconstruction, images), value)
    assert_close(distance.train()(images, reconstruction), value, atol=0, rtol=0)  # the package would drop features
    nearer = images + 0.1 * (reconstruction - images)
    assert (distance(images, nearer) < value).all()


def test_each_sample_stands_alone(distance: PerceptualDistance) -> None:
    images, reconstruction = pictures(0), pictures(1)
    alone = [distance(images[i : i + 1], reconstruction[i : i + 1]) for i in range(2)]
    assert_close(distance(images, reconstruction), torch.cat(alone))


def test_only_the_reconstruction_gets_a_gradient(distance: PerceptualDistance) -> None:
    images, reconstruction = pictures(0).requires_grad_(), pictures(1).requires_grad_()
    distance(images, reconstruction).sum().backward()
    assert images.grad is None
    assert reconstruction.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_no_step_of_the_gradient_is_nan_where_all_features_are_zero(weights: dict[str, Tensor], tmp_path: Path) -> None:
    dead = {key: torch.full_like(value, -50.0) if key == "features.0.bias" else value for key, value in weights.items()}
    save_tensors(tmp_path / "dead.safetensors", dead)
    reconstruction = pictures(1).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        value = PerceptualDistance(tmp_path / "dead.safetensors")(pictures(0), reconstruction)
        (gradient,) = torch.autograd.grad(value.sum(), reconstruction)
    assert_close(gradient, torch.zeros_like(gradient))


def test_construction_draws_no_random_numbers(weights_file: Path) -> None:
    before = torch.get_rng_state()
    PerceptualDistance(weights_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_of_another_network_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    wrong = {key: value for key, value in weights.items() if key != "features.28.bias"}
    save_tensors(tmp_path / "wrong.safetensors", {**wrong, "fc.weight": torch.zeros(2)})
    with pytest.raises(CheckpointMismatch, match=r"backbone\.28\.bias is not in the checkpoint\n  fc\.weight"):
        PerceptualDistance(tmp_path / "wrong.safetensors")


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "vgg16.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"features.0.weight": Bomb()}, tmp_path / "zip.pth")
    for name in ("vgg16.pth", "zip.pth"):
        with pytest.raises(CheckpointError):
            PerceptualDistance(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_offline_the_error_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CheckpointError) as caught:
        PerceptualDistance()
    for part in ("https://download.pytorch.org/models/vgg16-397923af.pth", "no route", "sha256", "backbone_weights"):
        assert part in str(caught.value)
