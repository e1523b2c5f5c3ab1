"""One pass over pictures: the same from any number of processes, after any interruption, and nothing looked at twice."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from eval.features import FeatureNetwork
from eval.frechet import FeatureStatistics
from eval.gather import Mean, Moments, Rows
from eval.inception_score import equal_splits, inception_scores
from eval.look import Want, look
from eval.pictures import PictureError, PictureSet, from_tensor
from eval.protocol import UNROUNDED
from eval.provenance import Origin
from tests.eval import looking
from tests.eval.looking import BATCH, COUNT, GATHERINGS, PICTURES, numbers, seen
from tests.processes import ENVIRONMENT, command


def start(*words: object, processes: int) -> subprocess.CompletedProcess[str]:
    job = command(Path(looking.__file__), *words, processes=processes)
    return subprocess.run(job, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one process sees without interruption, anywhere to save, or another batch size."""
    looking.seen_pictures.clear()
    return numbers(*seen(None))


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_kept_is_what_the_metrics_are_defined_on(alone: dict[str, Tensor]) -> None:
    rows = PICTURES.float().mean((1, 3))
    moments, few, kept, splits, _, right, mean = map(str, GATHERINGS)
    statistics = FeatureStatistics(8)
    statistics.update(rows)
    assert_close(alone[f"{moments} cov"], statistics.cov(), rtol=1e-12, atol=1e-9)
    pixels = PICTURES.double().flatten(1)
    assert_close(alone[f"{few} cov"], pixels.T.cov(correction=0), rtol=1e-12, atol=1e-9)
    assert torch.equal(alone[f"{kept} "], rows)
    order = torch.from_numpy(np.random.RandomState(2020).permutation(COUNT))
    assert_close(
        alone[f"{splits} "], inception_scores(rows[:, :5] / 50, equal_splits(COUNT, 4, order)), rtol=1e-12, atol=0
    )
    assert alone[f"{right} "] == (rows[:, :5].argmax(1) == torch.arange(COUNT) % 5).double().mean()
    assert_close(alone[f"{mean} "], PICTURES.double().mean(), rtol=1e-6, atol=0, check_dtype=False)
    assert sum(looking.seen_pictures) == COUNT


def test_two_processes_see_the_same(alone: dict[str, Tensor], tmp_path: Path) -> None:
    made = start(tmp_path / "work", tmp_path / "seen", processes=2)
    assert made.returncode == 0, made.stderr
    for rank in range(2):
        same(torch.load(tmp_path / f"seen.{rank}"), alone)


def test_a_killed_pass_is_taken_up_by_another_number_of_processes(alone: dict[str, Tensor], tmp_path: Path) -> None:
    made = start(tmp_path / "work", tmp_path / "seen", 30, processes=2)
    assert made.returncode != 0 and not list(tmp_path.glob("seen.*"))
    assert list((tmp_path / "work").glob("*/*.part"))
    looking.seen_pictures.clear()
    same(numbers(*seen(tmp_path / "work")), alone)
    assert 0 < sum(looking.seen_pictures) < COUNT - 20
    looking.seen_pictures.clear()
    same(numbers(*seen(tmp_path / "work")), alone)  # finished, and asked again
    assert not looking.seen_pictures


def test_a_pass_is_not_taken_up_with_other_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(tmp_path)
    monkeypatch.setattr(looking, "PICTURES", PICTURES.flip(0))
    with pytest.raises(
        PictureError, match=r"set: picture 0 is another than when this evaluation was interrupted; remove"
    ):
        seen(tmp_path)


def test_floats_are_rounded_by_each_rule_and_shown_once(origin: Origin) -> None:
    """Networks see uint8 under every rule, and grey levels where a protocol does not round."""
    images = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    made = PictureSet("made", 9, lambda size, a, b: iter(images[a:b].split(size)), origin, floats=True)

    def extract(pictures: Tensor) -> dict[str, Tensor]:
        return {"grey": pictures.double().flatten(1)}

    net = FeatureNetwork(looking.network().record, torch.device("cpu"), torch.float64, extract)
    wants = {rule: Want("net", Rows("grey"), rule) for rule in ("round", "trunc", UNROUNDED)}
    found = look(made, wants.values(), {"net": net}, 4)
    exact = ((images.clamp(-1, 1) + 1) * 127.5).double().flatten(1)
    values = {rule: found[want].value for rule, want in wants.items()}
    assert_close(values[UNROUNDED], exact, rtol=0, atol=1e-4)
    assert torch.equal(values["trunc"], exact.floor()) and torch.equal(values["round"], exact.round())
    said = {rule: found[want].pictures for rule, want in wants.items()}
    assert said["round"].sha256 != said["trunc"].sha256
    assert said["trunc"].origin.quantisation == "255 (clamp(x, -1, 1) + 1) / 2, truncated"
    assert said[UNROUNDED].origin.quantisation == "none, floats clamped to their range"


def test_pairs_are_shown_side_by_side(origin: Origin) -> None:
    def extract(pairs: Tensor) -> dict[str, Tensor]:
        return {"differ": (pairs[:, 0] != pairs[:, 1]).double().mean((1, 2, 3))}

    net = FeatureNetwork(looking.network().record, torch.device("cpu"), torch.float64, extract)
    want = Want("pairs", Mean("differ"), pairs=True)
    made, real = (
        from_tensor(name, PICTURES[place], origin) for name, place in (("made", [0, 1, 2]), ("real", [0, 5, 2]))
    )
    found = look(made, [want], {"pairs": net}, 2, originals=real)
    assert found[want].value == pytest.approx(float((PICTURES[1] != PICTURES[5]).double().mean()) / 3)
    with pytest.raises(PictureError, match="made: 3 reconstructions need as many originals in the same order, got 100"):
        look(made, [want], {"pairs": net}, 2, originals=looking.pictures())


def test_clips_pass_like_pictures(origin: Origin) -> None:
    clips = PICTURES[:96].unflatten(0, (12, 8)).movedim(1, 2)  # (12, 3, 8, 8, 8)
    net = FeatureNetwork(
        looking.network().record,
        torch.device("cpu"),
        torch.float32,
        lambda it: {"grey": it.float().mean((3, 4)).flatten(1)},
    )
    want = Want("net", Moments("grey"))
    found = look(from_tensor("clips", clips, origin), [want], {"net": net}, 5)[want]
    assert found.value.mean.shape == (24,) and (found.pictures.frames, found.pictures.height) == (8, 8)


def test_sets_that_are_not_what_they_say(origin: Origin) -> None:
    net = {"tiny": looking.network()}
    want = Want("tiny", Moments("rows"))

    def look_at(pictures: PictureSet, batch_size: int = BATCH) -> None:
        look(pictures, [want, *looking.WANTS[5:6]] if pictures.labels is not None else [want], net, batch_size)

    short = PictureSet("short", 90, lambda size, a, b: iter(PICTURES[a : min(b, 70)].split(size)), origin)
    with pytest.raises(PictureError, match="short: said to hold 90 pictures, gave 70"):
        look_at(short)
    mixed = PictureSet("mixed", 9, lambda size, a, b: iter([PICTURES[:5], PICTURES[5:9, ..., :6]]), origin)
    with pytest.raises(PictureError, match="mixed: picture 5 is 8x6, those before are 8x8; a score needs one size"):
        look_at(mixed, 5)
    with pytest.raises(PictureError, match="set: picture 2 has label 8, the network knows 5 classes"):
        look_at(from_tensor("set", PICTURES[:4], origin, torch.tensor([0, 1, 8, 0])), 2)
    with pytest.raises(PictureError, match=r"set: .*at least 2 pictures, got 1"):
        look_at(from_tensor("set", PICTURES[:1], origin))
    broken = PICTURES.float() / 127.5 - 1
    broken[41, 0, 0, 0] = torch.nan
    with pytest.raises(PictureError, match="set: picture 41 holds NaN or infinite pixels; look at what made it"):
        look(from_tensor("set", broken, origin), [Want("tiny", Moments("rows"), "round")], net, BATCH)
