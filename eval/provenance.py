"""What a number must carry: everything that had a part in it, as plain values.

A score without its protocol cannot be compared with anything. Who scores says it all, and what a sample file does not
tell is written down as not recorded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from eval.features import NetworkRecord
from eval.protocol import ProtocolRecord

NOT_RECORDED = "not recorded"
LIBRARIES = ("arloom", "torch", "torchvision", "torch-fidelity", "numpy", "pillow")


@dataclass(frozen=True)
class Origin:
    """How pictures came to be. Each a plain value, or NOT_RECORDED, or "none" where there was no such thing.

    quantisation: the rule by which floats became uint8. class_sampling: balanced or random. checkpoint: names and
    checksums of the models. record: whatever else their maker wrote down.
    """

    quantisation: str
    class_sampling: Any
    seed: Any
    guidance: Any
    sampler: Any
    checkpoint: Any
    record: Mapping[str, Any]

    @classmethod
    def unknown(cls) -> "Origin":
        return cls.of_samples({})

    @classmethod
    def of_samples(cls, record: Mapping[str, Any]) -> "Origin":
        """From the JSON that scripts/sample.py writes beside its samples; what it lacks is not recorded."""
        sampler = record.get("sampler", NOT_RECORDED)
        return cls(
            quantisation=record.get("quantisation", NOT_RECORDED),
            class_sampling=record.get("class_plan", NOT_RECORDED),
            seed=record.get("seed", NOT_RECORDED),
            guidance=sampler.get("guidance", "none") if isinstance(sampler, Mapping) else NOT_RECORDED,
            sampler=sampler,
            checkpoint=record.get("source", NOT_RECORDED),
            record=dict(record),
        )

    @classmethod
    def of_data(cls, quantisation: str, record: Mapping[str, Any]) -> "Origin":
        """Real pictures. record: what the data set says of itself (split, crop, checksums)."""
        return cls(quantisation, "none", "none", "none", "none", "none", dict(record))

    @classmethod
    def of_reconstructions(cls, quantisation: str, checkpoint: Any) -> "Origin":
        """What a tokenizer makes of real pictures."""
        return cls(quantisation, "none", "none", "none", "none", checkpoint, {})


@dataclass(frozen=True)
class PicturesRecord:
    """A set of pictures as it was scored; sha256 as `eval.pictures.content_sha256` takes it. frames: of each clip.

    Of published statistics the checksum is that of their file, and what it does not tell is NOT_RECORDED.
    """

    name: str
    sha256: str
    count: int | str
    height: int | str
    width: int | str
    origin: Origin
    frames: int | str = 1


@dataclass(frozen=True)
class Computation:
    """What the arithmetic ran on."""

    device: str
    dtype: str
    batch_size: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Provenance:
    """definition: the metric in words. network, reference: None for a metric that has none.

    protocol: None for a score that belongs to no named protocol.
    """

    definition: str
    network: NetworkRecord | None
    samples: PicturesRecord
    reference: PicturesRecord | None
    computation: Computation
    protocol: ProtocolRecord | None = None

    def line(self) -> str:
        """The protocol in one line, for a table; the whole of it is in the record."""
        parts = [self.definition]
        if self.network is not None:
            net = self.network
            parts.append(f"{net.name}, weights {net.weights_sha256[:8]}, {net.layer} ({net.dim}), {net.preprocessing}")
        parts += [_pictures(role, it) for role, it in (("of", self.samples), ("against", self.reference)) if it]
        made = self.samples.origin
        parts += [
            f"{what} {value}"
            for what, value in (("classes", made.class_sampling), ("seed", made.seed), ("guidance", made.guidance))
            if value != "none"
        ]
        if self.network is not None and not self.network.comparable_to_papers:
            parts.append("not comparable to published numbers")
        if self.protocol is not None:
            parts += [f"protocol {self.protocol.name}", *self.protocol.departures]
        return "; ".join(parts)


@dataclass(frozen=True)
class Score:
    """A number under its name, with its provenance. value is raw: a Fréchet distance may lie below 0 by rounding."""

    name: str
    value: float
    provenance: Provenance

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def library_versions() -> dict[str, str]:
    """Python and the libraries that numbers depend on."""
    found = {"python": python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    return found


def _pictures(role: str, record: PicturesRecord) -> str:
    rule = record.origin.quantisation
    size = f"{record.width}x{record.height}" + ("" if record.frames == 1 else f", {record.frames} frames")
    return f"{role} {record.count} of {record.name} ({record.sha256[:8]}, {size}, uint8 {rule})"
