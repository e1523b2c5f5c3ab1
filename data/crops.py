"""From a picture of any size to square crops: pure functions, randomness given.

Sources: the centre and random crops of ADM (Dhariwal & Nichol 2021, arXiv:2105.05233), used by LlamaGen, MAR, DiT and
their descendants; the ten-crop of LlamaGen's token caches (Sun et al. 2024, arXiv:2406.06525); the centre crop of VAR
(Tian et al. 2024, arXiv:2404.02905). PIL's filters throughout: those of torchvision on tensors
differ by several levels.

A picture is a PIL image or uint8 (H, W, 3); a crop of size S is uint8 (S, S, 3).
"""

from collections.abc import Callable
from math import ceil

import numpy as np
from PIL import Image
from torchvision.transforms import functional

Picture = Image.Image | np.ndarray
VAR_MARGIN = 1.125  # VAR shrinks the shorter side to this many crop sizes


def center_crop_arr(image: Picture, size: int) -> np.ndarray:
    """ADM: shorter side to `size` (box halvings, then bicubic), then the centre, offsets rounded down."""
    resized = _shrink(image, size)
    return _cut(resized, size, (resized.height - size) // 2, (resized.width - size) // 2)


def random_crop_arr(
    image: Picture,
    size: int,
    *,
    draws: tuple[int, int, int] | None = None,
    rng: np.random.Generator | None = None,
    min_frac: float = 0.8,
    max_frac: float = 1.0,
) -> np.ndarray:
    """ADM: shorter side to a random length `edge`, then a crop at a random place.

    edge is uniform in ceil(size / max_frac) .. ceil(size / min_frac), crop_y and crop_x in all places that fit; they
    come from `rng` in this order, or are given as draws = (edge, crop_y, crop_x).
    Raises ValueError unless exactly one of draws and rng is given, and for draws outside the picture.
    """
    if (draws is None) == (rng is None):
        raise ValueError("random_crop_arr: give draws=(edge, crop_y, crop_x) or rng, one of the two")
    edge = draws[0] if rng is None else int(rng.integers(ceil(size / max_frac), ceil(size / min_frac) + 1))
    resized = _shrink(image, edge)
    if rng is None:
        _, top, left = draws
    else:
        top, left = (int(rng.integers(side - size + 1)) for side in (resized.height, resized.width))
    if not (0 <= top <= resized.height - size and 0 <= left <= resized.width - size):
        raise ValueError(f"random_crop_arr: draws {draws} cut {size} px outside a picture of {resized.size} (w, h)")
    return _cut(resized, size, top, left)


def ten_crop(image: Picture, size: int, crop_range: float = 1.1) -> np.ndarray:
    """uint8 (10, S, S, 3) out of the ADM centre crop of int(size * crop_range): top left, top right, bottom left,
    bottom right, centre; then the same five of the mirrored picture."""
    wide = Image.fromarray(center_crop_arr(image, int(size * crop_range)))
    return np.stack([np.asarray(crop) for crop in functional.ten_crop(wide, size)])


def var_center_crop(image: Picture, size: int) -> np.ndarray:
    """VAR's validation: shorter side to round(1.125 * size) with Lanczos, then torchvision's centre crop."""
    return np.asarray(functional.center_crop(_var_resize(image, size), size))


def var_random_crop(image: Picture, size: int, rng: np.random.Generator) -> np.ndarray:
    """VAR's training: resized as for validation, then a crop at a random place."""
    resized = _var_resize(image, size)
    top, left = (int(rng.integers(side - size + 1)) for side in (resized.height, resized.width))
    return _cut(resized, size, top, left)


def _var_resize(image: Picture, size: int) -> Image.Image:
    return functional.resize(_as_image(image), round(VAR_MARGIN * size), functional.InterpolationMode.LANCZOS)


def mirrored(crop: np.ndarray) -> np.ndarray:
    """The mirror picture, left and right exchanged: (..., H, W, 3)."""
    return crop[..., ::-1, :]


def _as_image(image: Picture) -> Image.Image:
    return (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")


def _shrink(image: Picture, edge: int) -> Image.Image:
    """The shorter side becomes `edge`: halved with a box filter while it is at least twice that, then bicubic."""
    image = _as_image(image)
    while min(image.size) >= 2 * edge:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = edge / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _cut(image: Image.Image, size: int, top: int, left: int) -> np.ndarray:
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _with_mirror(crop: np.ndarray) -> np.ndarray:
    return np.stack((crop, mirrored(crop)))


TRANSFORMS: dict[str, tuple[int, Callable[[Picture, int, np.random.Generator, float], np.ndarray]]] = {
    # name: (A, crops of one picture; (image, size, rng, crop_range) -> (S, S, 3), or (A, S, S, 3) where A > 1)
    "center": (1, lambda image, size, rng, crop_range: center_crop_arr(image, size)),
    "random": (1, lambda image, size, rng, crop_range: random_crop_arr(image, size, rng=rng)),
    "var_center": (1, lambda image, size, rng, crop_range: var_center_crop(image, size)),
    "var_random": (1, lambda image, size, rng, crop_range: var_random_crop(image, size, rng)),
    "center_flip": (2, lambda image, size, rng, crop_range: _with_mirror(center_crop_arr(image, size))),
    "ten": (10, lambda image, size, rng, crop_range: ten_crop(image, size, crop_range)),
}
