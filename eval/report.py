"""A report in one HTML file: text, pictures, curves and tables given as plain values, everything inside the file.

    report = Report("Digits", "A tokenizer and a generator, trained from nothing in ten minutes")
    report.pairs("Reconstructions", images, decoded)
    report.curves("Training", {"loss": (steps, values)})
    report.table("Scores", [score_row(score) for score in scores])
    report.save("report.html")

Pictures are float (B, 3, H, W) in [-1, 1], brought to uint8 by clamp(127.5 x + 128, 0, 255), truncated.
`evaluation_report` makes the whole page of an evaluation from what was gathered for its scores, with pictures in uint8.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from eval.audit import Finding
from eval.bootstrap import Interval, share_interval
from eval.files import write_whole
from eval.markdown import Intervals, markdown_table, protocol_name, score_key, shown, significant
from eval.nearest import nearest
from eval.pixels import from_uint8, to_uint8
from eval.provenance import Score

INK, ACCENT, FAINT = "#1f2933", "#2b6cb0", "#d9e2ec"
CLASSES_IN_FULL = 20  # with more classes a table names the worst and the best CLASSES_AT_ENDS
CLASSES_AT_ENDS = 8

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 .75rem; font-size: 1.2rem; }
.lead { margin: .5rem 0 2rem; color: #52606d; font-size: 1.05rem; max-width: 46rem; }
section { background: #fff; border: 1px solid #d9e2ec; border-radius: 10px; padding: 1.4rem 1.5rem; margin: 0 0 1.25rem; }
.note { margin: .9rem 0 0; color: #52606d; font-size: .875rem; max-width: 52rem; }
.scroll { overflow-x: auto; }
.rows { display: grid; grid-template-columns: max-content 1fr; gap: .5rem 1rem; align-items: center; }
.rows .label { max-width: 8rem; color: #52606d; font-size: .875rem; text-align: right; }
.pictures { display: flex; flex-wrap: wrap; gap: 4px; }
figure { margin: 0; }
figure img { display: block; border-radius: 3px; image-rendering: pixelated; }
figcaption { color: #7b8794; font-size: .7rem; text-align: center; line-height: 1.5; }
.chart svg { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th { text-align: left; color: #52606d; font-weight: 600; border-bottom: 2px solid #d9e2ec; padding: .4rem .75rem .4rem 0; }
td { border-bottom: 1px solid #e4e7eb; padding: .5rem .75rem .5rem 0; vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td:first-child { font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.warning { color: #b44d12; font-weight: 600; }
pre { margin: .9rem 0 0; padding: .8rem 1rem; background: #f5f7fa; border-radius: 6px; font-size: .78rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; }
td.protocol { color: #7b8794; font-size: .78rem; line-height: 1.45; overflow-wrap: anywhere; }
</style>
</head>
<body><main>
<h1>{{ title }}</h1>
<p class="lead">{{ lead }}</p>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.rows %}
<div class="scroll"><div class="rows">
{% for label, figures in section.rows %}
<div class="label">{{ label }}</div>
<div class="pictures">
{% for source, caption in figures %}
<figure><img src="{{ source }}" width="{{ section.width }}" alt="{{ label }} {{ loop.index }}">
{% if caption %}<figcaption>{{ caption }}</figcaption>{% endif %}</figure>
{% endfor %}
</div>
{% endfor %}
</div></div>
{% endif %}
{% if section.chart %}<div class="chart">{{ section.chart }}</div>{% endif %}
{% if section.columns %}
<div class="scroll"><table>
<thead><tr>{% for column in section.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in section.cells %}
<tr>{% for kind, text in cells %}<td class="{{ kind }}">{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% if section.code %}<pre>{{ section.code }}</pre>{% endif %}
{% if section.note %}<p class="note">{{ section.note }}</p>{% endif %}
</section>
{% endfor %}
</main></body>
</html>
"""


class Report:
    """Sections in the order they are added. Every section has a title and may end in a note, a sentence or two."""

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.sections: list[dict[str, Any]] = []

    def text(self, title: str, text: str) -> None:
        """A paragraph."""
        self.sections.append({"title": title, "note": text})

    def pictures(
        self,
        title: str,
        rows: Mapping[str, Tensor],
        captions: Mapping[str, Sequence[str]] | None = None,
        note: str = "",
        width: int = 64,
    ) -> None:
        """Labelled rows of pictures, float (B, 3, H, W) in [-1, 1] each; small ones are enlarged without smoothing.

        captions: of some rows, one text a picture. width: of a picture on the page, in CSS pixels.
        Raises ValueError where a row has another number of captions than pictures, or captions fit no row.
        """
        captions = captions or {}
        if captions.keys() - rows.keys():
            raise ValueError(f"report: {title!r} has captions for {sorted(captions.keys() - rows.keys())}, not rows")
        made = []
        for label, images in rows.items():
            texts = captions.get(label, [""] * len(images))
            if len(texts) != len(images):
                raise ValueError(f"report: {title!r}, row {label!r}: {len(images)} pictures, {len(texts)} captions")
            made.append((label, list(zip(map(_data_url, to_uint8(images)), texts, strict=True))))
        self.sections.append({"title": title, "rows": made, "note": note, "width": width})

    def films(self, title: str, rows: Mapping[str, bytes], note: str = "", width: int = 560) -> None:
        """A playing picture a row: the content of a GIF file each. width: on the page, in CSS pixels."""
        made = [(label, [(_url("gif", film), "")]) for label, film in rows.items()]
        self.sections.append({"title": title, "rows": made, "note": note, "width": width})

    def pairs(
        self,
        title: str,
        originals: Tensor,
        reconstructions: Tensor,
        captions: Sequence[str] | None = None,
        note: str = "",
    ) -> None:
        """Every original (B, 3, H, W) above its reconstruction."""
        white = originals.new_ones(*originals.shape[:2], 2, originals.shape[-1])
        label = "original above, reconstruction below"
        stacked = torch.cat((originals, white, reconstructions), dim=-2)
        self.pictures(title, {label: stacked}, None if captions is None else {label: captions}, note)

    def classes(
        self, title: str, images: Tensor, labels: Tensor, names: Sequence[str], note: str = "", width: int = 64
    ) -> None:
        """One row for each class that occurs, in class order. images (B, 3, H, W); labels int64 (B,), places in names."""
        rows = {names[label]: images[labels == label] for label in labels.unique().tolist()}
        self.pictures(title, rows, note=note, width=width)

    def nearest(
        self, title: str, samples: Tensor, neighbours: Tensor, distances: Tensor, note: str = "", width: int = 64
    ) -> None:
        """Every sample (B, 3, H, W) beside its neighbours (B, K, 3, H, W), with their distances (B, K)."""
        rows, captions = {}, {}
        for number, (sample, near, distance) in enumerate(zip(samples, neighbours, distances, strict=True), 1):
            rows[f"sample {number}"] = torch.cat((sample[None], near))
            captions[f"sample {number}"] = ["sample", *(f"{value:.2f}" for value in distance.tolist())]
        self.pictures(title, rows, captions, note, width)

    def curves(self, title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], note: str = "") -> None:
        """Small line charts side by side, one a name: (steps, values) each."""
        columns = min(3, len(series))
        rows = ceil(len(series) / columns)
        figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
        for place, (name, (steps, values)) in enumerate(series.items(), 1):
            axes = figure.add_subplot(rows, columns, place)
            axes.plot(steps, values, color=ACCENT, linewidth=1.4)
            axes.set_title(name, loc="left", fontsize=10, color=INK)
            axes.set_xlabel("step", fontsize=8, color=INK)
            tidy(axes)
        self.sections.append({"title": title, "chart": _svg(figure), "note": note})

    def histogram(self, title: str, counts: Tensor, note: str = "") -> None:
        """How often each code occurs, most frequent first. counts (V,)."""
        ordered = counts.double().sort(descending=True).values
        share = (ordered / ordered.sum().clamp_min(1)).tolist()
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.fill_between(range(1, len(share) + 1), share, step="mid", color=ACCENT, alpha=0.85, linewidth=0)
        axes.axhline(1 / len(share), color=INK, linewidth=0.8, linestyle="--")
        axes.set_xlim(0.5, len(share) + 0.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("codes, most frequent first (dashed: all equally frequent)", fontsize=8, color=INK)
        axes.set_ylabel("share of tokens", fontsize=8, color=INK)
        tidy(axes)
        self.sections.append({"title": title, "chart": _svg(figure), "note": note})

    def figure(self, title: str, figure: Figure, note: str = "") -> None:
        """A drawing of one's own; `tidy` gives its axes the look of the others."""
        self.sections.append({"title": title, "chart": _svg(figure), "note": note})

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
        """Rows by column name; a column missing from a row stays empty. Floats get four significant figures; a column
        called "protocol" is set small."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [[_cell(column, row.get(column, "")) for column in columns] for row in rows]
        self.sections.append({"title": title, "columns": columns, "cells": cells, "note": note})

    def code(self, title: str, code: str, note: str = "") -> None:
        """Lines to copy, in a fixed width."""
        self.sections.append({"title": title, "code": code, "note": note})

    def bars(self, title: str, values: Tensor, level: float, axis: str, note: str = "") -> None:
        """Values (K,) in [0, 1] as bars, from the lowest to the highest, with a dashed line at `level`."""
        ordered = values.double().sort().values.tolist()
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(range(1, len(ordered) + 1), ordered, width=0.9, color=ACCENT, alpha=0.85)
        axes.axhline(level, color=INK, linewidth=0.8, linestyle="--")
        axes.set_xlim(0.5, len(ordered) + 0.5)
        axes.set_ylim(0, 1)
        axes.set_xlabel("classes, lowest first (dashed: all pictures)", fontsize=8, color=INK)
        axes.set_ylabel(axis, fontsize=8, color=INK)
        tidy(axes)
        self.sections.append({"title": title, "chart": _svg(figure), "note": note})

    def html(self) -> str:
        page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
        return page.render(title=self.title, lead=self.lead, sections=self.sections)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, self.html().encode())


def score_row(score: Score) -> dict[str, Any]:
    """A score as a row of a table."""
    return {"metric": score.name, "value": shown(score.value), "protocol": score.provenance.line()}


# ---- the page of an evaluation


@dataclass(frozen=True)
class Neighbours:
    """Samples uint8 (Q, 3, H, W), the nearest pictures of another set (Q, K, 3, H, W), their distances (Q, K).

    sample, index: numbers in their sets, int64 (Q,) and (Q, K). looked: at how many samples; typical: the median of
    their nearest distances. space, bank: what distances are of, and which set, in words.
    """

    samples: Tensor
    pictures: Tensor
    distances: Tensor
    sample: Tensor
    index: Tensor
    looked: int
    typical: float
    space: str
    bank: str


def nearest_pictures(
    sample_features: Tensor,
    bank_features: Tensor,
    samples: Iterable[Tensor],
    bank: Iterable[Tensor],
    space: str,
    bank_name: str,
    rows: int = 8,
    count: int = 4,
    looked: int = 1000,
) -> Neighbours:
    """Of `looked` samples spread over the whole set, the `rows` that lie nearest to the bank: copies come first.

    sample_features (n, D), bank_features (m, D), float; samples, bank: batches uint8 (B, 3, H, W) of the pictures in the
    same orders, of one size. Raises ValueError where a set has fewer pictures than features, or the bank fewer than count.
    """
    spread = torch.arange(0, len(sample_features), ceil(len(sample_features) / looked))
    distance, index = nearest(sample_features[spread].float(), bank_features.split(4096), count)
    closest = distance[:, 0].argsort(stable=True)[:rows].cpu()
    index, distance_shown = index.cpu()[closest], distance.cpu()[closest]
    return Neighbours(
        samples=pictures_at(samples, spread[closest]),
        pictures=pictures_at(bank, index.flatten()).unflatten(0, index.shape),
        distances=distance_shown,
        sample=spread[closest],
        index=index,
        looked=len(spread),
        typical=float(distance[:, 0].median()),
        space=space,
        bank=bank_name,
    )


def pictures_at(batches: Iterable[Tensor], index: Tensor) -> Tensor:
    """The pictures with these numbers, int64 (Q,), counted over all batches (B, ...) -> (Q, ...).

    Stops reading after the last one asked for. Raises ValueError where there are fewer.
    """
    found, wanted, seen = {}, sorted(set(index.tolist())), 0
    for batch in batches:
        while len(found) < len(wanted) and wanted[len(found)] < seen + len(batch):
            number = wanted[len(found)]
            found[number] = batch[number - seen].clone()
        seen += len(batch)
        if len(found) == len(wanted):
            return torch.stack([found[number] for number in index.tolist()])
    raise ValueError(f"pictures_at: picture {wanted[len(found)]} asked of {seen}")


def evaluation_report(
    title: str,
    scores: Sequence[Score],
    samples: Tensor,
    intervals: Intervals | None = None,
    audits: Mapping[str, Sequence[Finding]] | None = None,
    labels: Tensor | None = None,
    guesses: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    neighbours: Neighbours | None = None,
    shown_labels: Tensor | None = None,
) -> Report:
    """The page of an evaluation: scores with intervals and protocol, audit, samples, nearest pictures, classes.

    samples: some pictures to show, uint8 (B, 3, H, W), with their labels shown_labels int64 (B,), if any. intervals: by
    `eval.markdown.score_key`. audits: findings by the name of the set. labels, guesses: int64 (n,), the class each sample
    was made for and the class a network sees. class_names: of labels, else their numbers.
    Raises ValueError for no scores, and where labels and guesses differ in number.
    """
    intervals = intervals or {}
    protocols = list(dict.fromkeys(filter(None, map(protocol_name, scores))))
    under = f" under {', '.join(protocols)}" if protocols else ""
    page = Report(title, f"{len(scores)} scores{under}, and what to know before believing them.")
    rows = [_score_with_interval(score, intervals.get(score_key(score))) for score in scores]
    page.table("Scores", rows, _interval_note(list(intervals.values())))
    page.code("For a paper's table", markdown_table({title: scores}, {title: intervals}))
    if audits:
        found = [
            {"set": name, "about": it.name, "level": it.level, "finding": it.text}
            for name, findings in audits.items()
            for it in findings
        ]
        page.table("Audit", found)
    _show_samples(page, samples, shown_labels, class_names)
    if neighbours is not None:
        _show_neighbours(page, neighbours)
    if labels is not None and guesses is not None:
        _show_classes(page, labels, guesses, class_names)
    return page


def class_accuracy(labels: Tensor, guesses: Tensor, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each class that occurs: pictures, share recognised with its 95 % interval, and what others are taken for.

    labels, guesses int64 (n,). Raises ValueError where they differ in number.
    """
    if labels.shape != guesses.shape or labels.ndim != 1:
        raise ValueError(f"class_accuracy: labels {tuple(labels.shape)}, guesses {tuple(guesses.shape)}")
    rows = []
    for label in labels.unique().tolist():
        seen = guesses[labels == label]
        right, wrong = int((seen == label).sum()), seen[seen != label]
        interval = share_interval(right, len(seen))
        taken = ""
        if len(wrong):
            most = int(wrong.bincount().argmax())
            taken = f"{_class_name(most, names)} ({int((wrong == most).sum())})"
        rows.append(
            {
                "class": _class_name(label, names),
                "pictures": len(seen),
                "accuracy": interval.value,
                "95 %": f"{interval.low:.3f} .. {interval.high:.3f}",
                "mostly taken for": taken,
            }
        )
    return rows


def _score_with_interval(score: Score, interval: Interval | None) -> dict[str, Any]:
    row = score_row(score)
    line = row.pop("protocol")
    if interval is not None:
        texts = significant(score.value, interval.standard_error), f"{shown(interval.low):.4g} .. {interval.high:.4g}"
        row["value"], row["interval"] = (text.replace(" ", "\N{NO-BREAK SPACE}") for text in texts)
    return row | {"protocol": line}


def _interval_note(intervals: Sequence[Interval]) -> str:
    if not intervals:
        return ""
    methods = ", ".join(dict.fromkeys(it.method for it in intervals))
    return (
        f"± standard error; {intervals[0].level:.0%} intervals over other draws of as many samples against the same "
        f"reference ({methods}). The bias of a Fréchet distance, which falls as 1 / N, is part of its value."
    )


def _show_samples(page: Report, samples: Tensor, labels: Tensor | None, names: Sequence[str] | None) -> None:
    images = from_uint8(samples)
    if labels is None:
        page.pictures("Samples", {f"{len(samples)} samples": images})
        return
    kinds = labels.unique().tolist()
    rows = {_class_name(label, names): images[labels == label] for label in kinds}
    page.pictures("Samples by class", rows)


def _show_neighbours(page: Report, near: Neighbours) -> None:
    rows, captions = {}, {}
    lines = zip(
        near.samples, near.pictures, near.distances.tolist(), near.sample.tolist(), near.index.tolist(), strict=True
    )
    for sample, pictures, distances, number, index in lines:
        label = f"sample {number}"
        rows[label] = from_uint8(torch.cat((sample[None], pictures)))
        captions[label] = ["sample", *(f"{value:.3g} (no. {it})" for value, it in zip(distances, index, strict=True))]
    note = (
        f"Euclidean distance of {near.space}; of {near.looked} samples looked at, the {len(near.samples)} nearest to "
        f"{near.bank}. The median of all is {near.typical:.3g}: distances far below it are copies, and 0 is the same picture "
        "to the network."
    )
    page.pictures(f"Nearest pictures of {near.bank}", rows, captions, note, width=96)


def _show_classes(page: Report, labels: Tensor, guesses: Tensor, names: Sequence[str] | None) -> None:
    rows = class_accuracy(labels, guesses, names)
    total = share_interval(int((labels == guesses).sum()), len(labels))
    note = f"All pictures: {total.value:.4f}, 95 % {total.low:.4f} .. {total.high:.4f}."
    if len(rows) > CLASSES_IN_FULL:
        accuracies = torch.tensor([row["accuracy"] for row in rows])
        page.bars("Accuracy of every class", accuracies, total.value, "share recognised")
        rows.sort(key=lambda row: row["accuracy"])
        note += f" The {CLASSES_AT_ENDS} lowest and the {CLASSES_AT_ENDS} highest of {len(rows)} classes."
        rows = rows[:CLASSES_AT_ENDS] + rows[-CLASSES_AT_ENDS:]
    page.table("Samples recognised as their class", rows, note)


def _class_name(label: int, names: Sequence[str] | None) -> str:
    return f"class {label}" if names is None else names[label]


def save_grid(images: Tensor, path: str | Path, columns: int, scale: int = 1, gap: int = 2) -> None:
    """A PNG of pictures (B, 3, H, W), row by row on white, `gap` pixels apart, each enlarged `scale` times by repetition.

    float in [-1, 1], brought to uint8 by clamp(127.5 x + 128, 0, 255), truncated. Raises ValueError for no pictures.
    """
    if not len(images):
        raise ValueError(f"save_grid: no pictures for {path}")
    pictures = to_uint8(images).repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    height, width = pictures.shape[-2] + gap, pictures.shape[-1] + gap
    rows = ceil(len(pictures) / columns)
    sheet = torch.full((3, rows * height + gap, columns * width + gap), 255, dtype=torch.uint8)
    for place, picture in enumerate(F.pad(pictures, (gap, 0, gap, 0), value=255)):
        top, left = place // columns * height, place % columns * width
        sheet[:, top : top + height, left : left + width] = picture
    write_whole(path, _png(sheet))


def _png(picture: Tensor) -> bytes:
    """uint8 (3, H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(picture.movedim(0, -1).cpu().contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def _data_url(picture: Tensor) -> str:
    return _url("png", _png(picture))


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def tidy(axes: Any) -> None:
    """Axes in the style of the page."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _cell(column: str, value: Any) -> tuple[str, str]:
    if column == "protocol":
        return "protocol", str(value)
    if value == "warning":
        return "warning", value
    if isinstance(value, float):
        return "number", f"{value:.4g}"
    return ("number" if isinstance(value, int) else ""), str(value)
