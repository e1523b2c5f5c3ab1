"""Every score of a protocol gets the interval of its kind, made from the rows of the samples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eval.bootstrap import (
    Interval,
    frechet_interval,
    inception_interval,
    jackknife_interval,
    kernel_interval,
    overlap_left_out,
    share_interval,
)
from eval.features import FeatureNetwork, NetworkRecord
from eval.frechet import FeatureStatistics
from eval.gather import Splits
from eval.intervals import score_intervals, wanted_for_intervals
from eval.kernel import gaussian_kernel
from eval.look import look
from eval.metrics import (
    clip_discrepancy,
    frechet,
    inception_score,
    kernel_distance,
    kynkaanniemi,
    label_accuracy,
    naeem,
)
from eval.pictures import PictureSet, from_tensor
from eval.protocol import Protocol
from eval.provenance import Origin, Score
from eval.score import score, wanted_of_reference, wanted_of_samples

RECORD = NetworkRecord("means", "mean", 12, "f" * 64, "none", "frechet_mean_distance", False)
SPLITS = Splits("logits", splits=2, seed=1)


def extract(pictures: Tensor) -> dict[str, Tensor]:
    """Means of rows, and logits of how near their mean is to the middle of each quarter of the grey levels."""
    levels = torch.tensor([126.0, 127.0, 128.0, 129.0])
    mean = pictures.float().mean((1, 2, 3))
    return {"mean": pictures.float().mean((1, 3)) / 20, "logits": -(mean[:, None] - levels).abs()}


NETWORK = FeatureNetwork(RECORD, torch.device("cpu"), torch.float32, extract)
N = "means"


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return Protocol(
        name="everything",
        source="this test",
        metrics=(
            frechet(N, "mean", "fid"),
            inception_score(N, SPLITS, "2 splits"),
            kernel_distance(N, "mean", least=2),
            clip_discrepancy(N, "mean"),
            kynkaanniemi(N, "mean"),
            naeem(N, "mean"),
            label_accuracy(N),
        ),
        count=None,
        class_sampling=None,
        uint8="trunc_128",
        reference="more of the same",
    )


def pictures(name: str, count: int, seed: int) -> PictureSet:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 12, 16), generator=rng, dtype=torch.uint8)
    return from_tensor(name, images, Origin.unknown(), torch.arange(count) % 4)


@pytest.fixture(scope="module")
def sides() -> tuple[Tensor, Tensor, Tensor]:
    """Features of samples and reference, logits of samples."""
    ours, theirs = (extract(next(iter(it.batches(100)))) for it in (pictures("a", 60, 0), pictures("b", 80, 1)))
    return ours["mean"], theirs["mean"], ours["logits"]


@pytest.fixture(scope="module")
def evaluated(protocol: Protocol) -> tuple[dict[str, Score], dict[str, Interval]]:
    samples, real = pictures("a", 60, 0), pictures("b", 80, 1)
    wants = [*wanted_of_samples([protocol], samples), *wanted_for_intervals([protocol], samples)]
    seen = look(samples, wants, {N: NETWORK}, 32)
    reference = look(real, wanted_of_reference([protocol]), {N: NETWORK}, 32)
    scores = score(protocol, seen, reference).scores
    return {it.name: it for it in scores}, score_intervals(protocol, seen, reference, scores)


def test_all_but_deviations_have_one(evaluated: tuple[dict[str, Score], dict[str, Interval]]) -> None:
    scores, intervals = evaluated
    assert intervals.keys() == {f"everything/{name}" for name in scores if "_std" not in name}
    assert len(intervals) == 9
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(scores[name.removeprefix("everything/")].value, rel=1e-5, abs=1e-9)
        assert interval.low < interval.high


def test_each_is_made_by_its_method(
    evaluated: tuple[dict[str, Score], dict[str, Interval]], sides: tuple[Tensor, Tensor, Tensor]
) -> None:
    scores, intervals = evaluated
    fake, real, logits = sides
    gaussians = []
    for rows in (fake, real):
        gathered = FeatureStatistics(12)
        gathered.update(rows)
        gaussians.append(gathered.gaussian())
    values = {name.split("@")[0].split("_")[0]: it.value for name, it in scores.items() if "_std" not in name}
    closed, opened = overlap_left_out(fake, real, 3, True), overlap_left_out(fake, real, 5, False)
    scatter = next(it.value for name, it in scores.items() if name.startswith("kd_std")) / 10
    expected = [
        frechet_interval([fake], *gaussians, 60),
        inception_interval(logits, SPLITS.of_pictures(60)),
        kernel_interval(fake, real, values["kd"], scatter=scatter),
        kernel_interval(fake, real, values["mmd"], lambda x, y: 1000 * gaussian_kernel(x, y)),
        share_interval(round(values["precision"] * 60), 60),
        jackknife_interval(values["recall"], closed.recall),
        None,
        jackknife_interval(values["coverage"], opened.coverage),
        share_interval(round(values["label"] * 60), 60),
    ]
    for found, wanted in zip(intervals.values(), expected, strict=True):
        if wanted is not None:
            assert found.method == wanted.method
            assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-6)


def test_without_rows_there_is_none(protocol: Protocol) -> None:
    samples, real = pictures("a", 60, 0), pictures("b", 80, 1)
    protocol = replace(protocol, metrics=protocol.metrics[:2])
    seen = look(samples, wanted_of_samples([protocol], samples), {N: NETWORK}, 32)
    reference = look(real, wanted_of_reference([protocol]), {N: NETWORK}, 32)
    assert score_intervals(protocol, seen, reference, score(protocol, seen, reference).scores) == {}
