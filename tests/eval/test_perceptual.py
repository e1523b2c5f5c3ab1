"""LPIPS with random classifiers: against its definition, and what it refuses. The channel weights are the published ones."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import alexnet, squeezenet1_1, vgg16

from eval.features import FeatureError
from eval.perceptual import NETWORKS, lpips_layers, lpips_network

CLASSIFIERS = {"alex": alexnet, "vgg": vgg16, "squeeze": squeezenet1_1}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}


def classifier(name: str) -> nn.Sequential:
    with torch.device("meta"):
        features = CLASSIFIERS[name](weights=None).features
    rng = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(tensor.shape, generator=rng) * (2 / tensor.shape[1:].numel()) ** 0.5
        for key, tensor in features.state_dict().items()
    }
    features.load_state_dict(state, assign=True)
    return features.requires_grad_(False)


def torchvision_state(features: nn.Sequential) -> dict[str, Tensor]:
    return {f"features.{key}": tensor for key, tensor in features.state_dict().items()}


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 48, 40, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_that_of_its_definition(name: str) -> None:
    """Unit vectors over channels at every tap, squared differences weighted, mean over places; and none from itself."""
    features = classifier(name)
    network = lpips_network(name, torchvision_state(features))
    x, y = pictures(2, 0), pictures(2, 1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((it - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for it in (x, y))
    wanted = []
    for place, layer in enumerate(features[: TAPS[name][-1] + 1]):
        a, b = layer(a), layer(b)
        if place in TAPS[name]:
            weight = network.get_parameter(f"lin{len(wanted)}.model.1.weight")
            apart = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)).square()
            wanted.append((weight * apart).sum(1).mean((1, 2)))
    found = lpips_layers(network, x, y)
    assert len(wanted) == len(TAPS[name]) and float(found.min()) > 0
    assert_close(found, torch.stack(wanted, dim=1), atol=1e-6, rtol=1e-5)
    assert_close(lpips_layers(network, y, x), found)
    assert not lpips_layers(network, x, x).any()


def test_weights_of_another_network_are_refused() -> None:
    state = torchvision_state(classifier("squeeze"))
    with pytest.raises(
        FeatureError, match=r"not the weights of 'alex': features.0.weight is .*, must be \(64, 3, 11, 11\)"
    ):
        lpips_network("alex", state)
    del state["features.0.bias"]
    with pytest.raises(FeatureError, match=r"not the weights of 'squeeze': features\.0\.bias is missing"):
        lpips_network("squeeze", state)
    with pytest.raises(FeatureError, match="unknown network 'resnet'; known: alex, vgg, squeeze"):
        lpips_network("resnet", state)


def test_pictures_of_different_sizes_are_refused() -> None:
    network = lpips_network("squeeze", torchvision_state(classifier("squeeze")))
    with pytest.raises(ValueError, match=r"pictures \(2, 3, 48, 40\) beside \(1, 3, 48, 40\)"):
        lpips_layers(network, pictures(2, 0), pictures(1, 0))
