"""Training a generator on what follows the first frames of clips: it reads them, resumes, and says where it cannot."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data.loader import batches
from layers.record import build
from tests.small_clips import GENERATOR, SIZE, TOKENS, generator_run, tokenizer_run, write_video
from tests.training.tiny import begin, journal
from training.caching import cache_tokens
from training.decoder import Decoder
from training.generator_loop import lesson, train_generator
from training.jobs import generator_job
from training.loop import TrainOptions
from training.options import generator_parser, parse
from training.run import CLASSES, RunError, RunFolder, load_run

RECORD = {
    "class_path": "NextToken",
    "init_args": {**GENERATOR, "clip_tokens": TOKENS, "dropout": 0.0, "token_dropout": 0.0},
}


class Clips:
    """8 clips of squares that fade into others."""

    labels = np.zeros(8, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, last = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(index))
        clip = torch.lerp(first, last, torch.linspace(0, 1, 16)[:, None, None])
        image = clip.repeat_interleave(SIZE // 2, -1).repeat_interleave(SIZE // 2, -2).clamp(-1, 1)
        return {"image": image, "label": torch.tensor(0), "index": index}

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return self[index]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_run(tmp_path_factory.mktemp("runs") / "larp")


def train(tokenizer: Path, out: Path, steps: int, frames: int = 5) -> None:
    source, options = load_run(tokenizer), TrainOptions(steps=steps, lr=1e-2, trackers=(), log_every=1, save_every=20)
    folder = RunFolder(out, "generator", RECORD, {"name": "clips", "classes": ["all"]}, 0, source)
    accelerator = begin(folder, options)
    generator = build(RECORD, CLASSES, spec=source.tokenizer.spec)
    stream = partial(batches, Clips(), 8, 0)
    train_generator(generator, source.tokenizer, stream, options, folder, accelerator, given_frames=frames)


def test_it_learns_what_follows_and_reads_what_is_given(tokenizer: Path, tmp_path: Path) -> None:
    """The loss falls below what can be known without the clip, and rises where another clip is given."""
    train(tokenizer, tmp_path / "run", 60)
    losses = [line["loss"] for line in journal(tmp_path / "run") if "loss" in line]
    run, clips = load_run(tmp_path / "run"), Clips()
    batch = {"image": torch.stack([clips[i]["image"] for i in range(8)]), "label": torch.zeros(8, dtype=torch.int64)}
    tokens, told = lesson(batch, run.tokenizer, torch.device("cpu"), 5)
    shares = [torch.bincount(column).double() / 8 for column in tokens.T]
    unknown = -torch.stack([(share * share.clamp_min(1e-9).log()).sum() for share in shares]).mean()
    assert losses[0] > unknown > 4 * losses[-1]  # nats a token
    with torch.no_grad():
        own = run.generator.loss(tokens, told)[0]
        others = run.generator.loss(tokens, told.select(torch.arange(8).roll(3)))[0]
    assert own < 0.5 * unknown < others


def test_what_is_given_are_the_first_frames_standing_still(tokenizer: Path) -> None:
    run, clip = load_run(tokenizer), Clips()[3]
    batch = {"image": clip["image"][None], "label": clip["label"][None]}
    tokens, told = lesson(batch, run.tokenizer, torch.device("cpu"), 3)
    still = torch.cat((clip["image"][:, :3], clip["image"][:, 2:3].expand(-1, 13, -1, -1)), dim=1)
    assert torch.equal(told.clip, run.tokenizer.encode(still[None])) and set(told.fields()) == {"clip"}
    assert torch.equal(tokens, run.tokenizer.encode(batch["image"]))


def test_a_run_resumed_is_the_run_that_was_not_stopped(tokenizer: Path, tmp_path: Path) -> None:
    train(tokenizer, tmp_path / "whole", 6)
    train(tokenizer, tmp_path / "parts", 3)
    train(tokenizer, tmp_path / "parts", 6)
    whole, parts = ((tmp_path / name / "generator.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def config(tokenizer: Path, out: Path, told: dict[str, Any], data: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = {
        "out": str(out),
        "tokenizer_run": str(tokenizer),
        "data": {"name": "moving_digits", "batch_size": 2, "held_out": 1, **data},
        "generator": {"class_path": "NextToken", "init_args": {**GENERATOR, **told}},
        "train": {"steps": 2, "log_every": 1, "save_every": 2, "sample_every": 2, "trackers": []},
        **more,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return parse(generator_parser(), ["--config", str(path)])


def test_a_configuration_makes_a_run_that_goes_on_from_clips(tokenizer: Path, tmp_path: Path) -> None:
    told = config(tokenizer, tmp_path / "run", {"clip_tokens": TOKENS}, {})
    assert generator_job(told)
    run = load_run(tmp_path / "run")
    assert run.given_frames == 5 and (tmp_path / "run/samples/step_00000002.png").stat().st_size
    assert "held_out_loss" in journal(tmp_path / "run")[-1]
    assert Decoder(run.generator, run.tokenizer, None, 0, torch.device("cpu"), {}).continues
    assert generator_job({**told, "resume": True}) is False
    assert load_run(generator_run(tmp_path / "labelled")).given_frames is None


@pytest.mark.parametrize(
    ("told", "data", "more", "said"),
    [
        (
            {},
            {"given_frames": 5},
            {},
            "data.given_frames is 5, but no clip conditions this generator; give it clip_tok",
        ),
        ({"clip_tokens": 5}, {}, {}, "clip_tokens is 5, the tokenizer makes 6 of a clip"),
        (
            {"clip_tokens": TOKENS},
            {"given_frames": 16},
            {},
            "data.given_frames is 16, of clips of 16 frames: give 1 to",
        ),
        ({"clip_tokens": TOKENS}, {}, {"sampler": {"guidance": {"scale": 2.0}}}, "leave sampler.guidance out"),
    ],
)
def test_what_cannot_be_trained_is_named(
    tokenizer: Path, tmp_path: Path, told: dict[str, Any], data: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunError, match=said):
        generator_job(config(tokenizer, tmp_path / "run", told, data, **more))
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_cache_holds_no_frames_to_be_given(tokenizer: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_video(tmp_path / f"train/a/{number}.mp4", 16)
    data = {"name": "videos", "root": str(tmp_path)}
    cache_tokens(tokenizer, "videos", tmp_path / "cache", root=str(tmp_path), transform="center")
    told = config(tokenizer, tmp_path / "run", {"clip_tokens": TOKENS}, data, token_cache=str(tmp_path / "cache"))
    with pytest.raises(RunError, match="learns from clips: leave token_cache out"):
        generator_job(told)
