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
from generators.next_token import GivenClip
from generators.protocol import Generator
from layers.keymap import check_keys
from layers.noise import Noise
from layers.record import build
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from tokenizers_vis.protocol import Tokenizer
from tokenizers_vis.titok import TiTokTokenizer
from training.alignment import FeatureAlignment, WithAlignment
from training.drafter_loop import DrafterLesson, begin_drafter, drafter_record, train_drafter
from training.generator_loop import GIVEN_FRAMES, Sample, train_generator
from training.larp_prior import LARPPrior, WithPrior
from training.loop import Batch, Stream, TrainOptions, accelerate
from training.losses import TokenizerObjective
from training.options import Config
from training.published import entries, generator_weights
from training.run import CLASSES, Run, RunError, RunFolder, claim, feeding, load_run
from training.tokenizer_loop import train_tokenizer

GRID_CLASSES, GRID_EACH = 10, 8  # of a sample grid: at most so many rows, a class each, of so many pictures
LOADING = ("batch_size", "balanced", "workers", "held_out", "given_frames")  # of the section `data`, not open_set's


def tokenizer_job(config: Config) -> bool:
    """Train what a configuration of `options.tokenizer_parser` describes; False where it was finished before."""
    options = TrainOptions(**config["train"])
    accelerator = accelerate(options, Path(config["out"]))
    pictures = _pictures(config["data"], split="train")
    set_seed(config["seed"])
    given = {} if config["teacher"] is None else {"teacher": load_run(config["teacher"]).tokenizer}
    tokenizer = build(config["tokenizer"], CLASSES, **given)
    if isinstance(tokenizer, TiTokTokenizer) and tokenizer.text_shape[0]:
        raise RunError(
            f"tokenizer: text_slots is {tokenizer.text_shape[0]}: its decoder learns beside captions, and the data set "
            f"{config['data']['name']} has none (no data set of this project has them yet); leave text_slots out"
        )
    for part, run in (config["parts"] or {}).items():  # a run that is resumed reads its checkpoint over them
        tokenizer.get_submodule(part).load_state_dict(load_run(run).tokenizer.state_dict())
    objective = TokenizerObjective(**config["objective"])
    beside = learns_beside(config, tokenizer)
    folder = RunFolder(Path(config["out"]), "tokenizer", config["tokenizer"], pictures.describe(), config["seed"])
    if not _begin(folder, config, options.steps, accelerator):
        return False
    stream, held_out = _stream(config, pictures), _held_out(config["data"], pictures.classes, accelerator)
    train_tokenizer(tokenizer, objective, stream, options, folder, accelerator, held_out=held_out, beside=beside)
    return True


def learns_beside(config: Config, tokenizer: Tokenizer) -> WithPrior | WithAlignment | None:
    """The tokenizer together with the prior or the alignment that a configuration names. Raises RunError for both."""
    prior, alignment = config["prior"], config["alignment"]
    if prior is not None and alignment is not None:
        raise RunError("a tokenizer learns beside a prior or an alignment, not both: leave one of them out")
    if prior is not None:
        codes = {"tokens": tokenizer.spec.length, "channels": tokenizer.codebook().shape[-1]}
        return WithPrior(tokenizer, build(prior, {LARPPrior.__name__: LARPPrior}, **codes))
    if alignment is None:
        return None
    if not hasattr(tokenizer, "feature_channels"):
        raise RunError(f"alignment: {type(tokenizer).__name__} has no features to align, DARTokenizer has")
    classes = {FeatureAlignment.__name__: FeatureAlignment}
    return WithAlignment(tokenizer, build(alignment, classes, channels=tokenizer.feature_channels))


def generator_job(config: Config) -> bool:
    """Train what a configuration of `options.generator_parser` describes; False where it was finished before."""
    options = TrainOptions(**config["train"])
    accelerator = accelerate(options, Path(config["out"]))
    source = load_run(config["tokenizer_run"])
    data, lessons = _lessons(config, source)
    record = with_classes(config["generator"], len(lessons.classes))
    set_seed(config["seed"])
    generator = build(record, CLASSES, **feeding(record, source.tokenizer))
    given = given_frames(config, generator, source.tokenizer)
    config = {**config, "data": {**config["data"], "given_frames": given}}
    if config["start_from"] is not None:
        begin_with(generator, config["start_from"])
    folder = RunFolder(Path(config["out"]), "generator", record, lessons.describe(), config["seed"], source)
    if not _begin(folder, config, options.steps, accelerator):
        return False
    held_out = _held_out(data, lessons.classes, accelerator)
    if given is None:
        sample = class_grid(source.tokenizer, config["sampler"], len(lessons.classes), config["seed"])
    else:
        sample = continued_clips(source.tokenizer, config["sampler"], held_out, given, config["seed"])
    train_generator(
        generator,
        source.tokenizer,
        _stream(config, lessons),
        options,
        folder,
        accelerator,
        held_out=held_out,
        sample=sample,
        given_frames=given,
    )
    return True


def drafter_job(config: Config) -> bool:
    """Train what a configuration of `options.drafter_parser` describes; False where it was finished before.

    Raises RunError for a data set of other classes than the target's.
    """
    options = TrainOptions(**config["train"])
    accelerator = accelerate(options, Path(config["out"]))
    target = load_run(config["target_run"])
    data, lessons = _lessons(config, target)
    if tuple(lessons.classes) != target.classes:
        raise RunError(
            f"{target.path}: learned the classes {target.classes}, the data set has {tuple(lessons.classes)}"
        )
    set_seed(config["seed"])
    record = drafter_record(target.generator, config["drafter"])
    drafter = build(record, CLASSES, spec=target.tokenizer.spec)
    begin_drafter(drafter, target.generator)
    folder = RunFolder(Path(config["out"]), "drafter", record, lessons.describe(), config["seed"], target=target)
    if not _begin(folder, config, options.steps, accelerator):
        return False
    train_drafter(
        drafter,
        target.generator,
        target.tokenizer,
        _stream(config, lessons),
        DrafterLesson(**config["lesson"]),
        options,
        folder,
        accelerator,
        held_out=_held_out(data, lessons.classes, accelerator),
    )
    return True


def _lessons(config: Config, source: Run) -> tuple[dict[str, Any], Samples]:
    """The section `data` at the picture size of the run's tokenizer, and the pictures or cached tokens to learn from."""
    spec = source.tokenizer.spec
    frames = {"frames": spec.decoded[0]} if spec.decoded[0] > 1 else {}
    data = {**config["data"], "size": spec.decoded[1], **frames}
    if config["token_cache"] is None:
        return data, _pictures(data, split="train")
    return data, TokenCache(config["token_cache"], source.tokenizer_sha256)


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


def given_frames(config: Config, generator: Generator, tokenizer: Tokenizer) -> int | None:
    """How many first frames of each clip the generator is told; None where labels or text condition it.

    Raises RunError where it cannot be trained so: on a cache, on another tokenizer, with guidance, or too many frames.
    """
    asked, condition, spec = config["data"]["given_frames"], getattr(generator, "condition", None), tokenizer.spec
    if not isinstance(condition, GivenClip):
        if asked is not None:
            raise RunError(f"data.given_frames is {asked}, but no clip conditions this generator; give it clip_tokens")
        return None
    frames = GIVEN_FRAMES if asked is None else asked
    if not hasattr(tokenizer, "encode_start"):
        raise RunError(f"{type(tokenizer).__name__} makes no tokens of the first frames of clips, LARPTokenizer does")
    if condition.slots - 1 != spec.length:
        raise RunError(f"generator: clip_tokens is {condition.slots - 1}, the tokenizer makes {spec.length} of a clip")
    if not 1 <= frames < spec.decoded[0]:
        raise RunError(f"data.given_frames is {frames}, of clips of {spec.decoded[0]} frames: give 1 to all but one")
    if config["token_cache"] is not None:
        raise RunError("a generator of what follows given frames learns from clips: leave token_cache out")
    if Sampler.from_values(config["sampler"]).guidance.branches != 1:
        raise RunError("a generator of what follows given frames has no null condition: leave sampler.guidance out")
    return frames


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


def continued_clips(
    tokenizer: Tokenizer, sampler: Mapping[str, Any], held_out: Sequence[Batch], frames: int, seed: int
) -> Sample | None:
    """From a generator to two rows: held-out clips, and what it makes of their first frames. None without clips."""
    if not held_out:
        return None
    made, clips = Sampler.from_values(sampler), held_out[0]["image"][:GRID_EACH]

    @torch.no_grad()
    def sample(generator: Generator) -> Sequence[Tensor]:
        device = next(generator.parameters()).device
        noise = Noise(seed, torch.arange(len(clips), device=device))
        told = Condition(clip=tokenizer.encode_start(clips[:, :, :frames].to(device)))
        return [clips, tokenizer.decode(generate(generator, told, made, noise).tokens)]

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
