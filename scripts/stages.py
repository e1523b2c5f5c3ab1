"""What the demonstrations share: timed stages, configurations cut short, work in batches, curves of a finished run."""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.files import write_json

BATCH = 100


class Clock:
    """Seconds of every part, over all the times the demonstration was resumed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        print(f"{part} ...", flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            write_json(self.file, self.seconds)

    def cost(self) -> dict[str, Any]:
        """All of it, and the most memory that this process or one it started had at once, for the metrics."""
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "compute_seconds": sum(self.seconds.values()),
            "peak_memory_bytes": 1024 * peak,
            "seconds": self.seconds,
        }


def config(name: str) -> str:
    return str(files("configs") / f"{name}.yaml")


def shared(data: str, seed: int) -> list[str]:
    return ["--data.name", data, "--seed", str(seed), "--resume"]


def scaled(config: dict[str, Any], share: float) -> dict[str, Any]:
    """The configuration with `share` of its steps."""
    for name in ("steps", "warmup", "sample_every", "save_every"):
        config["train"][name] = max(1, round(config["train"][name] * share))
    return config


@torch.inference_mode()
def in_batches(work: Callable[[Tensor], Tensor], count: int, name: str) -> Tensor:
    """The results of work(index) for blocks of 0 .. count - 1, one after the other."""
    blocks = torch.arange(count).split(BATCH)
    return torch.cat([work(index) for index in tqdm(blocks, desc=name, unit=f"x{BATCH}", leave=False)])


def curves(log: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of everything in a log that is a loss or a held-out score."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    names = [name for line in lines for name in line if name in ("loss", "l2", "usage") or name.startswith("held_out")]
    return {
        name: tuple(zip(*[(line["step"], line[name]) for line in lines if name in line], strict=True))
        for name in dict.fromkeys(names)
    }
