"""Scores of whole picture sets: against closed forms of a network that is one line, and complete in what they record."""

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.audit import Audit
from eval.features import FeatureError, FeatureNetwork, NetworkRecord, tensors_sha256
from eval.files import write_json
from eval.frechet import FeatureStatistics, frechet_distance
from eval.pictures import PictureError, PictureSet, from_tensor
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score
from eval.score import accuracy_score, frechet_score, look

RECORD = NetworkRecord("means", "mean", 12, "f" * 64, "none", "frechet_mean_distance", False)


def extract(pictures: Tensor) -> dict[str, Tensor]:
    """Means of rows as features; the class is the quarter of grey levels that the mean lies in."""
    mean = pictures.float().mean((1, 2, 3))
    levels = torch.tensor([32.0, 96.0, 160.0, 224.0])
    return {"mean": pictures.float().mean((1, 3)), "logits": -(mean[:, None] - levels).abs()}


NETWORK = FeatureNetwork(RECORD, torch.device("cpu"), torch.float32, extract)


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 16), generator=rng, dtype=torch.uint8)


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_score_is_the_distance_of_all_features(count: int, batch_size: int, origin: Origin) -> None:
    one, two = pictures(count), pictures(30, seed=1)
    samples, reference = (look(NETWORK, from_tensor("set", it, origin), batch_size) for it in (one, two))
    sides = []
    for images in (one, two):
        statistics = FeatureStatistics(12)
        statistics.update(extract(images)["mean"])
        sides.append(statistics.gaussian())
    score = frechet_score(samples, reference)
    assert score.name == f"frechet_mean_distance@{count}"
    assert score.value == pytest.approx(frechet_distance(*sides), abs=1e-10)


def test_a_translation_of_all_pictures_is_its_length(origin: Origin) -> None:
    """The same pictures four levels brighter: the covariances are equal, the means 4 apart in each of 12 features."""
    images = pictures(30) // 2
    samples, reference = (look(NETWORK, from_tensor("set", it, origin)) for it in (images + 4, images))
    assert frechet_score(samples, reference).value == pytest.approx(12 * 4**2, rel=1e-6)


def test_label_accuracy_is_a_count(origin: Origin) -> None:
    images = torch.stack([torch.full((3, 12, 16), level, dtype=torch.uint8) for level in (30, 100, 160, 250, 10)])
    labels = torch.tensor([0, 1, 3, 3, 0])
    for batch_size in (1, 2, 5):
        score = accuracy_score(look(NETWORK, from_tensor("set", images, origin, labels), batch_size))
        assert (score.name, score.value) == ("label_accuracy", 4 / 5)


def test_an_audit_is_shown_what_the_network_sees(origin: Origin) -> None:
    images, labels = pictures(30), torch.arange(30) % 4
    seen, alone = Audit("set"), Audit("set")
    score = accuracy_score(look(NETWORK, from_tensor("set", images, origin, labels), 7, seen))
    alone.update(images, labels)
    assert seen.record() == alone.record()
    assert score.value == accuracy_score(look(NETWORK, from_tensor("set", images, origin, labels))).value


def leaves(value: Any) -> list[Any]:
    """Every field of nested dataclasses, by value."""
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


def test_a_record_holds_all_that_the_number_depends_on(origin: Origin, tmp_path: Path) -> None:
    samples = look(NETWORK, from_tensor("made", pictures(9), origin), batch_size=4)
    reference = look(NETWORK, from_tensor("real", pictures(8, seed=1), Origin.of_data("exact", {"split": "val"})))
    score = frechet_score(samples, reference)
    write_json(tmp_path / "score.json", score.record())
    content = json.loads((tmp_path / "score.json").read_text())
    provenance = content["provenance"]
    assert content["value"] == score.value
    assert provenance["network"] == {
        "name": "means",
        "layer": "mean",
        "dim": 12,
        "weights_sha256": "f" * 64,
        "preprocessing": "none",
        "distance": "frechet_mean_distance",
        "comparable_to_papers": False,
    }
    made = provenance["samples"]
    assert (made["name"], made["count"], made["height"], made["width"]) == ("made", 9, 12, 16)
    assert len(made["sha256"]) == 64 and made["sha256"] != provenance["reference"]["sha256"]
    assert made["origin"]["class_sampling"] == "balanced" and made["origin"]["seed"] == 3
    assert made["origin"]["guidance"] == {"scale": 2.0}
    assert made["origin"]["checkpoint"]["sha256"] == {"generator": "aa", "tokenizer": "bb"}
    assert provenance["reference"]["origin"]["record"] == {"split": "val"}
    assert (provenance["computation"]["device"], provenance["computation"]["dtype"]) == ("cpu", "float32")
    assert provenance["computation"]["batch_size"] == 4
    assert {"python", "torch", "numpy"} <= provenance["computation"]["versions"].keys()
    assert all(leaf is not None and leaf != "" for leaf in leaves(score))


def test_nothing_in_a_provenance_can_be_left_out() -> None:
    for kind in (Origin, PicturesRecord, Computation, Provenance, Score, NetworkRecord):
        with pytest.raises(TypeError, match=f"missing {len(fields(kind))} required positional arguments"):
            kind()


def test_what_a_sample_file_does_not_say_is_not_recorded() -> None:
    unknown = Origin.unknown()
    assert {leaf for leaf in leaves(unknown) if leaf != {}} == {"not recorded"}
    assert "not comparable to published numbers" in _line(unknown)
    assert "seed not recorded" in _line(unknown)


def _line(origin: Origin) -> str:
    seen = look(NETWORK, from_tensor("set", pictures(4), origin))
    return frechet_score(seen, seen).provenance.line()


def test_what_cannot_be_compared(origin: Origin) -> None:
    seen = look(NETWORK, from_tensor("made", pictures(4), origin))
    other = replace(NETWORK, record=replace(RECORD, weights_sha256="0" * 64))
    with pytest.raises(FeatureError, match=r"made and real were seen by different networks \(weights_sha256: fff"):
        frechet_score(seen, look(other, from_tensor("real", pictures(4), origin)))
    with pytest.raises(PictureError, match="made is 12x16, real is 12x12"):
        frechet_score(seen, look(NETWORK, from_tensor("real", pictures(4)[..., :12], origin)))
    with pytest.raises(FeatureError, match="made: no label accuracy"):
        accuracy_score(seen)


def test_sets_that_are_not_what_they_say(origin: Origin) -> None:
    short = PictureSet("short", 9, lambda size: iter(pictures(7).split(size)), origin)
    with pytest.raises(PictureError, match="short: said to hold 9 pictures, gave 7"):
        look(NETWORK, short)
    labels = torch.tensor([0, 1, 4, 0])
    with pytest.raises(PictureError, match="set: picture 2 has label 4, the network knows 4 classes"):
        look(NETWORK, from_tensor("set", pictures(4), origin, labels), batch_size=2)
    with pytest.raises(PictureError, match="set: holds 1 pictures, a covariance needs at least 2"):
        look(NETWORK, from_tensor("set", pictures(1), origin))


def test_a_checksum_of_tensors_sees_every_change() -> None:
    state = {"a": torch.arange(6.0), "b": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    same = {name: state[name].clone() for name in reversed(state)}
    changes = [
        {"a": torch.arange(6.0).view(2, 3)},
        {"a": torch.arange(6.0).double()},
        {"a": torch.arange(6.0) + 1e-6},
        {"n": torch.tensor(4)},
        {"c": torch.zeros(1)},
    ]
    sums = {tensors_sha256(state | change) for change in changes}
    assert tensors_sha256(same) == tensors_sha256(state)
    assert len(sums | {tensors_sha256(state)}) == 6


def test_json_is_standard_and_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    write_json(path, {"psnr": float("inf"), "nested": [{"x": float("nan")}, -float("inf")], 3: (1, 2.5, None, "s")})
    expected = {"psnr": "inf", "nested": [{"x": "nan"}, "-inf"], "3": [1, 2.5, None, "s"]}
    assert json.loads(path.read_text()) == expected
    with pytest.raises(TypeError):
        write_json(path, {"tensor": torch.zeros(2)})
    assert json.loads(path.read_text()) == expected
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]
