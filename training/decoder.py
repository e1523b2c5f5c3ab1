"""Samples of a run or of a published checkpoint, by number and class, and the options of the scripts that make them.

Sample i is a function of the seed, i and its class alone: not of batch size, processes or where the work was resumed.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from generators.next_token import GivenClip
from generators.protocol import Generator, State
from layers.noise import Noise
from layers.packed import pack_linears
from layers.spec import Condition
from layers.winograd import pack_convolutions
from sampling.decode import generate
from sampling.sampler import Sampler
from tokenizers_vis.protocol import Tokenizer
from training.generator_loop import GIVEN_FRAMES
from training.published import load_published
from training.run import RunError, load_run


class Decoder:
    """settings: whatever the samples depend on, as plain values. given: of clips that are gone on from, how many frames, and
    every which one, the generator learned to be told."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        sampler: Sampler,
        seed: int,
        device: torch.device,
        settings: dict[str, Any],
        given: tuple[int, int] = (GIVEN_FRAMES, 1),
    ) -> None:
        self.generator, self.tokenizer, self.sampler = generator, tokenizer, sampler
        self.seed, self.device, self.settings, self.given = seed, device, settings, given

    @property
    def continues(self) -> bool:
        """Whether it goes on from given clips, and knows no classes."""
        return isinstance(getattr(self.generator, "condition", None), GivenClip)

    @property
    def num_classes(self) -> int:
        """Raises RunError where something else than a class conditions the generator."""
        if self.continues:
            raise RunError("this generator goes on from given clips: give --clip FILE_OR_FOLDER")
        if not hasattr(self.generator.condition, "num_classes"):
            raise RunError("this generator is conditioned by text: give --text-features FILE and --grid FILE")
        return self.generator.condition.num_classes

    @torch.inference_mode()
    def __call__(self, index: Tensor, condition: Condition, preview: Callable[[State], None] | None = None) -> Tensor:
        """index int64 (B,) -> images float (B, 3, H, W), or clips (B, 3, T, H, W), on the decoder's device.

        preview: as `sampling.decode.generate` calls it.
        """
        noise = Noise(self.seed, index.to(self.device))
        state = generate(self.generator, condition.to(self.device), self.sampler, noise, preview=preview)
        if self.sampler.smooth is not None:  # the picture of the soft codes that the generator fed on
            return self.tokenizer.pixels(state.memory)
        return self.tokenizer.decode(state.tokens)

    @torch.inference_mode()
    def predict(self, index: Tensor, frames: Tensor) -> Tensor:
        """What follows the first frames (B, 3, f, H, W) of clips: whole clips (B, 3, T, H, W), in which these frames are as
        the tokens decode, as LARP scores them."""
        dtype = next(self.tokenizer.parameters()).dtype
        return self(index, Condition(clip=self.tokenizer.encode_start(frames.to(self.device, dtype))))

    def go_on(self, index: Tensor, frames: Tensor) -> Tensor:
        """The given frames as they are, and after them those of `predict`."""
        made = self.predict(index, frames)
        return torch.cat((frames.to(made), made[:, :, frames.shape[2] :]), dim=2)


def add_decoder_arguments(parser: ArgumentParser) -> None:
    """The options that `open_decoder` reads."""
    parser.add_argument("--run", type=str | None, default=None, help="Run folder of a generator.")
    parser.add_argument(
        "--published", type=str | None, default=None, help="Name in configs/published (scripts/published.py list)."
    )
    parser.add_argument("--weights", type=str | None, default=None, help="Local file of the published generator.")
    parser.add_argument("--tokenizer-weights", type=str | None, default=None, help="Local file of its tokenizer.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all noise, in [0, 2^32).")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float64"], default="float32", help="Of the generator."
    )
    parser.add_argument(
        "--compile", type=bool, default=False, help="torch.compile the generator: slow start, faster tokens."
    )
    parser.add_class_arguments(Sampler, "sampler")


def open_decoder(parser: ArgumentParser, arguments: Sequence[str] | None, device: torch.device) -> Decoder:
    """The decoder that the options name; what they leave open of the sampler is the model's own recipe.

    Raises RunError for a run without a generator, and as `load_run` and `load_published` do; settings out of their range
    end in the parser's error.
    """
    options = parser.parse_args(arguments)
    if options.run is not None:
        run = load_run(options.run, device)
        if run.generator is None:
            raise RunError(f"{options.run}: holds a tokenizer, not a generator; see scripts/reconstruct.py")
        tokenizer, generator, recipe, source = run.tokenizer, run.generator, run.recipe, run.provenance
        given = (run.given_frames or GIVEN_FRAMES, run.record["data"].get("stride", 1))
    else:
        found = load_published(options.published, options.weights, options.tokenizer_weights, device)
        tokenizer, generator, recipe, source = found.tokenizer, found.generator, found.recipe, found.provenance
        given = (GIVEN_FRAMES, 1)
    parser.set_defaults({f"sampler.{key}": value for key, value in _leaves(recipe)})  # but for what was asked
    options = parser.parse_args(arguments)
    try:
        sampler: Sampler = parser.instantiate(options).sampler
    except ValueError as error:  # a setting out of its range
        parser.error(str(error))
    generator.to(getattr(torch, options.dtype))
    if options.dtype == "float64":
        tokenizer.double()
    if device.type == "cpu" and not options.compile:
        pack_linears(generator)
        for name, part in list(tokenizer.named_modules()):
            if name.rpartition(".")[2] == "decoder":  # an encoder would give other ids
                pack_convolutions(part)
    if options.compile:
        if not hasattr(generator, "trunk"):
            parser.error(f"--compile: the shapes of {type(generator).__name__} change every round, leave it out")
        generator.trunk.compile(dynamic=False)
    settings = {"source": source, "sampler": _plain(options.sampler), "seed": options.seed, "dtype": options.dtype}
    decoder = Decoder(generator, tokenizer, sampler, options.seed, device, settings, given)
    if decoder.continues and sampler.guidance.branches != 1:
        parser.error("a generator of what follows given clips has no null condition: leave --sampler.guidance out")
    return decoder


def _plain(options: Namespace) -> dict[str, Any]:
    return json.loads(json.dumps(options.as_dict()))


def _leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in config.items():
        pairs += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
