"""A protocol: everything that must be agreed on before two numbers may be compared, as one value.

A metric says which network sees the pictures, what is kept of its outputs on either side, and the pure function from
there to named numbers. A protocol is metrics with the rules around them: how many samples, of which classes, how they
become uint8, against which reference. Each preset is a small file of `eval/protocols`; `eval.score` runs them, every
network once however many metrics and protocols ask for it. Pictures are uint8 (B, 3, H, W), clips (B, 3, T, H, W).

    FID = Metric(
        definition="Fréchet distance of Gaussians, covariance divisor n - 1",
        network="inception/tf1",
        of_samples=(Moments("2048"),),
        of_reference=(Moments("2048"),),
        compute=frechet("2048"),
        published={"fd": "fid"},
    )
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eval.features import NetworkRecord
from eval.gather import Gathering

Side = Mapping[Gathering, Any]  # what was gathered of one side, by what was asked for
Compute = Callable[[Side, Side], Mapping[str, float]]  # (samples, reference) -> values by their plain names
UNROUNDED = "none"  # of Protocol.uint8: the network sees clamped floats


@dataclass(frozen=True, eq=False)
class Metric:
    """definition: in words, for the record. network: a key of the table of networks (scripts: `eval.networks`).

    of_samples, of_reference: what `compute` finds in its two arguments. pairs: the network is shown every sample beside
    its original, (B, 2, 3, H, W), and all that is gathered of these pairs stands in the first argument.
    published: plain name of a value -> the name it has in papers, which it bears only under the published network.
    least: with fewer pictures on either side the metric is not defined, and is left out.
    """

    definition: str
    network: str
    compute: Compute
    published: Mapping[str, str]
    of_samples: tuple[Gathering, ...] = ()
    of_reference: tuple[Gathering, ...] = ()
    pairs: bool = False
    least: int = 2

    def name(self, value: str, network: NetworkRecord) -> str:
        """What a value of `compute` is called: as in papers, or after the network where that is another one.

        A value without a published name has its plain name under every network.
        """
        if network.comparable_to_papers or value not in self.published:
            return self.published.get(value, value)
        return network.distance if value == "fd" else f"{value}_{network.short}"


@dataclass(frozen=True, eq=False)
class Protocol:
    """name: as --protocol takes it. source: paper and code. count: samples it asks for; None: no number.

    class_sampling: of samples; None: left open. uint8: a key of `eval.pixels.UINT8_RULES`, or UNROUNDED.
    reference: which set, in words. arrays: gatherings that a published npz of statistics gives, with the names of its
    arrays, mean and covariance; without them the reference must be pictures, or a file of scripts/make_reference.py.
    """

    name: str
    source: str
    metrics: tuple[Metric, ...]
    count: int | None
    class_sampling: Literal["balanced", "random"] | None
    uint8: str
    reference: str
    arrays: Mapping[Gathering, tuple[str, str]] = field(default_factory=dict)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that its metrics name, each once."""
        return tuple(dict.fromkeys(metric.network for metric in self.metrics))

    @property
    def reconstructs(self) -> bool:
        """Whether samples are reconstructions, each beside its original."""
        return any(metric.pairs for metric in self.metrics)


@dataclass(frozen=True)
class ProtocolRecord:
    """What a score says of its protocol. departures: in what the scored sets are not as it asks, and what bends the value.

    complete: the protocol's own number of samples was scored; only then is the number one to compare.
    """

    name: str
    source: str
    count: int | None
    complete: bool
    class_sampling: str | None
    uint8: str
    reference: str
    departures: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
