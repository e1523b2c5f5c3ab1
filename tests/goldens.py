"""Numeric cases: a folder `<family>/<case>/` of case.json, io.safetensors and (often) weights.safetensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Check:
    """One call of a case: inputs by argument name, expected outputs by name, the tolerance that comes with it."""

    call: str
    inputs: dict[str, Tensor]
    params: dict[str, Any]
    outputs: dict[str, Tensor]
    atol: float
    note: str


@dataclass(frozen=True)
class Case:
    folder: Path
    family: str
    kind: str
    upstream_class: str
    config: dict[str, Any]
    checks: tuple[Check, ...]

    def weights(self) -> dict[str, Tensor] | None:
        """The tensors in the upstream key layout; None for pure functions."""
        path = self.folder / "weights.safetensors"
        return load_file(path) if path.exists() else None


def read_case(folder: Path) -> Case:
    content = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "io.safetensors")
    checks = tuple(
        Check(
            call=check["call"],
            inputs={name: tensors[key] for name, key in check["inputs"].items()},
            params=check.get("params", {}),
            outputs={name: tensors[key] for name, key in check["outputs"].items()},
            atol=float(check["atol"]),
            note=check.get("note", ""),
        )
        for check in content["checks"]
    )
    return Case(folder, content["family"], content["kind"], content["class"], content["config"], checks)


def find_cases(root: Path) -> list[Path]:
    """Case folders below `root`, sorted. Raises FileNotFoundError where there is none."""
    found = sorted(path.parent for path in root.glob("*/*/case.json"))
    if not found:
        raise FileNotFoundError(f"{root}: holds no <family>/<case>/case.json")
    return found
