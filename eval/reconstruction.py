"""How well pictures or clips come back from a tokenizer: PSNR and SSIM in grey levels, 0 to 255, and LPIPS.

The scorer brings both sides to uint8 by the same stated rule before they are compared; LlamaGen's numbers leave the
original in float. PSNR = 10 log10(255^2 / MSE), the MSE over the pixels and channels of one picture. SSIM (Wang et al.
2004): K1 0.01, K2 0.03, mean over the places where the window fits and over channels. Of clips the MSE is over all pixels of
a clip, and SSIM and LPIPS are means over its frames.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from eval.codebook import CodebookUsage
from eval.features import FeatureNetwork
from eval.pictures import PictureError, PictureSet, PixelDigest, rounded
from eval.pixels import UINT8_RULES, from_uint8
from eval.provenance import Computation, Origin, Provenance, Score, library_versions

PSNR = "PSNR 10 log10(255^2 / MSE) in dB, MSE of each picture, mean over pictures"
PSNR_OF_MEAN = "PSNR 10 log10(255^2 / MSE) in dB of the mean MSE of all pictures"
SSIM = "SSIM, Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, range 255, mean over pictures"
LPIPS = "LPIPS 0.1, mean over pictures"
OF_CLIPS = {  # how the same is said of clips
    PSNR: "PSNR 10 log10(255^2 / MSE) in dB, MSE of each clip, mean over clips",
    PSNR_OF_MEAN: "PSNR 10 log10(255^2 / MSE) in dB of the mean MSE of all clips",
    SSIM: "SSIM, Gaussian window 11, sigma 1.5, K1 0.01, K2 0.03, range 255, mean over frames of all clips",
    LPIPS: "LPIPS 0.1, mean over frames of all clips",
}
WINDOWS = {  # weights along one axis, which sum to 1
    "gaussian11": (-((torch.arange(-5, 6, dtype=torch.float64) / 1.5) ** 2) / 2).softmax(0),
    "uniform7": torch.full((7,), 1 / 7, dtype=torch.float64),
}
USAGE = "share of the codebook that occurs at least once in all pictures"
PERPLEXITY = "exp of the entropy of the code frequencies over all pictures"


def mse(pictures: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) or clips (B, 3, T, H, W) twice, uint8 or float grey levels -> float64 (B,), in squared grey levels."""
    return (pictures.double() - reference.double()).square().flatten(1).mean(1)


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """(B, 3, H, W) or clips twice, uint8 or float grey levels -> float64 (B,) in dB; infinite for equal pictures."""
    return _decibel(mse(pictures, reference))


def ssim(pictures: Tensor, reference: Tensor, window: str = "gaussian11", data_range: float = 255.0) -> Tensor:
    """(B, 3, H, W) twice, uint8 or float grey levels -> float64 (B,), at most 1.

    window: "gaussian11", sigma 1.5 with population covariances, as Wang et al. have it, or "uniform7" with sample
    covariances, scikit-image's default. data_range: LlamaGen's numbers have twice the true one, which raises them.
    Raises ValueError for another window and for pictures it does not fit in.
    """
    if window not in WINDOWS:
        raise ValueError(f"ssim: unknown window {window!r}; known: {', '.join(WINDOWS)}")
    taps = WINDOWS[window].to(pictures.device)
    size = len(taps)
    if min(pictures.shape[-2:]) < size:
        raise ValueError(f"ssim: pictures must be at least {size}x{size}, got {tuple(pictures.shape[-2:])}")

    def mean(values: Tensor) -> Tensor:
        across = F.conv2d(values.flatten(0, 1)[:, None], taps.view(1, 1, 1, size))  # (B 3, 1, H, W - size + 1)
        return F.conv2d(across, taps.view(1, 1, size, 1)).view(*values.shape[:2], -1)

    x, y = pictures.double(), reference.double()
    mean_x, mean_y = mean(x), mean(y)
    sampled = size**2 / (size**2 - 1) if window == "uniform7" else 1.0
    spread = sampled * (mean(x.square() + y.square()) - mean_x.square() - mean_y.square())
    common = sampled * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1) * (2 * common + c2) / (spread + c2)
    return likeness.mean((1, 2))  # (B, 3, places) -> (B,)


class ReconstructionScorer:
    """Gathers batches of reconstructions beside their originals.

    reconstructions, originals: names for the record. rule: a key of UINT8_RULES. lpips: a network of pairs of pictures
    ("lpips/vgg" or "lpips/alex" of `eval.networks`), whose distance is gathered as well.
    """

    def __init__(
        self, reconstructions: str, originals: str, rule: str = "trunc_128", lpips: FeatureNetwork | None = None
    ) -> None:
        self.rule, self.lpips = rule, lpips
        self._made, self._real = PixelDigest(reconstructions), PixelDigest(originals)
        self._dtype = ""
        self._mse: list[Tensor] = []
        self._of_frames: dict[str, list[Tensor]] = {"ssim": [], "lpips": []}

    def update(self, images: Tensor, reference: Tensor) -> None:
        """float (B, 3, H, W), or clips (B, 3, T, H, W), in [-1, 1] twice. Raises PictureError where their shapes differ."""
        if images.shape != reference.shape:
            raise PictureError(
                f"{self._made.name}: reconstructions {tuple(images.shape)} of originals {tuple(reference.shape)}"
            )
        self._dtype = str(images.dtype).removeprefix("torch.")
        made = rounded(self._made.name, images, self.rule, self._made.count)
        real = rounded(self._real.name, reference, self.rule, self._real.count)
        self._made.update(made)
        self._real.update(real)
        self._mse.append(mse(made, real).cpu())
        if made.ndim == 5:
            made, real = (rearrange(clips, "b c t h w -> (b t) c h w") for clips in (made, real))
        self._of_frames["ssim"].append(ssim(made, real).cpu())
        if self.lpips is not None:
            pairs = torch.stack((made, real), dim=1).to(self.lpips.device)
            self._of_frames["lpips"].append(self.lpips.extract(pairs)["lpips"].double().cpu())

    def scores(
        self,
        checkpoint: Any,
        data: Mapping[str, Any],
        batch_size: int,
        device: str,
        codebook: CodebookUsage | None = None,
    ) -> list[Score]:
        """PSNR both ways, SSIM, LPIPS where its network is there, and, given the counts of its codes, usage and perplexity
        of the codebook.

        checkpoint, data: what the tokenizer and the data set say of themselves; batch_size, device: how and where it
        ran. Raises PictureError before any batch.
        """
        rule = UINT8_RULES[self.rule]
        made = self._made.record(Origin.of_reconstructions(rule, checkpoint))
        real = self._real.record(Origin.of_data(rule, data))
        errors = torch.cat(self._mse)
        values = {
            ("psnr_db", PSNR): float(_decibel(errors).mean()),
            ("psnr_of_mean_mse_db", PSNR_OF_MEAN): float(_decibel(errors.mean())),
            ("ssim", SSIM): float(torch.cat(self._of_frames["ssim"]).mean()),
        }
        networks = {}
        if self.lpips is not None:
            name = self.lpips.record.distance
            networks[name] = self.lpips.record
            values[name, LPIPS] = float(torch.cat(self._of_frames["lpips"]).mean())
        computation = Computation(device, self._dtype, batch_size, library_versions())
        if codebook is not None:
            values["codebook_usage", USAGE] = codebook.usage()
            values["codebook_perplexity", PERPLEXITY] = codebook.perplexity()
        words = {} if made.frames == 1 else OF_CLIPS
        return [
            Score(name, value, Provenance(words.get(said, said), networks.get(name), made, real, computation))
            for (name, said), value in values.items()
        ]


def reconstructed(originals: PictureSet, again: Callable[[Tensor], Tensor], source: Any) -> PictureSet:
    """What a tokenizer makes of a set, as floats.

    again: pictures or clips as floats in [-1, 1] -> their reconstructions. source: what the tokenizer says of itself.
    """

    def read(size: int, start: int, stop: int) -> Iterator[Tensor]:
        for pictures in originals.batches(size, start, stop):
            yield again(pictures if originals.floats else from_uint8(pictures))

    origin = Origin.of_reconstructions("not yet", source)
    return PictureSet(f"reconstructions of {originals.name}", originals.count, read, origin, floats=True)


def _decibel(errors: Tensor) -> Tensor:
    return 10 * torch.log10(255.0**2 / errors)
