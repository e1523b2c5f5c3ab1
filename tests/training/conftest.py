"""Training is tested on the CPU, where it promises the same bits."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def on_the_cpu() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield
