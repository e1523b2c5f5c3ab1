"""A drafter learns the features of its target, resumes bit for bit, and opens with that target alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from generators.next_token import NextToken
from layers.record import build
from layers.spec import Condition
from tests.training import tiny
from training.drafter_loop import DrafterLesson, agreement, begin_drafter, drafter_record, features, train_drafter
from training.jobs import drafter_job
from training.loop import TrainOptions
from training.options import ConfigError, drafter_parser, parse
from training.run import CLASSES, Run, RunError, RunFolder, load_drafter, load_run

CHOSEN = {"heads": 2, "mlp_hidden": 24}


class Killed(Exception):
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A generator run with random weights, whose laws are far from uniform."""
    return export_target(tmp_path_factory.mktemp("target"), seed=0)


def export_target(root: Path, seed: int) -> Run:
    tiny.export_tokenizer(root / "vq")
    source = load_run(root / "vq")
    folder = RunFolder(root / "ar", "generator", tiny.GENERATOR, tiny.Pictures().describe(), 0, source)
    torch.manual_seed(seed)
    generator = build(tiny.GENERATOR, CLASSES, spec=source.tokenizer.spec)
    for parameter in generator.parameters():
        if parameter.dim() > 1:  # norms stay as they are
            torch.nn.init.normal_(parameter, std=0.5)
    folder.begin()
    folder.export(generator.state_dict(), generator.spec, step=1)
    (root / "ar/config.yaml").write_text("sampler: {}\n")
    return load_run(root / "ar")


def train(out: Path, target: Run, steps: int = 12, stop: int | None = None, **changed: Any) -> None:
    """Train the tiny drafter, or go on with it; `stop`: as if killed before that step."""
    options = TrainOptions(steps=steps, **{**tiny.QUICK, **changed})
    record = drafter_record(target.generator, CHOSEN)
    folder = RunFolder(out, "drafter", record, tiny.Pictures().describe(), 0, target=target)
    accelerator = tiny.begin(folder, options)
    drafter = build(record, CLASSES, spec=target.tokenizer.spec)
    begin_drafter(drafter, target.generator)

    def stream(**where: int) -> Any:
        for number, batch in enumerate(tiny.stream()(**where)):
            if stop is not None and where["start_step"] + number == stop:
                raise Killed
            yield batch

    train_drafter(
        drafter,
        target.generator,
        target.tokenizer,
        stream,
        DrafterLesson(noise=0.02),
        options,
        folder,
        accelerator,
        held_out=tiny.held_out(),
    )


@pytest.fixture(scope="module")
def whole(target: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "drafter"
    train(out, target)
    return out


def test_resuming_gives_the_same_run(target: Run, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "drafter"
    for stop in (6, 9):  # between checkpoints, which come after every 4 steps
        with pytest.raises(Killed):
            train(out, target, stop=stop)
    train(out, target)
    assert (out / "drafter.safetensors").read_bytes() == (whole / "drafter.safetensors").read_bytes()
    assert tiny.journal(out) == tiny.journal(whole)


def test_it_learns_what_the_target_will_say(target: Run, tmp_path: Path) -> None:
    train(tmp_path / "long", target, steps=60, log_every=20, save_every=60, sample_every=20)
    lines = tiny.journal(tmp_path / "long")
    losses = [line["loss"] for line in lines if "loss" in line]
    accepted = [line["held_out_acceptance"] for line in lines if "held_out_acceptance" in line]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0], losses
    assert 0 < accepted[0] < accepted[-1] < 1


def test_the_target_and_its_embedding_stay(target: Run, whole: Path) -> None:
    before = load_file(target.path / "generator.safetensors")
    assert_close(target.generator.state_dict(), before, rtol=0, atol=0)
    drafter = load_drafter(whole, target)
    assert_close(drafter.embed.weight, target.generator.embed.weight[:8], rtol=0, atol=0)
    assert not drafter.training and not any(module.training for module in target.generator.modules())


def test_features_are_what_the_read_out_takes(target: Run) -> None:
    generator, (tokens, condition) = target.generator, given()
    assert_close(generator.head.logits(features(generator, tokens, condition)), generator.logits(tokens, condition))
    none = features(generator, tokens, condition.null())
    assert_close(features(generator, tokens, condition, drop=1.0), none)


def test_agreement_is_one_for_a_drafter_that_knows(target: Run) -> None:
    tokens, condition = given()
    aims = features(target.generator, tokens, condition)
    readout = target.generator.head.readout.weight

    class Knows(torch.nn.Module):
        def forward(self, aims: Tensor, tokens: Tensor) -> Tensor:
            return aims.roll(-1, dims=1)

    class Uniform(torch.nn.Module):
        def forward(self, aims: Tensor, tokens: Tensor) -> Tensor:
            return torch.zeros_like(aims)

    assert_close(agreement(Knows(), aims, tokens, readout), torch.tensor(1.0))
    law = target.generator.logits(tokens, condition)[:, 1:].softmax(-1)
    assert_close(agreement(Uniform(), aims, tokens, readout), law.clamp_max(1 / 8).sum(-1).mean())


def test_noise_has_the_width_that_is_stated() -> None:
    rows = DrafterLesson(noise=0.2).shown(torch.zeros(100, 256, 4))
    assert_close(rows.amax(), torch.tensor(0.2), rtol=0, atol=1e-3)  # half of 0.2 * 512 / 256 to each side
    assert_close(rows.amin(), torch.tensor(-0.2), rtol=0, atol=1e-3)


def test_a_drafter_names_its_target_and_refuses_another(target: Run, whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    assert record["target"] == target.provenance and record["kind"] == "drafter"
    assert load_drafter(whole, target).spec == target.tokenizer.spec
    other = export_target(tmp_path, seed=1)
    with pytest.raises(RunError, match=r"another target than .*of ar, generator sha256"):
        load_drafter(whole, other)
    with pytest.raises(RunError, match="holds a generator, not a drafter"):
        load_drafter(target.path, target)
    with pytest.raises(RunError, match="holds a drafter for ar"):
        load_run(whole)
    taken = tmp_path / "taken"
    shutil.copytree(whole, taken)
    with pytest.raises(RunError, match="began with another target"):
        train(taken, other, steps=20)


def test_a_target_without_features_is_refused(target: Run) -> None:
    with pytest.raises(
        RunError, match="a drafter continues a NextToken generator with a categorical head, not Identity"
    ):
        drafter_record(torch.nn.Identity(), CHOSEN)


def test_from_a_configuration(tmp_path: Path) -> None:
    tiny_config = {
        "out": str(tmp_path / "eagle"),
        "target_run": str(digits_target(tmp_path).path),
        "data": {"name": "digits", "batch_size": 4, "held_out": 1},
        "drafter": CHOSEN,
        "train": {"steps": 2, "save_every": 2, "sample_every": 2, "log_every": 1, "trackers": []},
    }
    file = tmp_path / "eagle.yaml"
    file.write_text(yaml.safe_dump(tiny_config))
    config = parse(drafter_parser(), ["--config", str(file)])
    assert drafter_job(config)
    assert drafter_job({**config, "resume": True}) is False
    target = load_run(tiny_config["target_run"])
    assert load_drafter(tmp_path / "eagle", target).fuse.in_features == 2 * target.generator.embed.weight.shape[1]
    with pytest.raises(RunError, match="learned the classes"):
        drafter_job({**config, "out": str(tmp_path / "other"), "data": {**config["data"], "name": "emoji32"}})
    with pytest.raises(ConfigError, match=r"did you mean 'drafter\.mlp_hidden'"):
        parse(drafter_parser(), ["--config", str(file), "--drafter.mlp_hiden", "8"])


def digits_target(root: Path) -> Run:
    """A generator of digits with its first weights."""
    record = {**tiny.TOKENIZER, "init_args": {**tiny.TOKENIZER["init_args"], "image_size": 32}}
    data = {"name": "digits", "classes": [str(digit) for digit in range(10)]}
    folder = RunFolder(root / "vq", "tokenizer", record, data, 0)
    tokenizer = build(record, CLASSES)
    folder.begin()
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    source = load_run(root / "vq")
    arguments = {"dim": 16, "depth": 1, "heads": 2, "num_classes": 10}
    folder = RunFolder(root / "ar", "generator", {"class_path": "NextToken", "init_args": arguments}, data, 0, source)
    folder.begin()
    generator = NextToken(source.tokenizer.spec, **arguments)
    folder.export(generator.state_dict(), generator.spec, step=1)
    return load_run(root / "ar")


def given() -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, (5, 16), generator=generator)
    return tokens, Condition(label=torch.tensor([0, 1, 2, 0, 1]))
