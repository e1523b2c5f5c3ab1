"""The shared values: layouts and their lengths, the handshake as JSON, conditions by rows."""

import json

import pytest
import torch
from torch.testing import assert_close

from layers.record import UnknownName
from layers.spec import Condition, Grid, Layout, Pyramid, Sequence, TokenSpec, stack

LAYOUTS = [Grid(2, 3, 4), Sequence(24), Pyramid(((1, 2), (2, 3), (4, 4)))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_24_tokens_and_survives_json(layout: Layout) -> None:
    for kind in ({"vocab_size": 10}, {"channels": 4}):
        spec = TokenSpec(layout, (2, 32, 48), **kind)
        assert spec.length == layout.length == 24
        assert TokenSpec.from_record(json.loads(json.dumps(spec.record()))) == spec


def test_specs_are_values() -> None:
    """Lists from a YAML file and tuples make the same spec, and a spec can key a dict."""
    spec = TokenSpec(Pyramid([[1, 1], [2, 2]]), [1, 8, 8], vocab_size=10)
    assert spec == TokenSpec(Pyramid(((1, 1), (2, 2))), (1, 8, 8), vocab_size=10)
    assert len({spec, TokenSpec(Pyramid(((1, 1), (2, 2))), (1, 8, 8), vocab_size=10)}) == 1


def test_a_spec_has_a_vocabulary_or_channels() -> None:
    for kind in ({}, {"vocab_size": 10, "channels": 4}):
        with pytest.raises(ValueError, match="give vocab_size or channels, not both or neither"):
            TokenSpec(Sequence(3), (1, 8, 8), **kind)


def test_an_unknown_layout_in_a_record_is_told() -> None:
    record = {"layout": {"Gird": {"t": 1, "h": 1, "w": 1}}, "decoded": [1, 8, 8], "vocab_size": 2, "channels": None}
    with pytest.raises(UnknownName, match="layout 'Gird' is not known; did you mean 'Grid'"):
        TokenSpec.from_record(record)


def test_reading_under_another_layout() -> None:
    spec = TokenSpec(Sequence(24), (2, 32, 48), vocab_size=10)
    assert spec.read_as(None) is spec
    assert spec.read_as(Grid(2, 3, 4)) == TokenSpec(Grid(2, 3, 4), (2, 32, 48), vocab_size=10)
    with pytest.raises(ValueError, match="has 25 tokens, the tokenizer makes 24"):
        spec.read_as(Grid(1, 5, 5))


def condition() -> Condition:
    return Condition(
        label=torch.tensor([4, 5, 6]),
        text=torch.arange(12.0).reshape(3, 2, 2),
        text_mask=torch.tensor([[True, False], [True, True], [False, False]]),
    )


def test_rows_are_asked_of_any_field() -> None:
    assert condition().rows == 3
    assert Condition(keep=torch.ones(2, dtype=torch.bool)).rows == 2
    for wrong in (Condition(), Condition(label=torch.zeros(2), keep=torch.ones(3, dtype=torch.bool))):
        with pytest.raises(ValueError, match="must agree on the batch size, and one must be given"):
            _ = wrong.rows
    with pytest.raises(ValueError, match="one must be given"):
        Condition().null()


def test_selecting_rows_selects_in_every_field() -> None:
    some = condition().select(torch.tensor([2, 0]))
    assert some.fields().keys() == {"label", "text", "text_mask"}
    assert_close(some.label, torch.tensor([6, 4]))
    assert_close(some.text, condition().text[[2, 0]])
    assert_close(some.text_mask, condition().text_mask[[2, 0]])
    assert_close(condition().select(slice(1, 3)).label, torch.tensor([5, 6]))


def test_null_drops_every_row_and_nothing_else() -> None:
    null = condition().null()
    assert null.keep.tolist() == [False] * 3
    assert_close({**null.fields(), "keep": None}, {**condition().fields(), "keep": None})


def test_branches_are_stacked_in_order() -> None:
    full = condition()
    both = stack([full, full.null(), full])
    assert both.rows == 9
    assert both.keep.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    for name, value in full.fields().items():
        assert_close(both.fields()[name], torch.cat([value] * 3))
    assert stack((full, full)).keep is None


def test_branches_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different fields: \[\['label'\], \['label', 'text'\]\]"):
        stack([Condition(label=torch.zeros(2)), Condition(label=torch.zeros(2), text=torch.zeros(2, 1, 1))])
    with pytest.raises(ValueError, match=r"one batch size, got \[2, 3\]"):
        stack([Condition(label=torch.zeros(2)), Condition(label=torch.zeros(3))])


def test_moving_moves_every_field() -> None:
    there = condition().null().to("meta")
    assert {name: value.device.type for name, value in there.fields().items()} == dict.fromkeys(
        ("label", "text", "text_mask", "keep"), "meta"
    )
