"""A tokenizer of clips and its prior, from a configuration to a finished run, then a generator on its tokens."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from training.jobs import generator_job, tokenizer_job
from training.options import generator_parser, parse, tokenizer_parser
from training.run import load_run

SHORT = {"steps": 4, "log_every": 2, "save_every": 2, "sample_every": 4, "trackers": []}
DATA = {"name": "moving_digit", "stride": 2, "batch_size": 2, "held_out": 1}
TOKENIZER = {
    "class_path": "LARPTokenizer",
    "init_args": {
        "video": [4, 16, 16],
        "tokens": 6,
        "patch": [2, 8, 8],
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "quantizer": {"class_path": "StochasticVectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
    },
}


def trained(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    """The exported tokenizer of a run, continued where it was begun before."""
    content = {
        "out": str(tmp_path / name),
        "resume": True,
        "data": {**DATA, "size": 16, "frames": 4},
        "tokenizer": TOKENIZER,
        "prior": {"class_path": "LARPPrior", "init_args": {"dim": 16, "depth": 1, "heads": 2}},
        "objective": {"l2": 1.0, "terms": {"codebook": 0.1, "commitment": 0.025, "prior": 0.06}},
        "train": SHORT,
    }
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    assert tokenizer_job(parse(tokenizer_parser(), ["--config", str(tmp_path / f"{name}.yaml")]))
    return load_file(tmp_path / name / "tokenizer.safetensors")


def test_a_prior_learns_beside_the_tokenizer_and_stays_behind(tmp_path: Path) -> None:
    state = trained(tmp_path, "whole")
    assert not any("prior" in name for name in state)
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["prior"] > 0 for line in lines if "prior" in line] == [True, True]
    assert (tmp_path / "whole/samples/step_00000004.png").stat().st_size > 0
    assert load_run(tmp_path / "whole").tokenizer.spec.decoded == (4, 16, 16)

    config = {
        "out": str(tmp_path / "ar"),
        "tokenizer_run": str(tmp_path / "whole"),
        "data": DATA,
        "generator": {
            "class_path": "NextToken",
            "init_args": {"dim": 16, "depth": 1, "heads": 2, "positions": "learned"},
        },
        "train": {**SHORT, "steps": 1},
    }
    (tmp_path / "ar.yaml").write_text(yaml.safe_dump(config))
    assert generator_job(parse(generator_parser(), ["--config", str(tmp_path / "ar.yaml")]))
    assert load_run(tmp_path / "ar").generator.position.shape == (6, 16)


def test_a_resumed_run_has_the_prior_where_it_was(tmp_path: Path) -> None:
    """The tokenizer's weights depend on the prior's, on its optimiser's and on the progress: the same bits, so all came
    back."""
    whole = trained(tmp_path, "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "modules": {}, "step": 0}))
    again = trained(tmp_path, "run")
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name
