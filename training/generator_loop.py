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
GIVEN_FRAMES = 5  # of 16, as LARP predicts frames (arXiv:2410.21264, sec. 4.1)


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
    given_frames: int | None = None,
) -> None:
    """Train up to `options.steps`, from the newest checkpoint of `folder` on, and export the averaged weights.

    stream: batches with "label" and "tokens" (B, L), or "latent" or "image", of which the tokenizer makes tokens here.
    held_out: batches whose loss is reported; on every process its own. sample: the averaged generator -> rows of pictures
    (N, 3, H, W) for a grid. given_frames: as in `lesson`. Raises TrainingDiverged at a number that is not finite, NotWritten
    on a full disk.
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
            tokens, condition = lesson(next(batches), tokenizer, accelerator.device, given_frames)
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
                told = (lesson(batch, tokenizer, accelerator.device, given_frames) for batch in held_out)
                losses = [model(*each)[0] for each in told]
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


def lesson(
    batch: Batch, tokenizer: Tokenizer, device: torch.device, given_frames: int | None = None
) -> tuple[Tensor, Condition]:
    """Tokens and what they are about. Continuous tokens are drawn from the tokenizer's posterior, anew each time: here, or
    by the cache that gives a latent.

    given_frames: the tokens go on from so many first frames of their own clip, whose tokens, the last frame standing
    still, are the condition; None: they are about the label.
    """
    batch, spec = to_device(batch, device), tokenizer.spec
    if "tokens" in batch:
        tokens = batch["tokens"]
    elif "latent" in batch:
        tokens = tokenizer.tokens(batch["latent"])
    else:
        images = batch["image"]
        size = (len(images), spec.length, spec.channels)
        tokens = tokenizer.encode(images, noise=None if spec.channels is None else torch.randn(size, device=device))
    if given_frames is not None:
        return tokens, Condition(clip=tokenizer.encode_start(batch["image"][:, :, :given_frames]))
    return tokens, Condition(label=batch["label"])
