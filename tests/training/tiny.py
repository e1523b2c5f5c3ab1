"""A tokenizer, a generator and pictures so small that a whole run takes a second; and runs in processes of their own."""

import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data.loader import batches
from generators.protocol import Generator
from layers.record import build
from tokenizers_vis.protocol import Tokenizer
from training.generator_loop import train_generator
from training.loop import Stream, TrainOptions, accelerate
from training.losses import TokenizerObjective
from training.run import CLASSES, RunFolder, claim, load_run
from training.tokenizer_loop import train_tokenizer

TOKENIZER = {
    "class_path": "VQTokenizer",
    "init_args": {
        "image_size": 8,
        "quantizer": {"class_path": "EMAVectorQuantizer", "init_args": {"vocab_size": 8, "dim": 4}},
        "channels": 4,
        "encoder_mult": [1, 2],
        "groups": 2,
        "z_channels": 4,
        "res_blocks": 1,
        "dropout": 0.2,
    },
}
GENERATOR = {
    "class_path": "NextToken",
    "init_args": {"dim": 16, "depth": 1, "heads": 2, "num_classes": 3, "condition_drop": 0.5, "dropout": 0.2},
}
ADVERSARIAL = {
    "l2": 1.0,
    "adversarial": 0.5,
    "adversarial_start": 3,
    "adaptive_weight": True,
    "discriminator": {"class_path": "PatchDiscriminator", "init_args": {"width": 4, "layers": 1}},
    "terms": {"commitment": 0.25},
}
QUICK = {"lr": 1e-2, "ema_decay": 0.9, "trackers": (), "log_every": 1, "save_every": 4, "sample_every": 5}


class Pictures:
    """24 pictures (3, 8, 8) of 3 classes; training samples are shaken by their own random numbers."""

    labels = np.arange(24) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index, np.random.default_rng(0))

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        clean = np.random.default_rng(index).uniform(-1, 1, (3, 8, 8))
        image = torch.from_numpy((clean + rng.normal(0, 0.05, clean.shape)).clip(-1, 1)).float()
        return {"image": image, "label": torch.tensor(int(self.labels[index])), "index": index}

    def describe(self) -> dict[str, Any]:
        return {"name": "tiny", "count": len(self), "classes": ["a", "b", "c"]}


def stream(batch_size: int = 4) -> Stream:
    return partial(batches, Pictures(), batch_size, 0)


def held_out() -> list[dict[str, Tensor]]:
    return [next(stream()(start_step=100, rank=0, world=1))]


def make_tokenizer(seed: int = 0, **changed: Any) -> Tokenizer:
    torch.manual_seed(seed)
    return build({**TOKENIZER, "init_args": {**TOKENIZER["init_args"], **changed}}, CLASSES)


def begin(folder: RunFolder, options: TrainOptions, resume: bool = True) -> Accelerator:
    torch.set_num_threads(1)
    accelerator = accelerate(options, folder.path)
    if accelerator.is_main_process:
        claim(folder.path, {"train": {"lr": options.lr}}, resume)
        folder.begin()
    accelerator.wait_for_everyone()
    torch.manual_seed(0)
    return accelerator


def run_tokenizer(out: Path, steps: int = 10, **changed: Any) -> None:
    """Train the tiny tokenizer with an adversary, or go on with it."""
    options = TrainOptions(steps=steps, **{**QUICK, **changed})
    folder = RunFolder(out, "tokenizer", TOKENIZER, Pictures().describe(), seed=0)
    accelerator = begin(folder, options)
    tokenizer, objective = build(TOKENIZER, CLASSES), TokenizerObjective(**ADVERSARIAL)
    train_tokenizer(tokenizer, objective, stream(), options, folder, accelerator, held_out=held_out())


def random_rows(generator: Generator) -> list[Tensor]:
    """Stands for sampling: draws from the global random state, as a careless callback would."""
    return list(torch.rand(2, 2, 3, 8, 8))


def run_generator(out: Path, tokenizer_run: Path, steps: int = 10, **changed: Any) -> None:
    """Train the tiny generator, or go on with it."""
    options, source = TrainOptions(steps=steps, **{**QUICK, **changed}), load_run(tokenizer_run)
    folder = RunFolder(out, "generator", GENERATOR, Pictures().describe(), 0, source)
    accelerator = begin(folder, options)
    generator = build(GENERATOR, CLASSES, spec=source.tokenizer.spec)
    more = {"held_out": held_out(), "sample": random_rows}
    train_generator(generator, source.tokenizer, stream(), options, folder, accelerator, **more)


def export_tokenizer(path: Path, seed: int = 0) -> Tokenizer:
    """A finished run of a tokenizer with its first weights."""
    folder = RunFolder(path, "tokenizer", TOKENIZER, Pictures().describe(), seed=0)
    folder.begin()
    tokenizer = make_tokenizer(seed)
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=7)
    return tokenizer.eval()


def run_still(out: Path, tokenizer_run: Path, batch_size: int, accumulation: int = 1) -> None:
    """5 steps of the tiny generator in float64, nothing random in its loss."""
    options, source = TrainOptions(steps=5, accumulation=accumulation, **QUICK), load_run(tokenizer_run)
    still = {"dropout": 0.0, "token_dropout": 0.0, "condition_drop": 0.0}
    record = {**GENERATOR, "init_args": {**GENERATOR["init_args"], **still}}
    folder = RunFolder(out, "generator", record, Pictures().describe(), 0, source)
    accelerator = begin(folder, options)
    generator = build(record, CLASSES, spec=source.tokenizer.spec).double()
    train_generator(generator, source.tokenizer, stream(batch_size), options, folder, accelerator)


def journal(out: Path) -> list[dict[str, float]]:
    """log.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def processes() -> ForkServerContext:
    """Processes that begin with everything imported, forked from one in which torch has not run yet."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.training.tiny"])
    return context


def as_rank(rank: int, world: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` as one of `world` processes, as `accelerate launch --cpu --num_processes` would."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    work(*arguments)


def launch(world: int, work: Callable[..., None], *arguments: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = processes()
    group = [context.Process(target=as_rank, args=(rank, world, port, work, *arguments)) for rank in range(world)]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0] * world


def die_at_call(number: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work`, and SIGKILL this process when it flushes, renames or removes for the `number`-th time."""
    left = iter(range(number))

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*given: Any, **named: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return instead

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "rmdir", "unlink", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        work(*arguments)
