"""Quality against the number of tokens that a picture is given: a table for the terminal, and a plot."""

import io
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from eval.files import write_whole
from eval.report import ACCENT, INK, tidy

Values = Mapping[int, Mapping[str, float]]  # number of tokens -> a value of every score


def length_table(values: Values) -> list[str]:
    """Lines: a row a number of tokens, a column a score."""
    names = list(next(iter(values.values())))
    head = f"{'tokens':>8}" + "".join(f"{name:>{max(12, len(name) + 2)}}" for name in names)
    rows = [
        f"{length:>8}" + "".join(f"{row[name]:>{max(12, len(name) + 2)}.4f}" for name in names)
        for length, row in values.items()
    ]
    return [head, *rows]


def save_length_plot(path: str | Path, values: Values) -> None:
    """A PNG of small charts side by side, one a score; the numbers of tokens on a scale of octaves."""
    lengths, names = list(values), list(next(iter(values.values())))
    figure = Figure(figsize=(3.2 * len(names), 2.6), layout="constrained", dpi=150)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        axes.plot(
            lengths, [values[length][name] for length in lengths], color=ACCENT, linewidth=1.4, marker="o", ms=3.5
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("tokens", fontsize=8, color=INK)
        tidy(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
