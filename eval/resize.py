"""The resizers of the published scores, each by name: what lies between a picture and a network moves the score.

Axes: B pictures, H, W rows and columns; grey levels 0 to 255 throughout.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

RESIZERS = {
    "tf1": "TensorFlow 1 bilinear: place = place * in / out, no half-pixel shift, no antialiasing",
    "torch": "torch bilinear: half-pixel centres, no antialiasing",
    "clean": "PIL bicubic of each channel in float, antialiased, clipped to 0..255, not rounded",
    "pil_uint8": "PIL bicubic of the uint8 picture, antialiased, rounded to uint8",
}


def resize(pictures: Tensor, size: tuple[int, int], rule: str) -> Tensor:
    """uint8 (B, 3, H, W), or float grey levels where a protocol does not round, -> float32 (B, 3, *size) in grey levels,
    whole ones under "pil_uint8", which takes uint8 alone.

    rule: a key of RESIZERS. Raises ValueError for another rule and for pictures of another type or shape.
    """
    floats = pictures.is_floating_point() and rule != "pil_uint8"
    if not (floats or pictures.dtype == torch.uint8) or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"resize: expected uint8 pictures (B, 3, H, W), got {pictures.dtype} {tuple(pictures.shape)}")
    if rule == "tf1":
        return _tf1(_tf1(pictures.float(), size[1], dim=3), size[0], dim=2)
    if rule == "torch":
        return F.interpolate(pictures.float(), size, mode="bilinear", align_corners=False)
    if rule == "clean":  # torch's antialiased bicubic has PIL's kernel and support, and in float64 PIL's precision
        exact = F.interpolate(pictures.double(), size, mode="bicubic", align_corners=False, antialias=True)
        return exact.float().clamp(0, 255)
    if rule == "pil_uint8":
        return torch.stack([_pil(picture, size) for picture in pictures]).to(pictures.device)
    raise ValueError(f"resize: unknown rule {rule!r}; known: {', '.join(RESIZERS)}")


def _tf1(levels: Tensor, size: int, dim: int) -> Tensor:
    """Along one axis of (B, 3, H, W), in TensorFlow's order of operations, which decides the last digit."""
    count = levels.shape[dim]
    place = torch.arange(size, device=levels.device) * torch.tensor(count / size, dtype=torch.float32)
    low = place.long()
    share = (place - low).view(-1, *[1] * (3 - dim))
    a, b = (levels[(slice(None),) * dim + (index,)] for index in (low, (low + 1).clamp_max(count - 1)))
    return (b - a).mul_(share).add_(a)


def _pil(picture: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    image = Image.fromarray(picture.movedim(0, -1).cpu().contiguous().numpy())
    made = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(made.tobytes()), dtype=torch.uint8).view(height, width, 3).movedim(-1, 0).float()
