"""The page of a comparison of decoding methods, from what eval/speculation.py gathers, for readers of no paper.

page = comparison_page("LlamaGen-B", conditions, facts, summaries, costs, sweeps, pictures)
page.save("report.html")
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from eval.report import FAINT, INK, Report, tidy
from eval.speculation import GAP, CallCost, MethodFacts, Summary, SweepPoint, expected_tokens, theory

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096", "#975a16", "#285e61", "#9b2c2c", "#4c51bf")

READING = (
    "A picture is a row of tokens. Plain decoding (ar, the baseline) asks the big network once for every token: one call "
    "reads one token and says the next. Every other method guesses several tokens first (a draft) and lets one call of the "
    "big network test them all; what passes is kept, the first that fails is replaced. Fewer calls can mean less time, if a "
    "call that reads many tokens costs about as much as a call that reads one, and if drafting is cheap. Both are measured "
    "below. An exact method gives pictures of the very same law as plain decoding; the others trade quality for speed, and "
    "the page says how much."
)
SPEED = (
    "calls: of the big network for one picture, the first one included. tau: tokens a round commits, the correction counted / "
    "accepted drafts alone. latency: milliseconds of the token loop for one picture, median [p10, p90]. x ar: how many times "
    "faster than ar, with a 95 % interval of paired bootstrap. processor x: the same in processor time, which other programs "
    "on the machine disturb less. theory x: what the acceptance alone promises; with t(L): the same once a call over L "
    "positions has its measured cost. memory: of tensors, the most at once beyond the weights, one picture."
)
QUALITY = (
    "exact: the law of plain decoding. distance: Fréchet, to ar's pictures of the same conditions under other noise, with a "
    "95 % interval; ar's own value is the noise floor, what two sets of plain decoding lie apart. prec / rec: precision and "
    "recall beside the same pictures; a low recall is lost variety. to reference: the distance to real pictures. step TV: how "
    "far one tested token's law lies from the target's, 0 for exact methods."
)
PUBLISHED = [  # of the papers, all on a GPU at batch 1
    ("SJD", "2.2x latency, 2.3x fewer calls, FID unchanged", "Lumina-mGPT 7B"),
    ("SJD, coupled", "4.2x at window 64, FID unchanged; 13.6x on video", "Lumina-mGPT, Cosmos-1-AR"),
    ("EAGLE-1, exact", "2.03x / 2.37x", "LlamaGen-XL text / Lumina-mGPT"),
    ("LANTERN++", "2.15x / 2.48x re-measured, 2.56x claimed", "LlamaGen-XL text / Lumina-mGPT"),
    ("Cool-SD", "2.27x at equal FID, 2.72x at FID +0.2", "LlamaGen-XL text"),
    ("GSD", "3.7x average, FID +2.8 of 5k pictures", "Lumina-mGPT"),
    ("CSpD", "2.33x", "MAR"),
]
FEWER_WORDS = {
    "exact": "the law of plain decoding, proved; tested below",
    "bounded": "within a stated distance of the law of plain decoding",
    "biased": "another law, one token of which is known in closed form",
}


@dataclass(frozen=True)
class Comparison:
    """All that the page shows, the baseline first everywhere.

    unstable: why wall-clock speed-ups are not to be quoted; empty: they may be. processor: median processor seconds of the
    baseline over a method's own. cost, draft_steps: of a call of the target, and seconds a step of what drafts, by its name.
    overheads: seconds a call outside of networks. floor: Fréchet distances of the baseline to itself under other noise.
    decoder_seconds: of the pixel decoder, one picture.
    """

    title: str
    conditions: Mapping[str, Any]
    facts: Mapping[str, MethodFacts]
    summaries: Mapping[str, Summary]
    unstable: Sequence[str]
    processor: Mapping[str, float]
    cost: CallCost
    draft_steps: Mapping[str, float]
    overheads: Mapping[str, float]
    positions: Mapping[str, float]
    floor: Sequence[float]
    distance: str
    decoder_seconds: float
    sweeps: Sequence[SweepPoint] = ()

    @property
    def baseline(self) -> Summary:
        return next(iter(self.summaries.values()))

    def promised(self, name: str) -> tuple[float, float]:
        """Theory of a method, without and with the measured cost of its calls; 1 for plain decoding."""
        made, fact = self.summaries[name], self.facts[name]
        if not any(not math.isnan(a) for a in made.alpha):
            return 1.0, 1.0
        cost = self.draft_steps.get(fact.drafter or "", 0.0) / self.cost.at(1)
        steps = made.drafter_calls / made.calls
        return theory(made.alpha, steps, cost), theory(
            made.alpha, steps, cost, self.cost.relative(self.positions[name])
        )


def speed_table(found: Comparison) -> list[dict[str, Any]]:
    """A row a method: what it takes."""
    rows = []
    for name, made in found.summaries.items():
        fact = found.facts[name]
        promise, costed = found.promised(name)
        rows.append(
            {
                "method": name,
                "exact?": _class(fact),
                "calls": f"{made.calls:.1f}",
                "fewer": f"{made.fewer_calls:.2f}x",
                "tau": f"{made.tau:.2f} / {made.tau_drafts:.2f}" if made.alpha else "",
                "latency, ms": f"{1e3 * made.latency:.0f} [{1e3 * made.p10:.0f}, {1e3 * made.p90:.0f}]",
                "x ar": "unstable" if found.unstable else _ratio(made.speedup),
                "processor x": f"{found.processor[name]:.2f}",
                "theory x": f"{promise:.2f}",
                "with t(L)": f"{costed:.2f}",
                "memory, MiB": "" if fact.peak_bytes is None else f"{fact.peak_bytes / 2**20:.1f}",
                "drafter": f"{fact.extra_parameters:,}" if fact.extra_parameters else "",
            }
        )
    return rows


def quality_table(found: Comparison) -> list[dict[str, Any]]:
    """A row a method: what it makes."""
    rows = []
    for name, fact in found.facts.items():
        row = {"method": name, "exact?": _class(fact), "knob": fact.knob}
        if (quality := fact.quality) is not None:
            row["distance"] = f"{quality.distance:.3g} [{quality.low:.3g}, {quality.high:.3g}]"
            if quality.to_reference is not None:
                row["to reference"] = f"{quality.to_reference:.3g}"
            if quality.accuracy is not None:
                ends = f"[{100 * quality.accuracy_low:.1f}, {100 * quality.accuracy_high:.1f}]"
                row["accuracy, %"] = f"{100 * quality.accuracy:.1f} {ends}"
            row["prec / rec"] = f"{quality.precision:.2f} / {quality.recall:.2f}"
        row["step TV"] = "0" if fact.exactness == "exact" else "" if fact.step_tv is None else f"{fact.step_tv:.3f}"
        rows.append(row)
    return rows


def _class(fact: MethodFacts) -> str:
    return "control" if fact.control and fact.step_tv is None else fact.exactness


def comparison_page(found: Comparison, pictures: Mapping[str, Tensor]) -> Report:
    """pictures: rows of float (B, 3, H, W) in [-1, 1] by method, of the same conditions and numbers."""
    page = Report(found.title, _lead(found))
    page.text("How to read this page", READING)
    page.table("Speed", speed_table(found), SPEED)
    page.table("Quality", quality_table(found), _quality_note(found))
    page.pictures(
        "The same conditions by every method",
        pictures,
        note="A column is one condition and one number of the noise. Exact methods draw from the same law by other ways, so "
        "that their pictures differ one by one and agree as a crowd. A lossy method may be smoother or less varied.",
    )
    page.figure("What a call costs", _cost_figure(found), _cost_note(found))
    page.table("Where the time goes", _time_table(found), _time_note(found))
    if found.sweeps:
        page.figure("Speed against distance", _sweep_figure(found), _sweep_note(found))
        page.table("The knobs", _sweep_table(found))
    page.figure("How often drafts are accepted", _alpha_figure(found), ALPHA_NOTE)
    page.figure("Calls of a picture", _rounds_figure(found), "How many pictures took so many calls of the target.")
    page.table("Exactness", _exactness_table(found), EXACTNESS_NOTE)
    page.table("The slowest pictures, and batches", _tail_table(found), TAIL_NOTE)
    controls = [name for name, fact in found.facts.items() if fact.control]
    if controls:
        page.table("Controls", [_control_row(found, name) for name in controls], CONTROL_NOTE)
    page.table(
        "What the papers report",
        [dict(zip(("method", "claim", "model"), row, strict=True)) for row in PUBLISHED],
        "All of them on a GPU at batch 1, with models of 0.8 to 7 billion parameters, where a call is bound by memory and "
        "costs about the same for one position as for sixteen. On a small model or a CPU expect less, often below 1.",
    )
    page.table("Conditions", [{"what": key, "value": _words(value)} for key, value in found.conditions.items()])
    return page


def _quality_note(found: Comparison) -> str:
    low, high = min(found.floor), max(found.floor)
    return f"{QUALITY} The floor here: {low:.3g} to {high:.3g}, from three pairs of sets."


def _lead(found: Comparison) -> str:
    fewest = max(found.summaries.values(), key=lambda made: made.fewer_calls)
    exact = [made for name, made in found.summaries.items() if found.facts[name].exactness == "exact"]
    best = max(exact, key=lambda made: made.fewer_calls)
    told = (
        f"Plain decoding takes {found.baseline.calls:.0f} calls a picture. Of the exact methods {best.method} takes the "
        f"fewest, {best.calls:.1f} ({best.fewer_calls:.1f}x fewer); of all, {fewest.method}: {fewest.calls:.1f} "
        f"({fewest.fewer_calls:.1f}x)."
    )
    if found.unstable:
        return f"{told} Wall-clock speed-ups are withheld as unstable: {'; '.join(found.unstable)}."
    fastest = max(found.summaries.values(), key=lambda made: made.speedup.value)
    return f"{told} By the clock the fastest is {fastest.method}, {_ratio(fastest.speedup)} of ar's speed."


# ---- what a call costs


def _cost_figure(found: Comparison) -> Figure:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (cache, curve) in enumerate(found.cost.seconds.items()):
        lengths = sorted(curve)
        left.plot(lengths, [1e3 * curve[length] for length in lengths], "o-", ms=3, lw=1.2, color=COLOURS[place])
        left.annotate(f" {cache} cached", (lengths[-1], 1e3 * curve[lengths[-1]]), fontsize=7, color=COLOURS[place])
    left.set_xscale("log", base=2)
    left.set_ylim(bottom=0)
    left.set_title("a call over L new positions, ms", loc="left", fontsize=10, color=INK)
    left.set_xlabel("L", fontsize=8, color=INK)
    most = max(max(curve) for curve in found.cost.seconds.values())
    lengths = [length for length in sorted(next(iter(found.cost.seconds.values()))) if length <= most]
    right.plot(lengths, [found.cost.relative(length) for length in lengths], color=INK, lw=1.2)
    for place, (name, made) in enumerate(found.summaries.items()):
        point = found.positions[name], made.compression
        right.plot(*point, "o", color=COLOURS[place % len(COLOURS)], ms=5)
        right.annotate(f" {name}", point, fontsize=7, color=COLOURS[place % len(COLOURS)])
    right.set_xscale("log", base=2)
    right.set_yscale("log", base=2)
    right.set_title("tokens a call brings, beside t(L) / t(1)", loc="left", fontsize=10, color=INK)
    right.set_xlabel("positions of a call", fontsize=8, color=INK)
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:.0f}")
        tidy(axes)
    right.yaxis.set_major_formatter("{x:.1f}")
    return figure


def _cost_note(found: Comparison) -> str:
    measured = sorted({length for curve in found.cost.seconds.values() for length in curve if length > 1})
    told = ", ".join(f"t({length}) = {found.cost.relative(length):.1f} t(1)" for length in measured)
    steps = "; ".join(
        f"a step of the {name} drafter costs {seconds / found.cost.at(1):.2f} of a call"
        for name, seconds in found.draft_steps.items()
    )
    return (
        f"Here {told}{'; ' + steps if steps else ''}. On the right a method pays off only where its point lies above the "
        "line: it must bring more tokens a call than the call costs in plain calls, drafting not counted. Where memory traffic "
        "or the start of kernels bounds a call, as for large models on a GPU, the line stays near 1; where arithmetic does, it "
        "climbs."
    )


def _time_table(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for name, made in found.summaries.items():
        _, costed = found.promised(name)
        drafting = made.drafter_calls * found.draft_steps.get(found.facts[name].drafter or "", 0.0)
        measured = found.baseline.latency / made.latency
        gap = costed / measured - 1
        rows.append(
            {
                "method": name,
                "calls": f"{made.calls:.1f}",
                "positions a call": f"{found.positions[name]:.1f}",
                "in calls, ms": f"{1e3 * made.calls * found.cost.at(round(found.positions[name])):.1f}",
                "draft steps": f"{made.drafter_calls:.1f}",
                "in drafting, ms": f"{1e3 * drafting:.1f}",
                "elsewhere a call, ms": f"{1e3 * found.overheads[name]:.2f}",
                "E(alpha)": f"{expected_tokens(made.alpha):.2f}",
                "tau": f"{made.tau:.2f}",
                "theory against clock": f"{gap:+.0%}" + ("  explain" if abs(gap) > GAP else ""),
            }
        )
    return rows


def _time_note(found: Comparison) -> str:
    return (
        "Calls and draft steps at their cost in isolation; elsewhere: what is left of the latency, a call: tests, trees, "
        "draws of noise, bookkeeping. E(alpha): tokens a round should bring by the acceptance at each place; tau: what it "
        "brought (the end of the picture cuts the last round short). Theory against clock: how far the theory with t(L) lies "
        f"above the measured speed-up; more than {GAP:.0%} is marked, and then found in the column before it: what is spent "
        f"elsewhere is not in the theory. The pixel decoder, the same for all, takes {1e3 * found.decoder_seconds:.1f} ms more."
    )


# ---- knobs


def _sweep_figure(found: Comparison) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels: Sequence[tuple[Any, str, Callable[[SweepPoint], float]]] = (
        (None, "fewer calls, times", lambda point: point.fewer_calls),
        (None, "speed by the clock, times", lambda point: point.speedup),
    )
    names = list(dict.fromkeys(point.method for point in found.sweeps))
    for place, (_, label, speed) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 2, place)
        for colour, name in zip(COLOURS, names, strict=False):
            points = sorted((it for it in found.sweeps if it.method == name), key=lambda it: it.value)
            axes.plot(
                [speed(it) for it in points], [it.quality.distance for it in points], "o-", ms=4, lw=1.2, color=colour
            )
            for point in points:
                axes.annotate(f" {point.value:g}", (speed(point), point.quality.distance), fontsize=6.5, color=colour)
            axes.plot([], [], "o-", color=colour, label=f"{name} ({points[0].knob})")
        for place_exact, (name, made) in enumerate(found.summaries.items()):
            fact = found.facts[name]
            if fact.exactness == "exact" and fact.quality is not None and not fact.control:
                times = made.fewer_calls if place == 1 else found.baseline.latency / made.latency
                label_once = {"label": "exact methods"} if place_exact == 0 else {}
                axes.plot(times, fact.quality.distance, "s", color=INK, ms=4, **label_once)
                axes.annotate(f" {name}", (times, fact.quality.distance), fontsize=6.5, color=INK)
        axes.axhspan(0, max(found.floor), color=FAINT, alpha=0.5, lw=0)
        axes.set_xlabel(label, fontsize=8, color=INK)
        axes.set_title(found.distance.replace("_", " "), loc="left", fontsize=10, color=INK)
        tidy(axes)
        if place == 1:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _sweep_note(found: Comparison) -> str:
    low, high = min(found.floor), max(found.floor)
    return (
        f"Right and low is good. In the shaded band, up to {high:.3g}, the distance cannot be told from that between two sets "
        f"of plain decoding ({low:.3g} to {high:.3g}). Numbers at points are the setting of the knob. A single point is no "
        "comparison: lossy methods are to be compared by their curves, and with the plain amplified ratio, the simplest rule."
    )


def _sweep_table(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for point in found.sweeps:
        row = {
            "method": point.method,
            "knob": f"{point.knob} = {point.value:g}",
            "fewer calls": f"{point.fewer_calls:.2f}x",
            "processor x": f"{point.speedup:.2f}",
            "distance": f"{point.quality.distance:.3g} [{point.quality.low:.3g}, {point.quality.high:.3g}]",
        }
        if point.quality.accuracy is not None:
            row["accuracy"] = f"{100 * point.quality.accuracy:.1f} %"
        rows.append({**row, "prec / rec": f"{point.quality.precision:.2f} / {point.quality.recall:.2f}"})
    return rows


# ---- acceptance, rounds, exactness, tails

ALPHA_NOTE = (
    "Of the tests made at each place of a draft, the share that accepted; a place is tested once all before it were accepted, "
    "so late places of hard pictures are missing. In a tree a place is a depth."
)
EXACTNESS_NOTE = (
    "Exact methods decoded a model so small that the law of all its sequences is known, in this very build; p is the "
    "probability that draws of the right law look as far off as these: below 0.001 would be an alarm. For the others, step TV "
    "is the mean distance in total variation between the law of one tested token, in closed form, and the target's, on the "
    "laws met while decoding: the size of the step away from the truth at each token."
)
TAIL_NOTE = (
    "A mean hides the pictures that users wait for: the slowest 5 % of them. In a batch all wait for the last sequence: mean "
    "of its rounds. Images a second in batches of the sizes given; gains of speculation shrink with the batch."
)
CONTROL_NOTE = (
    "What the same compute buys otherwise: a smaller model decoded plainly; the same model made sharper by a lower temperature "
    "or top-k, since relaxed rules sharpen too; and the plain amplified ratio, which any relaxed rule must beat at equal speed."
)


def _alpha_figure(found: Comparison) -> Figure:
    figure = Figure(figsize=(10, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, made) in enumerate(found.summaries.items()):
        if any(not math.isnan(a) for a in made.alpha):
            steps = range(1, len(made.alpha) + 1)
            axes.plot(steps, made.alpha, "o-", ms=3, lw=1.2, color=COLOURS[place % len(COLOURS)], label=name)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("place in the draft", fontsize=8, color=INK)
    axes.legend(fontsize=7, frameon=False, ncols=4)
    tidy(axes)
    return figure


def _rounds_figure(found: Comparison) -> Figure:
    shown = {name: made for name, made in found.summaries.items() if len(made.rounds) > 1}
    columns = min(4, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(10, 1.9 * rows), layout="constrained")
    for place, (name, made) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.bar(list(made.rounds), list(made.rounds.values()), width=0.9, color=COLOURS[0], alpha=0.85)
        axes.set_title(name, loc="left", fontsize=9, color=INK)
        tidy(axes)
    return figure


def _exactness_table(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for name, fact in found.facts.items():
        if fact.control and fact.drafter is None:
            continue
        test = fact.test
        rows.append(
            {
                "method": name,
                "class": fact.exactness,
                "tokens have": FEWER_WORDS[fact.exactness],
                "p": "" if test is None else f"{test.p_value:.3f}",
                "draws": "" if test is None else f"{test.draws:,}",
                "chi-square": "" if test is None else f"{test.statistic:.1f} ({test.freedom} cells less one)",
                "step TV": "" if fact.step_tv is None else f"{fact.step_tv:.4f}",
                "what it does": fact.about,
            }
        )
    return rows


def _tail_table(found: Comparison) -> list[dict[str, Any]]:
    rows = []
    for name, made in found.summaries.items():
        fact = found.facts[name]
        row: dict[str, Any] = {
            "method": name,
            "slowest 5 %, ms": f"{1e3 * made.slowest:.0f}",
            "their calls": f"{made.slowest_calls:.1f}",
        }
        for size, rate in fact.throughput.items():
            row[f"images/s, batch {size}"] = f"{rate:.1f}"
        for size, rounds in fact.last_round.items():
            row[f"last of {size}, rounds"] = f"{rounds:.1f}"
        rows.append(row)
    return rows


def _control_row(found: Comparison, name: str) -> dict[str, Any]:
    fact, made = found.facts[name], found.summaries[name]
    row = {"control": name, "what": fact.about, "knob": fact.knob, "fewer calls": f"{made.fewer_calls:.2f}x"}
    row["processor x"] = f"{found.processor[name]:.2f}"
    if fact.quality is not None:
        row["distance"] = f"{fact.quality.distance:.3g}"
        row["prec / rec"] = f"{fact.quality.precision:.2f} / {fact.quality.recall:.2f}"
        if fact.quality.accuracy is not None:
            row["accuracy"] = f"{100 * fact.quality.accuracy:.1f} %"
    return row


def _ratio(interval: Any) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
