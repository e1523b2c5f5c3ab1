"""Records: a class and its constructor arguments as plain values, and the one place that turns them into objects.

A record is `{"class_path": "VQTokenizer", "init_args": {...}}`, the form jsonargparse reads and writes. Checkpoints
keep it as JSON. Only the last part of class_path counts, and only names of the given table are built: no file names
code.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from inspect import signature
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class UnknownName(ValueError):
    """A name that is not in a table: the message carries the table's name and the nearest valid ones."""


def look_up(name: str, table: Mapping[str, Any], what: str) -> Any:
    """The entry `name` of `table`. Raises UnknownName with the nearest valid names."""
    if name not in table:
        near = get_close_matches(name, table, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(sorted(table))}"
        raise UnknownName(f"{what} {name!r} is not known; {hint}")
    return table[name]


def build(record: Mapping[str, Any], classes: Mapping[str, type], **given: Any) -> Any:
    """Construct what `record` describes; `given` are constructor arguments that are no plain values (a TokenSpec).

    A nested record becomes an object, or, where the constructor asks for a Callable, a factory that waits for the
    remaining arguments. Raises UnknownName for a class or an argument that does not exist, at any depth.
    """
    made, arguments = _read(record, classes)
    return made(**given, **arguments)


def _read(record: Mapping[str, Any], classes: Mapping[str, type]) -> tuple[type, dict[str, Any]]:
    if "class_path" not in record:
        raise UnknownName(f"a record needs class_path and init_args; this one has {sorted(record)}")
    made = look_up(record["class_path"].rsplit(".", 1)[-1], classes, "class")
    hints, known = get_type_hints(made.__init__), signature(made).parameters
    arguments = {}
    for name, value in (record.get("init_args") or {}).items():
        look_up(name, known, f"{made.__name__}: argument")
        if isinstance(value, Mapping) and "class_path" in value:
            part, its = _read(value, classes)
            value = partial(part, **its) if _is_factory(hints.get(name)) else part(**its)
        arguments[name] = value
    return made, arguments


def _is_factory(hint: Any) -> bool:
    """Whether an argument annotated so takes something to call: `Callable[...]`, alone or in a union."""
    choices = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    return any(choice is Callable or get_origin(choice) is Callable for choice in choices)
