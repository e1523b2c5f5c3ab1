"""Scores of whole picture sets: against closed forms of a network that is one line, and complete in what they record."""

import json
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.evaluation import Evaluated, Reference, evaluate
from eval.features import FeatureError, FeatureNetwork, NetworkRecord, tensors_sha256
from eval.files import write_json
from eval.frechet import FeatureStatistics, frechet_distance
from eval.gather import Moments
from eval.look import Want, look
from eval.metrics import frechet, label_accuracy, real_accuracy
from eval.pictures import PictureError, PictureSet, from_tensor
from eval.protocol import Protocol
from eval.provenance import Computation, Origin, PicturesRecord, Provenance, Score
from eval.score import score

RECORD = NetworkRecord("means", "mean", 12, "f" * 64, "none", "frechet_mean_distance", False)


def extract(pictures: Tensor) -> dict[str, Tensor]:
    """Means of rows as features; the class is the quarter of grey levels that the mean lies in."""
    mean = pictures.float().mean((1, 2, 3))
    levels = torch.tensor([32.0, 96.0, 160.0, 224.0])
    return {"mean": pictures.float().mean((1, 3)), "logits": -(mean[:, None] - levels).abs()}


NETWORK = FeatureNetwork(RECORD, torch.device("cpu"), torch.float32, extract)
PUBLISHED = replace(NETWORK, record=replace(RECORD, distance="fid", comparable_to_papers=True))
PROTOCOL = Protocol(
    name="tiny",
    source="nowhere",
    metrics=(frechet("means", "mean", "fid"), label_accuracy("means"), real_accuracy("means")),
    count=40,
    class_sampling="balanced",
    uint8="trunc_128",
    reference="any",
)


def pictures(count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 16), generator=rng, dtype=torch.uint8)


def scored(
    samples: PictureSet, reference: PictureSet, network: FeatureNetwork = NETWORK, batch_size: int = 64
) -> Evaluated:
    return evaluate([PROTOCOL], samples, Reference(reference), {"means": network}, batch_size=batch_size)


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_score_is_the_distance_of_all_features(count: int, batch_size: int, origin: Origin) -> None:
    one, two = pictures(count), pictures(30, seed=1)
    sides = []
    for images in (one, two):
        statistics = FeatureStatistics(12)
        statistics.update(extract(images)["mean"])
        sides.append(statistics.gaussian())
    found = scored(from_tensor("one", one, origin), from_tensor("two", two, origin), batch_size=batch_size)
    (distance,) = found.scores
    assert distance.name == f"frechet_mean_distance@{count}"
    assert distance.value == pytest.approx(frechet_distance(*sides), abs=1e-10)


def test_a_translation_of_all_pictures_is_its_length(origin: Origin) -> None:
    """The same pictures four levels brighter: the covariances are equal, the means 4 apart in each of 12 features."""
    images = pictures(30) // 2
    found = scored(from_tensor("set", images + 4, origin), from_tensor("set", images, origin))
    assert found.scores[0].value == pytest.approx(12 * 4**2, rel=1e-6)


def test_label_accuracy_is_a_count(origin: Origin) -> None:
    images = torch.stack([torch.full((3, 12, 16), level, dtype=torch.uint8) for level in (30, 100, 160, 250, 10)])
    made = from_tensor("made", images, origin, torch.tensor([0, 1, 3, 3, 0]))
    real = from_tensor("real", images, origin, torch.tensor([0, 1, 2, 3, 0]))
    for batch_size in (1, 2, 5):
        values = {one.name: one.value for one in scored(made, real, batch_size=batch_size).scores}
        assert (values["label_accuracy"], values["classifier_accuracy"]) == (4 / 5, 1.0)
    unlabelled = scored(from_tensor("made", images, origin), real)
    assert [one.name for one in unlabelled.scores] == ["frechet_mean_distance@5", "classifier_accuracy"]
    assert list(unlabelled.left_out["tiny"].values()) == ["the samples have no labels"]


def test_a_name_says_network_and_number(origin: Origin) -> None:
    """Only the published network makes FID, and of another number of pictures than the protocol's it is no FID."""
    asked, fewer = (from_tensor("made", pictures(count), origin) for count in (40, 20))
    whole, part = (scored(samples, asked, PUBLISHED).scores[0] for samples in (asked, fewer))
    assert (whole.name, part.name) == ("fid@40", "fid@20")
    assert whole.provenance.protocol.complete and not part.provenance.protocol.complete
    assert whole.provenance.protocol.departures == ()
    assert part.provenance.protocol.departures == ("20 samples, the protocol asks for 40",)


def test_departures_from_the_protocol_are_named(origin: Origin) -> None:
    other = replace(origin, quantisation="by eye", class_sampling="random")
    found = scored(from_tensor("made", pictures(10), other), from_tensor("real", pictures(40), origin))
    assert found.scores[0].provenance.protocol.departures == (
        "10 samples, the protocol asks for 40",
        "uint8 by eye, the protocol's are clamp(127.5 x + 128, 0, 255), truncated",
        "classes random, the protocol's are balanced",
        "the covariance of 10 pictures of made in 12 features is rank deficient, the distance far above that of more "
        "pictures",
    )


def leaves(value: Any) -> list[Any]:
    """Every field of nested dataclasses, by value."""
    if is_dataclass(value):
        return [leaf for field in fields(value) for leaf in leaves(getattr(value, field.name))]
    return [value]


def test_a_record_holds_all_that_the_number_depends_on(origin: Origin, tmp_path: Path) -> None:
    real = from_tensor("real", pictures(8, seed=1), Origin.of_data("exact", {"split": "val"}))
    (score,) = scored(from_tensor("made", pictures(9), origin), real, batch_size=4).scores
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
    assert provenance["protocol"]["name"] == "tiny" and provenance["protocol"]["complete"] is False
    assert all(leaf is not None and leaf != "" for leaf in leaves(score))


def test_nothing_in_a_provenance_can_be_left_out() -> None:
    for kind in (Origin, PicturesRecord, Computation, Provenance, Score, NetworkRecord):
        required = [field for field in fields(kind) if field.default is MISSING]
        assert len(required) >= len(fields(kind)) - 1
        with pytest.raises(TypeError, match=f"missing {len(required)} required positional arguments"):
            kind()


def test_what_a_sample_file_does_not_say_is_not_recorded() -> None:
    unknown = Origin.unknown()
    assert {leaf for leaf in leaves(unknown) if leaf != {}} == {"not recorded"}
    assert "not comparable to published numbers" in _line(unknown)
    assert "seed not recorded" in _line(unknown)


def _line(origin: Origin) -> str:
    same = from_tensor("set", pictures(4), origin)
    return scored(same, same).scores[0].provenance.line()


def test_what_cannot_be_compared(origin: Origin) -> None:
    want = Want("means", Moments("mean"))
    made = look(from_tensor("made", pictures(4), origin), [want], {"means": NETWORK})
    other = replace(NETWORK, record=replace(RECORD, weights_sha256="0" * 64))
    real = look(from_tensor("real", pictures(4), origin), [want], {"means": other})
    with pytest.raises(FeatureError, match=r"made and real were seen by different networks \(weights_sha256: fff"):
        score(PROTOCOL, made, real)
    narrow = look(from_tensor("real", pictures(4)[..., :12], origin), [want], {"means": NETWORK})
    with pytest.raises(PictureError, match="made is 12x16, real is 12x12"):
        score(PROTOCOL, made, narrow)


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
