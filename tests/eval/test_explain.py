"""Explaining two results: every part that differs is named once, with what is known of it; nothing else is."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from eval.explain import UNKNOWN, Comparison, Difference, ExplainError, Result, explain, read_result
from eval.features import NetworkRecord
from eval.files import write_json
from eval.inception import PREPROCESSING
from eval.pixels import UINT8_RULES
from eval.protocol import ProtocolRecord
from eval.provenance import NOT_RECORDED, Computation, Origin, PicturesRecord, Provenance, Score
from tests.eval.conftest import RECORD

NETWORK = NetworkRecord("InceptionV3", "2048", 2048, "6" * 64, PREPROCESSING["tf1"], "fid", True)
SAMPLES = PicturesRecord("ours.npz", "a" * 64, 50_000, 256, 256, Origin.of_samples(RECORD))
REFERENCE = PicturesRecord(
    "imagenet train", "c" * 64, 1_281_167, 256, 256, Origin.of_data(UINT8_RULES["round"], {"split": "train"})
)
PROTOCOL = ProtocolRecord("adm", "ADM", 50_000, True, None, "trunc_128", "VIRTUAL", ())
DEFINITION = "Fréchet distance of Gaussians, covariance divisor n - 1"
COMPUTED = Computation("cpu", "float32", 64, {"torch": "2.14"})
SCORE = Score("fid@50000", 3.0, Provenance(DEFINITION, NETWORK, SAMPLES, REFERENCE, COMPUTED, PROTOCOL)).record()


def changed(value: float = 3.5, **parts: Any) -> dict[str, Any]:
    """The score with other content at some places, as a_b__c for a_b.c."""
    made = deepcopy(SCORE) | {"value": value}
    for path, content in parts.items():
        *above, last = path.split("__")
        place = made["provenance"]
        for name in above:
            place = place[name]
        place[last] = content
    return made


def compared(second: dict[str, Any], intervals: list[dict[str, Any]] | None = None) -> Comparison:
    known = [{"fid@50000": it} for it in intervals or [{}, {}]]
    sides = (
        Result(f"{side}.json", {"fid@50000": record}, it)
        for side, record, it in zip("ab", (SCORE, second), known, strict=True)
    )
    return explain(*sides)[0]


def only(comparison: Comparison) -> Difference:
    assert len(comparison.differences) == 1
    return comparison.differences[0]


def test_the_same_twice() -> None:
    same = compared(changed(3.0))
    assert same.differences == () and same.verdict == ("the same protocol and the same number",)
    verdict = " ".join(compared(changed(3.1)).verdict)
    assert "everything recorded is equal" in verdict and "Non-deterministic" in verdict and "batch size" in verdict


@pytest.mark.parametrize(
    ("parts", "part", "group", "known"),
    [
        ({"network__preprocessing": PREPROCESSING["pytorch"]}, "resizing and scaling", "protocol", "0.006"),
        ({"network__preprocessing": PREPROCESSING["clean"]}, "resizing and scaling", "protocol", "2.98 / 2.76"),
        ({"network__preprocessing": "by hand"}, "resizing and scaling", "protocol", UNKNOWN),
        ({"network__weights_sha256": "7" * 64}, "weights of the network (sha256)", "protocol", "unbounded"),
        ({"network__layer": "768"}, "layer", "protocol", "unbounded"),
        ({"network__name": "a port"}, "network", "protocol", "3.9433 and 3.9426"),
        ({"reference__sha256": "d" * 64}, "pixels of the reference (sha256)", "protocol", "2.19 / 4.28"),
        ({"reference__count": 10_000}, "pictures in the reference", "protocol", "128 times as large"),
        ({"samples__count": 5_000}, "number of samples", "protocol", "10 times as large for the smaller set"),
        ({"samples__height": 384}, "height of samples", "protocol", UNKNOWN),
        ({"definition": "Fréchet distance of Gaussians, covariance divisor n"}, "statistic", "protocol", "here 7e-05"),
        ({"definition": f"{DEFINITION}, square root by eigvals"}, "statistic", "protocol", "3e-3"),
        ({"definition": "something else"}, "statistic", "protocol", UNKNOWN),
        ({"protocol__name": "mar"}, "protocol name", "protocol", "none by itself"),
        ({"samples__sha256": "b" * 64}, "pixels of samples (sha256)", "samples", "the sampling error"),
        ({"computation__batch_size": 32}, "computation batch_size", "arithmetic", "2e-6 to 2e-5"),
        ({"computation__device": "cuda"}, "computation device", "arithmetic", "TF32"),
        ({"computation__dtype": "float16"}, "computation dtype", "arithmetic", UNKNOWN),
        ({"computation__versions": {"torch": "2.15"}}, "version of torch", "arithmetic", "2e-6"),
        ({"computation__threads": 4}, "computation threads", "arithmetic", UNKNOWN),
    ],
)
def test_one_part_that_differs(parts: dict[str, Any], part: str, group: str, known: str) -> None:
    found = only(compared(changed(**parts)))
    assert (found.part, found.group) == (part, group)
    assert known in found.effect.text
    assert found.effect.source or UNKNOWN in known or known in ("unbounded", "the sampling error")


@pytest.mark.parametrize(
    ("parts", "part", "known"),
    [
        ({"samples__origin__quantisation": UINT8_RULES["round"]}, "uint8 rule of samples", "4 pixels of 10^6"),
        ({"samples__origin__quantisation": UINT8_RULES["trunc"]}, "uint8 rule of samples", "63 of the 256 levels"),
        ({"samples__origin__quantisation": NOT_RECORDED}, "uint8 rule of samples", "one side does not say"),
        ({"samples__origin__class_sampling": "random"}, "class plan", "random labels"),
        ({"samples__origin__guidance": {"scale": 1.5}}, "guidance scale", "what the score is to measure"),
        ({"samples__origin__sampler__greedy": True}, "sampler greedy", "what the score is to measure"),
        ({"samples__origin__record__dtype": "bfloat16"}, "record of samples dtype", UNKNOWN),
        ({"samples__origin__record__files": "jpg, quality 90"}, "record of samples files", "90 6.08"),
    ],
)
def test_how_samples_were_made_matters_where_their_pixels_differ(parts: dict[str, Any], part: str, known: str) -> None:
    other = compared(changed(samples__sha256="b" * 64, **parts))
    found = {it.part: it.effect.text for it in other.differences}
    assert found.keys() == {part, "pixels of samples (sha256)"} and known in found[part]
    same = compared(changed(3.0, **parts))
    assert only(same).effect.text == "none: the pixels are the same"
    assert same.verdict == ("the same protocol and the same number",)


def test_an_unbiased_distance_does_not_move_with_the_number_of_samples() -> None:
    for name, known in (("kid@50000", "none on average"), ("kid_std@50000", UNKNOWN), ("precision@50000", UNKNOWN)):
        sides = [
            Result(side, {name: it}) for side, it in zip("ab", (SCORE, changed(samples__count=5_000)), strict=True)
        ]
        assert only(explain(*sides)[0]).effect.text.startswith(known)


def test_resizing_of_the_reference() -> None:
    record = {"split": "val", "transform": "bicubic without antialiasing"}
    found = compared(changed(reference__sha256="d" * 64, reference__origin__record=record)).differences
    effects = {it.part: it.effect.text for it in found}
    assert effects.keys() == {"pixels of the reference (sha256)", "reference transform", "reference split"}
    assert "6.1 to 6.5" in effects["reference transform"] and "none by itself" in effects["reference split"]


def test_the_verdict_follows_the_kind_of_difference() -> None:
    assert compared(changed(network__dim=768)).verdict[0] == "not comparable until these are equal: features"
    near, far = compared(changed(3.00002, computation__batch_size=1)), compared(changed(computation__batch_size=1))
    assert "arithmetic explains the rest" in near.verdict[0] and "more than arithmetic explains" in far.verdict[0]
    assert compared(changed(samples__sha256="b" * 64)).verdict == (
        "the same protocol: the difference is one of the samples",
    )


def test_the_number_of_samples_is_computed_from_the_bias() -> None:
    """b / N with b = 50,000: 1 at 50,000 pictures and 10 at 5,000, so 9 of a difference of 9.5."""
    intervals = [{"bias": 1.0, "standard_error": 0.03}, {"bias": 10.0, "standard_error": 0.4}]
    found = compared(changed(12.5, samples__count=5_000, samples__sha256="b" * 64), intervals)
    effects = {it.part: it.effect for it in found.differences}
    assert effects["number of samples"].shift == pytest.approx(9)
    assert "bias 1 / 10, about 5e+04 / N" in effects["number of samples"].text
    assert "0.4 (one standard error)" in effects["pixels of samples (sha256)"].text
    assert "computed effects make +9 of +9.5, +0.5 is left" in found.verdict
    assert found.verdict[-1] == "sampling error of the difference: 0.401; it is 1.2 standard errors"


def test_splits_of_an_inception_score() -> None:
    first = changed(200.0, definition="Inception Score, chunks of 5000 in stored order") | {
        "name": "inception_score@50000"
    }
    second = changed(210.0, definition="Inception Score, one split")
    names = [{"inception_score@50000": it} for it in (first, second)]
    found = only(explain(Result("a", names[0]), Result("b", names[1]))[0])
    assert "10.1% / 1.0% in splits of 5000 / 50000" in found.effect.text


def test_scores_pair_by_name_then_by_metric() -> None:
    first = Result("a.json", {"fid@50000": SCORE, "sfid@50000": SCORE, "kid@50000": SCORE})
    second = Result("b.json", {"fid@5000": SCORE, "sfid@50000": SCORE, "adm/kid@50000": SCORE, "mar/kid@5000": SCORE})
    assert [it.names for it in explain(first, second)] == [("sfid@50000", "sfid@50000"), ("fid@50000", "fid@5000")]
    assert explain(first, second, "kid@50000", "mar/kid@5000")[0].names == ("kid@50000", "mar/kid@5000")
    with pytest.raises(ExplainError, match=r"b\.json: has no score 'kid@50000'; it has fid@5000, sfid"):
        explain(first, second, "kid@50000")
    with pytest.raises(ExplainError, match=r"a\.json has x; b\.json has y: no score in common"):
        explain(Result("a.json", {"x": SCORE}), Result("b.json", {"y": SCORE}))


def test_a_file_is_read_whatever_else_it_holds(tmp_path: Path) -> None:
    finding = {"name": "duplicates", "level": "warning", "text": "7 of 9 pictures equal an earlier one"}
    content = {
        "fid@50000": SCORE,
        "clean-fid": {"fid@50000": SCORE, "left_out": {"KID": "too few"}},
        "audit": {"samples": {"findings": [finding, {"name": "count", "level": "note", "text": "9"}]}},
        "intervals": {"adm/fid@50000": {"standard_error": 0.02, "bias": 1.5}},
        "seconds": 3.5,
        "notes": ["a"],
        "sfid@50000": SCORE | {"value": float("nan")},
    }
    write_json(tmp_path / "a.json", content)
    result = read_result(tmp_path / "a.json")
    assert list(result.scores) == ["fid@50000", "clean-fid/fid@50000", "sfid@50000"]
    found = explain(result, result, "fid@50000")[0]
    assert found.errors == (0.02, 0.02)
    assert found.verdict[-1].endswith("a.json warns of samples: duplicates: 7 of 9 pictures equal an earlier one")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "expected a JSON object of scores"),
        ('{"audit": {}, "fid": {"value": 3}}', "holds no score with its provenance"),
        ('{"fid": {"value": "low", "provenance": {"samples": {}}}}', "the value of fid is 'low', no number"),
        ('{"fid": {"value": 3, "provenance": {}}}', "fid does not say which samples it is of"),
    ],
)
def test_errors_name_the_file(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ExplainError, match=rf"broken\.json: .*{message}"):
        read_result(path)
    with pytest.raises(ExplainError, match=r"missing\.json: not a readable"):
        read_result(tmp_path / "missing.json")


def test_lines_have_every_difference_with_its_effect() -> None:
    found = compared(changed(network__preprocessing=PREPROCESSING["pytorch"], computation__batch_size=1))
    text = "\n".join(found.lines())
    assert text.startswith("fid@50000: 3 / 3.5, second - first +0.5")
    for it in found.differences:
        assert f"{it.part}: {it.first} / {it.second}" in text and it.effect.text in text and it.effect.source in text
    assert text.index("resizing") < text.index("batch_size") < text.index("=> not comparable")
    assert json.dumps(PREPROCESSING["tf1"])[1:-1] in text
