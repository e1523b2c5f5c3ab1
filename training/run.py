"""Run folders: what a training run leaves behind, and how it is read again.

    runs/NAME/config.yaml          the whole resolved configuration
             run.json              kind, records and checksums of the modules, data set, step, seed, versions
             tokenizer.safetensors generator.safetensors drafter.safetensors      the averaged weights
             checkpoints/          what `--resume` needs (training/checkpoint.py)
             log.jsonl tensorboard/ samples/

A generator's run holds a copy of its tokenizer, so every run can be moved and read by itself. A drafter's names its target
by checksums, and opens with that alone. Reading builds classes of
this project's tables from plain values, and takes tensors from files whose checksum run.json states.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from pathlib import Path
from platform import python_version
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

import generators
import heads
import tokenizers_vis
from generators.protocol import Generator
from layers.checkpoint import CheckpointError, checksum, read_tensors, save_tensors, write_atomic
from layers.keymap import check_keys
from layers.record import build, look_up
from layers.spec import TokenSpec
from sampling.speculative.drafter import Drafter
from tokenizers_vis.protocol import Tokenizer

CLASSES = {**tokenizers_vis.CLASSES, **generators.CLASSES, **heads.CLASSES, Drafter.__name__: Drafter}
LIBRARIES = ("arloom", "torch", "torchvision", "accelerate", "safetensors", "numpy")
FREE = (  # what a resumed run may change: its length, its places, what it reports
    r"out|resume|tokenizer_run|target_run|data\.(root|workers|held_out)|sampler\..*"
    r"|train\.(steps|log_every|sample_every|save_every|keep_last|trackers)"
)


class RunError(ValueError):
    """A run folder that is missing, taken, unfinished or something else; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run. kind: tokenizer, which has no generator, or generator; classes: label names in order; record: the
    content of run.json."""

    path: Path
    kind: str
    tokenizer: Tokenizer
    generator: Generator | None
    classes: tuple[str, ...]
    record: dict[str, Any]

    @property
    def tokenizer_sha256(self) -> str:
        return self.record["modules"]["tokenizer"]["sha256"]

    @property
    def recipe(self) -> dict[str, Any]:
        """How the run itself draws its sample grids: arguments of Sampler, as plain values; none for a tokenizer's."""
        return yaml.safe_load((self.path / "config.yaml").read_text()).get("sampler", {})

    @property
    def given_frames(self) -> int | None:
        """How many first frames of a clip its generator is told; None where something else conditions it."""
        return yaml.safe_load((self.path / "config.yaml").read_text()).get("data", {}).get("given_frames")

    @property
    def provenance(self) -> dict[str, Any]:
        """What a number made with this run must carry."""
        checksums = {name: entry["sha256"] for name, entry in self.record["modules"].items()}
        data = self.record["data"]
        return {
            "run": self.path.name,
            "step": self.record["step"],
            "data": data["name"] if "name" in data else data["pictures"]["name"],  # pictures, or a cache of tokens
            "sha256": checksums,
        }


class NotWritten(OSError):
    """A file or folder that could not be written: the message says which, what it needs and what is free."""


@contextmanager
def naming_failure(path: Path, needed: Callable[[], int], hint: str = "Make room, and --resume") -> Iterator[None]:
    """Turn what goes wrong in writing `path` into NotWritten; torch and safetensors call a full disk by other names."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        raise NotWritten(
            f"{path}: could not be written; it needs about {needed():,} bytes and {free:,} are free ({error}). {hint}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """A whole file or none. Raises NotWritten."""
    with naming_failure(path, lambda: len(text)):
        write_atomic(path, lambda draft: draft.write_text(text))


def byte_count(state: Any) -> int:
    """Bytes of all tensors in nested dicts and sequences."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(byte_count, state.values()))
    return sum(map(byte_count, state)) if isinstance(state, list | tuple) else 0


def load_run(path: str | Path, device: torch.device | str = "cpu") -> Run:
    """The modules of a run, in eval mode on `device`.

    Raises RunError for a folder that is missing or has no export yet; CheckpointError for a weights file that is
    missing, damaged or another one; CheckpointMismatch and UnknownName where code and record no longer fit.
    """
    path = Path(path)
    record = _read_record(path)
    kind, modules = _exported(path, record), record["modules"]
    if kind == "drafter":
        raise RunError(f"{path}: holds a drafter for {record['target']['run']}; open that run, and this as its drafter")
    tokenizer = _load_module(path, modules["tokenizer"]).to(device)
    generator = None
    if kind == "generator":
        made_for = TokenSpec.from_record(modules["generator"]["spec"])
        if made_for != tokenizer.spec:
            raise RunError(f"{path}: the generator is made for {made_for}, the tokenizer makes {tokenizer.spec}")
        entry = modules["generator"]
        generator = _load_module(path, entry, **feeding(entry["record"], tokenizer)).to(device)
    return Run(path, kind, tokenizer, generator, tuple(record["data"]["classes"]), record)


def load_drafter(path: str | Path, target: Run, device: torch.device | str = "cpu") -> Drafter:
    """The drafter of a run, in eval mode on `device`, beside the target that it was trained for.

    Raises RunError for another target or another kind of run, otherwise as `load_run` does.
    """
    path = Path(path)
    record = _read_record(path)
    kind = _exported(path, record)
    if kind != "drafter":
        raise RunError(f"{path}: holds a {kind}, not a drafter; see scripts/train_drafter.py")
    made_for = record["target"]
    if made_for["sha256"] != target.provenance["sha256"]:
        raise RunError(
            f"{path}: was trained on the features of another target than {target.path} (of {made_for['run']}, generator "
            f"sha256 {made_for['sha256']['generator'][:12]}…); give that run, or train a drafter for this one"
        )
    return _load_module(path, record["modules"]["drafter"], spec=target.tokenizer.spec).to(device)


def feeding(record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The constructor arguments of a generator that its tokenizer makes: the spec, and a reader where one is asked for.

    Raises RunError where the tokenizer makes none.
    """
    name = record["class_path"].rsplit(".", 1)[-1]
    given: dict[str, Any] = {"spec": tokenizer.spec}
    if "reader" in signature(look_up(name, CLASSES, "class")).parameters:
        if not hasattr(tokenizer, "reader"):
            raise RunError(
                f"{name} feeds on a reader, {type(tokenizer).__name__} makes none; train it on another tokenizer"
            )
        given["reader"] = tokenizer.reader()
    return given


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "run.json"
    if not file.is_file():
        raise RunError(f"{path}: {'has no run.json, so it is no run' if path.is_dir() else 'no such run folder'}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file}: not valid JSON ({error}); copy the run again, or export it with --resume") from error


def _exported(path: Path, record: Mapping[str, Any]) -> str:
    """The kind of a run that has its export."""
    if record["kind"] not in record["modules"]:
        raise RunError(f"{path}: has no export yet (step {record['step']}); finish its training with --resume")
    return record["kind"]


def _load_module(folder: Path, entry: Mapping[str, Any], **given: Any) -> nn.Module:
    file = folder / Path(entry["file"]).name
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; copy the run again, or export it with --resume")
    if (found := checksum(file)) != entry["sha256"]:
        raise CheckpointError(
            f"{file}: has sha256 {found[:12]}…, run.json says {entry['sha256'][:12]}…: truncated, damaged or another "
            "file; copy the run again, or export it with --resume"
        )
    module, state = build(entry["record"], CLASSES, **given), read_tensors(file)
    check_keys(state, module.state_dict())
    module.load_state_dict(state)
    return module.eval()


def claim(path: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a new run and write its config.yaml; or, to resume, see that the old one still holds.

    A run that was never begun may be "resumed" too. Raises RunError for a folder that is taken, and for a configuration
    that would train otherwise than the run began (naming every such key).
    """
    file = path / "config.yaml"
    taken = path.exists() and (not path.is_dir() or any(not entry.name.startswith(".") for entry in path.iterdir()))
    if taken and not resume:
        raise RunError(f"{path}: exists; continue it with --resume, or choose another --out")
    if taken and not file.is_file():
        raise RunError(f"{path}: exists and is no run (no config.yaml); choose another --out")
    if taken:
        before = dict(_leaves(yaml.safe_load(file.read_text())))
        now = dict(_leaves(yaml.safe_load(yaml.safe_dump(dict(config)))))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        faults = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed if not re.fullmatch(FREE, key)]
        if faults:
            raise RunError(
                f"{path}: cannot resume, the configuration would train otherwise than it began:\n  "
                + "\n  ".join(faults)
                + "\nput these back, or choose another --out"
            )
    write_text(file, yaml.safe_dump(dict(config), sort_keys=False))


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, config


@dataclass(frozen=True)
class RunFolder:
    """A run in training. record: class and arguments of the module that is trained; data: what its data set says of
    itself, with "classes"; tokenizer: the finished run whose tokenizer a generator learns on; target: the one whose generator
    a drafter continues."""

    path: Path
    kind: str
    record: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int
    tokenizer: Run | None = None
    target: Run | None = None

    def begin(self) -> None:
        """Write run.json without an export, and the copy of the tokenizer. A resumed run keeps what it has.

        Raises RunError where it began with other classes, another tokenizer or another target.
        """
        if (self.path / "run.json").is_file():
            before = _read_record(self.path)
            if list(before["data"]["classes"]) != list(self.data["classes"]):
                raise RunError(
                    f"{self.path}: began on the classes {before['data']['classes']}, now {self.data['classes']}"
                )
            if self.tokenizer and before["modules"]["tokenizer"]["sha256"] != self.tokenizer.tokenizer_sha256:
                raise RunError(f"{self.path}: began with another tokenizer than that of {self.tokenizer.path}")
            if self.target and before["target"]["sha256"] != self.target.provenance["sha256"]:
                raise RunError(f"{self.path}: began with another target than {self.target.path}")
            return
        modules = {}
        if self.tokenizer is not None:
            entry = modules["tokenizer"] = self.tokenizer.record["modules"]["tokenizer"]
            source = self.tokenizer.path / entry["file"]
            target = self.path / entry["file"]
            with naming_failure(target, lambda: source.stat().st_size):
                write_atomic(target, lambda draft: shutil.copyfile(source, draft))
        self._write(modules, step=0)

    def finished(self, steps: int) -> bool:
        """Whether the export of at least `steps` steps is there."""
        if not (self.path / "run.json").is_file():
            return False
        record = _read_record(self.path)
        return self.kind in record["modules"] and record["step"] >= steps

    def export(self, state: Mapping[str, Tensor], spec: TokenSpec, step: int) -> None:
        """Write the trained weights, then the run.json that names them."""
        file = self.path / f"{self.kind}.safetensors"
        with naming_failure(file, lambda: byte_count(state)):
            save_tensors(file, state)
        entry = {
            "record": self.record,
            "spec": spec.record(),
            "file": file.name,
            "sha256": checksum(file),
            "parameters": sum(tensor.numel() for tensor in state.values()),
        }
        self._write({**_read_record(self.path)["modules"], self.kind: entry}, step)

    def _write(self, modules: Mapping[str, Any], step: int) -> None:
        content = {
            "kind": self.kind,
            "modules": modules,
            **({} if self.target is None else {"target": self.target.provenance}),
            "data": self.data,
            "step": step,
            "seed": self.seed,
            "versions": versions(),
        }
        write_text(self.path / "run.json", json.dumps(content, indent=1))


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that numbers depend on; "not installed" for a bare checkout of this one."""
    found = {"python": python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found
