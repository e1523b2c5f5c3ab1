"""PSNR and SSIM against closed forms and a window written out by hand."""

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchmetrics.functional.image import structural_similarity_index_measure

from eval.codebook import CodebookUsage
from eval.features import FeatureNetwork, NetworkRecord
from eval.pictures import PictureError
from eval.pixels import from_uint8, to_uint8
from eval.reconstruction import ReconstructionScorer, psnr, ssim


def pictures(count: int, seed: int = 0, size: int = 24) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(20, 230, (count, 3, size, size), generator=rng, dtype=torch.uint8)


def test_psnr_of_a_constant_error() -> None:
    real = pictures(3)
    for step in (1, 5, 20):
        expected = torch.full((3,), 20 * math.log10(255 / step), dtype=torch.float64)
        assert_close(psnr(real + step, real), expected)


def test_equal_pictures() -> None:
    real = pictures(2)
    assert psnr(real, real).isinf().all()
    assert_close(ssim(real, real), torch.ones(2, dtype=torch.float64))


def noisy(real: Tensor) -> Tensor:
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(1))
    return (real.float() + 30 * noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("data_range", [255.0, 510.0])
@pytest.mark.parametrize("window", ["gaussian11", "uniform7"])
def test_ssim_is_that_of_its_definition(window: str, data_range: float) -> None:
    real = pictures(3)
    if window == "gaussian11":
        tap = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2)
        weights, sampled = torch.outer(tap, tap) / tap.sum() ** 2, 1.0
    else:
        weights, sampled = torch.full((7, 7), 1 / 49, dtype=torch.float64), 49 / 48

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, weights.expand(3, 1, *weights.shape), groups=3)

    x, y = real.double(), noisy(real).double()
    mx, my = mean(x), mean(y)
    vx, vy, both = (sampled * it for it in (mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    by_hand = (2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert_close(ssim(noisy(real), real, window, data_range), by_hand.mean((1, 2, 3)), atol=1e-10, rtol=0)


def test_ssim_agrees_with_torchmetrics_away_from_the_border() -> None:
    real = pictures(3)
    _, theirs = structural_similarity_index_measure(
        noisy(real).double(), real.double(), data_range=255.0, reduction="none", return_full_image=True
    )  # (B, 3, H, W), the border by mirrored pictures
    assert_close(ssim(noisy(real), real), theirs[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-10, rtol=0)


def test_float_grey_levels_are_compared_as_they_are() -> None:
    real = pictures(2)
    assert_close(psnr(real, real + 0.5), torch.full((2,), 20 * math.log10(510), dtype=torch.float64))
    assert_close(ssim(real, real.float(), "uniform7"), torch.ones(2, dtype=torch.float64))


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(pictures(1, size=10), pictures(1, size=10))
    assert ssim(pictures(1, size=7), pictures(1, size=7), "uniform7") == 1
    with pytest.raises(ValueError, match="unknown window 'box'; known: gaussian11, uniform7"):
        ssim(pictures(1), pictures(1), "box")


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_the_two_means_of_psnr_and_no_part_of_the_batch_size(batch: int) -> None:
    real = pictures(10)
    made = real.clone()
    made[:5] += 2
    made[5:] += 10
    scorer = ReconstructionScorer("made", "real")
    for a, b in zip(from_uint8(made).split(batch), from_uint8(real).split(batch), strict=True):
        scorer.update(a, b)
    codes = CodebookUsage(4)
    codes.update(torch.tensor([0, 1, 1, 0]))
    scores = scorer.scores({"sha256": "0"}, {"name": "set"}, batch, "cpu", codes)
    values = {score.name: score.value for score in scores}
    each = [20 * math.log10(255 / step) for step in (2, 10)]
    assert values["psnr_db"] == pytest.approx(sum(each) / 2)
    assert values["psnr_of_mean_mse_db"] == pytest.approx(10 * math.log10(255**2 / 52))
    assert values["ssim"] == pytest.approx(float(ssim(made, real).mean()))
    assert values["codebook_usage"] == 0.5
    assert values["codebook_perplexity"] == pytest.approx(2)
    provenance = scores[0].provenance
    assert provenance.samples.count == provenance.reference.count == 10
    assert provenance.samples.origin.checkpoint == {"sha256": "0"}
    assert provenance.reference.origin.record == {"name": "set"}
    assert "127.5 x + 128" in provenance.line()
    assert (provenance.computation.dtype, provenance.computation.batch_size) == ("float32", batch)


def test_both_sides_obey_the_rule() -> None:
    """A difference below half a level is none under one rule and a whole level under another."""
    real = from_uint8(pictures(2)) + 1e-3  # 0.13 levels up
    made = real - 2e-3
    values = {}
    for rule in ("trunc_128", "trunc"):
        scorer = ReconstructionScorer("made", "real", rule)
        scorer.update(made, real)
        values[rule] = scorer.scores({}, {}, 2, "cpu")[0].value
        assert values[rule] == float(psnr(to_uint8(made, rule), to_uint8(real, rule)).mean())
    assert values["trunc_128"] == math.inf
    assert values["trunc"] == pytest.approx(20 * math.log10(255), abs=1)


def test_clips_are_scored_whole_and_frame_by_frame() -> None:
    """The MSE over a clip, SSIM and LPIPS over its frames; the network sees each frame beside its original."""

    def extract(pairs: Tensor) -> dict[str, Tensor]:
        return {"lpips": (pairs[:, 0].float() - pairs[:, 1].float()).mean((1, 2, 3))}

    record = NetworkRecord("stand-in", "lpips", 1, "none", "none", "lpips_other_weights", False)
    lpips = FeatureNetwork(record, torch.device("cpu"), torch.float32, extract)
    frames = pictures(2 * 5)
    real = rearrange(frames, "(b t) c h w -> b c t h w", b=2)
    steps = torch.tensor([0, 1, 2, 3, 14, 2, 2, 2, 2, 2]).view(2, 1, 5, 1, 1)
    scorer = ReconstructionScorer("made", "real", lpips=lpips)
    for part in range(2):
        scorer.update(*(from_uint8(each)[part : part + 1] for each in (real + steps.to(torch.uint8), real)))
    scores = {score.name: score for score in scorer.scores({}, {}, 1, "cpu")}
    errors = steps.double().square().view(2, 5).mean(1)
    assert scores["psnr_db"].value == pytest.approx(float((10 * (255**2 / errors).log10()).mean()))
    assert scores["lpips_other_weights"].value == pytest.approx(3.0)
    assert scores["lpips_other_weights"].provenance.network == record
    wanted = ssim(frames + steps.flatten().to(torch.uint8).view(10, 1, 1, 1), frames).mean()
    assert scores["ssim"].value == pytest.approx(float(wanted))
    assert scores["psnr_db"].provenance.samples.frames == 5 and "each clip" in scores["psnr_db"].provenance.definition


def test_errors() -> None:
    scorer = ReconstructionScorer("made", "real")
    with pytest.raises(PictureError, match=r"made: reconstructions .* of originals"):
        scorer.update(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 32))
    with pytest.raises(PictureError, match="made: holds no pictures"):
        scorer.scores({}, {}, 1, "cpu")
