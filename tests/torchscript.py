"""TorchScript archives of given tensors, for what reads such files."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class Tree(nn.Module):
    """Modules and buffers along dotted names. Its program does nothing."""

    def put(self, name: str, tensor: Tensor) -> None:
        first, dot, rest = name.partition(".")
        if not dot:
            self.register_buffer(first, tensor)
            return
        if first not in self._modules:
            self.add_module(first, Tree())
        self.get_submodule(first).put(rest, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


def write_torchscript(state: Mapping[str, Tensor], path: Path) -> None:
    tree = Tree()
    for name, tensor in state.items():
        tree.put(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(tree), str(path))
