"""What autograd keeps of a forward pass until the backward pass: the part of training memory that grows with the batch.

with SavedActivations(model) as saved:
    loss = model.loss(tokens, condition)
saved.bytes
"""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn


class SavedActivations:
    """Counts, while it is entered, the bytes of all storages that are saved for a backward pass: each once, however many
    tensors share it, and none that belongs to a parameter or buffer of `module`.

    A storage is known by its address: what was saved must live until the count is left, as it does below one loss.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = {it.untyped_storage().data_ptr() for it in (*module.parameters(), *module.buffers())}
        self._sizes: dict[int, int] = {}  # address -> bytes
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
