"""Parity with the original code: every numeric case, through our public API, at the case's own tolerance.

`pytest tests/test_goldens.py --goldens DIR` runs any folder <family>/<case>/; without it the small cases kept here.
"""

import importlib

import pytest
import torch

from tests.goldens import Case, implemented_families, read_case


def test_every_check_of_the_case_holds(golden_case: Case) -> None:
    name = golden_case.family.replace("-", "_")
    try:
        adapter = importlib.import_module(f"tests.adapters.{name}")
    except ModuleNotFoundError as error:
        pytest.fail(f"family {golden_case.family!r} has no adapter tests/adapters/{name}.py ({error})")
    faults = []
    for number, check in enumerate(golden_case.checks):
        label = f"{golden_case.folder.name}[{number}] {check.call}"
        if check.call not in adapter.CALLS:
            faults.append(f"{label}: call not known to tests/adapters/{name}.py")
            continue
        with torch.random.fork_rng():
            found = adapter.CALLS[check.call](golden_case, check)
        for key, wanted in check.outputs.items():
            if key not in found:
                faults.append(f"{label}: the adapter gives no {key}, only {sorted(found)}")
            elif found[key].shape != wanted.shape:
                faults.append(f"{label}: {key} is {tuple(found[key].shape)}, must be {tuple(wanted.shape)}")
            else:
                off = (found[key].detach().double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
                if not off <= check.atol:
                    faults.append(f"{label}: {key} is off by {off:.3g}, allowed {check.atol:g} ({check.note})")
    assert not faults, "\n".join(faults)


def test_documentation_names_exactly_the_families_with_an_adapter() -> None:
    from tests.goldens import ROOT

    adapters = {path.stem for path in (ROOT / "tests/adapters").glob("*.py")} - {"__init__"}
    assert {family.replace("-", "_") for family in implemented_families()} == adapters


def test_every_implemented_family_keeps_a_small_case_here() -> None:
    from tests.goldens import ROOT

    assert {path.name for path in (ROOT / "tests/goldens").iterdir()} == set(implemented_families())
    assert all(read_case(path.parent).checks for path in (ROOT / "tests/goldens").glob("*/*/case.json"))
