"""A report in one HTML file: text, pictures, curves and tables given as plain values, everything inside the file.

    report = Report("Digits", "A tokenizer and a generator, trained from nothing in ten minutes")
    report.pairs("Reconstructions", images, decoded)
    report.curves("Training", {"loss": (steps, values)})
    report.table("Scores", [score_row(score) for score in scores])
    report.save("report.html")

Pictures are float (B, 3, H, W) in [-1, 1], brought to uint8 by clamp(127.5 x + 128, 0, 255), truncated.
"""

import base64
import io
from collections.abc import Mapping, Sequence
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

from eval.files import write_whole
from eval.pixels import to_uint8
from eval.provenance import Score

INK, ACCENT, FAINT = "#1f2933", "#2b6cb0", "#d9e2ec"

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
            _tidy(axes)
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
        _tidy(axes)
        self.sections.append({"title": title, "chart": _svg(figure), "note": note})

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
        """Rows by column name; a column missing from a row stays empty. Floats get four significant figures; a column
        called "protocol" is set small."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [[_cell(column, row.get(column, "")) for column in columns] for row in rows]
        self.sections.append({"title": title, "columns": columns, "cells": cells, "note": note})

    def html(self) -> str:
        page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
        return page.render(title=self.title, lead=self.lead, sections=self.sections)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, self.html().encode())


def score_row(score: Score) -> dict[str, Any]:
    """A score as a row of a table. Only here a distance that rounding left a little below 0 is shown as 0."""
    value = 0.0 if -1e-6 < score.value < 0 else score.value
    return {"metric": score.name, "value": value, "protocol": score.provenance.line()}


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


def _data_url(picture: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode()


def _svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])


def _tidy(axes: Any) -> None:
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
    if isinstance(value, float):
        return "number", f"{value:.4g}"
    return ("number" if isinstance(value, int) else ""), str(value)
