"""What the two training loops share: options, optimiser, schedule, seeds, the watch over numbers, the journal."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torchvision.utils import make_grid, save_image

from layers.checkpoint import write_atomic
from training.ema import EMA
from training.run import naming_failure, write_text

Batch = dict[str, Tensor]


class Stream(Protocol):
    """Batches without end for one process, from any position on: `functools.partial(data.loader.batches, set, ...)`."""

    def __call__(self, *, start_step: int, rank: int, world: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class TrainOptions:
    """How long and by what rule to train, and how often to report.

    Args:
        steps: Optimiser steps in all.
        lr: Learning rate of AdamW at its highest.
        betas: Decay rates of AdamW's two moments.
        weight_decay: Weight decay of AdamW, on tensors of two or more dimensions alone.
        weight_decay_end: Weight decay at the last step, reached along half a cosine; null keeps it as it is.
        clip: Largest norm of the gradient; null leaves it as it is.
        warmup: Steps in which the learning rate rises to lr.
        warmup_from: Share of lr that the rise begins at.
        schedule: Course of the learning rate after the warm-up, down to lr_end times lr at the last step.
        hold: Share of the steps after the warm-up that still have all of lr, before a cosine or linear schedule begins.
        lr_end: Share of lr that is left at the end of a cosine or linear schedule.
        ema_decay: Decay of the weight average that is exported; it begins lower, see training/ema.py. 0: no averaging.
        accumulation: Batches that make one optimiser step.
        mixed_precision: Precision of the forward pass; weights, averages and optimiser stay in float32.
        log_every: Steps from one line of log.jsonl to the next.
        sample_every: Steps from one picture and held-out loss to the next; 0 for none.
        save_every: Steps from one checkpoint to the next; the last step always has one.
        keep_last: Checkpoints that stay.
        trackers: Trackers that accelerate writes to, "tensorboard" or "wandb", beside log.jsonl.
    """

    steps: int = 10_000
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    clip: float | None = 1.0
    warmup: int = 0
    warmup_from: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    hold: float = 0.0
    lr_end: float = 0.0
    ema_decay: float = 0.9999
    accumulation: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    log_every: int = 50
    sample_every: int = 1000
    save_every: int = 1000
    keep_last: int = 2
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}, must be at least 1")
        for name in ("warmup_from", "hold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}, must be in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "trackers", tuple(self.trackers))


class TrainingDiverged(ArithmeticError):
    """A loss or a gradient that is no number; the message names step, parts and the last good checkpoint."""


class Through(nn.Module):
    """One method of `module` as its forward: DDP, FSDP and autocast attend to `forward` alone."""

    def __init__(self, module: nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.method(*arguments, **named)


def accelerate(options: TrainOptions, folder: Path) -> Accelerator:
    """Precision, accumulation, devices and processes, trackers: all of it is the library's."""
    return Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        log_with=list(options.trackers) or None,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard")),
    )


def adamw(module: nn.Module, options: TrainOptions, undecayed: Sequence[str] = (), lr_share: float = 1.0) -> AdamW:
    """AdamW over the parameters that learn, at `lr_share` of the learning rate; biases, norms and other vectors are not
    decayed, nor is what has one of `undecayed` in its name."""
    decayed, spared = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spare = parameter.dim() < 2 or any(part in name for part in undecayed)
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, "decayed": True, "lr_share": lr_share},
        {"params": spared, "weight_decay": 0.0, "decayed": False, "lr_share": lr_share},
    ]
    return AdamW([group for group in groups if group["params"]], lr=options.lr, betas=options.betas)


def lr_factor(step: int, options: TrainOptions) -> float:
    """The share of `lr` in step `step`, counted from 0: a linear rise over `warmup` steps, then the schedule."""
    if step < options.warmup:
        return options.warmup_from + (1 - options.warmup_from) * (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    passed = min(1.0, (step - options.warmup) / max(1, options.steps - 1 - options.warmup))
    done = max(0.0, passed - options.hold) / (1 - options.hold)
    left = 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return options.lr_end + (1 - options.lr_end) * left


def set_lr(optimizers: Sequence[Optimizer], step: int, options: TrainOptions) -> float:
    """Give every optimiser the learning rate of this step, and say it. Nothing is remembered from step to step."""
    lr = options.lr * lr_factor(step, options)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr * group["lr_share"]
    return lr


def set_decay(optimizers: Sequence[Optimizer], step: int, options: TrainOptions) -> None:
    """Give every group that is decayed the weight decay of this step."""
    if options.weight_decay_end is None:
        return
    left = (1 + math.cos(math.pi * step / max(1, options.steps - 1))) / 2
    decay = options.weight_decay_end + (options.weight_decay - options.weight_decay_end) * left
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if group["decayed"]:
            group["weight_decay"] = decay


def reseed(seed: int, step: int, rank: int) -> None:
    """Every random number of a step is a function of (seed, step, process): resuming needs no memory, and what is drawn
    for a picture or a held-out loss changes nothing after it."""
    set_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def update(
    accelerator: Accelerator, module: nn.Module, optimizer: Optimizer, options: TrainOptions
) -> dict[str, Tensor]:
    """Once all batches of a step are in: clip the gradient, step, forget it. Returns its norm, to be watched.

    Not so under fp16: an infinite one is how the loss scale finds its place, and that step is left out.
    """
    watched = {}
    if accelerator.sync_gradients:
        limit = math.inf if options.clip is None else options.clip
        norm = accelerator.clip_grad_norm_(module.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded parameters
        watched = {} if accelerator.scaler is not None else {"gradient_norm": norm}
    optimizer.step()
    optimizer.zero_grad()
    return watched


@contextmanager
def evaluated(model: nn.Module, average: EMA) -> Iterator[None]:
    """Within, a prepared model has its averaged weights and is in eval mode."""
    model.eval()
    with average.applied(), torch.no_grad():
        if isinstance(model, FSDPModule):
            model.unshard()  # what lies outside its blocks is whole for other methods than forward
        yield
    model.train()


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


class Watch:
    """Means of named numbers over the steps since they were read, and the first of them that was not finite.

    Both stay on the device: the host asks only when it reads or checks.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        # N names that come together -> their sums (N,), the first bad step of each (N,), how often they came
        self.rows: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}

    @torch.no_grad()
    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """values: scalars by name; not every name need come in every step."""
        if not values:
            return
        device = self.accelerator.device
        row = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
        bad = torch.where(row.isfinite(), math.inf, float(step))
        total, first, count = self.rows.get(tuple(values), (torch.zeros_like(row), torch.full_like(row, math.inf), 0))
        self.rows[tuple(values)] = (total + row, torch.minimum(first, bad), count + 1)

    def check(self, last_good: Callable[[], Path | None]) -> None:
        """Raises TrainingDiverged, on every process, where any number since the last reading was not finite."""
        bad: dict[str, float] = {}
        for names, (_, first, _) in self.rows.items():
            earliest = self.accelerator.gather(first).view(-1, len(names)).amin(0).tolist()
            for name, step in zip(names, earliest, strict=True):
                if step < bad.get(name, math.inf):
                    bad[name] = step
        if bad:
            step = min(bad.values())
            parts = ", ".join(name for name, found in bad.items() if found == step)
            raise TrainingDiverged(
                f"step {step:.0f}: not finite: {parts}. Last good checkpoint: {last_good() or 'none yet'}. "
                "Try a lower train.lr, a longer train.warmup, a smaller train.clip, or train.mixed_precision bf16 or "
                "no, in a new --out: --resume would meet the same numbers again"
            )

    def read(self) -> dict[str, float]:
        """The means, over all processes; they begin anew."""
        totals: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for names, (total, _, count) in self.rows.items():
            mean = self.accelerator.reduce(total, reduction="mean").tolist()
            totals.update(dict(zip(names, mean, strict=True)))
            counts.update(dict.fromkeys(names, count))
        self.rows.clear()
        return {name: totals[name] / counts[name] for name in totals}


class Journal:
    """log.jsonl, one object a line, and accelerate's trackers. A resumed run drops the lines after its checkpoint."""

    def __init__(self, folder: Path, accelerator: Accelerator, first: int) -> None:
        self.file, self.accelerator = folder / "log.jsonl", accelerator
        self.images, self.since = 0, time.perf_counter()
        if accelerator.is_main_process and self.file.exists():
            kept = "".join(line for line in self.file.read_text().splitlines(True) if _step(line) <= first)
            write_text(self.file, kept)
        accelerator.init_trackers(folder.name, init_kwargs={"tensorboard": {"purge_step": first}})

    def count(self, images: int) -> None:
        self.images += images * self.accelerator.num_processes

    def throughput(self) -> dict[str, float]:
        """Images a second, of all processes, since the last time it was asked."""
        now = time.perf_counter()
        rate = self.images / (now - self.since)
        self.images, self.since = 0, now
        return {"images_per_second": rate}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            line = json.dumps({"step": step, **values}) + "\n"
            with naming_failure(self.file, lambda: len(line)), self.file.open("a") as file:
                file.write(line)
        self.accelerator.log(dict(values), step=step)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the end of a line that a kill cut off
        return math.inf


def save_grid(path: Path, rows: Sequence[Tensor]) -> None:
    """A PNG of equally many pictures a row: rows of (N, 3, H, W) in [-1, 1]. Of clips (N, 3, T, H, W) a filmstrip each,
    those at one place of the rows below each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [row.float().cpu().clamp(-1, 1) for row in rows]
    columns, pictures = len(rows[0]), torch.cat(rows)
    if pictures.ndim == 5:
        columns = pictures.shape[2]
        pictures = rearrange(torch.stack(rows, 1), "n r c t h w -> (n r t) c h w")
    grid = make_grid(pictures, nrow=columns, pad_value=1)
    with naming_failure(path, grid.numel):
        write_atomic(path, lambda draft: save_image((grid + 1) / 2, draft, format="png"))


def due(done: int, every: int, steps: int) -> bool:
    """Whether what happens every `every` steps, and after the last, happens after `done` of them. every 0: never."""
    return bool(every) and (done % every == 0 or done == steps)


def export_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a prepared model under the names of the module within: whole on the main process. What only learns
    beside that module stays behind."""
    prefix = "module." if isinstance(accelerator.unwrap_model(model), Through) else ""
    state = accelerator.get_state_dict(model)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
