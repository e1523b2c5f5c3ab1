"""Declarative key maps: upstream tensors under our names, every key of both sides accounted for.

A map is `{pattern: pattern | None | (pattern, transform)}`. `{name}` in a pattern stands for an index; None means the key
is ignored, for the reason written beside it. A transform is a named function Tensor -> Tensor. Where several keys
become one tensor, `Join` names the parts in order.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class CheckpointMismatch(ValueError):
    """The tensors of a file do not fit the model; the message lists every fault."""


@dataclass(frozen=True)
class Join:
    """Part `part` of `of` parts that are concatenated along dim 0 into `key`."""

    key: str
    part: int
    of: int


Target = str | None | Join | tuple[str, Callable[[Tensor], Tensor]]


def translate(
    state: Mapping[str, Tensor], keys: Mapping[str, Target], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Upstream `state` under the names of `wanted` (a module's state_dict).

    Raises CheckpointMismatch listing every key that is left over, missing, ambiguous or of a wrong shape.
    """
    rules = [
        (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(source))), target)
        for source, target in keys.items()
    ]
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, int] = {}
    faults = []
    for name, tensor in state.items():
        hits = [(hit.groupdict(), target) for rule, target in rules if (hit := rule.fullmatch(name))]
        if len(hits) != 1:
            shape = tuple(tensor.shape)
            faults.append(f"{name} {shape} fits {len(hits)} rules: map it once, or ignore it with a reason")
            continue
        indices, target = hits[0]
        if isinstance(target, Join):
            key = target.key.format(**indices)
            parts.setdefault(key, {})[target.part] = tensor
            sizes[key] = target.of
        elif isinstance(target, tuple):
            out[target[0].format(**indices)] = target[1](tensor)
        elif target is not None:
            out[target.format(**indices)] = tensor
    for key, found in parts.items():
        if len(found) == sizes[key]:
            out[key] = torch.cat([found[part] for part in range(sizes[key])])
        else:
            faults.append(f"{key} needs {sizes[key]} parts, the checkpoint has {sorted(found)}")
    check_keys(out, wanted, faults)
    return out


def check_keys(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], faults: list[str] | None = None) -> None:
    """Raises CheckpointMismatch, with all faults, unless `state` has exactly the keys and shapes of `wanted`."""
    faults = list(faults or [])
    faults += [f"{key} is not in the checkpoint" for key in wanted.keys() - state.keys()]
    faults += [f"{key} is not in the model" for key in state.keys() - wanted.keys()]
    faults += [
        f"{key} is {tuple(state[key].shape)}, the model has {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if faults:
        raise CheckpointMismatch(f"{len(faults)} keys do not fit:\n  " + "\n  ".join(sorted(faults)))
