"""scripts/demo_samplers.py: what it trains on what, and what it has compared. The parts are tested with their own scripts."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from eval.speculation import ImageRecord, write_records
from tests.goldens import ROOT
from training.samplers import recipes


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield import_module("demo_samplers")


def record(method: str, calls: int) -> ImageRecord:
    committed = (36 // calls,) * calls
    return ImageRecord(method, 0, 0, 0, (0,) * 36, calls, committed, 0, committed, 0, (), (), calls / 10, calls / 10)


def test_models_are_trained_in_order_and_handed_to_the_comparisons(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Configurations and options are real, and pass their parsers; what they ask for is not done."""
    out, trained, cached, asked = tmp_path / "demo", [], [], []

    def compare(words: list[str]) -> None:
        asked.append(import_module("compare_samplers").parser().parse_args(words))
        asked[-1].report.mkdir(parents=True)
        write_records(asked[-1].report / "images.jsonl", [record("ar", 36), record("sjd", 12)], {})

    monkeypatch.setattr(script, "compare_samplers", compare)
    monkeypatch.setattr(script, "cache_tokens", lambda run, data, folder, **given: cached.append((run, folder)))
    monkeypatch.setattr(script, "classify", lambda path, *given: trained.append({"out": str(path)}))
    for job in ("tokenizer_job", "generator_job", "drafter_job"):
        monkeypatch.setattr(script, job, trained.append)
    script.demo_samplers(out, share=0.1)

    by_name = {Path(config["out"]).name: config for config in trained}
    assert [*by_name] == [
        *("discrete-tokenizer", "target", "small", "discrete-classifier.safetensors", "eagle"),
        *("continuous-tokenizer", "mar", "mar-small", "continuous-classifier.safetensors"),
    ]
    caches = dict(cached)
    for name, part in (
        ("target", "discrete"),
        ("small", "discrete"),
        ("mar", "continuous"),
        ("mar-small", "continuous"),
    ):
        config = by_name[name]
        assert config["tokenizer_run"] == f"{out}/{part}-tokenizer" and config["train"]["steps"] <= 250
        assert config["token_cache"] == str(caches[Path(config["tokenizer_run"])])
    assert by_name["eagle"]["target_run"] == f"{out}/target"
    first, second = asked
    assert (first.run, first.draft_run, first.drafter_run) == tuple(
        f"{out}/{name}" for name in ("target", "small", "eagle")
    )
    assert (second.run, second.draft_run, second.drafter_run) == (f"{out}/mar", f"{out}/mar-small", None)
    assert first.samplers is second.samplers is None and second.sampler.rounds == 16  # all that these models allow

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["discrete"]["sjd"] == {"calls": 12.0, "fewer_calls": 3.0, "tau": 3.0, "clock": 3.0}
    script.demo_samplers(out)
    assert len(asked) == 2 and "finished already" in capsys.readouterr().out


def test_every_file_of_configs_samplers_can_be_read() -> None:
    found = recipes()
    assert {"ar", "speculative", "eagle", "eagle-tree", "sjd", "gsd", "lantern", "lantern-plus", "cspd"} <= found.keys()
    for recipe in found.values():
        for key, values in recipe.sweep.items():
            assert recipe.turned(key, values[0]).knob != "" and len(values) > 1
