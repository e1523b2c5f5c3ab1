"""A small tokenizer of clips and generators of its tokens, with random weights, as finished runs; and videos on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from layers.record import build
from sampling.clip_files import write_mp4
from training.run import CLASSES, RunFolder, load_run

FRAMES, SIZE, TOKENS = 16, 16, 6
DATA = {"name": "none", "classes": ["a", "b", "c"]}
TOKENIZER = {
    "class_path": "LARPTokenizer",
    "init_args": {
        "video": [FRAMES, SIZE, SIZE],
        "tokens": TOKENS,
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 12, "dim": 4}},
        "patch": [4, 8, 8],
        "dim": 24,
        "depth": 1,
        "heads": 2,
    },
}
GENERATOR = {"dim": 32, "depth": 1, "heads": 2, "mlp_hidden": 32, "positions": "learned"}


def tokenizer_run(path: Path, data: dict[str, Any] | None = None) -> Path:
    """data: what the data set it was trained on says of itself."""
    torch.manual_seed(0)
    tokenizer = build(TOKENIZER, CLASSES)
    torch.nn.init.normal_(tokenizer.out.weight, std=0.1)
    with torch.no_grad():  # codes that different clips choose differently
        clips = (
            torch.randn(2, 3, 1, 2, 2).repeat_interleave(8, -1).repeat_interleave(8, -2).expand(-1, -1, FRAMES, -1, -1)
        )
        tokenizer.quantizer.rows.copy_(tokenizer.latent(clips).flatten(0, 1))
    folder = RunFolder(path, "tokenizer", TOKENIZER, data or DATA, seed=0)
    folder.begin()
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    return path


def generator_run(path: Path, continues: bool = False) -> Path:
    """Class-conditional, or going on from 5 frames of a clip. The tokenizer's run lies beside it."""
    first = load_run(tokenizer_run(path.with_name(f"{path.name}-tokenizer")))
    told = {"clip_tokens": TOKENS} if continues else {"num_classes": 3}
    record = {"class_path": "NextToken", "init_args": {**GENERATOR, **told}}
    folder = RunFolder(path, "generator", record, DATA, 0, first)
    torch.manual_seed(0)
    generator = build(record, CLASSES, spec=first.tokenizer.spec)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.begin()
    folder.export(generator.state_dict(), generator.spec, step=1)
    (path / "config.yaml").write_text(yaml.safe_dump({"data": {"given_frames": 5 if continues else None}}))
    return path


def write_video(path: Path, frames: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> Tensor:
    """Moving stripes; uint8 (T, H, W, 3), before their compression."""
    rng = np.random.default_rng(seed)
    place = np.add.outer(np.add.outer(np.arange(frames), np.arange(size[0])), np.arange(size[1]))
    waves = np.sin(place[..., None] / rng.uniform(2, 6, 3) + rng.uniform(0, 6, 3))
    film = torch.from_numpy((127 + 100 * waves).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, film, fps=8)
    return film
