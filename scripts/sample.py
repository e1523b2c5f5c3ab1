"""Sample pictures from a run or a published checkpoint: a grid to look at, or many for a score.

    python scripts/sample.py --run runs/demo --per-class 8 --grid grid.png
    python scripts/sample.py --published llamagen-b-256 --classes 207 360 --grid grid.png    # or --weights FILE
    accelerate launch scripts/sample.py --run runs/my-run --num 50000 --out samples.npz     # stop and repeat it to resume

Sample i is a function of the seed, i and its class alone: not of batch size, processes or where the work was resumed.
"""

from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from eval.pixels import UINT8_RULES, to_uint8
from eval.report import save_grid
from layers.checkpoint import read_tensors
from layers.spec import Condition
from sampling.shards import Shards, plan_labels
from training.decoder import Decoder, add_decoder_arguments, open_decoder
from training.options import command_line
from training.run import versions

BLOCK = 256  # samples of one file of a large run


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add_decoder_arguments(made)
    made.add_argument("--classes", type=int, nargs="+", default=None, help="Class ids. Default: all, at most 100.")
    made.add_argument("--per-class", type=int, default=8, help="Samples of each class in the grid.")
    made.add_argument(
        "--text-features", type=str | None, default=None, help="safetensors with text (N, S, D), text_mask (N, S)."
    )
    made.add_argument("--grid", type=str | None, default=None, help="PNG to write; one row a class.")
    made.add_argument("--num", type=int | None, default=None, help="How many samples to write to --out.")
    made.add_argument("--out", type=str | None, default=None, help="NAME.npz, or a folder of PNG files.")
    made.add_argument(
        "--class-plan", type=Literal["balanced", "random"], default="balanced", help="Classes of --num samples."
    )
    made.add_argument("--batch-size", type=int, default=32, help="Samples decoded together.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    return made


def main(arguments: list[str] | None = None) -> None:
    cli = parser()
    options = cli.parse_args(arguments)
    if (options.run is None) == (options.published is None):
        cli.error("give --run FOLDER or --published NAME")
    if (options.grid is None) == (options.out is None) or (options.out is None) != (options.num is None):
        cli.error("give --grid FILE, or --num N with --out FILE")
    accelerator = Accelerator(cpu=options.device == "cpu")
    device = torch.device(options.device or accelerator.device)
    decoder = open_decoder(cli, arguments, device)
    if options.grid is not None:
        draw_grid(decoder, options)
    else:
        write_many(decoder, options, accelerator)


def draw_grid(decoder: Decoder, options: Namespace) -> None:
    """One row a class (or a caption), `per_class` pictures each."""
    if options.text_features is not None:
        texts = Condition(**read_tensors(options.text_features))
        condition = texts.select(torch.arange(texts.rows).repeat_interleave(options.per_class))
    else:
        classes = options.classes or list(range(min(decoder.num_classes, 100)))
        condition = Condition(label=torch.tensor(classes).repeat_interleave(options.per_class))
    batches = torch.arange(condition.rows).split(options.batch_size)
    images = [decoder(index, condition.select(index)) for index in tqdm(batches, desc="sampling", unit="batch")]
    save_grid(torch.cat(images), options.grid, columns=options.per_class)
    print(f"{options.grid}: {condition.rows} pictures, one row a {'caption' if options.text_features else 'class'}")


def write_many(decoder: Decoder, options: Namespace, accelerator: Accelerator) -> None:
    """Blocks of samples, shared out over the processes, then one file with its provenance beside it."""
    labels = plan_labels(options.num, decoder.num_classes, options.class_plan, options.seed)
    settings = {**decoder.settings, "class_plan": options.class_plan}
    shards = Shards(Path(options.out), labels, BLOCK, settings)
    if accelerator.is_main_process:
        shards.begin()
    accelerator.wait_for_everyone()
    todo = list(shards.missing(accelerator.process_index, accelerator.num_processes))
    for index in tqdm(todo, desc="sampling", unit=f"x{BLOCK}", disable=not accelerator.is_local_main_process):
        parts = [
            to_uint8(decoder(part, Condition(label=labels[part]))).movedim(1, -1)
            for part in index.split(options.batch_size)
        ]
        shards.write(index, torch.cat(parts))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        machine = {"device": str(decoder.device), "batch_size": options.batch_size, "versions": versions()}
        shards.finish({**settings, "count": options.num, "quantisation": UINT8_RULES["trunc_128"], **machine})
        print(f"{options.out}: {options.num} pictures")


if __name__ == "__main__":
    command_line(main)
