"""Declarative key maps: upstream tensors under our names, every key of both sides accounted for.

A map is `{pattern: pattern | None | (pattern, transform)}`. `{name}` in a pattern stands for an index; None means the
key is ignored, for the reason written beside it. A transform is a named function Tensor -> Tensor. Where several keys
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
    """Part `part` of `of` parts that are concatenated along `dim` into `key`."""

    key: str
    part: int
    of: int
    dim: int = 0


Target = str | None | Join | tuple[str, Callable[[Tensor], Tensor]]


def translate(
    state: Mapping[str, Tensor], keys: Mapping[str, Target], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Upstream `state` under the names of `wanted` (a module's state_dict).

    Raises CheckpointMismatch listing every key that is left over, missing, ambiguous, mapped twice or of a wrong shape.
    """
    rules = [
        (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(source))), target)
        for source, target in keys.items()
    ]
    found: dict[str, dict[int, Tensor]] = {}  # our key -> its parts
    joins: dict[str, tuple[int, int]] = {}  # our key -> the number of its parts, and the dim they lie along
    faults = []
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        hits = [(hit.groupdict(), target) for rule, target in rules if (hit := rule.fullmatch(name))]
        if len(hits) != 1:
            faults.append(f"{name} {shape} fits {len(hits)} rules: map it once, or ignore it with a reason")
            continue
        indices, target = hits[0]
        part, of, dim = 0, 1, 0
        match target:
            case None:
                continue
            case Join(key, part, of, dim):
                pass
            case (key, transform):
                try:
                    tensor = transform(tensor)
                except (RuntimeError, ValueError, IndexError) as error:
                    faults.append(f"{name} {shape} does not go through its transform {transform}: {error}")
                    continue
            case key:
                pass
        key = key.format(**indices)
        parts = found.setdefault(key, {})
        if part in parts or joins.setdefault(key, (of, dim)) != (of, dim):
            faults.append(f"{name} {shape} collides with another key that is mapped to {key}")
        parts[part] = tensor
    out = {}
    for key, parts in found.items():
        of, dim = joins[key]
        shapes = {part: tuple(tensor.shape) for part, tensor in sorted(parts.items())}
        if list(shapes) == list(range(of)) and len({shape[:dim] + shape[dim + 1 :] for shape in shapes.values()}) == 1:
            out[key] = torch.cat([parts[part] for part in shapes], dim) if len(parts) > 1 else parts[0]
        else:
            faults.append(f"{key} needs {of} parts that fit together, the checkpoint has {shapes}")
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
