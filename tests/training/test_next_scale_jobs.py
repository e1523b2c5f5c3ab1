"""Next-scale generators through training: what they feed on, stages, weights to start from, token caches, two processes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from data.sets import open_set
from data.token_cache import CacheWriter, TokenizerFacts, fill_cache, picture_header
from layers.keymap import CheckpointMismatch
from layers.record import build
from tests.training import tiny
from training.generator_loop import train_generator
from training.jobs import begin_with, generator_job
from training.loop import TrainOptions, adamw, lr_factor, set_decay
from training.options import generator_parser, parse
from training.run import CLASSES, RunError, RunFolder, feeding, load_run

SHORT = {"steps": 6, "log_every": 1, "save_every": 6, "sample_every": 6, "trackers": []}
TOKENIZER = {
    "class_path": "MultiScaleVQTokenizer",
    "init_args": {
        "scales": [1, 2, 3],
        "quantizer": {"class_path": "VectorQuantizer", "init_args": {"vocab_size": 16, "dim": 4}},
        "channels": 4,
        "mult": [1, 1],
        "res_blocks": 1,
        "groups": 2,
    },
}
SIZE = {"dim": 16, "depth": 1, "heads": 2}
MVAR = {**SIZE, "attention": "scale", "window": 3, "windowed_from": 2, "coarse_steps": 2}


def export_tokenizer(path: Path, **changed: Any) -> Path:
    record = {**TOKENIZER, "init_args": {**TOKENIZER["init_args"], **changed}}
    folder = RunFolder(path, "tokenizer", record, {"name": "tiny", "classes": ["a", "b", "c"]}, seed=0)
    torch.manual_seed(0)
    tokenizer = build(record, CLASSES)
    for parameter in tokenizer.scales.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.begin()
    folder.export(tokenizer.state_dict(), tokenizer.spec, step=1)
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer runs: `ms` for pictures of 32 x 32 pixels, `small` for 6 x 6."""
    root = tmp_path_factory.mktemp("next-scale")
    export_tokenizer(root / "ms", scales=[1, 2, 4], mult=[1, 1, 1, 1])
    export_tokenizer(root / "small")
    return root


def configured(root: Path, out: str, arguments: dict[str, Any], **sections: Any) -> dict[str, Any]:
    record = {"class_path": "NextScale", "init_args": arguments}
    content = {
        "out": str(root / out),
        "tokenizer_run": str(root / "ms"),
        "data": {"name": "emoji32", "batch_size": 4, "held_out": 1},
        "train": SHORT,
        "generator": record,
        **sections,
    }
    (root / f"{out}.yaml").write_text(yaml.safe_dump(content))
    return parse(generator_parser(), ["--config", str(root / f"{out}.yaml")])


def test_a_run_keeps_what_its_generator_feeds_on(root: Path) -> None:
    head = {"class_path": "Categorical", "init_args": {"bias": True}}
    sampler = {"guidance": {"scale": 1.0, "schedule": "linspace", "end": 2.5}, "filter": {"convention": "var"}}
    assert generator_job(configured(root, "var", {**SIZE, "head": head}, sampler=sampler))
    run = load_run(root / "var")
    given = torch.randint(16, (2, 21))
    assert_close(run.generator.reader(given), load_run(root / "ms").tokenizer.reader()(given), rtol=0, atol=0)
    assert run.generator.head.readout.bias is not None
    assert (root / "var/samples/step_00000006.png").stat().st_size > 0
    assert {"loss", "cross_entropy"} <= tiny.journal(root / "var")[0].keys()


def test_cached_ids_train_like_pictures(root: Path) -> None:
    assert generator_job(configured(root, "direct", SIZE))
    run, pictures = load_run(root / "ms"), open_set("emoji32", split="train")
    facts = TokenizerFacts("ms", run.tokenizer_sha256, run.tokenizer.spec.vocab_size)
    writer = CacheWriter(root / "cache", picture_header(pictures, facts, run.tokenizer.spec.length))
    with torch.no_grad():
        for _ in fill_cache(writer, pictures, run.tokenizer.encode, batch_size=500):
            pass
    assert writer.finish()
    assert generator_job(configured(root, "cached", SIZE, token_cache=str(root / "cache")))
    weights = [(root / out / "generator.safetensors").read_bytes() for out in ("cached", "direct")]
    assert weights[0] == weights[1]


def test_mvar_is_fine_tuned_from_var(root: Path) -> None:
    made = partial(build, **feeding({"class_path": "NextScale"}, load_run(root / "ms").tokenizer), num_classes=9)
    if not (root / "var-start").exists():
        assert generator_job(configured(root, "var-start", SIZE))
    tuned = made({"class_path": "NextScale", "init_args": {**MVAR, "window": 1}}, CLASSES)
    begin_with(tuned, str(root / "var-start"))
    source = load_run(root / "var-start").generator.state_dict()
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, source[name])
    larger = made({"class_path": "NextScale", "init_args": {**SIZE, "depth": 2}}, CLASSES)
    with pytest.raises(CheckpointMismatch, match=r"trunk\.blocks\.1\..* is not in the checkpoint"):
        begin_with(larger, str(root / "var-start"))
    with pytest.raises(RunError, match="holds a tokenizer, not a generator"):
        begin_with(larger, str(root / "ms"))
    assert generator_job(configured(root, "tuned", {**MVAR, "window": 1}, start_from=str(root / "var-start")))


def test_the_stages_of_mvar_are_trained_in_turn(root: Path) -> None:
    """A step on one scale moves the position table of that scale alone (AdamW moves what has a gradient)."""
    options = TrainOptions(**{**SHORT, "steps": 1, "weight_decay": 0.0, "ema_decay": 0.0})
    tokenizer = load_run(root / "small").tokenizer
    record = {"class_path": "NextScale", "init_args": {**MVAR, "num_classes": 3}}
    for turn, rows in {0: slice(0, 5), 2: slice(5, 14)}.items():
        generator = build(record, CLASSES, **feeding(record, tokenizer))
        before, plan = generator.position.detach().clone(), generator.curriculum
        generator.curriculum = partial(lambda turn, plan, _, steps: plan(turn, steps), turn, plan)
        folder = RunFolder(root / f"turn{turn}", "generator", record, tiny.Pictures().describe(), 0)
        train_generator(generator, tokenizer, small_stream, options, folder, tiny.begin(folder, options))
        moved = (generator.position != before).any(-1)
        assert moved[rows].all() and moved.sum() == len(moved[rows])


def small_stream(*, start_step: int, rank: int, world: int) -> Any:
    for batch in tiny.stream()(start_step=start_step, rank=rank, world=world):
        yield {**batch, "image": batch["image"][..., :6, :6]}


def run_stages(out: Path, tokenizer_run: Path, steps: int) -> None:
    options, source = TrainOptions(**{**SHORT, "steps": steps, "save_every": 3, "lr": 1e-2}), load_run(tokenizer_run)
    record = {"class_path": "NextScale", "init_args": {**MVAR, "num_classes": 3}}
    folder = RunFolder(out, "generator", record, tiny.Pictures().describe(), 0, source)
    accelerator = tiny.begin(folder, options)
    generator = build(record, CLASSES, **feeding(record, source.tokenizer))
    train_generator(generator, source.tokenizer, small_stream, options, folder, accelerator)


def test_two_processes_train_every_stage(root: Path) -> None:
    tiny.launch(2, run_stages, root / "two", root / "small", 4)
    assert load_run(root / "two").record["step"] == 4


def test_a_resumed_run_goes_on_with_the_stage_it_stopped_at(root: Path) -> None:
    run_stages(root / "whole", root / "small", 7)
    run_stages(root / "cut", root / "small", 3)
    run_stages(root / "cut", root / "small", 7)
    weights = [load_file(root / out / "generator.safetensors") for out in ("cut", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


# ---- schedules


def test_the_learning_rate_rises_from_a_share_holds_and_falls_to_a_share() -> None:
    options = TrainOptions(steps=1001, warmup=100, warmup_from=0.005, schedule="linear", hold=0.05, lr_end=0.1)
    assert lr_factor(0, options) == pytest.approx(0.005 + 0.995 / 100) and lr_factor(99, options) == 1.0
    assert lr_factor(100, options) == lr_factor(145, options) == 1.0
    for step in (200, 600, 1000):
        rest = 1 - (step - 100) / 900
        assert lr_factor(step, options) == pytest.approx(0.1 + 0.9 * rest / 0.95)
    assert lr_factor(1000, options) == pytest.approx(0.1)


def test_weight_decay_follows_half_a_cosine_where_there_is_any() -> None:
    options = TrainOptions(steps=101, weight_decay=0.05, weight_decay_end=0.08)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "position": torch.nn.Linear(2, 2, bias=False)})
    optimizer = adamw(module, options, undecayed=("position",))
    decays = []
    for step in (0, 50, 100):
        set_decay([optimizer], step, options)
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
    assert decays == [[pytest.approx(value), 0.0] for value in (0.05, 0.065, 0.08)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
