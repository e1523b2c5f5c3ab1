"""The pieces of the loops against their closed forms, and what the loops promise about numbers that go wrong."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from data.loader import batches
from tests.training import tiny
from training.loop import Journal, Stream, TrainingDiverged, TrainOptions, Watch, adamw, lr_factor, reseed
from training.losses import TokenizerObjective
from training.run import RunFolder, load_run
from training.tokenizer_loop import train_tokenizer


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    tiny.export_tokenizer(tmp_path / "vq")
    tiny.run_still(tmp_path / "whole", tmp_path / "vq", batch_size=6)
    tiny.run_still(tmp_path / "parts", tmp_path / "vq", batch_size=2, accumulation=3)
    parts, whole = (load_file(tmp_path / run / "generator.safetensors") for run in ("parts", "whole"))
    for name, tensor in whole.items():
        assert_close(parts[name], tensor, atol=1e-11, rtol=0, msg=name)
    losses = [[line["loss"] for line in tiny.journal(tmp_path / run) if "loss" in line] for run in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_training_learns_at_the_scheduled_rate(tmp_path: Path) -> None:
    schedule = {"warmup": 10, "schedule": "cosine", "lr": 2e-2, "save_every": 100, "sample_every": 40}
    tiny.run_tokenizer(tmp_path / "vq", steps=40, **schedule)
    tiny.run_generator(tmp_path / "ar", tmp_path / "vq", steps=40, **schedule)
    options = TrainOptions(steps=40, **schedule)
    for run, part, share in (("vq", "l2", 0.97), ("ar", "loss", 0.5)):  # noise does not compress, but its tokens repeat
        lines = [line for line in tiny.journal(tmp_path / run) if part in line]
        assert [line["lr"] for line in lines] == [2e-2 * lr_factor(step, options) for step in range(40)]
        first, last = (sum(line[part] for line in half) / 10 for half in (lines[:10], lines[-10:]))
        assert last < share * first, (run, first, last)


def test_reports_leave_the_weights_alone(tmp_path: Path) -> None:
    quiet = {"log_every": 100, "sample_every": 0, "save_every": 100}
    tiny.export_tokenizer(tmp_path / "vq")
    tiny.run_generator(tmp_path / "loud", tmp_path / "vq", steps=4, sample_every=1)
    tiny.run_generator(tmp_path / "quiet", tmp_path / "vq", steps=4, **quiet)
    weights = [(tmp_path / run / "generator.safetensors").read_bytes() for run in ("loud", "quiet")]
    assert weights[0] == weights[1]


def poisoned(*, start_step: int, rank: int, world: int, bad: int) -> Iterator[dict[str, Tensor]]:
    """The tiny pictures; batch `bad` holds a picture that is no number."""
    for number, batch in enumerate(batches(tiny.Pictures(), 4, 0, start_step, rank, world), start_step):
        if number == bad:
            batch["image"][0, 0, 0, 0] = math.nan
        yield batch


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_no_number_ends_training(log_every: int, tmp_path: Path) -> None:
    def train(stream: Stream, steps: int) -> None:
        options = TrainOptions(steps=steps, **{**tiny.QUICK, "log_every": log_every})
        folder = RunFolder(tmp_path, "tokenizer", tiny.TOKENIZER, tiny.Pictures().describe(), seed=0)
        accelerator, objective = tiny.begin(folder, options), TokenizerObjective(terms={"commitment": 0.25})
        train_tokenizer(tiny.make_tokenizer(), objective, stream, options, folder, accelerator)

    with pytest.raises(TrainingDiverged) as error:
        train(partial(poisoned, bad=6), steps=20)
    for part in ("step 6:", "l2", "loss", f"{tmp_path}/checkpoints/step_00000004", "train.lr", "train.warmup"):
        assert part in str(error.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004"]
    assert not (tmp_path / "tokenizer.safetensors").exists()
    train(tiny.stream(), steps=8)
    assert all(tensor.isfinite().all() for tensor in load_run(tmp_path).tokenizer.state_dict().values())


def test_watch_means_every_name_over_the_times_it_came() -> None:
    watch = Watch(Accelerator())
    watch.add(0, {"loss": torch.tensor(1.0), "l2": 4.0})
    watch.add(1, {"loss": torch.tensor(3.0)})
    watch.add(1, {})
    watch.check(lambda: None)
    assert watch.read() == {"loss": 2.0, "l2": 4.0}
    watch.add(2, {"loss": 7.0})
    assert watch.read() == {"loss": 7.0}


def test_watch_names_the_first_bad_step_and_its_parts() -> None:
    watch = Watch(Accelerator())
    for step, (loss, l2, norm) in enumerate([(1, 1, 1), (math.inf, math.nan, 1), (math.nan, 1, math.nan)]):
        watch.add(step, {"loss": loss, "l2": l2, "l1": 1.0})
        watch.add(step, {"gradient_norm": norm})
    with pytest.raises(TrainingDiverged, match=r"step 1: not finite: loss, l2\. Last good checkpoint: none yet"):
        watch.check(lambda: None)


def test_vectors_are_not_decayed() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).requires_grad_(False))
    groups = adamw(module, TrainOptions(weight_decay=0.3)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert [decays.get(id(parameter)) for parameter in module.parameters()] == [0.3, 0.0, 0.0, 0.0, None, None]


@pytest.mark.parametrize(
    ("schedule", "middle"), [("constant", 1.0), ("linear", 0.5 * 1.2), ("cosine", 0.2 + 0.8 * 0.5)]
)
def test_learning_rate_rises_and_falls(schedule: str, middle: float) -> None:
    options = TrainOptions(steps=21, warmup=10, schedule=schedule, lr_end=0.2)
    assert [lr_factor(step, options) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert lr_factor(10, options) == 1
    assert lr_factor(15, options) == pytest.approx(middle)
    assert lr_factor(20, options) == pytest.approx(1.0 if schedule == "constant" else 0.2)


def test_numbers_of_a_step_depend_on_seed_step_and_process() -> None:
    drawn = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        reseed(*key)
        drawn[key] = torch.rand(4).tolist()
        reseed(*key)
        assert torch.rand(4).tolist() == drawn[key]
    assert len(set(map(tuple, drawn.values()))) == 4


def test_a_resumed_journal_forgets_what_comes_again(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    Journal(tmp_path, Accelerator(), first=3).write(4, {"loss": 2.0})
    assert tiny.journal(tmp_path) == [{"step": step, "loss": 1.0} for step in (1, 2, 3)] + [{"step": 4, "loss": 2.0}]


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.accumulation is 0, must be at least 1"):
        TrainOptions(accumulation=0)
