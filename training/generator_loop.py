"""Training a generator on the tokens of a frozen tokenizer: tokens, loss, step.

What is particular to an order of prediction, its masks, its noise and the share of dropped conditions, is in the
generator's `loss`.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from generators.protocol import Generator
from layers.spec import Condition
from tokenizers_vis.protocol import Tokenizer
from training.checkpoint import Checkpoints
from training.ema import EMA
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
    save_grid,
    set_decay,
    set_lr,
    to_device,
    update,
)
from training.run import RunFolder

Sample = Callable[[Generator], Sequence[Tensor]]


def train_generator(
    generator: Generator,
    tokenizer: Tokenizer,
    stream: Stream,
    options: TrainOptions,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    held_out: Sequence[Batch] = (),
    sample: Sample | None = None,
) -> None:
    """Train up to `options.steps`, from the newest checkpoint of `folder` on, and export the averaged weights.

    stream: batches with "label" and "tokens" (B, L), or "latent" or "image", of which the tokenizer makes tokens here.
    held_out: batches whose loss is reported; on every process its own. sample: the averaged generator -> rows of pictures
    (N, 3, H, W) for a grid. Raises TrainingDiverged at a number that is not finite, NotWritten on a full disk.
    """
    tokenizer.to(accelerator.device).eval().requires_grad_(False)
    model = Through(generator, generator.loss)
    optimizer = adamw(model, options, generator.undecayed)
    model, optimizer = accelerator.prepare(model, optimizer)
    average = EMA(model, options.ema_decay)
    accelerator.register_for_checkpointing(average)
    checkpoints = Checkpoints(
        folder.path / "checkpoints", accelerator, options.keep_last, parts=[model, optimizer, average]
    )

    first = checkpoints.resume()
    journal, watch = Journal(folder.path, accelerator, first), Watch(accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = stream(start_step=first * options.accumulation, rank=rank, world=world)
    model.train()
    for step in tqdm(range(first, options.steps), initial=first, total=options.steps, disable=rank > 0):
        reseed(folder.seed, step, rank)
        lr = set_lr([optimizer], step, options)
        set_decay([optimizer], step, options)
        given = generator.curriculum(step, options.steps)
        for _ in range(options.accumulation):
            tokens, condition = lesson(next(batches), tokenizer, accelerator.device)
            journal.count(len(tokens))
            with accelerator.accumulate(model):
                loss, parts = model(tokens, condition, **given)
                accelerator.backward(loss)
                watch.add(step, {**parts, "loss": loss})
                watch.add(step, update(accelerator, model, optimizer, options))
        average.update()

        done = step + 1
        if due(done, options.log_every, options.steps):
            watch.check(checkpoints.newest)
            journal.write(done, {**watch.read(), "lr": lr, **journal.throughput()})
        if due(done, options.sample_every, options.steps):
            reseed(folder.seed, 0, rank)  # the same draws every time
            with evaluated(model, average):
                losses = [model(*lesson(batch, tokenizer, accelerator.device))[0] for batch in held_out]
                rows = sample(generator) if sample else None
            if losses:
                loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
                journal.write(done, {"held_out_loss": loss.item()})
            if rows and accelerator.is_main_process:
                save_grid(folder.path / f"samples/step_{done:08d}.png", rows)
        if due(done, options.save_every, options.steps):
            watch.check(checkpoints.newest)
            checkpoints.save(done)

    with average.applied():
        state = export_state(accelerator, model)
        if accelerator.is_main_process:
            folder.export(state, generator.spec, options.steps)
    accelerator.end_training()


def lesson(batch: Batch, tokenizer: Tokenizer, device: torch.device) -> tuple[Tensor, Condition]:
    """Tokens and what they are about. Continuous tokens are drawn from the tokenizer's posterior, anew each time: here, or
    by the cache that gives a latent."""
    batch, spec = to_device(batch, device), tokenizer.spec
    if "tokens" in batch:
        tokens = batch["tokens"]
    elif "latent" in batch:
        tokens = tokenizer.tokens(batch["latent"])
    else:
        images = batch["image"]
        size = (len(images), spec.length, spec.channels)
        tokens = tokenizer.encode(images, noise=None if spec.channels is None else torch.randn(size, device=device))
    return tokens, Condition(label=batch["label"])
