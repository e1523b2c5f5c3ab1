"""The audit of a set of pictures: facts by hand, the same from any batches and processes, in bounded memory."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from eval.audit import NAMED, ROW, Audit, Finding
from eval.pictures import PictureError


def noise(count: int, seed: int = 0, size: tuple[int, int] = (4, 5)) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=rng, dtype=torch.uint8)


def audited(pictures: Tensor, labels: Tensor | None = None, **asked: int) -> Audit:
    audit = Audit("set", **asked)
    audit.update(pictures, labels)
    return audit


def finding(audit: Audit, name: str) -> Finding:
    return next(it for it in audit.findings() if it.name == name)


@pytest.fixture
def faulty() -> tuple[Tensor, Tensor]:
    """40 pictures in 4 classes: 7 and 30 are 3 again, 11 is black, 12 is red, 20 and 11 are grey."""
    pictures = noise(40)
    pictures[[7, 30]] = pictures[3].clone()
    pictures[11] = 0
    pictures[12] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    pictures[20] = pictures[20, :1].clone()
    return pictures, torch.arange(40) % 4


def test_all_facts_by_hand(faulty: tuple[Tensor, Tensor]) -> None:
    pictures, labels = faulty
    audit = audited(pictures, labels, expected=50, num_classes=5)
    assert audit.count == 40
    assert audit.duplicates() == [(3, 7), (3, 30)]
    assert audit.constant() == [11, 12]
    assert audit.grey() == 2
    assert audit.sizes() == {(4, 5): 40}
    assert audit.levels.tolist() == np.bincount(pictures.flatten().numpy(), minlength=256).tolist()
    assert audit.value_range() == (int(pictures.min()), int(pictures.max()))
    balance = audit.class_balance()
    assert balance is not None
    assert (balance.fewest, balance.most, balance.missing) == (0, 10, (4,))
    assert balance.chi_square == pytest.approx(4 * 2**2 / 8 + 8)  # counts 10 10 10 10 0, expected 8
    levels = {it.name: it.level for it in audit.findings()}
    warned = {"count", "duplicates", "classes", "constant"}
    assert levels == {
        name: "warning" if name in warned else "note"
        for name in ("count", "duplicates", "classes", "range", "constant", "resolution", "colour")
    }
    assert "40 pictures, the protocol asks for 50" in finding(audit, "count").text
    assert "make 10 more" in finding(audit, "count").text
    assert "2 of 40 pictures equal an earlier one (7 = 3, 30 = 3)" in finding(audit, "duplicates").text
    assert "2 of 40 pictures are of one colour (11, 12)" in finding(audit, "constant").text
    assert "missing classes: 1 (4)" in finding(audit, "classes").text
    lines = audit.lines()
    assert lines[0] == "audit of set" and len(lines) == 8
    assert lines[1].startswith("    warning count: 40 pictures")


def test_a_sound_set_has_notes_only() -> None:
    audit = audited(noise(40), torch.arange(40) % 4, expected=40)
    assert {it.level for it in audit.findings()} == {"note"}
    assert finding(audit, "count").text == "40 pictures, as the protocol asks"
    assert "10 to 10 per class, chi-square 0, p = 1: balanced" in finding(audit, "classes").text


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_batches_and_processes_make_no_difference(faulty: tuple[Tensor, Tensor], batch_size: int) -> None:
    """Three processes take every third picture; what they saw is added up in any order."""
    pictures, labels = faulty
    whole = audited(pictures, labels).record()
    alone = Audit("set")
    for part in torch.arange(40).split(batch_size):
        alone.update(pictures[part], labels[part])
    assert alone.record() == whole
    merged = Audit("set")
    for rank in (2, 0, 1):
        shard = Audit("set")
        for part in torch.arange(rank, 40, 3).split(batch_size):
            shard.update(pictures[part], labels[part], part)
        merged.add(shard.sums())
    assert merged.record() == whole and merged.sha256() == alone.sha256()
    assert json.loads(json.dumps(whole)) == whole


def test_a_picture_counted_by_two_processes_is_found() -> None:
    pictures, merged = noise(5), Audit("set", expected=5)
    for part in (torch.tensor([0, 2, 4]), torch.tensor([1, 3, 0])):  # the sampler repeats 0 to fill the last batch
        shard = Audit("set", expected=5)
        shard.update(pictures[part], indices=part)
        merged.add(shard.sums())
    assert merged.duplicates() == [(0, 0)]
    assert "6 pictures, the protocol asks for 5" in finding(merged, "count").text
    assert "leave out the last 1" in finding(merged, "count").text


@pytest.mark.parametrize("changed", [0, 59])
def test_one_level_in_one_pixel_is_no_duplicate(changed: int) -> None:
    pictures = noise(1).repeat(2, 1, 1, 1)
    assert audited(pictures).duplicates() == [(0, 1)]
    pictures[1].view(-1)[changed] ^= 1
    assert audited(pictures).duplicates() == []


def test_mixed_sizes_are_counted_and_are_no_duplicates() -> None:
    audit = Audit("set")
    for size in ((2, 8), (4, 4), (4, 4)):
        audit.update(torch.full((1, 3, *size), 9, dtype=torch.uint8))
    assert audit.sizes() == {(4, 4): 2, (2, 8): 1}
    assert audit.duplicates() == [(1, 2)]
    assert finding(audit, "resolution").level == "warning"
    assert "2 sizes (height x width): 2 of 4x4, 1 of 2x8" in finding(audit, "resolution").text


def test_clips_are_audited_as_wholes() -> None:
    """Of 6 clips one is another again, one is still, one is still and of one colour."""
    clips = torch.stack([noise(4, seed) for seed in range(6)]).movedim(2, 1)  # (6, 3, 4, 4, 5)
    clips[4] = clips[1].clone()
    clips[2] = clips[2, :, :1].clone()
    clips[3] = 9
    audit = audited(clips, expected=6)
    assert audit.duplicates() == [(1, 4)] and audit.still() == [2, 3] and audit.constant() == [3]
    assert audit.sizes() == {(4, 4, 5): 6}
    assert audit.record()["sizes"] == [{"width": 5, "height": 4, "frames": 4, "count": 6}]
    assert "2 of 6 clips are still, all their frames equal (2, 3)" in finding(audit, "motion").text
    assert "6 of 4x4x5 (frames x height x width)" in finding(audit, "resolution").text
    moving = audited(torch.stack([noise(4, seed) for seed in range(3)]).movedim(2, 1))
    assert finding(moving, "motion").level == "note"


def test_long_lists_are_cut_and_counted() -> None:
    audit = audited(torch.zeros(30, 3, 2, 2, dtype=torch.uint8), torch.full((30,), 19))
    assert (
        "(1 = 0, 2 = 0, " in finding(audit, "duplicates").text and "10 = 0, ...)" in finding(audit, "duplicates").text
    )
    record = audit.record()
    assert record["duplicates"]["count"] == 29 and len(record["duplicates"]["first"]) == NAMED
    assert record["constant"] == {"count": 30, "first": list(range(NAMED))}
    assert record["classes"]["missing"] == {"count": 19, "first": list(range(NAMED))}


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_p_is_that_of_a_chi_square_test(classes: int) -> None:
    labels = torch.randint(0, classes, (3000,), generator=torch.Generator().manual_seed(0))
    balance = audited(noise(3000, size=(1, 2)), labels, num_classes=classes).class_balance()
    assert balance is not None
    expected = chisquare(np.bincount(labels.numpy(), minlength=classes))
    assert balance.chi_square == pytest.approx(expected.statistic, rel=1e-12)
    assert balance.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert balance.verdict == "random"


def test_random_draws_are_called_uneven_once_in_a_thousand() -> None:
    """400 sets of 500 labels in 10 classes: more than 4 called uneven has probability 7e-5 at rate 1/1000."""
    rng, called = torch.Generator().manual_seed(0), 0
    pictures = torch.zeros(500, 3, 1, 1, dtype=torch.uint8)
    for _ in range(400):
        balance = audited(pictures, torch.randint(0, 10, (500,), generator=rng), num_classes=10).class_balance()
        assert balance is not None
        called += balance.verdict == "uneven"
    assert called <= 4


def test_uneven_and_missing_classes_are_warned_of() -> None:
    pictures = noise(300)
    uneven = audited(pictures, (torch.arange(300) % 4).clamp_max(2), num_classes=3)  # 75 75 150
    assert finding(uneven, "classes").level == "warning"
    assert "less even than random draws; draw classes again" in finding(uneven, "classes").text
    missing = audited(pictures, torch.arange(300) % 9, num_classes=10)
    assert "make pictures of the missing classes" in finding(missing, "classes").text
    few = audited(pictures[:6], torch.arange(6), num_classes=10)  # six pictures cannot be of ten classes
    assert finding(few, "classes").level == "note"
    assert "(rough): balanced; missing classes: 4 (6, 7, 8, 9)" in finding(few, "classes").text
    one = audited(pictures, torch.zeros(300, dtype=torch.int64))
    assert "p = 1: balanced" in finding(one, "classes").text


def test_labels_of_some_pictures_only_are_warned_of() -> None:
    audit = Audit("set")
    audit.update(noise(8), torch.arange(8) % 2)
    audit.update(noise(3, seed=1))
    assert "3 pictures have no label; give labels to all pictures or to none" in finding(audit, "classes").text
    assert finding(audit, "classes").level == "warning"
    assert finding(audited(noise(2)), "classes").text == "no labels, so the balance of classes is not known"


def test_casts_and_narrow_ranges_are_warned_of() -> None:
    unit = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    unit[0] = 1
    assert "floats in [0, 1] cast to uint8" in finding(audited(unit.to(torch.uint8)), "range").text
    signed = (2 * unit - 1).round().to(torch.int64).to(torch.uint8)  # -1 wraps around to 255
    assert signed.unique().tolist() == [0, 1, 255]
    assert "floats in [-1, 1] cast to uint8" in finding(audited(signed), "range").text
    narrow = finding(audited(noise(20) // 2), "range")
    assert narrow.level == "warning"
    assert narrow.text.startswith("grey levels 0 to 127, 128 of 256 occur: suspiciously narrow")
    assert finding(audited((255 * unit).to(torch.uint8)), "range").level == "note"


def test_no_pictures() -> None:
    audit = Audit("set", expected=3)
    assert [it.name for it in audit.findings()] == ["count"]
    assert audit.findings()[0].level == "warning"
    assert audit.record()["range"] is None
    with pytest.raises(PictureError, match="set: holds no pictures"):
        audit.value_range()


def test_bad_input_is_named_and_leaves_no_trace() -> None:
    audit = Audit("set", num_classes=10)
    with pytest.raises(PictureError, match=r"set: expected uint8 pictures \(B, 3, H, W\) or clips.*got torch.float32"):
        audit.update(noise(2).float())
    with pytest.raises(PictureError, match=r"got torch.uint8 \(2, 4, 5, 3\)"):
        audit.update(noise(2).movedim(1, -1))
    with pytest.raises(
        PictureError, match=r"labels must be integers, one for each of 2 pictures; they are torch.int64"
    ):
        audit.update(noise(2), torch.arange(3))
    with pytest.raises(PictureError, match=r"indices must be integers.*torch.float32"):
        audit.update(noise(2), indices=torch.zeros(2))
    for label in (-1, 10):
        with pytest.raises(PictureError, match=f"picture 1 has label {label}, classes go from 0 to 9"):
            audit.update(noise(2), torch.tensor([3, label]))
    assert audit.count == 0 and not audit.levels.any()


def test_a_hundred_thousand_pictures_fit_in_memory() -> None:
    count = 100_000
    pictures, labels = noise(count, size=(2, 2)), torch.arange(count) % 1000
    pictures[-1] = pictures[0]
    audit = Audit("set")
    tracemalloc.start()
    for batch, classes in zip(pictures.split(500), labels.split(500), strict=True):
        audit.update(batch, classes)
    kept = tracemalloc.get_traced_memory()[0]
    record = audit.record()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record["duplicates"] == {"count": 1, "first": [[0, count - 1]]}
    assert ROW.itemsize == 53
    assert kept < 1.5 * ROW.itemsize * count
    assert peak < 60e6
