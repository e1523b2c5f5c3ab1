"""Run folders: what is written is what is read, and nothing else is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from layers.checkpoint import CheckpointError
from layers.record import build
from layers.spec import Condition
from tests.training import tiny
from training.run import CLASSES, RunError, RunFolder, claim, load_run

DATA = tiny.Pictures().describe()


def export_generator(path: Path, tokenizer_run: Path) -> torch.nn.Module:
    source = load_run(tokenizer_run)
    folder = RunFolder(path, "generator", tiny.GENERATOR, DATA, 0, source)
    folder.begin()
    torch.manual_seed(3)
    generator = build(tiny.GENERATOR, CLASSES, spec=source.tokenizer.spec)
    folder.export(generator.state_dict(), generator.spec, step=9)
    return generator.eval()


def test_what_is_loaded_computes_what_was_saved(tmp_path: Path) -> None:
    tokenizer = tiny.export_tokenizer(tmp_path / "vq")
    generator = export_generator(tmp_path / "ar", tmp_path / "vq")
    shutil.rmtree(tmp_path / "vq")  # a generator's run stands alone
    run = load_run(tmp_path / "ar")
    images = tiny.held_out()[0]["image"]
    tokens = tokenizer.encode(images)
    assert torch.equal(run.tokenizer.encode(images), tokens)
    assert torch.equal(run.tokenizer.decode(tokens), tokenizer.decode(tokens))
    condition = Condition(label=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(run.generator.loss(tokens, condition)[0], generator.loss(tokens, condition)[0])
    assert (run.kind, run.classes, run.record["step"]) == ("generator", ("a", "b", "c"), 9)


def test_the_copied_tokenizer_keeps_its_checksum(tmp_path: Path) -> None:
    tiny.export_tokenizer(tmp_path / "vq")
    export_generator(tmp_path / "ar", tmp_path / "vq")
    assert load_run(tmp_path / "ar").tokenizer_sha256 == load_run(tmp_path / "vq").tokenizer_sha256


def test_missing_folders_and_missing_exports_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such run folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"has no run\.json"):
        load_run(tmp_path)
    RunFolder(tmp_path, "tokenizer", tiny.TOKENIZER, DATA, seed=0).begin()
    with pytest.raises(RunError, match="no export yet"):
        load_run(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_damaged_weights_are_refused_by_name(damage: object, tmp_path: Path) -> None:
    tiny.export_tokenizer(tmp_path)
    damage(tmp_path / "tokenizer.safetensors")
    with pytest.raises(CheckpointError, match=r"tokenizer\.safetensors: .*copy the run again"):
        load_run(tmp_path)


def test_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny.export_tokenizer(tmp_path / str(seed), seed)
    shutil.copy(tmp_path / "1/tokenizer.safetensors", tmp_path / "0")
    with pytest.raises(CheckpointError, match="another file"):
        load_run(tmp_path / "0")


def test_a_record_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    for place in ("a", "b"):
        tiny.export_tokenizer(tmp_path / place)
    record = json.loads((tmp_path / "a/run.json").read_text())
    record["modules"]["tokenizer"]["file"] = "../b/tokenizer.safetensors"
    (tmp_path / "a/run.json").write_text(json.dumps(record))
    (tmp_path / "a/tokenizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_run(tmp_path / "a")


def test_a_generator_beside_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny.export_tokenizer(tmp_path / "vq")
    export_generator(tmp_path / "ar", tmp_path / "vq")
    record = json.loads((tmp_path / "ar/run.json").read_text())
    record["modules"]["generator"]["spec"]["vocab_size"] = 99
    (tmp_path / "ar/run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"vocab_size=99.*vocab_size=8"):
        load_run(tmp_path / "ar")


CONFIG = {"out": "x", "data": {"workers": 0}, "train": {"lr": 0.1, "steps": 5, "betas": (0.9, 0.95)}}


def test_a_folder_that_exists_is_never_written(tmp_path: Path) -> None:
    claim(tmp_path / "run", CONFIG, resume=False)
    with pytest.raises(RunError, match="exists; continue it with --resume, or choose another --out"):
        claim(tmp_path / "run", CONFIG, resume=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("1")
    with pytest.raises(RunError, match="is no run"):
        claim(tmp_path / "thesis", CONFIG, resume=True)


def test_resuming_may_change_length_and_reports_alone(tmp_path: Path) -> None:
    claim(tmp_path, CONFIG, resume=False)
    longer = {"out": "y", "data": {"workers": 2}, "train": {"lr": 0.1, "steps": 50, "betas": (0.9, 0.95)}}
    claim(tmp_path, longer, resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]["steps"] == 50
    other = {**longer, "train": {**longer["train"], "lr": 0.2, "betas": (0.9, 0.99), "clip": 1.0}}
    with pytest.raises(RunError) as error:
        claim(tmp_path, other, resume=True)
    for key in ("train.lr: 0.1 -> 0.2", "train.betas: [0.9, 0.95] -> [0.9, 0.99]", "train.clip: None -> 1.0"):
        assert key in str(error.value)


def test_resuming_with_other_classes_or_another_tokenizer_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny.export_tokenizer(tmp_path / str(seed), seed)
    first, second = (load_run(tmp_path / str(seed)) for seed in (0, 1))
    RunFolder(tmp_path / "ar", "generator", tiny.GENERATOR, DATA, 0, first).begin()
    with pytest.raises(RunError, match="another tokenizer"):
        RunFolder(tmp_path / "ar", "generator", tiny.GENERATOR, DATA, 0, second).begin()
    with pytest.raises(RunError, match="began on the classes"):
        RunFolder(tmp_path / "ar", "generator", tiny.GENERATOR, {**DATA, "classes": ["b", "a", "c"]}, 0, first).begin()


def test_finished_compares_the_steps(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tokenizer", tiny.TOKENIZER, DATA, seed=0)
    assert not folder.finished(1)
    tiny.export_tokenizer(tmp_path)
    assert folder.finished(7) and not folder.finished(8)
