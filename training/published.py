"""Published checkpoints: which there are, where they come from, and how one is loaded.

`configs/published/<family>.yaml` describes them, a row each. A file is taken from the disk or from the Hugging Face hub,
its tensors are read without running code, and every key is accounted for (layers/keymap.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import constants, hf_hub_download
from torch import Tensor, nn

import generators
import tokenizers_vis
from generators.protocol import Generator
from layers.checkpoint import checksum, read_places
from layers.keymap import CheckpointMismatch
from layers.record import look_up
from tokenizers_vis.flextok_published import header_config
from tokenizers_vis.protocol import Tokenizer

OWN_CONFIG = {"flextok": header_config}  # families whose files say in their headers how they are built
FROM_PUBLISHED = {"tokenizer": tokenizers_vis.from_published, "generator": generators.from_published}


class PublishedError(ValueError):
    """A published file that is not at hand, or is another one; the message says where to get it and how to name it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of configs/published.

    file, nested: the file in the repository `hub`, and the entry of it that holds the tensors (None: flat); trainer: the
    entry of a checkpoint of the original trainer that holds the same. sha256: None where not known. parameters: millions,
    as published. config: the original constructor arguments. ignored: pattern of keys that no model needs -> reason. Of a
    generator: condition, what it is told; the tokenizer that decodes it, with what differs from that one's config; recipe,
    the Sampler's arguments (filter, guidance). reported: the published numbers, each with metric, value and its protocol.
    """

    name: str
    kind: Literal["tokenizer", "generator"]
    paper: dict[str, str]
    licence: str
    family: str
    hub: str
    file: str
    nested: str | None
    trainer: str | None = None
    sha256: str | None
    parameters: float
    config: dict[str, Any]
    ignored: dict[str, str]
    condition: str | None = None
    tokenizer: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    reported: list[dict[str, Any]]

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.hub}/resolve/main/{self.file}"

    @property
    def cache(self) -> Path:
        """The folder that a download goes to."""
        return Path(constants.HF_HUB_CACHE) / f"models--{self.hub.replace('/', '--')}"


def entries() -> dict[str, Entry]:
    """All published checkpoints by name, as the files list them."""
    found = {}
    for file in sorted(files("configs").joinpath("published").iterdir(), key=str):
        if not file.name.endswith(".yaml"):
            continue
        family = yaml.safe_load(file.read_text(encoding="utf-8"))
        for kind in ("tokenizer", "generator"):
            for name, row in family.get(f"{kind}s", {}).items():
                row |= {key: family[key] for key in ("paper", "licence")}
                row["ignored"] = family["ignored"].get(row["family"], {})
                row["reported"] = [{**n, "protocol": family["protocols"][n["protocol"]]} for n in row["reported"]]
                found[name] = Entry(name=name, kind=kind, **row)
    return found


def find(name: str) -> Entry:
    """Raises UnknownName with the nearest names."""
    return look_up(name, entries(), "published checkpoint")


def fetch(entry: Entry, weights: str | Path | None = None, flag: str = "--weights") -> Path:
    """The file of an entry: `weights` where given, else from the hub's cache or by download.

    flag: the option that takes a local file, for the message. Raises PublishedError where neither is to be had, and
    for a download with another checksum than the entry's.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise PublishedError(f"{weights}: no such file; {flag} takes a local copy of {entry.url}")
        return Path(weights)
    known = f"sha256 {entry.sha256}" if entry.sha256 else "its sha256 is not known: the one found is recorded"
    cure = f"get {entry.url} ({known}) and pass it as {flag} FILE"
    try:
        path = Path(hf_hub_download(entry.hub, entry.file))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        raise PublishedError(
            f"{entry.name}: {entry.file} is not in {entry.cache} and could not be downloaded "
            f"({type(error).__name__}); go online, or {cure}"
        ) from error
    if entry.sha256 is not None and (found := checksum(path)) != entry.sha256:
        raise PublishedError(
            f"{entry.name}: {path} has sha256 {found}: damaged, or replaced on the hub; remove it, {cure}"
        )
    return path


@dataclass(frozen=True)
class Published:
    """A loaded checkpoint, in eval mode. generator: None for a tokenizer's. recipe: the Sampler's arguments as plain
    values. provenance: names, files and checksums of what was loaded, as plain values."""

    tokenizer: Tokenizer
    generator: Generator | None
    recipe: dict[str, Any]
    provenance: dict[str, Any]


def load_published(
    name: str,
    weights: str | Path | None = None,
    tokenizer_weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Published:
    """The modules of a published checkpoint on `device`, in float32.

    weights, tokenizer_weights: local files, of `name` itself and, for a generator, of its tokenizer; None: from the
    hub. Raises UnknownName, PublishedError for a file that is not to be had, CheckpointError for one that is damaged or
    holds code, CheckpointMismatch for one that holds another model.
    """
    entry = find(name)
    if entry.kind == "tokenizer":
        if tokenizer_weights is not None:
            raise PublishedError(f"{name} is a tokenizer: pass its file as --weights, not as --tokenizer-weights")
        path = fetch(entry, weights)
        return Published(_load(entry, path, entry.config).to(device), None, {}, _provenance(entry, path))
    coder = find(entry.tokenizer)
    path, coder_path = fetch(entry, weights), fetch(coder, tokenizer_weights, "--tokenizer-weights")
    tokenizer = _load(coder, coder_path, coder.config | entry.tokenizer_config).to(device)
    given = {"reader": tokenizer.reader()} if hasattr(tokenizer, "reader") else {}
    generator = _load(entry, path, entry.config, **given).to(device)
    provenance = {**_provenance(entry, path), "tokenizer": _provenance(coder, coder_path)}
    return Published(tokenizer, generator, entry.recipe, provenance)


def generator_weights(name: str, weights: str | Path | None = None) -> dict[str, Tensor]:
    """The tensors of a published generator under this project's names; those of its reader, which are the tokenizer's,
    may be empty. Raises as `load_published`."""
    entry = find(name)
    if entry.kind != "generator":
        raise PublishedError(f"{name} is a tokenizer; a generator can start from a generator alone")
    return _load(entry, fetch(entry, weights), entry.config).state_dict()


def _load(entry: Entry, path: Path, config: Mapping[str, Any], **given: Any) -> nn.Module:
    read = _read(path, [entry])
    try:
        return FROM_PUBLISHED[entry.kind](
            entry.family, next(iter(read.values())), _config(entry, path, config), **given
        )
    except CheckpointMismatch as error:
        raise CheckpointMismatch(
            f"{path} is not {entry.name}: {error}\n`python scripts/published.py check {path}` says what it is"
        ) from error


def _config(entry: Entry, path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file itself says of its wiring, where its family does so and it is there; else `config`."""
    said = OWN_CONFIG[entry.family](path) if entry.family in OWN_CONFIG and path.suffix == ".safetensors" else {}
    return said or config


def _provenance(entry: Entry, path: Path) -> dict[str, Any]:
    return {
        "published": entry.name,
        "url": entry.url,
        "file": path.name,
        "sha256": checksum(path),
        "sha256_published": entry.sha256,
        "licence": entry.licence,
    }


@dataclass(frozen=True)
class Report:
    """What a file holds.

    fits: the entries whose keys and shapes are exactly the file's, the one of its name or checksum first; several where
    models differ in nothing that is stored. Where it fits none: closest, the entry with the fewest faults, and these.
    tensors: in the file; ignored: which of them no model needs -> reason; parameters: of the model, None without one;
    seconds: to read the file and build the model.
    """

    file: Path
    sha256: str
    fits: tuple[str, ...]
    closest: str
    faults: tuple[str, ...]
    tensors: int
    ignored: dict[str, str]
    parameters: int | None
    seconds: float


def check(file: str | Path, name: str | None = None) -> Report:
    """Hold a file against the entry `name`, or against all.

    Raises UnknownName, and CheckpointError for a file that is missing, damaged, holds code, or no tensors where the
    entry has them.
    """
    path = Path(file)
    tried = entries().values() if name is None else [find(name)]
    start = perf_counter()
    read = _read(path, tried)
    seconds = perf_counter() - start
    shapes = {nested: {key: tensor.to("meta") for key, tensor in tensors.items()} for nested, tensors in read.items()}
    places = [(entry, place) for entry in tried for place in _places(entry, path) if place in read]
    faults = {entry.name: _faults(entry, path, shapes[place]) for entry, place in reversed(places)}
    sha256 = checksum(path)

    def rank(found: tuple[Entry, str | None]) -> tuple[int, bool, bool]:
        entry, _ = found
        return len(faults[entry.name]), entry.sha256 != sha256, entry.file != path.name

    places.sort(key=rank)
    entry, place = places[0]
    model = None
    if not faults[entry.name]:
        start = perf_counter()
        model = FROM_PUBLISHED[entry.kind](entry.family, read[place], _config(entry, path, entry.config))
        seconds += perf_counter() - start
    return Report(
        file=path,
        sha256=sha256,
        fits=tuple(entry.name for entry, _ in places if not faults[entry.name]),
        closest=entry.name,
        faults=faults[entry.name],
        tensors=len(read[place]),
        ignored={key: reason for key in read[place] if (reason := _reason(entry, key)) is not None},
        parameters=None if model is None else sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=seconds,
    )


def _places(entry: Entry, path: Path) -> tuple[str | None, ...]:
    """Where in a file of this kind the tensors of an entry may lie."""
    if path.suffix == ".safetensors":
        return (None,)
    return (entry.nested,) if entry.trainer is None else (entry.nested, entry.trainer)


def _read(path: Path, tried: Iterable[Entry]) -> dict[str | None, dict[str, Tensor]]:
    """The tensors at every place of the file where an entry has its own. A file with an inner dict is not flat as well."""
    places = {place for entry in tried for place in _places(entry, path)}
    read = read_places(path, sorted(places, key=lambda place: (place is None, place)))
    if len(read) > 1:
        read.pop(None, None)
    return read


def _faults(entry: Entry, path: Path, shapes: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What keeps tensors of these shapes (on the meta device) from being the entry; empty: they are."""
    try:
        FROM_PUBLISHED[entry.kind](entry.family, shapes, _config(entry, path, entry.config))
    except CheckpointMismatch as error:
        return tuple(line.strip() for line in str(error).splitlines()[1:])
    return ()


def _reason(entry: Entry, key: str) -> str | None:
    return next((reason for pattern, reason in entry.ignored.items() if fnmatchcase(key, pattern)), None)
