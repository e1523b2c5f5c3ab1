"""Training an EAGLE drafter on the hidden states of a frozen next-token generator: features, loss, step.

Source: LANTERN (Jang et al. 2024, arXiv:2410.03355), after EAGLE (arXiv:2401.15077). The generator reads real tokens; the
drafter learns to say its next hidden state, and the law that its read-out makes of it, from noisy ones.

Letters: B samples, L tokens, D width of the generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from generators.next_token import NextToken
from generators.protocol import Generator
from heads.categorical import Categorical
from layers.condition import drop_condition
from layers.spec import Condition
from sampling.speculative.acceptance import acceptance_rate
from sampling.speculative.drafter import Drafter
from tokenizers_vis.protocol import Tokenizer
from training.checkpoint import Checkpoints
from training.ema import EMA
from training.generator_loop import lesson
from training.loop import (
    Batch,
    Journal,
    Stream,
    Through,
    TrainOptions,
    Watch,
    adamw,
    due,
    evaluated,
    export_state,
    reseed,
    set_decay,
    set_lr,
    update,
)
from training.run import RunError, RunFolder

NOISE_LENGTH = 512  # tokens at which the noise has the width that is stated


@dataclass(frozen=True)
class DrafterLesson:
    """What the drafter is shown.

    Args:
        condition_drop: Share of conditions replaced by the null one, so that both branches of guidance are learned.
        noise: Width of the uniform noise on the features that are read, at 512 tokens; at L tokens times 512 / L.
    """

    condition_drop: float = 0.1
    noise: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.condition_drop <= 1 or self.noise < 0:
            raise ValueError(
                f"lesson: condition_drop is {self.condition_drop}, must be in [0, 1]; noise is {self.noise}, not below 0"
            )

    def shown(self, features: Tensor) -> Tensor:
        """features (B, L, D) with noise on them."""
        width = self.noise * NOISE_LENGTH / features.shape[1]
        return features + (torch.rand_like(features) - 0.5) * width


def drafter_record(target: Generator, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a drafter of the target's width. chosen: its other arguments.

    Raises RunError for a target whose features cannot be drafted.
    """
    if not isinstance(target, NextToken) or not isinstance(target.head, Categorical):
        raise RunError(
            f"a drafter continues a NextToken generator with a categorical head, not {type(target).__name__} with "
            f"{type(getattr(target, 'head', None)).__name__}"
        )
    if target.condition.slots != 1:
        raise RunError(
            f"a drafter is trained behind a condition of one slot, this generator has {target.condition.slots}"
        )
    return {"class_path": Drafter.__name__, "init_args": {**chosen, "dim": target.embed.weight.shape[1]}}


@torch.no_grad()
def begin_drafter(drafter: Drafter, target: NextToken) -> None:
    """Give a new drafter the target's embedding, which it keeps."""
    drafter.embed.weight.copy_(target.embed.weight[: len(drafter.embed.weight)])


def train_drafter(
    drafter: Drafter,
    target: NextToken,
    tokenizer: Tokenizer,
    stream: Stream,
    shows: DrafterLesson,
    options: TrainOptions,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    held_out: Sequence[Batch] = (),
) -> None:
    """Train up to `options.steps`, from the newest checkpoint of `folder` on, and export the averaged weights.

    stream, held_out: as for `train_generator`. Of the held-out batches the loss is reported, and the share of drafts that
    the exact rule would accept one token ahead, at temperature 1. Raises TrainingDiverged at a number that is not finite,
    NotWritten on a full disk.
    """
    for frozen in (target, tokenizer):
        frozen.to(accelerator.device).eval().requires_grad_(False)
    model = Through(drafter, drafter.loss)
    optimizer = adamw(model, options)
    model, optimizer = accelerator.prepare(model, optimizer)
    average = EMA(model, options.ema_decay)
    accelerator.register_for_checkpointing(average)
    checkpoints = Checkpoints(
        folder.path / "checkpoints", accelerator, options.keep_last, parts=[model, optimizer, average]
    )
    readout = target.head.readout.weight

    def features_of(batch: Batch, drop: float) -> tuple[Tensor, Tensor]:
        tokens, condition = lesson(batch, tokenizer, accelerator.device)
        return features(target, tokens, condition, drop), tokens

    first = checkpoints.resume()
    journal, watch = Journal(folder.path, accelerator, first), Watch(accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = stream(start_step=first * options.accumulation, rank=rank, world=world)
    model.train()
    for step in tqdm(range(first, options.steps), initial=first, total=options.steps, disable=rank > 0):
        reseed(folder.seed, step, rank)
        lr = set_lr([optimizer], step, options)
        set_decay([optimizer], step, options)
        for _ in range(options.accumulation):
            aims, tokens = features_of(next(batches), shows.condition_drop)
            journal.count(len(tokens))
            with accelerator.accumulate(model):
                loss, parts = model(aims, tokens, readout, fed=shows.shown(aims))
                accelerator.backward(loss)
                watch.add(step, {**parts, "loss": loss})
                watch.add(step, update(accelerator, model, optimizer, options))
        average.update()

        done = step + 1
        if due(done, options.log_every, options.steps):
            watch.check(checkpoints.newest)
            journal.write(done, {**watch.read(), "lr": lr, **journal.throughput()})
        if due(done, options.sample_every, options.steps) and held_out:
            with evaluated(model, average):
                lessons = [features_of(batch, drop=0.0) for batch in held_out]
                losses = torch.stack([model(*it, readout)[0] for it in lessons]).mean()
                accepted = torch.stack([agreement(drafter, *it, readout) for it in lessons]).mean()
            scores = accelerator.reduce(torch.stack((losses, accepted)), reduction="mean").tolist()
            journal.write(done, dict(zip(("held_out_loss", "held_out_acceptance"), scores, strict=True)))
        if due(done, options.save_every, options.steps):
            watch.check(checkpoints.newest)
            checkpoints.save(done)

    with average.applied():
        state = export_state(accelerator, model)
        if accelerator.is_main_process:
            folder.export(state, drafter.spec, options.steps)
    accelerator.end_training()


@torch.no_grad()
def features(target: NextToken, tokens: Tensor, condition: Condition, drop: float = 0.0) -> Tensor:
    """What the read-out takes: tokens (B, L) -> (B, L, D), feature t before token t; a share `drop` without condition."""
    return target.hidden(tokens, drop_condition(condition, None, drop))


@torch.no_grad()
def agreement(drafter: Drafter, aims: Tensor, tokens: Tensor, readout: Tensor) -> Tensor:
    """Mean of sum min(p, q) over the laws that both make one token ahead: the share of drafts accepted at temperature 1.

    aims (B, L, D), tokens int64 (B, L), readout (V, D).
    """
    p, q = ((x @ readout.T).softmax(-1) for x in (aims[:, 1:], drafter(aims, tokens)[:, :-1]))
    return acceptance_rate(p, q).mean()
