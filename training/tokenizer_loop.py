"""Training a tokenizer: reconstruct, weigh the terms, step; then, where there is one, the discriminator's turn.

Source of the order of things: VQGAN (Esser et al. 2021, arXiv:2012.09841) and LlamaGen (Sun et al. 2024,
arXiv:2406.06525). What is particular to a tokenizer is in the tokenizer, what is particular to a loss in the objective.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from layers.spec import Pyramid
from layers.spec import Sequence as Line
from sampling.preview import shown_lengths
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.quantizers.usage import code_counts, usage_metrics
from training.alignment import WithAlignment
from training.checkpoint import Checkpoints
from training.ema import EMA
from training.larp_prior import WithPrior
from training.loop import (
    Batch,
    Journal,
    Stream,
    TrainOptions,
    Watch,
    adamw,
    due,
    evaluated,
    export_state,
    reseed,
    save_grid,
    set_lr,
    to_device,
    update,
)
from training.losses import TokenizerObjective
from training.run import RunFolder

SHOWN = 8  # pictures in a row of a reconstruction grid


def train_tokenizer(
    tokenizer: Tokenizer,
    objective: TokenizerObjective,
    stream: Stream,
    options: TrainOptions,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    held_out: Sequence[Batch] = (),
    beside: WithPrior | WithAlignment | None = None,
) -> None:
    """Train up to `options.steps`, from the newest checkpoint of `folder` on, and export the averaged weights.

    held_out: batches whose reconstruction is scored, the first pictures shown above theirs; on every process its own.
    beside: the tokenizer and what learns beside it, which gives it one more term and is not exported.
    Raises TrainingDiverged at a number that is not finite, NotWritten on a full disk.
    """
    model = tokenizer if beside is None else beside
    optimizer = adamw(model, options)
    model, optimizer = accelerator.prepare(model, optimizer)
    in_training, optimizers = [model], [optimizer]
    objective.to(accelerator.device)
    if objective.adversary is not None:
        critic_optimizer = adamw(objective.adversary, options, lr_share=objective.adversarial_lr)
        critic, critic_optimizer = accelerator.prepare(objective.adversary, critic_optimizer)
        in_training, optimizers = [model, critic], [optimizer, critic_optimizer]
    average = EMA(model, options.ema_decay)
    accelerator.register_for_checkpointing(average)
    checkpoints = Checkpoints(
        folder.path / "checkpoints", accelerator, options.keep_last, parts=[*in_training, *optimizers, average]
    )

    first = checkpoints.resume()
    journal, watch = Journal(folder.path, accelerator, first), Watch(accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = stream(start_step=first * options.accumulation, rank=rank, world=world)
    model.train()
    for step in tqdm(range(first, options.steps), initial=first, total=options.steps, disable=rank > 0):
        reseed(folder.seed, step, rank)
        lr = set_lr(optimizers, step, options)
        given = {"progress": step / options.steps} if isinstance(beside, WithPrior) else {}
        for _ in range(options.accumulation):
            images = to_device(next(batches), accelerator.device)["image"]
            journal.count(len(images))
            with accelerator.accumulate(*in_training):
                reconstruction, parts = model(images, **given)
                with accelerator.autocast():
                    loss, logs = objective(images, reconstruction, parts, step, tokenizer.last_layer)
                accelerator.backward(loss)
                watch.add(step, {**logs, **parts.get("stats", {})})
                watch.add(step, update(accelerator, model, optimizer, options))
                if objective.critic_learns(step):
                    loss, logs = critic(images, reconstruction.detach())
                    accelerator.backward(objective.adversarial_weight(step) * loss)
                    watch.add(step, logs)
                    update(accelerator, critic, critic_optimizer, options)
        average.update()

        done = step + 1
        if due(done, options.log_every, options.steps):
            watch.check(checkpoints.newest)
            journal.write(done, {**watch.read(), "lr": lr, **journal.throughput()})
        if held_out and due(done, options.sample_every, options.steps):
            with evaluated(model, average):
                scores = score(tokenizer, held_out, accelerator, folder.path / f"samples/step_{done:08d}.png")
            journal.write(done, scores)
        if due(done, options.save_every, options.steps):
            watch.check(checkpoints.newest)
            checkpoints.save(done)

    with average.applied():
        state = export_state(accelerator, model)
        if accelerator.is_main_process:
            folder.export(state, tokenizer.spec, options.steps)
    accelerator.end_training()


def score(tokenizer: Tokenizer, held_out: Sequence[Batch], accelerator: Accelerator, picture: Path) -> dict[str, float]:
    """Mean squared error and PSNR of clamped reconstructions, range 2, mean over pictures; use of the codebook.

    Of a pyramid of scales also the perplexity of each scale's codes and the PSNR of its decode with those before it; of a
    line of tokens whose first ones decode by themselves, the PSNR of some numbers of them (`sampling.preview.shown_lengths`).
    """
    layout, prefixes = tokenizer.spec.layout, tokenizer.prefixes
    if isinstance(layout, Line) and len(prefixes) > 1:
        prefixes = shown_lengths(prefixes)
    errors, ids = [], []
    for batch in held_out:
        images = to_device(batch, accelerator.device)["image"]
        tokens = tokenizer.encode(images)
        again = [tokenizer.decode(tokens[:, :n]).float().clamp(-1, 1) for n in prefixes]
        errors.append(torch.stack([(some - images).square().flatten(1).mean(1) for some in again], 1))  # (B, prefixes)
        ids.append(tokens)
        if len(errors) == 1 and accelerator.is_main_process:
            save_grid(picture, [images[:SHOWN], *(some[:SHOWN] for some in again)])
    error = accelerator.gather(torch.cat(errors))
    psnr = 10 * (4 / error).log10().mean(0)
    scores = {"held_out_mse": error[:, -1].mean(), "held_out_psnr_db": psnr[-1]}

    def use(tokens: Tensor) -> dict[str, Tensor]:
        return usage_metrics(accelerator.reduce(code_counts(tokens, tokenizer.spec.vocab_size)))

    if tokenizer.spec.vocab_size is not None:
        scores["held_out_usage"] = use(torch.cat(ids))["usage"]
    if isinstance(layout, Pyramid):
        starts = (0, *prefixes)
        for k, end in enumerate(prefixes):
            scores[f"held_out_psnr_db_scale_{k}"] = psnr[k]
            if tokenizer.spec.vocab_size is not None:
                scores[f"held_out_perplexity_scale_{k}"] = use(torch.cat(ids)[:, starts[k] : end])["perplexity"]
    elif len(prefixes) > 1:
        scores |= {f"held_out_psnr_db_of_{n}": psnr[k] for k, n in enumerate(prefixes)}
    return {name: value.item() for name, value in scores.items()}
