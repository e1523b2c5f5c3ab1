"""Options of the test run."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        action="append",
        default=None,
        help="a folder of numeric cases <family>/<case>/ to run instead of tests/goldens (repeatable)",
    )
