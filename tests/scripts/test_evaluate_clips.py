"""scripts/evaluate.py on models of clips: the scores that files of their clips would have, and what cannot be scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sets import open_set
from eval.clip_sets import read_videos
from eval.pictures import PictureError, PictureSet, from_tensor
from eval.pixels import from_uint8
from eval.protocols import CLIPS
from eval.provenance import Origin
from sampling.sampler import Sampler
from scripts import evaluate, sample
from tests.eval.test_fvd import blind_network, scored
from tests.small import generator_run as picture_run
from tests.small_clips import DATA, SIZE, generator_run, write_video
from training.decoder import Decoder
from training.run import load_run


@pytest.fixture(autouse=True)
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "open_network", lambda *given: blind_network())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `labelled` and `continuing`, and eight videos in `real`."""
    root = tmp_path_factory.mktemp("models")
    generator_run(root / "labelled")
    generator_run(root / "continuing", continues=True)
    for number in range(8):
        write_video(root / f"real/{number}.mp4", 20 + number, seed=number)
    return root


def call(script: Any, *words: object) -> None:
    script.main([str(word) for word in (*words, "--device", "cpu")])


def score(out: Path, name: str = "fd_blind") -> dict[str, Any]:
    (found,) = (value for key, value in json.loads(out.read_text()).items() if key.startswith(name))
    return found


def test_clips_need_no_file_to_be_scored(root: Path, tmp_path: Path) -> None:
    """Under a protocol of uint8 the same pixels by way of an npz, in any batches."""
    model = ("--run", root / "labelled", "--num", 20, "--dtype", "float64", "--seed", 3)
    call(sample, *model, "--out", tmp_path / "made.npz", "--class-plan", "random")
    against = ("--reference", root / "real", "--protocol", "stylegan-v")
    call(evaluate, "--samples", tmp_path / "made.npz", *against)
    call(evaluate, *model, *against, "--out", tmp_path / "model.json", "--batch-size", 7)
    by_file, at_once = score(tmp_path / "made.stylegan-v.json"), score(tmp_path / "model.json")
    assert at_once["value"] == pytest.approx(by_file["value"], rel=1e-6)
    made, here = (content["provenance"]["samples"] for content in (by_file, at_once))
    assert made["sha256"] == here["sha256"] and (here["count"], here["frames"]) == (20, 16)
    assert here["origin"]["class_sampling"] == "random"  # the protocol's own


def originals(root: Path, protocol: str) -> PictureSet:
    return CLIPS[protocol].real(read_videos(root / "real"), SIZE)


def test_a_tokenizer_of_clips_reconstructs_the_reference(root: Path, tmp_path: Path) -> None:
    words = ("--reference", root / "real", "--protocol", "larp-reconstruction", "--out", tmp_path / "scores.json")
    call(evaluate, "--run", root / "labelled-tokenizer", *words, "--batch-size", 3)
    found, real = score(tmp_path / "scores.json"), originals(root, "larp-reconstruction")
    clips = torch.cat(list(real.batches(8)))
    tokenizer = load_run(root / "labelled-tokenizer").tokenizer
    with torch.no_grad():
        again = tokenizer.decode(tokenizer.encode(from_uint8(clips)))
    (wanted,) = scored("larp-reconstruction", from_tensor("again", again, Origin.unknown()), real, blind_network())
    assert found["value"] == pytest.approx(wanted.value, rel=1e-6) and found["value"] > 0
    assert found["provenance"]["samples"]["count"] == 8


def test_what_follows_is_scored_on_the_clips_whose_frames_were_given(root: Path, tmp_path: Path) -> None:
    """All frames as they decode, the given ones too: LARP's rule."""
    words = ("--reference", root / "real", "--protocol", "larp", "--dtype", "float64", "--frames", 3)
    call(evaluate, "--run", root / "continuing", *words, "--out", tmp_path / "scores.json", "--batch-size", 3)
    found, real = score(tmp_path / "scores.json"), originals(root, "larp")
    run = load_run(root / "continuing")
    decoder = Decoder(run.generator.double(), run.tokenizer.double(), Sampler(), 0, torch.device("cpu"), {})
    made = decoder.predict(torch.arange(8), from_uint8(torch.cat(list(real.batches(8)))[:, :, :3]).double())
    (wanted,) = scored("larp", from_tensor("made", made.float(), Origin.unknown()), real, blind_network())
    assert found["value"] == pytest.approx(wanted.value, rel=1e-5)
    assert found["provenance"]["samples"]["origin"]["record"]["given_frames"] == 3


def test_a_data_set_of_videos_is_a_reference(root: Path, tmp_path: Path) -> None:
    """The protocol's cuts of its videos, every other frame of them."""
    for number in range(3):
        write_video(tmp_path / f"real/val/a/{number}.mp4", 40, seed=number)
    words = ("--run", root / "labelled", "--num", 4, "--protocol", "larp", "--out", tmp_path / "a.json")
    call(evaluate, *words, "--reference", "videos", "--reference-root", tmp_path / "real", "--reference-stride", 2)
    record = score(tmp_path / "a.json")["provenance"]["reference"]
    assert (record["count"], record["frames"], record["name"]) == (3, 16, "videos val")
    assert record["origin"]["record"]["stride"] == 2
    videos = open_set("moving_digits", split="val").source.pictures
    frames = torch.stack(list(evaluate.frames_of_video(videos, 3, 7, 3)))
    assert torch.equal(frames, torch.from_numpy(videos.read(3, lambda n: torch.arange(0, n, 3).numpy())).movedim(-1, 1))


def test_what_cannot_be_scored_is_named(root: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.json")
    with pytest.raises(PictureError, match="--protocol rc512: this model makes clips; their protocols are larp"):
        call(evaluate, "--run", root / "labelled", "--reference", "digits", "--protocol", "rc512", *out)
    picture_run(tmp_path / "pictures", DATA)
    with pytest.raises(PictureError, match="--protocol larp: this model makes pictures; their protocols are adm"):
        call(evaluate, "--run", tmp_path / "pictures", "--reference", root / "real", "--protocol", "larp", *out)
    with pytest.raises(PictureError, match="digits: holds pictures; the data sets of videos are moving_digits"):
        call(evaluate, "--run", root / "labelled", "--reference", "digits", "--protocol", "larp", *out)
    words = ("--run", root / "labelled", "--reference", root / "real")
    with pytest.raises(PictureError, match="has 16 frames, the protocol compares 17; make longer samples"):
        call(evaluate, *words, "--protocol", "seed-voken-video", "--num", 4, *out)
    with pytest.raises(PictureError, match="--frames is 16, this model makes clips of 16 frames: give 1 to 15"):
        call(evaluate, "--run", root / "continuing", *words[2:], "--protocol", "larp", "--frames", 16, *out)
    with pytest.raises(PictureError, match="--frames: no generator that is given frames makes these samples"):
        call(evaluate, *words, "--protocol", "larp", "--frames", 3, *out)
