"""Key maps: every key of both sides is accounted for, and what is wrong is all said at once."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from layers.keymap import CheckpointMismatch, Join, check_keys, translate


def transpose(weight: Tensor) -> Tensor:
    return weight.T


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def faults_of(state: dict[str, Tensor], keys: dict[str, object], wanted: dict[str, Tensor]) -> list[str]:
    with pytest.raises(CheckpointMismatch) as caught:
        translate(state, keys, wanted)
    first, *faults = str(caught.value).split("\n  ")
    assert first == f"{len(faults)} keys do not fit:"
    return faults


def test_renaming_dropping_transforming_and_joining() -> None:
    state = {
        "blocks.0.res.11.w": numbered(2, 3),
        "blocks.10.res.2.w": numbered(2, 3, start=6),
        "head.weight": numbered(2, 3),
        "attn.0.q": numbered(1, 2),
        "attn.0.v": numbered(2, 2, start=4),
        "attn.0.k": numbered(1, 2, start=2),
        "right": numbered(2, 1),
        "down": numbered(2, 2, start=4),
        "steps": torch.tensor(7),
    }
    keys = {
        "blocks.{i}.res.{j}.w": "layers.{j}.{i}.weight",
        "head.weight": ("read_out", transpose),
        "attn.{i}.q": Join("attention.{i}.qkv", 0, 3),
        "attn.{i}.k": Join("attention.{i}.qkv", 1, 3),
        "attn.{i}.v": Join("attention.{i}.qkv", 2, 3),
        "right": Join("beside", 0, 2, dim=1),
        "down": Join("beside", 1, 2, dim=1),
        "steps": None,  # bookkeeping of training
    }
    expected = {
        "layers.11.0.weight": numbered(2, 3),
        "layers.2.10.weight": numbered(2, 3, start=6),
        "read_out": torch.tensor([[0, 3], [1, 4], [2, 5]]),
        "beside": torch.tensor([[0, 4, 5], [1, 6, 7]]),
        "attention.0.qkv": torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]),
    }
    wanted = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    assert_close(translate(state, keys, wanted), expected, atol=0, rtol=0)


def test_patterns_match_whole_names_and_dots_are_dots() -> None:
    wanted = {"weight": numbered(1)}
    cases = [("aXb", "a.b"), ("a.bc", "a.b"), ("xa.b", "a.b"), ("w.x", "w.{i}"), ("w.", "w.{i}")]
    for name, pattern in cases:
        left_over = f"{name} (1,) fits 0 rules: map it once, or ignore it with a reason"
        faults = faults_of({name: numbered(1)}, {pattern: "weight"}, wanted)
        assert faults == sorted([left_over, "weight is not in the checkpoint"])


def test_all_faults_of_both_sides_are_listed_at_once() -> None:
    state = {"left.over": numbered(1), "both.0": numbered(2), "a": numbered(3), "extra": numbered(4)}
    keys = {"both.{i}": "both", "both.0": "both", "a": "a", "extra": "extra"}
    wanted = {"a": numbered(5), "both": numbered(2), "missing": numbered(1)}
    assert faults_of(state, keys, wanted) == [
        "a is (3,), the model has (5,)",
        "both is not in the checkpoint",
        "both.0 (2,) fits 2 rules: map it once, or ignore it with a reason",
        "extra is not in the model",
        "left.over (1,) fits 0 rules: map it once, or ignore it with a reason",
        "missing is not in the checkpoint",
    ]


def test_two_keys_never_become_one_silently() -> None:
    state, wanted = {"a": numbered(2), "b": numbered(2)}, {"x": numbered(2)}
    collision = ["b (2,) collides with another key that is mapped to x"]
    assert faults_of(state, {"a": "x", "b": "x"}, wanted) == collision
    assert faults_of(state, {"a": Join("x", 0, 1), "b": "x"}, wanted) == collision
    assert collision[0] in faults_of(state, {"a": Join("x", 0, 2), "b": Join("x", 1, 2, dim=1)}, wanted)
    assert collision[0] in faults_of(state, {"a": Join("x", 0, 2), "b": Join("x", 0, 2)}, wanted)
    assert collision[0] in faults_of(state, {"a": Join("x", 0, 2), "b": Join("x", 1, 3)}, wanted)


def test_parts_that_do_not_fit_together_are_named() -> None:
    wanted = {"x": numbered(4, 2)}
    keys = {"a": Join("x", 0, 2), "b": Join("x", 1, 2)}
    message = "x needs 2 parts that fit together, the checkpoint has {}"
    assert message.format("{1: (2, 2)}") in faults_of({"b": numbered(2, 2)}, keys, wanted)
    different = {"a": numbered(2, 2), "b": numbered(2, 3)}
    assert message.format("{0: (2, 2), 1: (2, 3)}") in faults_of(different, keys, wanted)


def test_a_transform_that_does_not_take_the_tensor_is_a_named_fault() -> None:
    def fold(weight: Tensor) -> Tensor:
        return weight.reshape(2, 2)

    fault = faults_of({"a": numbered(3)}, {"a": ("x", fold)}, {"x": numbered(2, 2)})[0]
    assert fault.startswith("a (3,) does not go through its transform")
    assert "fold" in fault


def test_check_keys_accepts_the_same_names_and_shapes_only() -> None:
    wanted = {"a": numbered(2), "b": numbered(1, 2)}
    check_keys({"b": numbered(1, 2), "a": numbered(2)}, wanted)
    with pytest.raises(CheckpointMismatch, match=r"b is \(2, 1\), the model has \(1, 2\)"):
        check_keys({"b": numbered(2, 1), "a": numbered(2)}, wanted)
