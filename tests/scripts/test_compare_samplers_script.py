"""scripts/compare_samplers.py on small models: every method is measured, the page is whole, nothing is done twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval.speculation import read_records, summary
from layers.record import UnknownName, build
from scripts import compare_samplers
from tests import small
from tests.small import generator_run
from training.drafter_loop import begin_drafter, drafter_record
from training.run import CLASSES, RunError, RunFolder, load_run
from training.samplers import SamplerError

DATA = {"name": "tiny", "classes": ["a", "b", "c"]}
FEW = ("--images", 5, "--num", 12, "--warmup", 0, "--device", "cpu", "--threads", 1)
CHAIN = {
    "class_path": "Chain",
    "init_args": {"drafts": 3, "rule": {"class_path": "Weighted", "init_args": {"delta": 4.0}}},
}


SHORT = {**small.RECORD, "init_args": {**small.RECORD["init_args"], "encoder_mult": [1, 1, 2]}}  # 4 x 4 tokens


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "RECORD", SHORT)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a generator run `ar`, a drafter run `eagle` for it, and a method of one's own, own.yaml."""
    root = tmp_path_factory.mktemp("runs")
    target = load_run(generator_run(root / "ar", DATA))
    record = drafter_record(target.generator, {"heads": 2, "mlp_hidden": 16})
    folder = RunFolder(root / "eagle", "drafter", record, DATA, 0, target=target)
    drafter = build(record, CLASSES, spec=target.tokenizer.spec)
    begin_drafter(drafter, target.generator)
    folder.begin()
    folder.export(drafter.state_dict(), drafter.spec, step=1)
    own = {"about": "my own rule", "drafter": "eagle", "method": CHAIN, "sweep": {"delta": [1.0]}}
    (root / "own.yaml").write_text(yaml.safe_dump(own))
    return root


def compare(runs: Path, out: Path, *words: object) -> None:
    models = ("--run", runs / "ar", "--draft-run", runs / "ar", "--drafter-run", runs / "eagle")
    compare_samplers.main([str(word) for word in (*models, "--report", out, *FEW, *words)])


@pytest.fixture(scope="module")
def out(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of an exact chain by a draft that is the target itself, Jacobi windows, and a lossy method."""
    out = tmp_path_factory.mktemp("out") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_samplers, "EXACT_DRAWS", 1000)
        patch.setattr(compare_samplers, "PLACES", 20)
        methods = ("speculative:drafts=3", "sjd:window=8", runs / "own.yaml")
        compare(runs, out, "--samplers", *methods, "--batch-sizes", 2, "--reference", "digits")
    return out


def value(out: Path, part: str) -> Any:
    return json.loads((out / f"{part}.json").read_text())["value"]


NAMES = ["ar", "speculative:drafts=3", "sjd:window=8", "own"]


def test_every_image_is_on_record_with_what_it_took(out: Path) -> None:
    head, records = read_records(out / "images.jsonl")
    assert {"commit", "versions", "seed", "source", "timing"} <= head.keys()
    assert [(it.method, it.image) for it in records] == [(name, image) for name in NAMES for image in range(5)]
    for it in records:
        assert len(it.tokens) == 16 == sum(it.committed) and it.calls == len(it.committed) == len(it.positions)
        assert it.condition == it.image % 3 and it.seconds > 0
    plain = [it for it in records if it.method == "ar"]
    assert all(it.calls == 16 and it.positions == (1,) * 16 for it in plain)
    same = [it for it in records if it.method == NAMES[1]]  # the draft is the target: all drafts are accepted
    assert all(it.calls == 4 and it.positions == (4,) * 4 for it in same)
    found = summary(same, plain)
    assert found.alpha == (1.0,) * 3 and found.fewer_calls == 4 and found.tau == 4


def test_exactness_is_tested_or_its_lack_measured(out: Path) -> None:
    found = value(out, "exactness")
    assert found["speculative:drafts=3"]["test"]["p_value"] > 0.001 and found["sjd:window=8"]["test"]["p_value"] > 0.001
    assert found["own"]["test"] is None and 0 < found["own"]["step_tv"] < 1
    assert found["ar"] == {"test": None, "step_tv": None}


def test_costs_quality_and_batches_are_there(out: Path) -> None:
    costs, quality, batches = (value(out, part) for part in ("costs", "quality", "batches"))
    assert [*costs["seconds"]] == ["4", "8", "12"]
    assert [*costs["seconds"]["4"]] == ["1", "2", "4", "8", "16"]
    assert costs["steps"].keys() == {"model", "eagle"} and min(costs["steps"].values()) > 0
    assert quality["methods"].keys() == set(NAMES) and len(quality["floor"]) == 3
    assert quality["methods"]["ar"]["distance"] == quality["floor"][0]  # under other noise than the baseline
    assert quality["methods"]["ar"]["to_reference"] > quality["methods"]["ar"]["distance"]
    assert all(batches[name]["throughput"]["2"] > 0 and batches[name]["peak_bytes"] > 0 for name in NAMES)
    assert batches["ar"]["last_round"] == {"2": 16} and batches[NAMES[1]]["last_round"] == {"2": 4}
    (point,) = value(out, "sweeps")
    assert (point["method"], point["knob"], point["value"]) == ("own", "delta", 1.0) and point["fewer_calls"] > 0


def test_the_page_stands_alone(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert all(words in page for words in (*NAMES, "my own rule", "How to read this page", "drafts 3", "rc512"))
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_what_is_done_is_left_alone_and_another_comparison_refused(
    runs: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {path: path.read_bytes() for path in (*out.glob("*.json"), out / "images.jsonl")}
    methods = ("--samplers", "speculative:drafts=3", "sjd:window=8", runs / "own.yaml")
    (out / "report.html").unlink()
    compare(runs, out, *methods, "--batch-sizes", 2, "--reference", "digits")
    assert {path: path.read_bytes() for path in parts} == parts and (out / "report.html").is_file()
    assert "costs ..." not in capsys.readouterr().out
    with pytest.raises(SamplerError, match="other settings; choose another --report"):
        compare(runs, out, "--samplers", "sjd:window=4")


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path) -> None:
    alone = ("--run", runs / "ar", "--report", tmp_path / "out", *FEW)

    def refused(error: type[Exception], match: str, *words: object) -> None:
        with pytest.raises(error, match=match):
            compare_samplers.main([str(word) for word in (*alone, *words)])

    refused(SamplerError, "give --draft-run RUN", "--samplers", "speculative")
    refused(SamplerError, "give --drafter-run RUN", "--samplers", "eagle")
    refused(UnknownName, "did you mean 'gsd'", "--samplers", "gds")
    refused(UnknownName, "half", "--samplers", "gsd:hafl=3")
    refused(SamplerError, "'half' is no setting", "--samplers", "gsd:half")
    refused(RunError, "another target", "--drafter-run", other_drafter(tmp_path))


def other_drafter(root: Path) -> Path:
    """A drafter for another generator."""
    run = load_run(generator_run(root / "other", {**DATA, "name": "again"}))
    weights = {name: torch.zeros_like(tensor) for name, tensor in run.generator.state_dict().items()}
    RunFolder(run.path, "generator", run.record["modules"]["generator"]["record"], DATA, 0).export(
        weights, run.generator.spec, 2
    )
    run = load_run(run.path)
    record = drafter_record(run.generator, {"heads": 2, "mlp_hidden": 16})
    folder = RunFolder(root / "other-eagle", "drafter", record, DATA, 0, target=run)
    drafter = build(record, CLASSES, spec=run.tokenizer.spec)
    folder.begin()
    folder.export(drafter.state_dict(), drafter.spec, step=1)
    return folder.path
