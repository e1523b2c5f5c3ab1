"""Numeric cases: a folder `<family>/<case>/` of case.json, io.safetensors and (often) weights.safetensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Check:
    """One call of a case: inputs by argument name, expected outputs by name, the tolerance that comes with it.

    params: plain arguments; a case keeps them under params, args or kwargs.
    """

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
            params={**check.get("params", {}), **check.get("args", {}), **check.get("kwargs", {})},
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


def implemented_families() -> list[str]:
    """The families that docs/systems.md calls implemented: the first column of its table of that name."""
    text = (ROOT / "docs/systems.md").read_text()
    section = re.search(r"^## Implemented$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return re.findall(r"^\| `([\w-]+)` \|", section.group(1) if section else "", re.M)
