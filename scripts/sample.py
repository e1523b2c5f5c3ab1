"""Sample pictures from a run or a published checkpoint: a grid to look at, or many for a score.

    python scripts/sample.py --run runs/demo --per-class 8 --grid grid.png
    python scripts/sample.py --published llamagen-b-256 --classes 207 360 --grid grid.png    # or --weights FILE
    accelerate launch scripts/sample.py --run runs/my-run --num 50000 --out samples.npz     # stop and repeat it to resume

Sample i is a function of the seed, i and its class alone: not of batch size, processes or where the work was resumed.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm import tqdm

from eval.pixels import UINT8_RULES, to_uint8
from eval.report import save_grid
from generators.protocol import Generator
from layers.checkpoint import read_tensors
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from sampling.shards import Shards, plan_labels
from tokenizers_vis.protocol import Tokenizer
from training.options import command_line
from training.published import load_published
from training.run import RunError, load_run, versions

BLOCK = 256  # samples of one file of a large run


def parser() -> ArgumentParser:
    made = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    made.add_argument("--run", type=str | None, default=None, help="Run folder of a generator.")
    made.add_argument(
        "--published", type=str | None, default=None, help="Name in configs/published (scripts/published.py list)."
    )
    made.add_argument("--weights", type=str | None, default=None, help="Local file of the published generator.")
    made.add_argument("--tokenizer-weights", type=str | None, default=None, help="Local file of its tokenizer.")
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
    made.add_argument("--seed", type=int, default=0, help="Seed of all noise, in [0, 2^32).")
    made.add_argument("--batch-size", type=int, default=32, help="Samples decoded together.")
    made.add_argument("--device", type=str | None, default=None, help="Default: the GPU where there is one.")
    made.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float64"], default="float32", help="Of the generator."
    )
    made.add_argument(
        "--compile", type=bool, default=False, help="torch.compile the generator: slow start, faster tokens."
    )
    made.add_class_arguments(Sampler, "sampler")
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
    if options.run is not None:
        run = load_run(options.run, device)
        if run.generator is None:
            raise RunError(f"{options.run}: holds a tokenizer, not a generator; see scripts/reconstruct.py")
        tokenizer, generator, recipe, source = run.tokenizer, run.generator, run.recipe, run.provenance
    else:
        found = load_published(options.published, options.weights, options.tokenizer_weights, device)
        tokenizer, generator, recipe, source = found.tokenizer, found.generator, found.recipe, found.provenance
    cli.set_defaults({f"sampler.{key}": value for key, value in _leaves(recipe)})  # the recipe, but for what was asked
    options = cli.parse_args(arguments)
    try:
        sampler: Sampler = cli.instantiate(options).sampler
    except ValueError as error:  # a setting out of its range
        cli.error(str(error))
    generator.to(getattr(torch, options.dtype))
    if options.dtype == "float64":
        tokenizer.double()
    if device.type == "cpu" and not options.compile:
        pack_linears(generator)
    if options.compile:
        generator.trunk.compile(dynamic=False)
    decoder = Decoder(generator, tokenizer, sampler, options.seed, device)
    if options.grid is not None:
        draw_grid(decoder, options)
    else:
        write_many(decoder, options, accelerator, source)


class Decoder:
    """Samples by number and class."""

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, sampler: Sampler, seed: int, device: torch.device
    ) -> None:
        self.generator, self.tokenizer, self.sampler, self.seed, self.device = (
            generator,
            tokenizer,
            sampler,
            seed,
            device,
        )

    @property
    def num_classes(self) -> int:
        if not hasattr(self.generator.condition, "num_classes"):
            raise ValueError("this generator is conditioned by text: give --text-features FILE and --grid FILE")
        return self.generator.condition.num_classes

    @torch.inference_mode()
    def __call__(self, index: Tensor, condition: Condition) -> Tensor:
        """index int64 (B,) -> images float (B, 3, H, W), on the CPU."""
        noise = Noise(self.seed, index.to(self.device))
        tokens = generate(self.generator, condition.to(self.device), self.sampler, noise).tokens
        return self.tokenizer.decode(tokens).cpu()


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


def write_many(decoder: Decoder, options: Namespace, accelerator: Accelerator, source: dict[str, Any]) -> None:
    """Blocks of samples, shared out over the processes, then one file with its provenance beside it."""
    labels = plan_labels(options.num, decoder.num_classes, options.class_plan, options.seed)
    settings = {
        "source": source,
        "sampler": json.loads(json.dumps(options.sampler.as_dict())),
        "class_plan": options.class_plan,
        "seed": options.seed,
        "dtype": options.dtype,
    }
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


def _leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        pairs += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


if __name__ == "__main__":
    command_line(main)
