"""Scores as rows of a paper's table in Markdown, and under them, in one line each, the protocols they were made by.

print(markdown_table({"AR-B": scores, "AR-L": others}, {"AR-B": intervals}))

| model | fid@50000 | precision@50000 | protocol |
| --- | --- | --- | --- |
| AR-B | 3.910 ± 0.043 | 0.827 | adm [1] |

[1] fid@50000: Fréchet distance of Gaussians, ...; InceptionV3 2015-12-05, weights 6726825d, ...
"""

from collections.abc import Mapping, Sequence

from eval.bootstrap import Interval
from eval.provenance import Score

Intervals = Mapping[str, Interval]  # by `score_key`


def score_key(score: Score) -> str:
    """PROTOCOL/NAME, or the name of a score without a named protocol: one name may occur under several protocols."""
    protocol = protocol_name(score)
    return f"{protocol}/{score.name}" if protocol else score.name


def protocol_name(score: Score) -> str:
    """The short one, or nothing."""
    return "" if score.provenance.protocol is None else score.provenance.protocol.name


def markdown_table(rows: Mapping[str, Sequence[Score]], intervals: Mapping[str, Intervals] | None = None) -> str:
    """Header, a row for each model under each protocol, and the footnotes. rows, intervals: by model.

    A score with an interval has its standard error after a ±, one that a row lacks is a dash. Raises ValueError for no
    scores, and for two of one name in a row.
    """
    columns = list(dict.fromkeys(score.name for scores in rows.values() for score in scores))
    if not columns:
        raise ValueError("markdown_table: no scores")
    notes: dict[str, int] = {}  # text -> its number
    lines = [_row(["model", *columns, "protocol"]), _row(["---"] * (len(columns) + 2))]
    for model, scores in rows.items():
        known = (intervals or {}).get(model, {})
        for protocol in dict.fromkeys(map(protocol_name, scores)):
            ours = [score for score in scores if protocol_name(score) == protocol]
            cells = {score.name: _cell(score, known.get(score_key(score))) for score in ours}
            if len(cells) != len(ours):
                raise ValueError(
                    f"markdown_table: {model} has two scores of one name, {[score.name for score in ours]}"
                )
            number = notes.setdefault(protocol_note(ours), len(notes) + 1)
            note = f"{protocol} [{number}]".strip()
            lines.append(_row([model, *(cells.get(column, "-") for column in columns), note]))
    return "\n".join([*lines, "", *(f"[{number}] {note}" for note, number in notes.items())])


def protocol_note(scores: Sequence[Score]) -> str:
    """The protocol of scores in one line: what each is, then what they were made with, once where it is the same."""
    made: list[tuple[list[str], list[str]]] = []  # names with what they are, and the rest of their protocol
    for score in scores:
        definition = score.provenance.definition
        name = f"{score.name}: {definition}"
        rest = score.provenance.line().removeprefix(definition).removeprefix("; ").split("; ")
        for names, parts in made:
            if set(rest) <= set(parts) or set(parts) <= set(rest):  # one has no reference, say
                names.append(name)
                parts[:] = max(rest, parts, key=len)
                break
        else:
            made.append(([name], rest))
    return " | ".join("; ".join((*names, *parts)) for names, parts in made).replace("\n", " ")


def shown(value: float) -> float:
    """The value, but a distance that rounding left a little below 0 is shown as 0."""
    return 0.0 if -1e-6 < value < 0 else value


def significant(value: float, error: float | None = None) -> str:
    """Three figures, or as many places as the first two of the standard error have."""
    value = shown(value)
    if not error or not error < float("inf"):
        return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
    places = max(0, 1 - int(f"{error:e}".partition("e")[2]))
    return f"{value:.{places}f} ± {error:.{places}f}"


def _cell(score: Score, interval: Interval | None) -> str:
    return significant(score.value, None if interval is None else interval.standard_error)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
