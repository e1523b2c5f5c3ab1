"""A small tokenizer of 16x16 pictures and a generator of its tokens, with random weights, as finished runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layers.record import build
from training.run import CLASSES, RunFolder, load_run

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


def generator_run(path: Path, data: Mapping[str, Any]) -> Path:
    """A class-conditional generator under `path`, and its tokenizer beside it. data: with its classes."""
    first = load_run(tokenizer_run(path.with_name(f"{path.name}-tokenizer"), data))
    record = {"class_path": "NextToken", "init_args": {"dim": 32, "depth": 1, "heads": 2, "num_classes": 3}}
    folder = RunFolder(path, "generator", record, data, 0, first)
    torch.manual_seed(0)
    generator = build(record, CLASSES, spec=first.tokenizer.spec)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    folder.begin()
    folder.export(generator.state_dict(), generator.spec, step=1)
    (path / "config.yaml").write_text("sampler: {filter: {top_k: 9}, guidance: {scale: 1.5}, greedy: false}\n")
    return folder.path
