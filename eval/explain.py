"""Why two scores differ: which parts of their records do, and how far each is known to move the number.

    first, second = read_result("ours.json"), read_result("theirs.json")
    for comparison in explain(first, second):
        print("\\n".join(comparison.lines()))

Works on the JSON of scripts/evaluate.py, so on plain values. Sizes are as published, as measured here, or computed from
the two records; where nothing is known it says so.

Sources: clean-fid, Parmar et al. 2022 (arXiv:2104.11222) and its repository; Chong and Forsyth 2020 (arXiv:1911.07023);
what users and authors report of references on GitHub (LlamaGen, guided-diffusion, D-AR).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import hypot, isfinite
from pathlib import Path
from typing import Any, Literal

from eval.inception import PREPROCESSING
from eval.pixels import UINT8_RULES
from eval.provenance import NOT_RECORDED

UNKNOWN = "unknown effect"
ROUNDING = 1e-3  # by which equal protocols may differ through arithmetic, relative to a value above 1
CLEAN = "clean-fid (arXiv:2104.11222)"
Group = Literal["protocol", "samples", "arithmetic"]


class ExplainError(ValueError):
    """A result that cannot be read, or that holds no score to compare."""


@dataclass(frozen=True)
class Result:
    """A result file: records of scores by name; intervals by the same names; audit findings by what was audited."""

    path: str
    scores: Mapping[str, Mapping[str, Any]]
    intervals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Effect:
    """text: how far the number moves. source: who says so. shift: second less first, where it can be computed."""

    text: str
    source: str = ""
    shift: float | None = None


@dataclass(frozen=True)
class Difference:
    """One part that differs, in words, with both contents."""

    part: str
    group: Group
    first: str
    second: str
    effect: Effect


@dataclass(frozen=True)
class Comparison:
    """Two scores of one metric. errors: their standard errors, where known. verdict: sentences."""

    names: tuple[str, str]
    values: tuple[float, float]
    errors: tuple[float | None, float | None]
    differences: tuple[Difference, ...]
    verdict: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the terminal."""
        (here, there), (first, second) = self.names, self.values
        title = here if here == there else f"{here} / {there}"
        made = [f"{title}: {first:.6g} / {second:.6g}, second - first {second - first:+.4g}"]
        for group in ("protocol", "samples", "arithmetic"):
            for it in (it for it in self.differences if it.group == group):
                made.append(f"  {group:10} {it.part}: {it.first} / {it.second}")
                made.append(f"      {it.effect.text}" + (f" [{it.effect.source}]" if it.effect.source else ""))
        return [*made, *(f"  => {sentence}" for sentence in self.verdict)]


# ---- reading


def read_result(path: str | Path) -> Result:
    """Every score in the file, at whatever depth, under its keys joined by "/"; what is no score is passed over.

    Raises ExplainError, naming the file, where it is missing, is no JSON object, holds no score, or a score lacks parts.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ExplainError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise ExplainError(f"{path}: expected a JSON object of scores, as scripts/evaluate.py writes it")
    scores = dict(_scores(path, content))
    if not scores:
        raise ExplainError(f"{path}: holds no score with its provenance; give a JSON that scripts/evaluate.py wrote")
    intervals = content.get("intervals")
    return Result(str(path), scores, intervals if isinstance(intervals, dict) else {}, tuple(_warnings(content)))


def _scores(path: str | Path, content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, entry in content.items():
        name = above + key
        if not isinstance(entry, dict) or name in ("audit", "intervals"):
            continue
        if "value" not in entry or "provenance" not in entry:
            yield from _scores(path, entry, f"{name}/")
            continue
        try:
            value = float(entry["value"])
        except (TypeError, ValueError) as error:
            raise ExplainError(f"{path}: the value of {name} is {entry['value']!r}, no number") from error
        if not isinstance(entry["provenance"], dict) or not isinstance(entry["provenance"].get("samples"), dict):
            raise ExplainError(f"{path}: {name} does not say which samples it is of; score them again")
        yield name, {"value": value, "provenance": entry["provenance"]}


def _warnings(content: Mapping[str, Any]) -> Iterator[str]:
    audits = content.get("audit")
    for role, audit in audits.items() if isinstance(audits, dict) else ():
        for found in audit.get("findings", ()) if isinstance(audit, dict) else ():
            if isinstance(found, dict) and found.get("level") == "warning":
                yield f"{role}: {found.get('name')}: {found.get('text')}"


# ---- comparing


def explain(first: Result, second: Result, score: str | None = None, against: str | None = None) -> list[Comparison]:
    """Of all scores that both have, by name, or by the name without what is before "/" and from "@" on.

    score, against: the name of one score in each, to compare these two alone; against: default, the same as score.
    Raises ExplainError where there is no such score, or no pair.
    """
    if score is not None:
        pairs = [(score, score if against is None else against)]
        for result, name in zip((first, second), pairs[0], strict=True):
            if name not in result.scores:
                raise ExplainError(f"{result.path}: has no score {name!r}; it has {', '.join(result.scores)}")
    else:
        pairs = _pairs(first.scores, second.scores)
    if not pairs:
        raise ExplainError(
            f"{first.path} has {', '.join(first.scores)}; {second.path} has {', '.join(second.scores)}: "
            "no score in common; name one of each"
        )
    return [_compare(first, second, *names) for names in pairs]


def _interval(result: Result, name: str) -> Mapping[str, Any]:
    """By the name it has in the file, or under its protocol."""
    protocol = result.scores[name]["provenance"].get("protocol")
    longer = f"{protocol.get('name')}/{name}" if isinstance(protocol, dict) else name
    found = result.intervals.get(name, result.intervals.get(longer))
    return found if isinstance(found, dict) else {}


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [(name, name) for name in first if name in second]
    left, right = ([name for name in side if (name, name) not in pairs] for side in (first, second))
    for name in left:
        ours, theirs = ([other for other in side if _metric(other) == _metric(name)] for side in (left, right))
        if len(ours) == len(theirs) == 1:
            pairs.append((name, theirs[0]))
    return pairs


def _metric(name: str) -> str:
    return name.rsplit("/", 1)[-1].split("@", 1)[0]


def _compare(first: Result, second: Result, here: str, there: str) -> Comparison:
    ours, theirs = first.scores[here], second.scores[there]
    pair = _Pair(_metric(here), ours, theirs, _interval(first, here), _interval(second, there))
    differences = tuple(_differences(pair))
    values, errors = (ours["value"], theirs["value"]), tuple(it.get("standard_error") for it in pair.intervals)
    warnings = [
        f"the audit of {result.path} warns of {warning}" for result in (first, second) for warning in result.warnings
    ]
    return Comparison((here, there), values, errors, differences, (*_verdict(values, errors, differences), *warnings))


class _Pair:
    """Two records side by side, as the rules ask about them."""

    def __init__(
        self,
        metric: str,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        interval: Mapping[str, Any],
        other: Mapping[str, Any],
    ) -> None:
        self.metric, self.values, self.intervals = metric, (first["value"], second["value"]), (interval, other)
        self.leaves = [dict(_flat(record["provenance"])) for record in (first, second)]

    def both(self, path: str) -> tuple[Any, Any]:
        return tuple(leaves.get(path, NOT_RECORDED) for leaves in self.leaves)

    def same_pixels(self, role: str) -> bool:
        first, second = self.both(f"{role}.sha256")
        return first == second != NOT_RECORDED

    @property
    def frechet(self) -> bool:
        return bool(re.search(r"fid|fvd|fd|distance|frechet", self.metric))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


PARTS: dict[str, tuple[str, Group]] = {  # where in the record -> what it is; longer paths are below these
    "definition": ("statistic", "protocol"),
    "protocol": ("protocol", "protocol"),
    "network.name": ("network", "protocol"),
    "network.weights_sha256": ("weights of the network (sha256)", "protocol"),
    "network.layer": ("layer", "protocol"),
    "network.dim": ("features", "protocol"),
    "network.preprocessing": ("resizing and scaling", "protocol"),
    "network": ("network", "protocol"),
    "reference.origin.quantisation": ("uint8 rule of the reference", "protocol"),
    "reference.origin.record": ("reference", "protocol"),
    "reference.count": ("pictures in the reference", "protocol"),
    "reference.sha256": ("pixels of the reference (sha256)", "protocol"),
    "reference": ("reference", "protocol"),
    "samples.count": ("number of samples", "protocol"),
    "samples.height": ("height of samples", "protocol"),
    "samples.width": ("width of samples", "protocol"),
    "samples.origin.quantisation": ("uint8 rule of samples", "protocol"),
    "samples.origin.class_sampling": ("class plan", "protocol"),
    "samples.origin.guidance": ("guidance", "samples"),
    "samples.origin.sampler": ("sampler", "samples"),
    "samples.origin.seed": ("seed", "samples"),
    "samples.origin.checkpoint": ("checkpoint", "samples"),
    "samples.origin.record": ("record of samples", "samples"),
    "samples.sha256": ("pixels of samples (sha256)", "samples"),
    "samples": ("samples", "samples"),
    "computation.versions": ("version of", "arithmetic"),
    "computation": ("computation", "arithmetic"),
}
FOLLOWS = (  # from another part, or names only
    "network.distance",
    "network.short",
    "network.comparable_to_papers",
    "samples.name",
    "reference.name",
    "reference.origin.class_sampling",
    "samples.origin.sampler.guidance",
    "protocol.complete",
    "protocol.departures",
    "protocol.source",
    *(f"samples.origin.record.{key}" for key in ("quantisation", "class_plan", "seed", "sampler", "source", "count")),
)


def _differences(pair: _Pair) -> Iterator[Difference]:
    paths = dict.fromkeys(path for leaves in pair.leaves for path in leaves)
    for path in paths:
        first, second = pair.both(path)
        if first == second or any(path == known or path.startswith(f"{known}.") for known in FOLLOWS):
            continue
        known = next((part for part in PARTS if path == part or path.startswith(f"{part}.")), None)
        part, group = PARTS[known] if known is not None else (path, "protocol")
        rest = "" if known is None else path[len(known) + 1 :]
        effect = next((effect for rule in RULES if (effect := rule(pair, path, first, second))), Effect(UNKNOWN))
        yield Difference(f"{part} {rest}".strip(), group, _short(path, first), _short(path, second), effect)


def _short(path: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


# ---- what is known; a rule gives None where it has nothing to say

Rule = Callable[[_Pair, str, Any, Any], Effect | None]


def _equal_pixels(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    role = path.split(".", 1)[0]
    if path.startswith(("samples.origin", "reference.origin")) and pair.same_pixels(role):
        return Effect("none: the pixels are the same", "sha256")
    return None


def _not_recorded(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if NOT_RECORDED not in (first, second):
        return None
    return Effect(f"{UNKNOWN}: one side does not say, so it may be the same or not")


def _preprocessing(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if path != "network.preprocessing":
        return None
    keys = {text: key for key, text in PREPROCESSING.items()}
    kinds = {keys.get(first), keys.get(second)}
    if kinds == {"tf1", "pytorch"}:
        return Effect(
            "FID 8.9725 (TensorFlow) and 8.9669 (torch) on 5,000 pairs of FFHQ pictures at 1024 px: 0.006", CLEAN
        )
    if "clean" in kinds and None not in kinds:
        text = (
            "FID clean / legacy: FFHQ StyleGAN2 2.98 / 2.76, CIFAR-10 StyleGAN2 10.85 / 9.90, LSUN church 4.08 / 3.87"
        )
        return Effect(text, CLEAN)
    return None


def _network(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if path in ("network.weights_sha256", "network.layer", "network.dim", "network"):
        return Effect("unbounded: features of another network or layer have another scale; the two cannot be compared")
    if path == "network.name" and pair.both("network.weights_sha256")[0] == pair.both("network.weights_sha256")[1]:
        text = "FID 2e-6 to 2e-5 between ports with equal weights and resizing; 3.9433 and 3.9426 for the ADM evaluator"
        return Effect(text, f"{CLEAN}; a torch port of the ADM evaluator")
    return None


def _uint8(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if not path.endswith("origin.quantisation"):
        return None
    keys = {text: key for key, text in UINT8_RULES.items()}
    kinds = {keys.get(first), keys.get(second)}
    if kinds == {"trunc_128", "round"}:
        return Effect("next to none: the two differ on exact ties only, 4 pixels of 10^6", "counted")
    if "trunc" in kinds and None not in kinds:
        text = (
            "truncation is half a grey level darker on average, and lowers 63 of the 256 levels of real pictures by one"
        )
        return Effect(f"{text}; its FID: {UNKNOWN}", "counted")
    return None


def _count(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if path not in ("samples.count", "reference.count") or not all(isinstance(it, int) for it in (first, second)):
        return None
    source = "arXiv:1911.07023"
    if re.match(r"(\w+_)?(kid|kd)(_(?!std)|$)", pair.metric):
        return Effect("none on average: this kernel distance is unbiased", "arXiv:1801.01401")
    if not pair.frechet:
        return Effect(f"{UNKNOWN}; scores of sets of other sizes have another bias")
    biases = [
        it["bias"] * count
        for it, count in zip(pair.intervals, (first, second), strict=True)
        if isinstance(it.get("bias"), int | float)
    ]
    if path == "samples.count" and biases:
        bias = sum(biases) / len(biases)
        text = f"bias {bias / first:.4g} / {bias / second:.4g}, about {bias:.4g} / N for features of these covariances"
        return Effect(text, f"{source}, constant of Gaussian features", bias / second - bias / first)
    text = f"a bias of about b / N, {max(first, second) / min(first, second):.3g} times as large for the smaller set"
    return Effect(f"{text}: whole units of FID between 5,000 and 50,000", source)


def _statistic(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if path != "definition":
        return None
    both, counts = f"{first} / {second}", pair.both("samples.count")
    if "divisor n - 1" in both and re.search(r"divisor n\b(?! - 1)", both) and isinstance(counts[0], int):
        bound = max(map(abs, pair.values)) / min(counts)
        text = f"divisor n and not n - 1, with N pictures on either side: lower by at most value / N, here {bound:.2g}"
        return Effect(text, "computed")
    if both.count("square root by eigvals") == 1:
        text = "eigenvalues of the product: 1e-11 at full rank; FID lower by 3e-3 where covariances are nearly singular"
        return Effect(text, "measured at 2048 features")
    sizes = [_split_size(text, count) for text, count in zip((first, second), counts, strict=True)]
    if all(sizes):
        return _splits(sizes)
    if both.count("float16") == 1:
        return Effect("distances in float16 decide otherwise about one picture in 300: up to 0.003", "measured")
    if both.count("data_range 2") == 1:
        return Effect("a range of 2 for pictures in [0, 1] raises SSIM, 0.929 for 0.923", "measured")
    return None


def _split_size(definition: str, count: Any) -> int | None:
    """Pictures in a split of an Inception Score, as its definition has it."""
    if chunk := re.search(r"chunks of (\d+)", definition):
        return int(chunk[1])
    splits = re.search(r"(\d+|one)( equal)? splits?", definition)
    if splits is None or not isinstance(count, int):
        return None
    return count // (1 if splits[1] == "one" else int(splits[1]))


def _splits(sizes: list[int]) -> Effect:
    text = "a smaller split has a lower score: by (K' - 1) / 2n of its log, K' <= 1008 classes in use, so at most"
    bounds = " / ".join(f"{min(1.0, 1007 / (2 * n)):.1%}" for n in sizes)
    same = "; a shuffle moves it too where files are sorted by class" if sizes[0] == sizes[1] else ""
    return Effect(f"{text} {bounds} in splits of {sizes[0]} / {sizes[1]}{same}", "Miller-Madow bias of an entropy")


def _asked(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if not path.startswith("protocol"):
        return None
    return Effect("none by itself: it is what was asked for, and what was done has lines of its own", "its parts")


def _storage(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if ".origin.record" not in path:
        return None
    texts = [str(it).lower() for it in (first, second)]
    if sum(bool(re.search(r"jpe?g", text)) for text in texts) == 1:
        return Effect(
            "FID between PNG and JPEG of the same pictures: quality 100 0.23, 90 6.08, 75 20.96 (FFHQ)", CLEAN
        )
    words = r"resiz|resampl|interpol|antialias|bicubic|bilinear|lanczos|transform|crop"
    if path.startswith("reference") and re.search(words, f"{path} {' '.join(texts)}".lower()):
        text = (
            "FID of FFHQ 1024 to 299 px against PIL bicubic: not antialiased 6.1 to 6.5, nearest 7.4, PIL Lanczos 0.30"
        )
        return Effect(f"{text}, box 0.53, bilinear 0.64", CLEAN)
    return None


def _reference(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if not path.startswith("reference"):
        return None
    if path.startswith("reference.origin.record"):
        return Effect("none by itself: its pixels have a line of their own", "their sha256")
    text = (
        "rFID against ImageNet val / the ADM reference: LlamaGen VQ-16 2.19 / 4.28, VAR 0.92 / 2.70; against the same "
        f"crops / whole pictures: D-AR 1.5 / 2.2; generated samples: {UNKNOWN}"
    )
    return Effect(text, "issues LlamaGen 34, guided-diffusion 161, D-AR 3 on GitHub")


def _samples(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if path in ("samples.sha256", "samples.origin.seed"):
        errors = [it.get("standard_error") for it in pair.intervals]
        if all(isinstance(it, int | float) for it in errors):
            return Effect(f"other draws of the same law: {hypot(*errors):.2g} (one standard error)", "their intervals")
        return Effect("other pictures; of the same law: the sampling error, which intervals would tell")
    if path.startswith(("samples.origin.checkpoint", "samples.origin.sampler", "samples.origin.guidance")):
        return Effect(f"{UNKNOWN}: this is what the score is to measure")
    if path.startswith("samples.origin.class_sampling"):
        return Effect(f"{UNKNOWN}; random labels add the scatter of class shares, lists cut short leave classes out")
    return None


def _arithmetic(pair: _Pair, path: str, first: Any, second: Any) -> Effect | None:
    if not path.startswith("computation"):
        return None
    if path == "computation.dtype":
        text = "FID within 1e-3 for float32 and wider; half precision of the network, or TF32: "
        return Effect(text + UNKNOWN, "measured")
    return Effect("order of additions: FID 2e-6 to 2e-5 in float32 without TF32", f"{CLEAN}, between ports")


RULES: tuple[Rule, ...] = (  # the first that has something to say
    _equal_pixels,
    _asked,
    _storage,
    _not_recorded,
    _preprocessing,
    _network,
    _uint8,
    _count,
    _statistic,
    _samples,
    _reference,
    _arithmetic,
)


def _verdict(
    values: tuple[float, float], errors: tuple[Any, Any], differences: tuple[Difference, ...]
) -> Iterator[str]:
    delta = values[1] - values[0]
    close = isfinite(delta) and abs(delta) <= ROUNDING * max(1.0, abs(values[0]))
    active = [it for it in differences if not it.effect.text.startswith("none")]
    groups = {group: [it.part for it in active if it.group == group] for group in ("protocol", "samples", "arithmetic")}
    if groups["protocol"]:
        yield f"not comparable until these are equal: {'; '.join(dict.fromkeys(groups['protocol']))}"
    elif not active:
        yield (
            "the same protocol and the same number"
            if delta == 0
            else "everything recorded is equal, yet the values differ: what is left is not recorded. Non-deterministic "
            "kernels or TF32 on a GPU, another model of processor, another build of the same library versions, or files "
            "changed between reading and scoring; score both again on the CPU with one batch size"
        )
    elif not groups["samples"]:
        yield (
            "the same pictures under the same protocol; arithmetic explains the rest"
            if close
            else f"the same pictures under the same protocol, but {abs(delta):.3g} apart, more than arithmetic explains: "
            "look for TF32, half precision, or a non-deterministic kernel; score both again on the CPU with one batch size"
        )
    else:
        yield "the same protocol: the difference is one of the samples"
    shifts = [it.effect.shift for it in active if it.effect.shift is not None]
    if shifts:
        yield f"computed effects make {sum(shifts):+.3g} of {delta:+.3g}, {delta - sum(shifts):+.3g} is left"
    if groups["samples"] and all(isinstance(it, int | float) and it > 0 for it in errors):
        error = hypot(*errors)
        left = delta - sum(shifts)
        yield (
            f"sampling error of the difference: {error:.3g}; {'it is' if groups['protocol'] else 'the values are'} "
            + (f"{abs(left) / error:.1f} standard errors" + ("" if groups["protocol"] else " apart"))
        )
