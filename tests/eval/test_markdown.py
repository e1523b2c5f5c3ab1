"""Rows for a paper: every number in its column with the right places, every protocol named once."""

import math

import pytest

from eval.bootstrap import Interval
from eval.features import NetworkRecord
from eval.markdown import markdown_table, protocol_note, score_key, significant
from eval.protocol import ProtocolRecord
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score

NETWORK = NetworkRecord("Inception", "2048", 2048, "67" * 32, "TF1 bilinear", "fid", True)
REAL = PicturesRecord("real", "cd" * 32, 90, 8, 8, Origin.unknown())


def score(name: str, value: float, protocol: str | None = "adm", paired: bool = True, samples: str = "ab") -> Score:
    ours = PicturesRecord("made", samples * 32, 10, 8, 8, Origin.unknown())
    asked = protocol and ProtocolRecord(protocol, "paper", 10, True, None, "round", "real", ())
    against = REAL if paired else None
    return Score(name, value, Provenance(f"def {name}", NETWORK, ours, against, Computation("cpu", "f", 1, {}), asked))


def interval(error: float) -> Interval:
    return Interval(0.0, error, 0.0, 0.0, 0.95, "any")


def test_a_table_by_model_and_protocol() -> None:
    rows = {
        "AR-B": [score("fid@10", 3.9123), score("precision@10", 0.82714), score("fid@10", 4.5, "clean")],
        "AR|L": [score("fid@10", 2.5, samples="ef"), score("is@10", 215.84, paired=False, samples="ef")],
    }
    lines = markdown_table(rows, {"AR-B": {"adm/fid@10": interval(0.043)}}).splitlines()
    assert lines[:6] == [
        "| model | fid@10 | precision@10 | is@10 | protocol |",
        "| --- | --- | --- | --- | --- |",
        "| AR-B | 3.912 ± 0.043 | 0.827 | - | adm [1] |",
        "| AR-B | 4.5 | - | - | clean [2] |",
        "| AR\\|L | 2.5 | - | 215.8 | adm [3] |",
        "",
    ]
    assert [line[:3] for line in lines[6:]] == ["[1]", "[2]", "[3]"]
    note = lines[6]
    assert note.startswith("[1] fid@10: def fid@10; precision@10: def precision@10; Inception, weights 67676767")
    assert note.count("against 90 of real") == note.count("of 10 of made") == note.count("Inception") == 1
    assert lines[8].count("Inception") == 1 and "against 90 of real" in lines[8]


def test_two_scores_of_one_protocol_that_share_nothing_stand_apart() -> None:
    note = protocol_note([score("a", 1.0), score("b", 1.0, samples="ef")])
    assert note.count(" | ") == 1 and note.count("Inception") == 2


def test_keys_tell_protocols_apart() -> None:
    assert [score_key(score("fid@10", 1.0, name)) for name in ("adm", None)] == ["adm/fid@10", "fid@10"]


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (3.9123, 0.0434, "3.912 ± 0.043"),
        (3.9123, 0.00987, "3.9123 ± 0.0099"),
        (215.84, 1.53, "215.8 ± 1.5"),
        (215.84, 23.4, "216 ± 23"),
        (215.84, None, "215.8"),
        (-1e-9, None, "0"),
        (-0.5, math.nan, "-0.5"),
        (0.82714, 0.0, "0.827"),
    ],
)
def test_places_follow_the_error(value: float, error: float | None, shown: str) -> None:
    assert significant(value, error) == shown


def test_what_is_no_table() -> None:
    with pytest.raises(ValueError, match="no scores"):
        markdown_table({"a": []})
    with pytest.raises(ValueError, match="two scores of one name"):
        markdown_table({"a": [score("x", 1.0), score("x", 2.0)]})
