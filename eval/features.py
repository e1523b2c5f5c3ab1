"""What a feature network is to the scorer: named features of uint8 pictures, and all that a reader must know of it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class FeatureError(RuntimeError):
    """A feature network that cannot be had or used: weights missing, damaged, or of another network."""


@dataclass(frozen=True)
class NetworkRecord:
    """The part of a protocol that belongs to the feature network.

    layer, dim: its main output, which the Fréchet distance is taken on, and its width. preprocessing: resizer and
    scaling. distance: the name of that distance; only the published Inception weights may say "fid", a stand-in says
    "fd_" and a short name of its own. comparable_to_papers: whether published numbers are made with this very network.
    """

    name: str
    layer: str
    dim: int
    weights_sha256: str
    preprocessing: str
    distance: str
    comparable_to_papers: bool

    @property
    def short(self) -> str:
        """What other scores than the distance are called after, where the network is not the published one."""
        return self.distance.removeprefix("fd_").removeprefix("frechet_").removesuffix("_distance")


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network.

    extract: uint8 pictures (B, 3, H, W) or clips (B, 3, T, H, W) on `device` -> named outputs of B rows, float (B, d)
    or (B,); one is `record.layer`, (B, dim). A network of pairs takes (B, 2, 3, H, W), each sample before its original.
    Where a protocol does not round, the pictures are float grey levels in [0, 255], and extract takes those.
    """

    record: NetworkRecord
    device: torch.device
    dtype: torch.dtype
    extract: Callable[[Tensor], Mapping[str, Tensor]]


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """A checksum of named tensors: names, dtypes, shapes and bytes in the order of the names, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
