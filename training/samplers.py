"""Decoding methods by name, joined with the models that they decode and draft with.

`configs/samplers/NAME.yaml` describes one: what it does, the record of its method (sampling.speculative.methods), what
drafts for it, and the knob that is worth turning.

    recipe = chosen("gsd:half=3")                               # configs/samplers/gsd.yaml with another value
    made = Contestant(recipe, models).decode(index, condition)  # tokens, and what they took
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from generators.protocol import Generator
from layers.noise import Noise
from layers.record import build, look_up
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from sampling.speculative.continuous_decode import ContinuousSpeculation
from sampling.speculative.drafter import Drafter
from sampling.speculative.drafting import Drafting, EagleDrafter, ModelDrafter
from sampling.speculative.methods import METHODS

KNOWN = {**METHODS, ContinuousSpeculation.__name__: ContinuousSpeculation}
FOLDER = files("configs").joinpath("samplers")


class SamplerError(ValueError):
    """A decoding method that cannot be made as asked; the message says what it needs."""


@dataclass(frozen=True)
class Recipe:
    """A file of configs/samplers. about: in one sentence. method: a record, None for plain decoding. drafter: what drafts.
    model: which generator is decoded. sampler: what differs from the sampler of all. control: not a method of speculation,
    but what it is to be held against. sweep: argument of the method -> values."""

    name: str
    about: str
    paper: str = "none"
    method: Mapping[str, Any] | None = None
    drafter: Literal["model", "eagle"] | None = None
    model: Literal["target", "draft"] = "target"
    sampler: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    sweep: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def knob(self) -> str:
        """Its settings in words."""
        found = [*_leaves(self.method or {}), *_leaves(self.sampler)]
        return ", ".join(f"{path[-1]} {value}" for path, value in found if path[-1] != "class_path")

    def turned(self, key: str, value: Any) -> "Recipe":
        """With another value of an argument of the method or of the sampler, named by the last part of its place.

        Raises UnknownName for one that it does not state.
        """
        changed = {name: copy.deepcopy(getattr(self, name)) for name in ("method", "sampler")}
        places = {path[-1]: (name, path) for name in changed for path, _ in _leaves(changed[name] or {})}
        name, path = look_up(key, places, f"{self.name}: setting")
        inner = changed[name]
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
        return replace(self, name=f"{self.name}:{key}={value}", **changed)


def _leaves(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*before, key))
        else:
            yield (*before, key), value


def recipes() -> dict[str, Recipe]:
    """All files of configs/samplers, by name."""
    found = sorted(Path(str(entry)) for entry in FOLDER.iterdir() if entry.name.endswith(".yaml"))
    return {path.stem: _read(path) for path in found}


def chosen(word: str) -> Recipe:
    """NAME, or a YAML file of the same form, with settings after colons: gsd:half=3:window=32.

    Raises UnknownName for a name or a setting that is not known, SamplerError for a word that is no setting.
    """
    name, *settings = word.split(":")
    recipe = _read(Path(name)) if name.endswith(".yaml") else look_up(name, recipes(), "sampler")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise SamplerError(f"{word}: {setting!r} is no setting; write NAME:key=value")
        recipe = recipe.turned(key, yaml.safe_load(value))
    return recipe


def _read(path: Path) -> Recipe:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SamplerError(f"{path}: cannot be read ({error.strerror})") from error
    for key in content:
        look_up(key, Recipe.__dataclass_fields__, f"{path}: key")
    return Recipe(path.stem, **content)


@dataclass(frozen=True)
class Models:
    """What is decoded, and what may draft for it. sampler, seed: of all methods alike. codebook (V, C): of the tokenizer, as
    it stores it, for rules that look for neighbours in it."""

    target: Generator
    sampler: Sampler
    seed: int
    device: torch.device
    draft: Generator | None = None
    drafter: Drafter | None = None
    codebook: Tensor | None = None

    def drafting(self, kind: str | None) -> Drafting | None:
        """Raises SamplerError where the models do not have it."""
        if kind is None:
            return None
        network = self.network(kind)
        return ModelDrafter(network) if kind == "model" else EagleDrafter(network)

    def network(self, kind: str) -> nn.Module:
        found = self.draft if kind == "model" else self.drafter
        if found is None:
            cure = "--draft-run RUN of a smaller generator" if kind == "model" else "--drafter-run RUN of a drafter"
            raise SamplerError(f"this method is drafted for: give {cure}")
        return found


@dataclass(frozen=True)
class Decoded:
    """tokens (B, L) or (B, L, C) of a batch, and what it took. rounds, calls and the others as in loop.Trace."""

    tokens: Tensor
    rounds: Tensor
    calls: int
    drafter_calls: int
    committed: Tensor
    tested: Tensor
    accepted: Tensor


class Contestant:
    """A recipe with its models, ready to decode. Raises SamplerError for models that it lacks."""

    def __init__(self, recipe: Recipe, models: Models) -> None:
        self.recipe, self.models = recipe, models
        self.generator = models.target if recipe.model == "target" else models.network("model")
        self.method = None if recipe.method is None else method_of(recipe.method, models.codebook)
        self.sampler = _changed(models.sampler, recipe.sampler)
        if recipe.drafter is not None:
            models.network(recipe.drafter)

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def exactness(self) -> str:
        """Of the law of its tokens, against plain decoding of the target with the sampler of all."""
        if self.method is None:
            return "biased" if self.recipe.control else "exact"
        if isinstance(self.method, ContinuousSpeculation):
            return "exact" if self.method.exact else "biased"
        return self.method.exactness

    @property
    def undrafted(self) -> int:
        """First rounds of a decoding that no draft can come before."""
        return int(self.recipe.drafter == "eagle" or self.method is None)

    @cached_property
    def drafting(self) -> Drafting | None:
        return self.models.drafting(self.recipe.drafter)

    def decode(self, index: Tensor, condition: Condition, seed: int | None = None) -> Decoded:
        """index int64 (B,): numbers of the samples. seed: of the noise, that of the models when None."""
        device = self.models.device
        noise = Noise(self.models.seed if seed is None else seed, index.to(device))
        condition = condition.to(device)
        if self.method is None:
            state = generate(self.generator, condition, self.sampler, noise)
            rounds = torch.full_like(noise.index, state.nfe)
            none, plan = rounds.new_zeros(0), getattr(state, "plan", [1] * state.rounds)
            each = rounds.new_tensor(plan).expand(len(rounds), -1)
            return Decoded(state.tokens, rounds, state.nfe, 0, each, none, none)
        if isinstance(self.method, ContinuousSpeculation):
            return self._continuous(condition, noise)
        state, trace = self.method.generate(self.generator, condition, self.sampler, noise, self.drafting)
        return Decoded(
            state.tokens,
            trace.rounds,
            trace.calls,
            trace.drafter_calls,
            trace.committed,
            trace.tested,
            trace.accepted,
        )

    def _continuous(self, condition: Condition, noise: Noise) -> Decoded:
        truth, guess, tests = self.method.generate(
            self.generator, self.models.network("model"), condition, self.sampler, noise
        )
        rounds = torch.full_like(noise.index, truth.nfe)
        tested = sum(test.accepted.numel() for test in tests)
        accepted = sum(int(test.accepted.sum()) for test in tests)
        blocks = [test.positions.shape[1] for test in tests]
        committed = [*truth.plan[: truth.nfe - len(blocks)], *blocks]  # its own first rounds, then what it tested
        return Decoded(
            truth.tokens,
            rounds,
            truth.nfe,
            guess.nfe,
            rounds.new_tensor(committed).expand(len(rounds), -1),
            rounds.new_tensor([tested]),
            rounds.new_tensor([accepted]),
        )


def method_of(record: Mapping[str, Any], codebook: Tensor | None) -> Any:
    """The method of a record. codebook: for one that asks for it."""
    made = look_up(record["class_path"], KNOWN, "method")
    given = {"codebook": codebook} if "codebook" in signature(made).parameters else {}
    return build(record, KNOWN, **given)


def _changed(sampler: Sampler, changes: Mapping[str, Any]) -> Sampler:
    """Parts of the sampler with other arguments: {"filter": {"temperature": 0.7}}."""
    parts = {name: replace(getattr(sampler, name), **given) for name, given in changes.items()}
    return replace(sampler, **parts)


@contextmanager
def positions_of(network: nn.Module) -> Iterator[list[int]]:
    """How many new positions each call of `network` reads: axis 1 of what it is given first."""
    found: list[int] = []
    hook = network.register_forward_hook(lambda module, given, output: found.append(given[0].shape[1]))
    try:
        yield found
    finally:
        hook.remove()
