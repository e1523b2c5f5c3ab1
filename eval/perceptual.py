"""LPIPS: the distance of two pictures in the features of a classifier, weighted to agree with human judgement.

Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1, version 0.1; the network and its channel weights are those of the
`lpips` package, the classifiers (AlexNet, VGG16, SqueezeNet 1.1) are torchvision's.
"""

import re
import warnings
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

import torch
from lpips import LPIPS, ScalingLayer
from torch import Tensor

from eval.features import FeatureError

NETWORKS = ("alex", "vgg", "squeeze")


def lpips_network(
    name: str, backbone: Mapping[str, Tensor], channel_weights: Mapping[str, Tensor] | None = None
) -> LPIPS:
    """LPIPS on "alex", "vgg" or "squeeze", in eval mode and frozen.

    backbone: the state dict of torchvision's alexnet, vgg16 or squeezenet1_1; its classifier is left.
    channel_weights: "lin{i}.model.1.weight" (1, width, 1, 1) of every tap; None: those of the package.
    Raises FeatureError for another network, and for tensors that are missing or of another shape.
    """
    if name not in NETWORKS:
        raise FeatureError(f"lpips: unknown network {name!r}; known: {', '.join(NETWORKS)}")
    if channel_weights is None:
        path = Path(distribution("lpips").locate_file(f"lpips/weights/v0.1/{name}.pth"))
        channel_weights = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"), warnings.catch_warnings():  # the package speaks to torchvision in its old tongue
        warnings.simplefilter("ignore", UserWarning)
        network = LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False)
    scaling = {f"scaling_layer.{key}": tensor for key, tensor in ScalingLayer().state_dict().items()}
    given = {**backbone, **channel_weights, **scaling}
    state, faults = {}, []
    for key, wanted in network.state_dict().items():
        source = re.sub(r"^lins\.(\d+)\.", r"lin\1.", re.sub(r"^net\.slice\d+\.", "features.", key))
        if source not in given:
            faults.append(f"{source} is missing")
        elif given[source].shape != wanted.shape:
            faults.append(f"{source} is {tuple(given[source].shape)}, must be {tuple(wanted.shape)}")
        else:
            state[key] = given[source]
    if faults:
        raise FeatureError(f"lpips: these are not the weights of {name!r}: {'; '.join(faults[:5])}")
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def lpips_layers(network: LPIPS, images: Tensor, reference: Tensor) -> Tensor:
    """What every tap adds to the distance, (B, taps): the sum over taps is LPIPS. Pictures float (B, 3, H, W) in [-1, 1].

    Raises ValueError where the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(f"lpips: pictures {tuple(images.shape)} beside {tuple(reference.shape)}")
    _, layers = network(images, reference, retPerLayer=True)
    return torch.cat([layer.flatten(1) for layer in layers], dim=1)
