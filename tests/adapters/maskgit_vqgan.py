"""The VQ tokenizer of MaskGIT, through from_published. The original clamps decoded pixels, we do not."""

from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.maskgit_vq import MaskGITVQTokenizer


def tokenizer(case: Case, size: list[int]) -> MaskGITVQTokenizer:
    return from_published("maskgit-vqgan", case.weights(), {**case.config, "image_size": size})


def of_tokens(case: Case, tokens: Tensor) -> tuple[MaskGITVQTokenizer, Tensor]:
    """Tokens (B, L) of a square grid, or (B, h, w)."""
    side = round(tokens.shape[1] ** 0.5)
    grid = tokens.shape[1:] if tokens.dim() == 3 else (side, side)
    pixels = 2 ** (case.config["num_resolutions"] - 1)
    return tokenizer(case, [cells * pixels for cells in grid]), tokens.flatten(1)


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    images = check.inputs["images"]
    return {"tokens": tokenizer(case, list(images.shape[-2:])).encode(images)}


def embed(case: Case, check: Check) -> dict[str, Tensor]:
    model, tokens = of_tokens(case, check.inputs["tokens"])
    return {"codes": model.embed(tokens)}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    model, tokens = of_tokens(case, check.inputs["tokens"])
    return {"images": model.decode(tokens).clamp(-1, 1)}


CALLS = {"encode": encode, "embed": embed, "decode": decode}
