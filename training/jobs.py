"""From a configuration to a finished run: what the training scripts do, and what anything else may do with a dict."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from data.loader import Samples, batches
from data.sets import PictureSet, open_set
from data.token_cache import TokenCache
from generators.protocol import Generator
from layers.keymap import check_keys
from layers.noise import Noise
from layers.record import build
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from tokenizers_vis.protocol import Tokenizer
from training.generator_loop import Sample, train_generator
from training.larp_prior import LARPPrior
from training.loop import Batch, Stream, TrainOptions, accelerate
from training.losses import TokenizerObjective
from training.options import Config
from training.published import entries, generator_weights
from training.run import CLASSES, RunError, RunFolder, claim, feeding, load_run
from training.tokenizer_loop import train_tokenizer

GRID_CLASSES, GRID_EACH = 10, 8  # of a sample grid: at most so many rows, a class each, of so many pictures
LOADING = ("batch_size", "balanced", "workers", "held_out")  # keys of the section `data` that are not open_set's


def tokenizer_job(config: Config) -> bool:
    """Train what a configuration of `options.tokenizer_parser` describes; False where it was finished before."""
    options = TrainOptions(**config["train"])
    accelerator = accelerate(options, Path(config["out"]))
    pictures = _pictures(config["data"], split="train")
    set_seed(config["seed"])
    given = {} if config["teacher"] is None else {"teacher": load_run(config["teacher"]).tokenizer}
    tokenizer = build(config["tokenizer"], CLASSES, **given)
    for part, run in (config["parts"] or {}).items():  # a run that is resumed reads its checkpoint over them
        tokenizer.get_submodule(part).load_state_dict(load_run(run).tokenizer.state_dict())
    objective = TokenizerObjective(**config["objective"])
    prior = None
    if config["prior"] is not None:
        codes = {"tokens": tokenizer.spec.length, "channels": tokenizer.codebook().shape[-1]}
        prior = build(config["prior"], {LARPPrior.__name__: LARPPrior}, **codes)
    folder = RunFolder(Path(config["out"]), "tokenizer", config["tokenizer"], pictures.describe(), config["seed"])
    if not _begin(folder, config, options.steps, accelerator):
        return False
    stream, held_out = _stream(config, pictures), _held_out(config["data"], pictures.classes, accelerator)
    train_tokenizer(tokenizer, objective, stream, options, folder, accelerator, held_out=held_out, prior=prior)
    return True


def generator_job(config: Config) -> bool:
    """Train what a configuration of `options.generator_parser` describes; False where it was finished before."""
    options = TrainOptions(**config["train"])
    accelerator = accelerate(options, Path(config["out"]))
    source = load_run(config["tokenizer_run"])
    spec = source.tokenizer.spec
    frames = {"frames": spec.decoded[0]} if spec.decoded[0] > 1 else {}
    data = {**config["data"], "size": spec.decoded[1], **frames}
    if config["token_cache"] is None:
        lessons = _pictures(data, split="train")
    else:
        lessons = TokenCache(config["token_cache"], source.tokenizer_sha256)
    record = with_classes(config["generator"], len(lessons.classes))
    set_seed(config["seed"])
    generator = build(record, CLASSES, **feeding(record, source.tokenizer))
    if config["start_from"] is not None:
        begin_with(generator, config["start_from"])
    folder = RunFolder(Path(config["out"]), "generator", record, lessons.describe(), config["seed"], source)
    if not _begin(folder, config, options.steps, accelerator):
        return False
    train_generator(
        generator,
        source.tokenizer,
        _stream(config, lessons),
        options,
        folder,
        accelerator,
        held_out=_held_out(data, lessons.classes, accelerator),
        sample=class_grid(source.tokenizer, config["sampler"], len(lessons.classes), config["seed"]),
    )
    return True


def with_classes(record: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The record of a generator with the number of its classes: as many as the data set has, unless text conditions it.

    Raises RunError for another number.
    """
    arguments = dict(record["init_args"])
    if "num_classes" in arguments and arguments.get("text_dim") is arguments.get("clip_tokens") is None:
        if arguments["num_classes"] not in (None, count):
            raise RunError(
                f"generator: num_classes is {arguments['num_classes']}, the data set has {count} classes; leave it out"
            )
        arguments["num_classes"] = count
    return {**record, "init_args": arguments}


def begin_with(generator: Generator, source: str) -> None:
    """Give a new generator the weights of another with the same parameters: a run folder, or a name in
    configs/published. What it feeds on stays that of its own tokenizer.

    Raises RunError for a run without a generator, CheckpointMismatch naming every tensor that does not fit.
    """
    if source in entries():
        state = generator_weights(source)
    else:
        found = load_run(source).generator
        if found is None:
            raise RunError(f"{source}: holds a tokenizer, not a generator to start from")
        state = found.state_dict()
    own = generator.state_dict()
    kept = {name: tensor for name, tensor in own.items() if name.startswith("reader.")}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("reader.")} | kept
    check_keys(state, own)
    generator.load_state_dict(state)


def class_grid(tokenizer: Tokenizer, sampler: Mapping[str, Any], classes: int, seed: int) -> Sample:
    """From a generator to rows of samples, a class each: the samples 0, 1, ... of `seed`. sampler: plain values."""
    made = Sampler.from_values(sampler)

    @torch.no_grad()
    def sample(generator: Generator) -> Sequence[Tensor]:
        device = next(generator.parameters()).device
        label = torch.arange(min(classes, GRID_CLASSES), device=device).repeat_interleave(GRID_EACH)
        noise = Noise(seed, torch.arange(len(label), device=device))
        tokens = generate(generator, Condition(label=label), made, noise).tokens
        return tokenizer.decode(tokens).split(GRID_EACH)

    return sample


def _begin(folder: RunFolder, config: Config, steps: int, accelerator: Accelerator) -> bool:
    """Claim the folder, once for all processes; whether anything is left to do."""
    if accelerator.is_main_process:
        claim(folder.path, config, config["resume"])
        folder.begin()
    accelerator.wait_for_everyone()
    return not folder.finished(steps)


def _pictures(data: Mapping[str, Any], split: str, **more: Any) -> PictureSet:
    return open_set(**{name: value for name, value in data.items() if name not in LOADING}, split=split, **more)


def _stream(config: Config, lessons: Samples) -> Stream:
    data = config["data"]
    return partial(
        batches, lessons, data["batch_size"], config["seed"], workers=data["workers"], balanced=data["balanced"]
    )


def _held_out(data: Mapping[str, Any], classes: Sequence[str], accelerator: Accelerator) -> list[Batch]:
    """A few batches of split val, this process's own, the same ones throughout; an unreadable picture is an error."""
    if not data["held_out"]:
        return []
    rank, world = accelerator.process_index, accelerator.num_processes
    transform = {"random": "center", "var_random": "var_center"}.get(data["transform"], data["transform"])
    still = {"flip": False, "transform": transform, "on_corrupt": "error"}
    pictures = _pictures({**data, **still}, split="val", classes=classes)
    size = min(data["batch_size"], len(pictures) // world)
    return list(islice(batches(pictures, size, seed=0, rank=rank, world=world), data["held_out"]))
