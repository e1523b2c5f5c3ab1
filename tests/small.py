"""A small tokenizer of 16x16 pictures with random weights, as a finished run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layers.record import build
from training.run import CLASSES, RunFolder

RECORD = {
    "class_path": "VQTokenizer",
    "init_args": {
        "image_size": 16,
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 64, "dim": 4}},
        "channels": 8,
        "encoder_mult": [1, 2],
        "groups": 4,
        "z_channels": 8,
    },
}


def tokenizer_run(path: Path, data: Mapping[str, Any]) -> Path:
    """Write the run under `path`. data: what the data set it was trained on says of itself."""
    folder = RunFolder(path, "tokenizer", RECORD, data, seed=0)
    torch.manual_seed(0)
    tokenizer = build(RECORD, CLASSES)
    folder.begin()
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    return folder.path
