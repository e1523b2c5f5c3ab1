"""Editing without training: tokens of a part of a picture are made anew, the others stay as they are.

In-painting, out-painting and, with another class, class editing, for any generator that takes `fixed` tokens. Source: VAR
(Tian et al. 2024, arXiv:2404.02905, sec. 5.3), where the tokens of every scale outside the mask are those of the picture.

Dims: B pictures of H x W pixels, L tokens.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from generators.protocol import Generator
from layers.noise import Noise
from layers.spec import Condition, Grid, Layout, Pyramid
from sampling.decode import generate
from sampling.sampler import Sampler


class Coder(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, tokens: Tensor) -> Tensor: ...


def cells_to_make(layout: Layout, hidden: Tensor, overlap: float = 0.0) -> Tensor:
    """hidden bool (H, W) -> bool (L,): the tokens more than `overlap` of whose cell is hidden, on every scale of a pyramid.

    Raises ValueError for tokens without a place in one picture, and for an overlap outside [0, 1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, must be in [0, 1)")
    match layout:
        case Grid(1, h, w):
            sizes = [(h, w)]
        case Pyramid(sizes):
            pass
        case _:
            raise ValueError(f"the tokens of {layout} have no place in a picture, so no part of it can be made anew")
    share = [F.adaptive_avg_pool2d(hidden[None].double(), size).flatten() for size in sizes]
    return torch.cat(share) > overlap + 1e-9


def box_mask(height: int, width: int, box: tuple[int, int, int, int]) -> Tensor:
    """box: (top, left, height, width) in pixels -> bool (H, W), True inside. Raises ValueError for a box outside."""
    top, left, tall, wide = box
    if min(top, left) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width:
        raise ValueError(f"box {box} (top, left, height, width) is not within a picture of {height} x {width} pixels")
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + tall, left : left + wide] = True
    return mask


def hide(images: Tensor, hidden: Tensor) -> Tensor:
    """images (B, 3, H, W), hidden bool (H, W): the hidden pixels get the mean colour of the others, picture by picture."""
    seen = ~hidden
    mean = (images * seen).sum((-2, -1), keepdim=True) / seen.sum().clamp_min(1)
    return torch.where(hidden, mean, images)


@torch.inference_mode()
def edit(
    generator: Generator,
    tokenizer: Coder,
    images: Tensor,
    hidden: Tensor,
    condition: Condition,
    sampler: Sampler,
    noise: Noise,
    overlap: float = 0.0,
) -> Tensor:
    """images float (B, 3, H, W) in [-1, 1], hidden bool (H, W) -> images in which the hidden pixels are made anew.

    The tokens that stay are those of the picture with its hidden pixels blanked, so nothing of them is seen; the pixels
    that are not hidden stay as they are. condition: what the picture shall show, the old class or another.
    Raises ValueError as `cells_to_make`.
    """
    anew = cells_to_make(generator.spec.layout, hidden, overlap)
    tokens = tokenizer.encode(hide(images, hidden))
    fixed = tokens, ~anew.expand(len(tokens), -1)
    made = tokenizer.decode(generate(generator, condition, sampler, noise, fixed=fixed).tokens)
    return torch.where(hidden, made.clamp(-1, 1).to(images.dtype), images)


@torch.inference_mode()
def keep_first(
    generator: Generator,
    tokenizer: Coder,
    images: Tensor,
    count: int,
    condition: Condition,
    sampler: Sampler,
    noise: Noise,
) -> Tensor:
    """images float (B, 3, H, W) in [-1, 1] -> images that share their first `count` tokens, made anew after these.

    Where the first tokens say the most of the whole (D-AR, FlexTok) that keeps the layout: D-AR (Gao & Shou 2025,
    arXiv:2505.23660, sec. 4.3). Raises ValueError for a count outside [1, L].
    """
    tokens = tokenizer.encode(images)
    if not 1 <= count <= tokens.shape[1]:
        raise ValueError(f"{count} first tokens are to stay, a picture has {tokens.shape[1]}")
    first = torch.arange(tokens.shape[1], device=tokens.device) < count
    fixed = tokens, first.expand(len(tokens), -1)
    return tokenizer.decode(generate(generator, condition, sampler, noise, fixed=fixed).tokens)
