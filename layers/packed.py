"""Linear layers with weights laid out in advance for few rows on a CPU.

Decoding multiplies a handful of rows by every weight of a network, a token at a time. With weights in plain row order
the product of 8 rows runs at a third of the speed at which the memory could deliver them; in oneDNN's blocked layout it
comes close. The numbers differ from nn.Linear in the order of summation only.
"""

import torch
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

ROWS = 8  # the number of rows the layout is chosen for; others work, and gain less as they grow


class PackedLinear(nn.Module):
    """nn.Linear for inference in float32 on a CPU, and a GELU (in its tanh form) on what comes out, where asked for.

    Its weight cannot be trained, saved or moved any more.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.then = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.then)


def pack_linears(module: nn.Module) -> nn.Module:
    """Replace every nn.Linear inside `module`, in place, where it is float32 on a CPU that has oneDNN; others stay.

    In an Mlp with a tanh GELU that is one with its first layer.
    """
    if isinstance(module, Mlp) and isinstance(module.act, GELUTanh) and _packable(module.fc1):
        module.fc1, module.act = PackedLinear(module.fc1, gelu=True), nn.Identity()
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            pack_linears(child)
        elif _packable(child):
            setattr(module, name, PackedLinear(child))
    return module


def _packable(linear: nn.Module) -> bool:
    return (
        isinstance(linear, nn.Linear)
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )
