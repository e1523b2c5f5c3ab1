"""Sets of clips: frames in their order, broken videos, and an order that workers and resuming do not change."""

import json
import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data.clip_set import ClipSet
from data.errors import CorruptVideo, DataError
from data.loader import batches, evaluation_batches, sample_rng
from data.sets import open_set
from data.source import Source
from data.token_cache import CacheWriter, TokenCache, TokenizerFacts, fill_cache, picture_header
from data.videos import COUNTS_FILE, VideoFiles, read_frames

STEP = 5  # from the shade of a frame to that of the next
LOSSLESS = {
    "mp4": ("libx264rgb", {"crf": "0", "g": "7"}),
    "mkv": ("ffv1", {}),
    "avi": ("mpeg4", {"qmin": "1", "qmax": "1", "bf": "2"}),
}


def write(path: Path, frames: int, first: int = 0, side: tuple[int, int] = (16, 24), kind: str | None = None) -> Path:
    """A video whose frame i is grey of shade first + STEP * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, options = LOSSLESS[kind or path.suffix[1:]]
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = side
        stream.pix_fmt = {"libx264rgb": "rgb24", "ffv1": "bgr0", "mpeg4": "yuv420p"}[codec]
        for number in range(frames):
            picture = np.full((*side, 3), first + STEP * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def numbers(image: torch.Tensor, first: int = 0) -> list[int]:
    """Which frames a clip (3, T, S, S) shows."""
    shade = ((image[0, :, 0, 0] + 1) * 127.5 - first) / STEP
    assert torch.allclose(shade, shade.round(), atol=2.5 / STEP)
    return shade.round().int().tolist()


class Pretended:
    """Videos without files: frame i of each is of shade i. Those in `broken` cannot be read."""

    def __init__(self, *counts: int, broken: tuple[int, ...] = ()) -> None:
        self.lengths, self.broken = counts, broken

    def counts(self) -> np.ndarray:
        return np.array([0 if video in self.broken else n for video, n in enumerate(self.lengths)])

    def read(self, index: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
        if index in self.broken:
            raise CorruptVideo(f"video {index} is not readable")
        shade = choose(self.lengths[index]).astype(np.uint8)[:, None, None, None] * STEP
        return np.broadcast_to(shade, (len(shade), 8, 10, 3)).copy()


def pretended(*counts: int, broken: tuple[int, ...] = (), **given: object) -> ClipSet:
    labels = np.arange(len(counts)) % 2
    names = [f"{video}.mp4" for video in range(len(counts))]
    source = Source(
        "pretended", "train", "none", Path("/v"), ["a", "b"], labels, names, Pretended(*counts, broken=broken)
    )
    return ClipSet(source, **{"frames": 4, "size": 8, **given})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five videos of two classes: 20, 9, 3 and 30, 12 frames."""
    for name, frames in (("a/0.mp4", 20), ("a/1.avi", 9), ("a/2.mkv", 3), ("b/0.mkv", 30), ("b/1.mp4", 12)):
        write(tmp_path / "train" / name, frames)
    return tmp_path


def test_a_clip_is_frames_in_order_with_the_class_of_its_folder(folder: Path) -> None:
    clips = open_set("videos", split="train", root=str(folder), size=8, frames=6)
    assert clips.classes == ["a", "b"] and clips.labels.tolist() == [0, 0, 0, 1, 1] and len(clips) == 5
    for index, frames in enumerate((20, 9, 3, 30, 12)):
        seen = [clips.sample(index, sample_rng(0, epoch, index)) for epoch in range(6)]
        for sample in seen:
            assert sample["image"].shape == (3, 6, 8, 8) and sample["image"].dtype == torch.float32
            shown = numbers(sample["image"])
            assert shown == [min(shown[0] + step, frames - 1) for step in range(6)] and shown[-1] < frames
            assert sample["label"] == clips.labels[index] and sample["index"] == index
        starts = {numbers(sample["image"])[0] for sample in seen}
        assert len(starts) > 1 if frames > 6 else starts == {0}
        assert torch.equal(clips[index]["image"], clips[index]["image"])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_frames_read_from_the_middle_are_those_of_reading_from_the_start(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"v.{kind}", 40)
    whole, met = read_frames(path, np.arange(40))
    assert met == 40 and np.abs(whole[:, 0, 0, 0] - STEP * np.arange(40)).max() <= 2
    videos = VideoFiles(tmp_path, [path.name])
    for start in range(0, 36, 3):
        for stride in (1, 2):
            wanted = start + np.arange(2) * stride
            assert np.array_equal(videos.read(0, lambda n, wanted=wanted: wanted), whole[wanted])
    assert read_frames(path, np.array([38, 40])) == (None, 40)


def test_all_clips_of_all_videos_are_indexed_by_counted_frames(folder: Path) -> None:
    clips = open_set("videos", split="train", root=str(folder), size=8, frames=4, window="consecutive")
    wanted = [(video, 4 * k) for video, n in enumerate((20, 9, 3, 30, 12)) for k in range(n // 4)]
    assert clips.rows.tolist() == [list(row) for row in wanted] and len(clips) == 17
    assert clips.labels.tolist() == [int(video > 2) for video, _ in wanted]
    for index, (_, start) in enumerate(wanted):
        assert numbers(clips[index]["image"]) == list(range(start, start + 4))
        assert numbers(clips.sample(index, sample_rng(3))["image"]) == list(range(start, start + 4))
    every_second = open_set("videos", split="train", root=str(folder), frames=4, stride=2, window="consecutive")
    assert numbers(every_second[1]["image"]) == [8, 10, 12, 14]


def test_frames_are_counted_once_and_again_where_a_file_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"split": "train", "root": str(folder), "frames": 4, "window": "consecutive"}
    first = open_set("videos", **given).rows
    kept = json.loads((folder / "train" / COUNTS_FILE).read_text())
    assert {name: count for name, (_, count) in kept.items()} == {
        "a/0.mp4": 20,
        "a/1.avi": 9,
        "a/2.mkv": 3,
        "b/0.mkv": 30,
        "b/1.mp4": 12,
    }
    counted = []
    count = VideoFiles._count
    monkeypatch.setattr(VideoFiles, "_count", lambda self, name: counted.append(name) or count(self, name))
    assert np.array_equal(open_set("videos", **given).rows, first) and counted == []
    write(folder / "train/a/2.mkv", 11)
    assert len(open_set("videos", **given)) == len(first) + 2 and counted == ["a/2.mkv"]
    cut_short(folder / "train/a/0.mp4")
    assert open_set("videos", **given).rows[:2].tolist() == [[0, 0], [1, 0]]  # its five clips are one broken one
    assert "a/0.mp4" not in json.loads((folder / "train" / COUNTS_FILE).read_text())


def test_short_videos_are_dropped_where_asked_and_none_left_is_an_error() -> None:
    assert pretended(3, 9, 5, 4, window="first", short="drop").rows[:, 0].tolist() == [1, 2, 3]
    assert pretended(3, 9, 7, 6, stride=2, short="drop").rows[:, 0].tolist() == [1, 2]
    assert pretended(3, 9, 7, 6, short="drop", stride=2).labels.tolist() == [1, 0]
    for given in ({"short": "drop"}, {"window": "consecutive"}):
        with pytest.raises(DataError, match=r"no video of /v has 4 frames, the longest is 1\.mp4 with 3"):
            pretended(2, 3, **given)


@pytest.mark.parametrize("window", ["random", "consecutive"])
def test_workers_resuming_and_broken_videos_do_not_change_the_order(window: str) -> None:
    def stream(start: int = 0, workers: int = 0) -> list[dict[str, torch.Tensor]]:
        clips = pretended(*[9 + 3 * video for video in range(12)], broken=(3, 8), window=window)
        batch = len(clips) // 3
        return list(islice(batches(clips, batch, seed=4, start_step=start, workers=workers), 9 - start))

    whole = stream()
    for start, workers in ((0, 2), (4, 0), (7, 1)):
        again = stream(start, workers)
        assert len(again) == 9 - start
        for ours, theirs in zip(whole[start:], again, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_names_counts_and_skips_broken_videos(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = folder / "train"
    cut_short(train / "a/0.mp4")
    cut_short(train / "a/1.avi")
    clips = open_set("videos", split="train", root=str(folder), size=8, frames=4, max_corrupt=2)
    caplog.clear()
    seen = list(islice(batches(clips, 5, seed=0), 3))
    indices = torch.cat([batch["index"] for batch in seen])
    assert Counter(indices.tolist()) == {2: 9, 3: 3, 4: 3}  # the next one stands in
    assert torch.equal(torch.cat([batch["label"] for batch in seen]), (indices >= 3).long())
    assert clips.corrupt == [f"{train}/a/0.mp4", f"{train}/a/1.avi"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(line.split(":")[0] for line in warnings) == clips.corrupt


def test_beyond_the_limit_training_stops_and_evaluation_always_does() -> None:
    clips = pretended(9, 9, 9, 9, broken=(0, 2), max_corrupt=1)
    with pytest.raises(DataError, match=r"(?s)2 clips cannot be read, max_corrupt is 1.*/v/0\.mp4.*/v/2\.mp4"):
        list(islice(batches(clips, 4, seed=0), 1))
    with pytest.raises(CorruptVideo, match="video 0"):
        list(evaluation_batches(pretended(9, 9, broken=(0,)), 1))
    with pytest.raises(CorruptVideo, match="video 1"):
        pretended(9, 9, broken=(1,), on_corrupt="error").sample(1, sample_rng())
    with pytest.raises(DataError, match="not one clip can be read"):
        pretended(9, 9, broken=(0, 1)).sample(1, sample_rng())


def test_a_broken_video_does_not_vanish_from_the_index_of_all_clips(folder: Path) -> None:
    cut_short(folder / "train/a/0.mp4")
    clips = open_set("videos", split="train", root=str(folder), frames=4, window="consecutive")
    assert clips.rows[:2].tolist() == [[0, 0], [1, 0]]
    with pytest.raises(CorruptVideo, match=r"a/0\.mp4"):
        clips[0]
    assert clips.sample(0, sample_rng())["index"] == 1


@pytest.mark.parametrize("content", [b"", b"no video at all" * 40])
def test_what_is_no_video_is_named(content: bytes, folder: Path) -> None:
    for name in ("a/0.mp4", "a/1.avi", "b/0.mkv"):
        (folder / "train" / name).write_bytes(content)
    clips = open_set("videos", split="train", root=str(folder), frames=4)
    for index, name in ((0, "a/0.mp4"), (1, "a/1.avi"), (3, "b/0.mkv")):
        with pytest.raises(CorruptVideo, match=name):
            clips[index]


def test_one_coin_mirrors_a_whole_clip_but_not_one_that_changes_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "v.mkv", 5)
    clips = open_set("videos", split="all", root=str(tmp_path), frames=5, size=16, flip=True)
    ramp = np.tile(np.arange(24, dtype=np.uint8)[:, None] * 10, (5, 16, 1, 3))
    monkeypatch.setattr(VideoFiles, "read", lambda self, index, choose: ramp)
    plain = clips[0]["image"]
    seen = [clips.sample(0, sample_rng(0, epoch))["image"] for epoch in range(40)]
    mirrored = [torch.equal(clip, plain.flip(-1)) for clip in seen]
    assert all(found or torch.equal(clip, plain) for found, clip in zip(mirrored, seen, strict=True))
    assert 8 <= sum(mirrored) <= 32  # 40 fair coins
    with pytest.raises(DataError, match="moving_digits: every class changes its meaning"):
        open_set("moving_digits", split="train", flip=True)


def linked(source: Path, *names: Path) -> None:
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.symlink_to(source)


def test_ucf101_is_divided_by_its_lists_and_labelled_by_file_names(tmp_path: Path) -> None:
    video, root = write(tmp_path / "v.avi", 3), tmp_path / "ucf101"
    kinds = [f"Kind{number:02d}" for number in range(100)] + ["HandStandPushups"]
    folders = {kind: kind.replace("HandStand", "Handstand") for kind in kinds}
    train, val = ([f"{folders[kind]}/v_{kind}_g{g:02d}_c01.avi" for kind in kinds] for g in (8, 1))
    linked(video, *(root / name for name in train + val))
    (root / "trainlist01.txt").write_text("".join(f"{name} {number}\n" for number, name in enumerate(train, 1)))
    (root / "testlist01.txt").write_text("".join(f"{name}\n" for name in reversed(val)))
    sets = {split: open_set("ucf101", split=split, root=str(root), frames=3) for split in ("train", "val", "all")}
    for split, names in (("train", train), ("val", val), ("all", train + val)):
        assert sets[split].source.names == sorted(names) and sets[split].classes == sorted(kinds)
        assert [sets[split].classes[label] for label in sets[split].labels] == [
            Path(name).name.split("_")[1] for name in sorted(names)
        ]
    rows = "".join(f"{i},data/ucf101/{name},x,0\n" for i, name in enumerate(train))
    (root / "ucf101_train.csv").write_text("id,path,action,label\n" + rows)
    listed = open_set("ucf101", split="train", root=str(root), frames=3)
    assert listed.describe() == sets["train"].describe() and numbers(listed[100]["image"]) == [0, 1, 2]
    (root / train[5]).unlink()
    with pytest.raises(DataError, match=rf"1 of 101 videos of .*ucf101_train\.csv .* the first is {train[5]}"):
        open_set("ucf101", split="train", root=str(root))
    linked(video, *(tmp_path / "other/train" / name for name in train[:7]))
    with pytest.raises(DataError, match="7 classes, expected 101"):
        open_set("ucf101", split="train", root=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"no list of split 'val' \(ucf101_val\.csv, testlist01\.txt"):
        open_set("ucf101", split="val", root=str(tmp_path / "other"))


def test_kinetics_is_class_folders_or_a_list_beside_flat_videos(tmp_path: Path) -> None:
    video = write(tmp_path / "v.mp4", 2)
    kinds = [f"doing {number:03d}" for number in range(600)]
    linked(video, *(tmp_path / "folders/val" / kind / "x.mp4" for kind in kinds))
    linked(video, *(tmp_path / "k600/val" / f"{999 - number}.mp4" for number in range(600)))
    rows = "".join(f"{i},data/k600/val/{999 - i}.mp4,{kind},{i}\n" for i, kind in enumerate(kinds))
    (tmp_path / "k600/k600_val.csv").write_text("id,path,action,label\n" + rows)
    for root, labels in (("folders", range(600)), ("k600", reversed(range(600)))):
        clips = open_set("kinetics600", split="val", root=str(tmp_path / root), frames=2)
        assert clips.classes == kinds and clips.labels.tolist() == list(labels)


def test_a_folder_without_classes_is_one_class_and_a_mixed_one_is_refused(folder: Path) -> None:
    flat = folder / "train/a"
    clips = open_set("videos", split="all", root=str(flat), frames=4, size=8)
    assert clips.classes == ["all"] and clips.source.names == ["0.mp4", "1.avi", "2.mkv"]
    write(folder / "train/stray.mp4", 3)
    with pytest.raises(DataError, match=r"stray\.mp4 lies beside folders"):
        open_set("videos", split="train", root=str(folder))


@pytest.mark.parametrize("transform", ["center", "center_flip"])
def test_a_token_cache_holds_every_clip(transform: str, tmp_path: Path) -> None:
    clips = pretended(9, 14, 4, window="consecutive", transform=transform)
    header = picture_header(clips, TokenizerFacts("first frames", "0" * 64, vocab_size=256), 4)
    writer = CacheWriter(tmp_path / "cache", header)

    def encode(images: torch.Tensor) -> torch.Tensor:
        assert images.shape[1:] == (3, 4, 8, 8)
        return ((images[:, 0, :, 0, 0] + 1) * 127.5).round().long()  # (n, T) shades

    assert sum(fill_cache(writer, clips, encode, 2)) == len(clips) == 6 and writer.finish()
    cache = TokenCache(tmp_path / "cache", "0" * 64)
    assert cache.labels.tolist() == clips.labels.tolist() and cache.header.crops == clips.crops
    for index, (_, start) in enumerate(clips.rows):
        assert cache[index]["tokens"].tolist() == [STEP * (start + step) for step in range(4)]
    assert cache.describe()["pictures"]["window"] == "consecutive"


def test_moments_of_clips_keep_their_three_axes(tmp_path: Path) -> None:
    clips = pretended(9, 14, window="first")
    header = picture_header(clips, TokenizerFacts("mean", "0" * 64), (6, 4, 2, 2), precision="float32")
    writer = CacheWriter(tmp_path / "cache", header)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.cat((images[..., :2, :2], torch.full_like(images[..., :2, :2], -60)), 1)  # (n, 2Z, t, h, w)

    assert sum(fill_cache(writer, clips, encode, 2)) == 2 and writer.finish()
    latent = TokenCache(tmp_path / "cache", "0" * 64)[1]["latent"]
    torch.testing.assert_close(latent, clips[1]["image"][..., :2, :2], atol=1e-6, rtol=0)


def test_opening_says_what_is_there_and_the_description_what_was_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        clips = open_set("moving_digits", split="val", size=32, frames=8, stride=2, window="first")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "moving_digits (val): 1000 clips of 10 classes" in line and "CC BY-SA 3.0" in line
    facts = clips.describe()
    assert json.loads(json.dumps(facts)) == facts
    wanted = {"videos": 1000, "count": 1000, "frames": 8, "stride": 2, "window": "first", "short": "repeat"}
    assert wanted.items() <= facts.items() and clips[0]["image"].shape == (3, 8, 32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "moving_digit5"}, "did you mean 'moving_digit' or 'moving_digits'"),
        ({"name": "digits", "frames": 16}, "digits: holds pictures; drop frames, or take one of moving_digits"),
        ({"name": "moving_digits", "window": "centre"}, "window 'centre' .* did you mean 'center'"),
        ({"name": "moving_digits", "transform": "ten"}, "transform of clips 'ten' is not known"),
        ({"name": "moving_digits", "frames": 0}, "frames is 0, stride 1; both must be at least 1"),
        ({"name": "moving_digits", "window": "uniform", "stride": 2}, "leave stride out"),
        ({"name": "moving_digits", "root": "x"}, "built in and takes no root"),
        ({"name": "ucf101"}, "ucf101: give root="),
        ({"name": "videos", "root": "/no/such/place"}, "/no/such/place does not exist"),
    ],
)
def test_what_cannot_be_opened_is_named_with_the_cure(given: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_set(**{"split": "train", **given})
