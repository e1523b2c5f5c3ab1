"""Between float pictures in [-1, 1] and uint8: the rules in use, each by name, since the choice moves scores.

"trunc_128" and "round" bring every uint8 picture back as it was; "trunc" darkens 63 of the 256 levels by one.
"""

import torch
from torch import Tensor

UINT8_RULES = {
    "trunc_128": "clamp(127.5 x + 128, 0, 255), truncated",  # LlamaGen, DiT, PAR, NAR, D-AR
    "round": "clamp(255 (x + 1) / 2, 0, 255), rounded half to even",  # MAR, HiMAR, xAR, CSpD
    "trunc": "255 (clamp(x, -1, 1) + 1) / 2, truncated",  # Open-MAGVIT2, IBQ, taming, 1d-tokenizer
}


def to_uint8(images: Tensor, rule: str = "trunc_128") -> Tensor:
    """Float pictures (..., 3, H, W) in [-1, 1] (what lies outside is clamped) -> uint8 of the same shape.

    rule: a key of UINT8_RULES. Raises ValueError for another rule, for pictures that are no floats of three channels,
    and for values that are not finite, naming the first picture that has one.
    """
    if not images.is_floating_point() or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(
            f"to_uint8: expected float pictures (..., 3, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}"
        )
    broken = ~images.isfinite().flatten(-3).all(-1).flatten()
    if broken.any():
        raise ValueError(f"to_uint8: picture {int(broken.nonzero()[0])} of {len(broken)} holds NaN or infinite pixels")
    if rule == "trunc_128":
        return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
    if rule == "round":
        return ((images + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)
    if rule == "trunc":
        return (255 * ((images.clamp(-1, 1) + 1) / 2)).to(torch.uint8)
    raise ValueError(f"to_uint8: unknown rule {rule!r}; known: {', '.join(UINT8_RULES)}")


def from_uint8(pictures: Tensor) -> Tensor:
    """uint8 pictures -> float32 in [-1, 1]: v / 127.5 - 1."""
    return pictures.float() / 127.5 - 1
