"""scripts/sample.py on models of clips: films, filmstrips, sets that the harness reads, what follows given frames."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.given import GivenFrames
from eval.clip_sets import read_videos
from eval.pixels import to_uint8
from layers.noise import Noise
from layers.spec import Condition
from sampling.decode import generate
from sampling.sampler import Sampler
from scripts import sample
from tests.small_clips import FRAMES, SIZE, generator_run, write_video
from training.run import RunError, load_run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generator_run(tmp_path_factory.mktemp("runs") / "labelled")


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generator_run(tmp_path_factory.mktemp("runs") / "continuing", continues=True)


def call(*words: object) -> None:
    sample.main([str(word) for word in (*words, "--device", "cpu")])


def film(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def by_hand(run: Path, labels: list[int]) -> torch.Tensor:
    """uint8 (N, T, H, W, 3)."""
    loaded = load_run(run)
    noise, about = Noise(0, torch.arange(len(labels))), Condition(label=torch.tensor(labels))
    with torch.inference_mode():
        clips = loaded.tokenizer.decode(generate(loaded.generator, about, Sampler(), noise).tokens)
    return to_uint8(clips.movedim(1, 2)).movedim(2, -1)


def off_by_rounding(made: np.ndarray, wanted: torch.Tensor) -> bool:
    """Packed weights sum in another order: a value on the edge of a grey level may fall on the other side."""
    return made.shape == wanted.shape and np.abs(made.astype(int) - wanted.numpy()).max() <= 1


def test_a_filmstrip_has_a_row_a_sample_and_films_a_row_a_class(labelled: Path, tmp_path: Path) -> None:
    for ending in ("png", "gif", "mp4"):
        call(
            "--run", labelled, "--classes", 2, 0, "--per-class", 3, "--clips", tmp_path / f"clips.{ending}", "--fps", 5
        )
    wanted = by_hand(labelled, [2, 2, 2, 0, 0, 0])
    step = SIZE + 2
    strip = np.asarray(Image.open(tmp_path / "clips.png"))
    assert strip.shape == (6 * step + 2, FRAMES * step + 2, 3)
    rows = strip[2:, 2:].reshape(6, step, FRAMES, step, 3)[:, :SIZE, :, :SIZE].transpose(0, 2, 1, 3, 4)
    assert off_by_rounding(rows, wanted)
    for ending in ("gif", "mp4"):
        assert film(tmp_path / f"clips.{ending}").shape == (FRAMES, 2 * step + 2, 3 * step + 2, 3)


def test_the_harness_reads_what_is_written(labelled: Path, tmp_path: Path) -> None:
    for out in ("clips.npz", "clips"):
        call("--run", labelled, "--num", 20, "--out", tmp_path / out, "--batch-size", 7)
    wanted = by_hand(labelled, [i % 3 for i in range(20)])
    with np.load(tmp_path / "clips.npz") as made:
        assert made["arr_0"].dtype == np.uint8 and off_by_rounding(made["arr_0"], wanted)
        assert made["arr_1"].tolist() == [i % 3 for i in range(20)]
    for out in ("clips.npz", "clips"):
        videos = read_videos(tmp_path / out)
        assert list(videos.counts) == [FRAMES] * 20 and videos.labels.tolist() == [i % 3 for i in range(20)]
        read = torch.stack([torch.stack(list(frames)) for frames in videos.frames(range(20))]).movedim(2, -1)
        if out == "clips.npz":
            assert off_by_rounding(read.numpy(), wanted)
        else:  # an MP4 keeps the light of every pixel nearly, and a colour for four of them
            light = [(clips.double() @ torch.tensor([0.299, 0.587, 0.114]).double()) for clips in (read, wanted)]
            assert (light[0] - light[1]).abs().mean((2, 3)).max() < 0.2 * light[1].std()
    rule = "clamp(127.5 x + 128, 0, 255), truncated"
    assert json.loads((tmp_path / "clips.json").read_text())["quantisation"] == rule
    folder = json.loads((tmp_path / "clips/samples.json").read_text())
    assert folder["quantisation"] == f"{rule}, then H.264, crf 12, 4:2:0 (lossy)" and folder["count"] == 20


def test_what_follows_begins_with_the_given_frames(continuing: Path, tmp_path: Path) -> None:
    """Bit for bit; the rest is the decode of what the generator makes of their tokens."""
    for number in range(2):
        write_video(tmp_path / f"given/{number}.mp4", 7, seed=number)
    call("--run", continuing, "--clip", tmp_path / "given", "--num", 4, "--out", tmp_path / "made.npz")
    given = GivenFrames(tmp_path / "given", 5, SIZE)
    frames = torch.stack([given[i % 2] for i in range(4)])
    made = np.load(tmp_path / "made.npz")
    assert made["arr_0"].shape == (4, FRAMES, SIZE, SIZE, 3) and made["arr_1"].tolist() == [0, 1, 0, 1]
    read = np.stack([film(tmp_path / f"given/{i % 2}.mp4")[:5] for i in range(4)])
    assert np.array_equal(made["arr_0"][:, :5], read)
    run = load_run(continuing)
    with torch.inference_mode():
        told = Condition(clip=run.tokenizer.encode_start(frames))
        clips = run.tokenizer.decode(generate(run.generator, told, Sampler(), Noise(0, torch.arange(4))).tokens)
    assert off_by_rounding(made["arr_0"][:, 5:], to_uint8(clips.movedim(1, 2)).movedim(2, -1)[:, 5:])
    record = json.loads((tmp_path / "made.json").read_text())["given"]
    assert record["frames"] == 5 and record["videos"] == ["0.mp4", "1.mp4"]


def test_a_file_of_another_size_is_cropped_and_the_number_of_frames_chosen(continuing: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "wide.mp4", 9, size=(24, 40))
    words = ("--run", continuing, "--clip", tmp_path / "wide.mp4", "--frames", 3, "--per-class", 2)
    call(*words, "--clips", tmp_path / "strip.png")
    strip = torch.from_numpy(np.array(Image.open(tmp_path / "strip.png")))
    step = SIZE + 2
    rows = strip[2:, 2:].reshape(2, step, FRAMES, step, 3)[:, :SIZE, :, :SIZE].permute(0, 2, 1, 3, 4)
    wanted = to_uint8(GivenFrames(tmp_path / "wide.mp4", 3, SIZE)[0].movedim(0, 1)).movedim(1, -1)
    assert torch.equal(rows[:, :3], wanted.expand(2, -1, -1, -1, -1))
    assert not torch.equal(rows[0, 3:], rows[1, 3:])


def test_what_cannot_be_made_is_named(
    labelled: Path, continuing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "short.mp4", 4)
    (tmp_path / "none").mkdir()
    out, clip = ("--clips", tmp_path / "x.gif"), ("--clip", tmp_path / "short.mp4")
    with pytest.raises(DataError, match=r"short\.mp4: has 4 frames, the first 5 are needed .* or fewer frames"):
        call("--run", continuing, *clip, *out)
    with pytest.raises(DataError, match="holds no videos"):
        call("--run", continuing, "--clip", tmp_path / "none", *out)
    with pytest.raises(DataError, match="nowhere does not exist"):
        call("--run", continuing, "--clip", tmp_path / "nowhere", *out)
    with pytest.raises(RunError, match=r"--frames is 16, this model makes clips of 16 frames: give 1 to 15"):
        call("--run", continuing, *clip, "--frames", 16, *out)
    with pytest.raises(RunError, match="goes on from given clips: give --clip"):
        call("--run", continuing, *out)
    with pytest.raises(RunError, match="this generator is not told of clips"):
        call("--run", labelled, *clip, *out)
    with pytest.raises(RunError, match="give --clip FILE_OR_FOLDER, too"):
        call("--run", continuing, "--frames", 3, *out)
    with pytest.raises(RunError, match="this model makes clips: give --clips FILE"):
        call("--run", labelled, "--grid", tmp_path / "x.png")
    with pytest.raises(SystemExit):
        call("--run", continuing, *clip, *out, "--sampler.guidance.scale", 2)
    assert "has no null condition: leave --sampler.guidance out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("--run", labelled, "--clips", tmp_path / "x.webm")
    assert "x.webm must end in one of .mp4, .gif, .png" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))
