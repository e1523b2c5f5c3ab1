"""The command line: constructor arguments as keys, and a helpful refusal of everything else."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from layers.record import build
from tests.goldens import ROOT
from training.options import ConfigError, command_line, generator_parser, parse, tokenizer_parser
from training.run import CLASSES

TOKENIZER = {
    "out": "runs/x",
    "data": {"name": "digits"},
    "tokenizer": {
        "class_path": "VQTokenizer",
        "init_args": {"image_size": 32, "quantizer": {"class_path": "FSQ", "init_args": {"levels": [8, 5]}}},
    },
}
GENERATOR = {
    "out": "runs/x",
    "data": {"name": "digits"},
    "tokenizer_run": "runs/vq",
    "generator": {"class_path": "NextToken", "init_args": {"dim": 32, "depth": 1, "heads": 2}},
}
ROOMS = {"tokenizer": (tokenizer_parser, TOKENIZER), "generator": (generator_parser, GENERATOR)}


def write(content: dict, path: Path) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("kind", ROOMS)
def test_the_resolved_configuration_is_its_own_source(kind: str, tmp_path: Path) -> None:
    make, content = ROOMS[kind]
    config = parse(make(), ["--config", write(content, tmp_path / "a.yaml")])
    assert config == parse(make(), ["--config", write(config, tmp_path / "b.yaml")])
    assert config["train"]["betas"] == [0.9, 0.95] and config["data"]["batch_size"] == 64


@pytest.mark.parametrize("kind", ROOMS)
def test_every_config_of_the_repository_fits(kind: str) -> None:
    files = sorted((ROOT / f"configs/{kind}s").glob("*.yaml"))
    assert files
    for file in files:
        record = parse(ROOMS[kind][0](), ["--config", str(file)])[kind]
        assert record["class_path"] in CLASSES, file


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    arguments = ["--config", write(TOKENIZER, tmp_path / "a.yaml"), "--train.lr", "3e-4", "--resume"]
    arguments += ["--tokenizer.quantizer.levels", "[4,4,4]", "--tokenizer.channels", "32"]
    config = parse(tokenizer_parser(), arguments)
    quantizer = {"class_path": "FSQ", "init_args": {"levels": [4, 4, 4]}}
    assert config["train"]["lr"] == 3e-4 and config["resume"] is True
    assert config["tokenizer"]["init_args"]["quantizer"] == quantizer
    assert build(config["tokenizer"], CLASSES).spec.vocab_size == 64


def test_a_head_is_chosen_by_its_record(tmp_path: Path) -> None:
    arguments = ["--config", write(GENERATOR, tmp_path / "a.yaml"), "--generator.head", "Categorical"]
    config = parse(generator_parser(), [*arguments, "--generator.head.bias", "true"])
    assert config["generator"]["init_args"]["head"] == {"class_path": "Categorical", "init_args": {"bias": True}}


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("generator", ["--train.stepz", "3"], "'train.stepz': did you mean 'train.steps'?"),
        ("generator", ["--train.step", "3"], "'train.step': did you mean 'train.steps'?"),
        ("generator", ["--generator.detph", "3"], "'detph': did you mean 'depth'?"),
        ("generator", ["--generator", "NextTokn"], "'NextTokn': did you mean 'NextToken'?"),
        ("generator", ["--generator.head", "Categoricall"], "'Categoricall': did you mean 'Categorical'?"),
        ("tokenizer", ["--tokenizer.quantizer.levls", "[3]"], "'levls': did you mean 'levels'?"),
        ("tokenizer", ["--objective.L1", "1"], "'objective.L1': did you mean 'objective.l1'?"),
        ("generator", ["--train.steps", "3.5"], "Expected a <class 'int'>. Got value: 3.5"),
        ("generator", ["--generator.depth", "two"], "Expected a <class 'int'>. Got value: two"),
        ("tokenizer", ["--train.schedule", "cosin"], "train.schedule"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_name(
    kind: str, arguments: list[str], said: str, tmp_path: Path
) -> None:
    make, content = ROOMS[kind]
    with pytest.raises(ConfigError) as error:
        parse(make(), ["--config", write(content, tmp_path / "a.yaml"), *arguments])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"stepz": 3}}, "'stepz': did you mean 'steps'?"),
        ({"trian": {"steps": 3}}, "'trian.steps': did you mean 'train.steps'?"),
        ({"train": {"steps": "many"}}, "Expected a <class 'int'>. Got value: many"),
        ({"data": {"nmae": "digits"}}, "'nmae': did you mean 'name'?"),
    ],
)
def test_a_file_is_held_to_the_same(change: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        parse(tokenizer_parser(), ["--config", write({**TOKENIZER, **change}, tmp_path / "a.yaml")])
    assert said in str(error.value)


@pytest.mark.parametrize("make", [tokenizer_parser, generator_parser])
def test_every_option_of_training_has_help(make: object) -> None:
    parser: ArgumentParser = make()
    ours = [action for action in parser._actions if action.dest.startswith(("train.", "data."))]
    assert len(ours) > 20 and not [action.dest for action in ours if not action.help]


def test_a_users_mistake_ends_a_script_with_its_message_alone() -> None:
    def main() -> None:
        raise ConfigError("put it right")

    with pytest.raises(SystemExit, match="error: put it right"):
        command_line(main)
