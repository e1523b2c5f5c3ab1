"""Options of the test run, and the numeric cases as parameters."""

from pathlib import Path

import pytest
import torch

from tests.goldens import ROOT, Case, find_cases, implemented_families, read_case

torch.set_num_threads(1)  # the networks of the tests are too small for a second thread to pay


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=ROOT / "tests/goldens",
        help="the folder of numeric cases <family>/<case>/ to run (default: the small ones in tests/goldens)",
    )
    parser.addoption(
        "--implemented-only",
        action="store_true",
        help="run the cases of the families that docs/systems.md calls implemented, and name the others",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        folders = find_cases(metafunc.config.getoption("--goldens"))
        if metafunc.config.getoption("--implemented-only"):
            folders = [folder for folder in folders if folder.parent.name in implemented_families()]
        metafunc.parametrize("folder", folders, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


@pytest.fixture
def golden_case(folder: Path) -> Case:
    return read_case(folder)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--implemented-only"):
        families = {folder.parent.name for folder in find_cases(config.getoption("--goldens"))}
        others = sorted(families - set(implemented_families()))
        terminalreporter.write_line(f"families of numeric cases not implemented yet: {', '.join(others) or 'none'}")
