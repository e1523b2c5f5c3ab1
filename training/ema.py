"""The exponential moving average of a model in training, which is what a run exports.

Source: Polyak & Juditsky 1992; the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage. The first
export of a short run would otherwise still be full of the initial weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """average <- d * average + (1 - d) * parameter, once an optimiser step; d = min(decay, (1 + n) / (10 + n)).

    n: the updates before this one. Parameters are averaged. Buffers are not: they hold statistics, counts or tables,
    and the averaged model takes them as the model has them. decay in [0, 1); 0 follows the parameters exactly. Build it
    from the prepared model: the average of a sharded parameter is sharded likewise (FSDP 2).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}, must be in [0, 1)")
        self.model, self.decay, self.updates = model, decay, 0
        self.average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.model.parameters()), self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model's parameters are the averages; after, they are its own again, bit for bit."""
        own = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._put(self.average.values())
        try:
            yield
        finally:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a forward without a backward has left it whole
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        whole = {name: a.full_tensor() if isinstance(a, DTensor) else a for name, a in self.average.items()}
        return {"updates": self.updates, "average": whole}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, average in self.average.items():
            average.copy_(_like(state["average"][name], average))


def _like(whole: Tensor, wanted: Tensor) -> Tensor:
    if isinstance(wanted, DTensor):
        return distribute_tensor(whole.to(wanted.device), wanted.device_mesh, wanted.placements)
    return whole
