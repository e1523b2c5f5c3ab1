"""From a configuration to a finished run, on real pictures and on several processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from data.sets import open_set
from data.token_cache import CacheWriter, TokenizerFacts, fill_cache, picture_header
from tests.goldens import ROOT
from tests.training import tiny
from training.jobs import generator_job, tokenizer_job, with_classes
from training.options import generator_parser, parse, tokenizer_parser
from training.run import RunError, load_run

SHORT = {"steps": 2, "log_every": 1, "save_every": 2, "sample_every": 2, "trackers": []}
DATA = {"name": "digits", "batch_size": 4, "held_out": 1}
EMOJI = {**DATA, "name": "emoji32"}
TOKENIZER = {**tiny.TOKENIZER, "init_args": {**tiny.TOKENIZER["init_args"], "image_size": 32}}


def configure(make: Callable[[], Any], path: Path, out: Path, **sections: Any) -> dict[str, Any]:
    path.write_text(yaml.safe_dump({"out": str(out), "data": DATA, "train": SHORT, **sections}))
    return parse(make(), ["--config", str(path)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tokenizer run `vq` on digits."""
    root = tmp_path_factory.mktemp("jobs")
    objective = {"terms": {"commitment": 0.25}}
    config = configure(tokenizer_parser, root / "vq.yaml", root / "vq", tokenizer=TOKENIZER, objective=objective)
    assert tokenizer_job(config)
    return root


def generator_config(root: Path, out: str, **sections: Any) -> dict[str, Any]:
    record = {"class_path": "NextToken", "init_args": {"dim": 16, "depth": 1, "heads": 2}}
    given = {"tokenizer_run": str(root / "vq"), "generator": record, **sections}
    return configure(generator_parser, root / f"{out}.yaml", root / out, **given)


def test_digits_from_pictures_to_a_loadable_run(root: Path) -> None:
    config = generator_config(root, "ar", sampler={"guidance": {"scale": 2.0}})
    assert generator_job(config)
    run = load_run(root / "ar")
    assert run.classes == tuple("0123456789")
    assert run.record["modules"]["generator"]["record"]["init_args"]["num_classes"] == 10
    assert (run.record["step"], run.record["data"]["name"], run.record["seed"]) == (2, "digits", 0)
    assert yaml.safe_load((root / "ar/config.yaml").read_text()) == config
    assert (root / "ar/samples/step_00000002.png").stat().st_size > 0
    assert generator_job({**config, "resume": True}) is False  # finished: nothing to do
    with pytest.raises(RunError, match="exists; continue it with --resume"):
        generator_job(config)


def test_another_data_set_is_one_changed_line(root: Path) -> None:
    assert generator_job(generator_config(root, "emoji", data=EMOJI))
    assert len(load_run(root / "emoji").classes) == 9


def test_cached_tokens_train_like_pictures(root: Path) -> None:
    assert generator_job(generator_config(root, "direct", data=EMOJI))
    run, pictures = load_run(root / "vq"), open_set("emoji32", split="train")
    facts = TokenizerFacts("vq", run.tokenizer_sha256, run.tokenizer.spec.vocab_size)
    writer = CacheWriter(root / "cache", picture_header(pictures, facts, run.tokenizer.spec.length))
    with torch.no_grad():
        for _ in fill_cache(writer, pictures, run.tokenizer.encode, batch_size=500):
            pass
    assert writer.finish()
    assert generator_job(generator_config(root, "cached", token_cache=str(root / "cache"), data=EMOJI))
    weights = [(root / out / "generator.safetensors").read_bytes() for out in ("cached", "direct")]
    assert weights[0] == weights[1]


def test_the_number_of_classes_is_the_data_sets() -> None:
    record = {"class_path": "NextToken", "init_args": {"dim": 16, "num_classes": 7, "text_dim": None}}
    with pytest.raises(RunError, match="num_classes is 7, the data set has 10 classes"):
        with_classes(record, 10)
    text = {"class_path": "NextToken", "init_args": {"num_classes": None, "text_dim": 8}}
    assert with_classes(text, 10) == text


def test_a_decoder_beside_captions_is_not_trained_without_any(tmp_path: Path) -> None:
    sizes = {"image_size": 32, "tokens": 4, "channels": 2, "encoder_dim": 16, "encoder_depth": 1, "encoder_heads": 2}
    sizes |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "text_slots": 5}
    record = {"class_path": "TiTokTokenizer", "init_args": sizes}
    config = configure(
        tokenizer_parser, tmp_path / "a.yaml", tmp_path / "a", tokenizer=record, objective={"terms": {"kl": 0.0}}
    )
    with pytest.raises(RunError, match=r"text_slots is 5.* the data set digits has none"):
        tokenizer_job(config)


def test_two_processes_are_one_with_a_batch_twice_as_large(tmp_path: Path) -> None:
    tiny.export_tokenizer(tmp_path / "vq")
    tiny.launch(2, tiny.run_still, tmp_path / "two", tmp_path / "vq", 3)
    tiny.run_still(tmp_path / "one", tmp_path / "vq", 6)
    two, one = (load_file(tmp_path / out / "generator.safetensors") for out in ("two", "one"))
    for name, tensor in one.items():
        assert_close(two[name], tensor, atol=1e-11, rtol=0, msg=name)
    losses = [[line["loss"] for line in tiny.journal(tmp_path / out) if "loss" in line] for out in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    tiny.launch(2, tiny.run_tokenizer, tmp_path / "whole", 8)
    tiny.launch(2, tiny.run_tokenizer, tmp_path / "cut", 4)
    tiny.launch(2, tiny.run_tokenizer, tmp_path / "cut", 8)
    weights = [(tmp_path / out / "tokenizer.safetensors").read_bytes() for out in ("cut", "whole")]
    assert weights[0] == weights[1]


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_scripts_train_and_refuse(root: Path) -> None:
    objective = {"terms": {"commitment": 0.25}}
    configure(tokenizer_parser, root / "s.yaml", root / "s", tokenizer=TOKENIZER, objective=objective)
    done = run_script("train_tokenizer.py", "--config", str(root / "s.yaml"), "--train.steps", "1")
    assert done.returncode == 0 and done.stdout.endswith("s: trained\n"), done.stderr
    assert load_run(root / "s").record["step"] == 1
    refused = run_script("train_generator.py", "--config", str(root / "s.yaml"), "--out", "x")
    assert refused.returncode == 1 and "error: " in refused.stderr and "Traceback" not in refused.stderr
