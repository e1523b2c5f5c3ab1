"""The FlexTok entries of the registry: a file whose header says how it is wired is built by that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training import published
from training.published import check, find, load_published

NAME = "flextok-d12-d12-in1k"
WIRING = {"vae": {"scaling_factor": 0.3}, "encoder": {"module_dict": {"enc_transformer": {"dim": 32}}}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The configurations that tokenizers are built by, one after the other."""
    found: list[Mapping[str, Any]] = []

    def built(family: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        found.append(config)
        return nn.Linear(1, 1)

    monkeypatch.setitem(published.FROM_PUBLISHED, "tokenizer", built)
    return found


def test_the_header_of_a_file_is_its_configuration(tmp_path: Path, asked: list[Mapping[str, Any]]) -> None:
    header = {**{key: str(part) for key, part in WIRING.items()}, "format": "pt"}
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", header)
    load_published(NAME, tmp_path / "model.safetensors")
    assert check(tmp_path / "model.safetensors", NAME).fits == (NAME,)
    assert asked == 3 * [WIRING]  # loaded, compared, built


def test_without_a_header_the_entry_is(tmp_path: Path, asked: list[Mapping[str, Any]]) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    load_published(NAME, tmp_path / "model.safetensors")
    assert asked == [find(NAME).config]
