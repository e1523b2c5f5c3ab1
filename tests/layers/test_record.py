"""Records: what they build, and that no name outside the table is ever reached."""

import json
from collections.abc import Callable
from functools import partial

import pytest

from layers.record import UnknownName, build, look_up


class Quantizer:
    def __init__(self, size: int, dim: int = 8) -> None:
        self.size, self.dim = size, dim


class Tokenizer:
    def __init__(self, width: int, quantizer: Quantizer | None = None) -> None:
        self.width, self.quantizer = width, quantizer


class Head:
    def __init__(self, width: int, spec: str, quantizer: Quantizer | None = None, depth: int = 1) -> None:
        self.width, self.spec, self.quantizer, self.depth = width, spec, quantizer, depth


class Generator:
    def __init__(self, spec: str, head: Callable[[int, str], Head], spare: Callable[..., Head] | None = None) -> None:
        self.spec, self.head, self.spare = spec, head(16, spec), spare


CLASSES = {"Quantizer": Quantizer, "Tokenizer": Tokenizer, "Head": Head, "Generator": Generator}


def record(name: str, **arguments: object) -> dict[str, object]:
    return {"class_path": name, "init_args": arguments}


def test_nested_records_become_objects() -> None:
    made = build(record("tokenizers_vis.vq.Tokenizer", width=3, quantizer=record("Quantizer", size=5)), CLASSES)
    assert type(made) is Tokenizer
    assert (made.width, made.quantizer.size, made.quantizer.dim) == (3, 5, 8)
    assert build({"class_path": "Tokenizer"}, CLASSES, width=2).quantizer is None
    assert build({"class_path": "Tokenizer", "init_args": None}, CLASSES, width=2).width == 2


def test_where_a_callable_is_asked_for_a_record_becomes_a_factory() -> None:
    """In a union too, and with a record of its own inside."""
    head = record("heads.Head", depth=3, quantizer=record("Quantizer", size=5))
    made = build(record("Generator", head=head, spare=head), CLASSES, spec="spec")
    assert (made.head.width, made.head.spec, made.head.depth, made.head.quantizer.size) == (16, "spec", 3, 5)
    assert isinstance(made.spare, partial)
    assert made.spare(4, "other").width == 4


def test_a_record_is_plain_json() -> None:
    there = record("Tokenizer", width=3, quantizer=record("Quantizer", size=5))
    back = json.loads(json.dumps(there))
    assert back == there
    assert build(back, CLASSES).quantizer.size == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (record("Tokeniser", width=1), "class 'Tokeniser' is not known; did you mean 'Tokenizer'"),
        (record("Tokenizer", widht=1), "Tokenizer: argument 'widht' is not known; did you mean 'width'"),
        (record("Tokenizer", width=1, quantizer=record("Quantiser")), "class 'Quantiser' is not known"),
        (record("Tokenizer", width=1, quantizer=record("Quantizer", sise=1)), "Quantizer: argument 'sise'"),
        (record("Generator", head=record("Head", deph=3)), "Head: argument 'deph' is not known; did you mean 'depth'"),
        (record("Tokenizer", self=1), "Tokenizer: argument 'self' is not known"),
        ({"init_args": {}}, r"needs class_path and init_args; this one has \['init_args'\]"),
    ],
)
def test_unknown_names_are_told_with_the_nearest_valid_ones(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        build(wrong, CLASSES, **({"spec": "spec"} if wrong.get("class_path") == "Generator" else {}))


def test_only_the_table_is_reached() -> None:
    with pytest.raises(UnknownName, match="class 'system' is not known"):
        build(record("os.system", command="true"), CLASSES)


def test_look_up() -> None:
    assert look_up("a", {"a": 1}, "thing") == 1
    with pytest.raises(UnknownName, match="thing 'zzz' is not known; known: alpha, beta"):
        look_up("zzz", {"beta": 1, "alpha": 2}, "thing")
    with pytest.raises(UnknownName, match="did you mean 'beta'"):
        look_up("bta", {"beta": 1, "alpha": 2}, "thing")
