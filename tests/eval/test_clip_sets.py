"""Sets of videos: what is read is what was written, clips are the frames they say, and every fault names its file."""

import json
import random
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from eval.clip_sets import FITS, Cut, VideoSet, clips_of, fit, frames_of, halves, read_videos
from eval.clips import Place, centre_window, consecutive_clips, larp_reference
from eval.pictures import PictureError
from eval.provenance import Origin


def video(frames: int, seed: int = 0, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth moving pattern, uint8 (T, H, W, 3), of which no two frames are equal."""
    y, x = np.mgrid[:height, :width]
    shift = np.arange(frames)[:, None, None]
    waves = [np.sin((x + 2 * shift) / 5 + seed), np.cos((y + shift) / 7 + seed), np.sin((x + y + 3 * shift) / 9)]
    return ((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, codec: str, pixels: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


write_mp4 = partial(write_video, codec="libx264", pixels="yuv420p")
write_lossless = partial(write_video, codec="ffv1", pixels="bgr0")


def write_frames(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{number}.png")


def channels_first(frames: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(frames), "t h w c -> c t h w")


def in_memory(*videos: np.ndarray) -> VideoSet:
    names = [f"video {number}" for number in range(len(videos))]

    def frames(numbers: list[int]) -> Iterator[Tensor]:
        return (rearrange(torch.from_numpy(videos[number]), "t h w c -> t c h w") for number in numbers)

    return VideoSet("memory", names, [len(it) for it in videos], frames, Origin.of_data("uint8 as decoded", {}))


def of_counts(*counts: int) -> VideoSet:
    return VideoSet("memory", [f"v{n}" for n in range(len(counts))], counts, lambda _: iter(()), Origin.unknown())


def whole(videos: VideoSet, size: int = 3, start: int = 0, stop: int | None = None) -> Tensor:
    clips = clips_of(videos, [Place(number, range(count)) for number, count in enumerate(videos.counts)])
    return torch.cat(list(clips.batches(size, start, stop)))


@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_gives_its_clips_in_any_batches_and_shares(compressed: bool, tmp_path: Path) -> None:
    array = np.stack([video(10, seed) for seed in range(5)])
    (np.savez_compressed if compressed else np.savez)(tmp_path / "clips.npz", array, np.arange(5) * 2)
    (tmp_path / "clips.json").write_text(json.dumps({"count": 5, "seed": 3}))
    videos = read_videos(tmp_path / "clips.npz")
    expected = rearrange(torch.from_numpy(array), "n t h w c -> n c t h w")
    for size in (1, 2, 7):
        assert torch.equal(whole(videos, size), expected)
    assert torch.equal(whole(videos, 2, 1, 4), expected[1:4])
    assert videos.counts == [10] * 5 and videos.labels.tolist() == [0, 2, 4, 6, 8] and videos.origin.seed == 3
    middle = clips_of(videos, [Place(4, range(1, 8, 3)), Place(1, range(2, 5))])
    assert torch.equal(torch.cat(list(middle.batches(9))), torch.stack((expected[1, :, 2:5], expected[4, :, 1:8:3])))
    assert middle.labels.tolist() == [2, 8]


def test_videos_of_every_kind_come_back_frame_by_frame(tmp_path: Path) -> None:
    write_lossless(tmp_path / "b" / "exact.mkv", video(12))
    write_mp4(tmp_path / "b" / "close.mp4", video(47))
    write_video(tmp_path / "c.avi", video(30), "mpeg4", "yuv420p")
    grey = [Image.fromarray(np.full((24, 32, 3), 12 * number, np.uint8)) for number in range(20)]
    grey[0].save(tmp_path / "a.gif", save_all=True, append_images=grey[1:], duration=40)
    videos = read_videos(tmp_path)
    assert [Path(name).name for name in videos.names] == ["a.gif", "close.mp4", "exact.mkv", "c.avi"]
    assert videos.counts == [20, 47, 12, 30]
    gif, close, exact, avi = (torch.stack(list(frames)) for frames in videos.frames([0, 1, 2, 3]))
    assert gif.flatten(1).unique(dim=1).tolist() == [[12 * number] for number in range(20)]
    assert torch.equal(rearrange(exact, "t c h w -> c t h w"), channels_first(video(12)))
    for found, count in ((close, 47), (avi, 30)):  # lossy; still each is nearest to its own original
        original = rearrange(torch.from_numpy(video(count)), "t h w c -> t c h w")
        away = (found[:, None].float() - original.float()).abs().mean((2, 3, 4))
        assert torch.equal(away.argmin(1), torch.arange(count))


def test_frames_in_folders_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    write_frames(tmp_path / "second", video(12, seed=1))
    write_frames(tmp_path / "first", video(11))
    (tmp_path / "labels.json").write_text("[7, 4]")
    videos = read_videos(tmp_path)
    assert videos.counts == [11, 12] and videos.labels.tolist() == [7, 4]
    clips = clips_of(videos, [Place(1, range(12))])
    assert torch.equal(next(clips.batches(1))[0], channels_first(video(12, seed=1)))
    assert clips.labels.tolist() == [4]


def test_clips_are_cut_while_frames_pass() -> None:
    """Overlapping, strided and repeated clips, drawn in any order; no frame after the last that is needed is asked for."""
    frames = [torch.full((3, 2, 2), number, dtype=torch.uint8) for number in range(40)]
    asked: list[int] = []

    def passing() -> Iterator[Tensor]:
        for number, frame in enumerate(frames):
            asked.append(number)
            yield frame

    videos = VideoSet("v", ["v"], [40], lambda numbers: iter([passing()]), Origin.unknown())
    ranges = [range(20, 23), range(3, 12, 3), range(3, 12, 3), range(5, 8)]
    clips = clips_of(videos, [Place(0, wanted) for wanted in ranges])
    reading = clips.batches(1)
    found = []
    for last in (9, 9, 9, 22):
        found.append(next(reading)[0, 0, :, 0, 0].tolist())
        assert max(asked) == last
    assert not list(reading) and max(asked) == 22
    assert found == [[3, 6, 9], [3, 6, 9], [5, 6, 7], [20, 21, 22]]


def test_frames_of_clips_are_pictures_in_any_batches() -> None:
    videos = in_memory(*(video(10, seed) for seed in range(3)))
    pictures = frames_of(clips_of(videos, Cut("whole", 10)(videos)))
    expected = torch.cat([rearrange(torch.from_numpy(video(10, seed)), "t h w c -> t c h w") for seed in range(3)])
    assert pictures.count == 30
    for size, start, stop in ((4, 0, 30), (10, 0, 30), (64, 0, 30), (3, 7, 24), (25, 10, 11)):
        batches = list(pictures.batches(size, start, stop))
        assert torch.equal(torch.cat(batches), expected[start:stop]) and max(map(len, batches)) <= size


def test_the_clips_of_larp() -> None:
    videos = of_counts(33, 15, 48, 16)
    counts = [33, 0, 48, 16]
    assert Cut("consecutive")(videos) == consecutive_clips(counts) and len(consecutive_clips(counts)) == 6
    assert Cut("larp", count=4, seed=42)(videos) == larp_reference(counts, 4)
    assert set(Cut("larp", count=10_000, seed=42)(videos)) == set(consecutive_clips(counts))  # all there are


def test_the_clips_of_stylegan_v() -> None:
    """Videos shorter than length * stride are left out; the last start still leaves the last strided frame inside."""
    videos = of_counts(127, 128, 400, 500)
    places = Cut("random", 16, 8, count=2)(videos)
    assert [place.video for place in places] == [1, 2]
    assert all(len(place.frames) == 16 and place.frames.step == 8 for place in places)
    starts = {Cut("random", 16, 8, seed=seed)(of_counts(128))[0].frames.start for seed in range(100)}
    assert starts == set(range(8))
    assert Cut("random", 16, 8, seed=1)(videos) == Cut("random", 16, 8, seed=1)(videos)
    made = Cut("first", 16, 8)(of_counts(16, 121, 300))
    assert [place.frames for place in made] == [range(16), range(0, 121, 8), range(0, 121, 8)]


def test_the_clips_of_seed_voken() -> None:
    places = Cut("centre", 17, count=2)(of_counts(16, 17, 30, 40))
    assert places == [Place(1, range(17)), Place(2, centre_window(30))]


@pytest.mark.parametrize(
    ("cut", "counts", "message"),
    [
        (Cut("whole"), (16, 12, 16), "v1: has 12 frames, the protocol compares 16; make longer samples"),
        (Cut("whole"), (16, 32), "v1: has 32 frames, the protocol compares 16; cut them to 16 first"),
        (
            Cut("first", 16, 8),
            (128, 120),
            "v1: has 120 frames, the protocol compares 16 frames, every 8th; make longer",
        ),
        (Cut("larp"), (8, 15, 3), "no video has 16 frames, the longest is v1 with 15"),
        (Cut("random", 16, 8), (127,), "no video has 128 frames, the longest is v0 with 127"),
    ],
)
def test_too_few_or_too_many_frames_are_told_with_the_video(cut: Cut, counts: tuple[int, ...], message: str) -> None:
    with pytest.raises(PictureError, match=message):
        cut(of_counts(*counts))


@pytest.mark.parametrize(("height", "width", "long"), [(24, 32, 10), (32, 24, 10), (24, 24, 8), (19, 45, 18)])
def test_the_fit_of_larp_is_resize_and_crop_of_torchvision(height: int, width: int, long: int) -> None:
    """The longer side rounded down, the crop's corner rounded to even, antialiased; and floats stay floats."""
    clip = channels_first(video(3, 0, height, width))
    shape = (long, 8) if height > width else (8, long)
    resized = F.interpolate(rearrange(clip / 255, "c t h w -> t c h w"), shape, mode="bilinear", antialias=True)
    top, left = (round((side - 8) / 2) for side in shape)
    expected = rearrange(resized[..., top : top + 8, left : left + 8], "t c h w -> c t h w")
    assert_close(fit(clip, 8, "larp"), expected * 2 - 1, atol=1e-6, rtol=0)


def test_the_fit_of_stylegan_v_is_pils() -> None:
    frames = video(2)
    found = fit(channels_first(frames), 8, "stylegan-v")
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((10, 8), Image.Resampling.LANCZOS).crop((1, 0, 9, 8))
        assert np.array_equal(rearrange(found[:, number], "c h w -> h w c").numpy(), np.array(picture))


@pytest.mark.parametrize("rule", FITS)
def test_only_videos_of_another_size_are_fitted(rule: str) -> None:
    """One of the right size among others is, and moves by no more than float arithmetic does."""
    small, large = video(4, 0, 8, 8), video(4)
    places = [Place(0, range(4)), Place(1, range(4))]
    as_they_are = clips_of(in_memory(small, small), places, 8, rule)
    assert torch.equal(next(as_they_are.batches(1))[0], channels_first(small)) and not as_they_are.floats
    clips = clips_of(in_memory(large, small), places, 8, rule, "all")
    other, same = next(clips.batches(2))
    assert torch.equal(other, fit(channels_first(large), 8, rule))
    assert clips.floats == other.is_floating_point() == (rule != "stylegan-v")
    grey = (same + 1) * 127.5 if clips.floats else same.float()
    assert_close(grey, channels_first(small).float(), atol=1e-4, rtol=0)
    assert clips.origin.record == {"clips": "all", "videos": 2, "fit": FITS[rule]}
    assert as_they_are.origin.record["fit"] == "none"


def test_halves_have_no_video_in_common() -> None:
    videos = of_counts(*(16 * random.Random(0).choices(range(1, 9), k=30)[number] for number in range(30)))
    places = Cut("consecutive")(videos)
    first, second = halves(videos, places, seed=1)
    assert not {place.video for place in first} & {place.video for place in second}
    assert len(first) == len(second) > len(places) / 2 - 8 and set(first) | set(second) <= set(places)
    assert halves(videos, places, seed=1) == (first, second) != halves(videos, places, seed=2)
    with pytest.raises(PictureError, match="clips of one video; two disjoint sets need at least 2"):
        halves(videos, places[:1])


def cut_off(name: str, share: float) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if name.endswith(".gif"):
            frames = [Image.fromarray(frame) for frame in video(20)]
            frames[0].save(folder / name, save_all=True, append_images=frames[1:])
        else:
            write_video(folder / name, video(40), "mpeg4", "yuv420p")
        whole_file = (folder / name).read_bytes()
        (folder / name).write_bytes(whole_file[: int(share * len(whole_file))])

    return make


def a_page(folder: Path) -> None:
    (folder / "page.mp4").write_text("<html>quota exceeded</html>")


def videos_and_pictures(folder: Path) -> None:
    write_lossless(folder / "v.mkv", video(4))
    Image.fromarray(video(1)[0]).save(folder / "p.png")


def a_picture_beside(folder: Path) -> None:
    write_frames(folder / "clip", video(2))
    Image.fromarray(video(1)[0]).save(folder / "preview.png")


def too_few_labels(folder: Path) -> None:
    write_frames(folder / "clip", video(2))
    (folder / "labels.json").write_text("[1, 2]")


def too_few_clips(folder: Path) -> None:
    write_frames(folder / "clip", video(2))
    (folder / "samples.json").write_text('{"count": 10000}')


def a_cut_off_frame(folder: Path) -> None:
    write_frames(folder / "clip", video(4))
    file = folder / "clip" / "frame2.png"
    file.write_bytes(file.read_bytes()[:200])


def unequal_frames(folder: Path) -> None:
    write_frames(folder / "clip", video(4))
    Image.fromarray(video(1, 0, 20, 20)[0]).save(folder / "clip" / "frame3.png")


def unequal_videos(folder: Path) -> None:
    write_lossless(folder / "a.mkv", video(4))
    write_lossless(folder / "b.mkv", video(4, 0, 32, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (cut_off("cut.avi", 0.8), r"cut\.avi: \d+ frames can be decoded, 40 should be there; copy it again"),
        (cut_off("cut.mp4", 0.8), r"cut\.mp4: not a readable video at frame 0"),
        (cut_off("cut.gif", 0.8), r"cut\.gif: cut off after \d+ frames; copy it again"),
        (a_page, r"page\.mp4: not a readable video at frame 0 \(.*; copy it again, or leave it out"),
        (lambda folder: None, r"holds no videos \(\.mp4, .*\) and no folders of frames"),
        (videos_and_pictures, r"holds videos \(.*v\.mkv\) and pictures \(.*p\.png\); leave one kind"),
        (a_picture_beside, r"preview\.png: a picture beside the folders of frames; put"),
        (too_few_labels, r"labels\.json: 2 labels for 1 videos"),
        (too_few_clips, r"holds 1 videos, its record says 10000; finish or copy"),
        (a_cut_off_frame, r"frame2\.png: not a readable picture"),
        (unequal_frames, r"clip: frame 3 is 20x20, frame 0 is 24x32; all frames of a video must have one size"),
        (unequal_videos, r"b\.mkv: its clip is 4x32x32, that of .*a\.mkv is 4x24x32; a score needs one size"),
    ],
)
def test_a_faulty_folder_is_an_error_that_names_the_file(
    make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(PictureError, match=message) as caught:
        whole(read_videos(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"clips": np.zeros((2, 9, 4, 4, 3), np.uint8)}, r"has no array arr_0.*it holds \['clips'\]"),
        ({"arr_0": np.zeros((2, 9, 4, 4, 3), np.float32)}, r"it is float32 \(2, 9, 4, 4, 3\); round floats to uint8"),
        ({"arr_0": np.zeros((2, 3, 9, 4, 4), np.uint8)}, r"channels last; it is uint8 \(2, 3, 9, 4, 4\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, r"these are pictures; score them under a protocol for pictures"),
        ({"arr_0": np.zeros((0, 9, 4, 4, 3), np.uint8)}, r"arr_0 holds no clips"),
        (
            {"arr_0": np.zeros((2, 9, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, np.int64)},
            "3 labels for 2 clips",
        ),
    ],
)
def test_a_faulty_npz_is_an_error_that_names_it(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "clips.npz", **arrays)
    with pytest.raises(PictureError, match=message) as caught:
        read_videos(tmp_path / "clips.npz")
    assert str(tmp_path / "clips.npz") in str(caught.value)


def test_a_damaged_npz_is_found(tmp_path: Path) -> None:
    path = tmp_path / "clips.npz"
    np.savez(path, np.stack([video(9, seed) for seed in range(6)]))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        middle = archive.infolist()[0].header_offset + 3 * 9 * 24 * 32 * 3
    path.write_bytes(content[:middle] + b"damage" + content[middle + 6 :])
    with pytest.raises(PictureError, match=r"clips\.npz: damaged at clip 5 of 6 .*; copy or make it again"):
        whole(read_videos(path))
    path.write_bytes(content[:middle])
    with pytest.raises(PictureError, match=r"clips\.npz: not a whole npz file"):
        read_videos(path)
    with pytest.raises(PictureError, match="nowhere: no such file or folder"):
        read_videos(tmp_path / "nowhere")
