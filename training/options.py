"""The command line of the training scripts: YAML whose keys are constructor arguments, each overridable by `--key value`.

A section is a class or a function of this project; its arguments, types and defaults are the schema, its docstring the
help. What is not known or of a wrong type is refused, with the nearest valid name, before any data or weights are read.
"""

import logging
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from data.errors import DataError
from data.sets import open_set
from generators.protocol import Generator
from layers.checkpoint import CheckpointError
from layers.condition import LabelError
from layers.keymap import CheckpointMismatch
from layers.record import UnknownName
from sampling.sampler import Sampler
from sampling.shards import SampleError
from sampling.speculative.drafter import Drafter
from tokenizers_vis.protocol import Tokenizer
from training.alignment import FeatureAlignment
from training.drafter_loop import DrafterLesson
from training.generator_loop import GIVEN_FRAMES
from training.larp_prior import LARPPrior
from training.loop import TrainingDiverged, TrainOptions
from training.losses import TokenizerObjective
from training.published import PublishedError
from training.run import CLASSES, NotWritten, RunError
from training.samplers import SamplerError

Config = dict[str, Any]
REFUSED = re.compile(r"(?i:option '|key '|unrecognized arguments: --|import path string: |path but )([\w.]+)")


class ConfigError(ValueError):
    """A configuration that does not fit its schema: the parser's words, and the nearest valid names."""


USERS = (  # errors whose message says what to do
    *(ConfigError, DataError, RunError, CheckpointError, CheckpointMismatch, UnknownName),
    *(TrainingDiverged, NotWritten, LabelError, SampleError, SamplerError, PublishedError),
)


def tokenizer_parser() -> ArgumentParser:
    parser = _common("Train a tokenizer.", skip={"split", "classes"})
    parser.add_subclass_arguments(Tokenizer, "tokenizer", required=True, skip={"teacher"})
    parser.add_argument(
        "--teacher",
        type=str | None,
        default=None,
        help="Run folder of a tokenizer whose codes are learned first (TiTok).",
    )
    parser.add_argument(
        "--parts",
        type=dict[str, str] | None,
        default=None,
        help="Parts of the tokenizer that are finished tokenizers themselves: name of the part -> run folder.",
    )
    parser.add_class_arguments(TokenizerObjective, "objective")
    parser.add_subclass_arguments(LARPPrior, "prior", required=False, skip={"tokens", "channels"})
    parser.add_subclass_arguments(FeatureAlignment, "alignment", required=False, skip={"channels"})
    return parser


def generator_parser() -> ArgumentParser:
    parser = _on_tokens("Train a generator on the tokens of a finished tokenizer run.")
    parser.add_argument("--tokenizer_run", type=str, required=True, help="Run folder of the tokenizer.")
    parser.add_argument(
        "--data.given_frames",
        type=int | None,
        default=None,
        help=f"First frames that a generator of what follows (clip_tokens) is given. Default: {GIVEN_FRAMES}.",
    )
    parser.add_argument(
        "--start_from",
        type=str | None,
        default=None,
        help="Begin with the weights of this run's generator, or of this name in configs/published.",
    )
    parser.add_subclass_arguments(Generator, "generator", required=True, skip={"spec", "reader"})
    parser.add_class_arguments(Sampler, "sampler")
    return parser


def drafter_parser() -> ArgumentParser:
    parser = _on_tokens("Train a drafter that continues the hidden states of a finished next-token generator.")
    parser.add_argument("--target_run", type=str, required=True, help="Run folder of the generator.")
    parser.add_class_arguments(Drafter, "drafter", skip={"spec", "dim", "slots"})
    parser.add_class_arguments(DrafterLesson, "lesson")
    return parser


def _on_tokens(description: str) -> ArgumentParser:
    parser = _common(description, skip={"split", "classes", "size", "frames"})
    parser.add_argument(
        "--token_cache",
        type=str | None,
        default=None,
        help="Train on the tokens of this cache (scripts/cache_tokens.py), not on pictures.",
    )
    return parser


def _common(description: str, skip: set[str]) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_argument("--out", type=str, required=True, help="Run folder to write.")
    parser.add_argument("--resume", action="store_true", help="Continue the run in `out`, if it has begun.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights, data order and every draw.")
    parser.add_function_arguments(open_set, "data", skip=skip)
    parser.add_argument("--data.batch_size", type=int, default=64, help="Pictures of a batch, on each process.")
    parser.add_argument("--data.balanced", type=bool, default=False, help="Every class equally often.")
    parser.add_argument("--data.workers", type=int, default=0, help="Processes that load pictures.")
    parser.add_argument("--data.held_out", type=int, default=4, help="Batches of split val that are scored; 0: none.")
    parser.add_class_arguments(TrainOptions, "train")
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Config:
    """The resolved configuration as plain values, defaults included, classes by their bare names.

    Raises ConfigError for keys, names and types that do not fit.
    """
    try:
        found = parser.parse_args(underscored(arguments))
    except ArgumentError as error:
        raise ConfigError(explain(str(error), parser)) from error
    config = _plain(found.as_dict())
    del config["config"]
    return config


def explain(message: str, parser: ArgumentParser) -> str:
    """The parser's message, and what its refused names may have been meant to be."""
    known = set(_names(parser))
    hints = []
    for name in dict.fromkeys(REFUSED.findall(message)):
        if near := get_close_matches(name, known, n=1):
            hints.append(f"{name!r}: did you mean {near[0]!r}?")
    return "\n".join([message, *hints])


def _names(parser: ArgumentParser) -> Iterator[str]:
    """Every key of the parser, whole and by its last part, every class and every argument of a class."""
    for key in (action.dest for action in parser._actions):
        yield from {key, key.split(".")[-1]}
    for name, made in CLASSES.items():
        yield name
        yield from signature(made).parameters


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping | Namespace):
        values = {key: _plain(part) for key, part in dict(value).items()}
        if "class_path" in values:
            values["class_path"] = values["class_path"].rsplit(".", 1)[-1]
        return values
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def underscored(words: Sequence[str] | None = None) -> list[str]:
    """The words of a command line (this process's, when None) with --batch-size spelled as --batch_size."""
    words = sys.argv[1:] if words is None else words
    return [re.sub(r"^--[\w.-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]


def command_line(main: Callable[[], None]) -> None:
    """Run a script. What its user can put right ends it with the message alone, anything else with its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it names every file of every checkpoint
    try:
        main()
    except USERS as error:
        sys.exit(f"error: {error}")
