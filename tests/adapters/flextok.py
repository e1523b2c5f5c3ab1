"""FlexTok, through from_published. Their latents (B, C, h, w) are our cells (B, h w, C)."""

import torch
from einops import rearrange
from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.flextok import FlexTokTokenizer, projected_guidance


def tokenizer(case: Case, shown: Tensor | None = None, cell: int = 1) -> FlexTokTokenizer:
    """For pictures, or latents whose cells are `cell` pixels apart, of the size of `shown`; None: the full size."""
    size = None if shown is None else [side * cell for side in shown.shape[-2:]]
    return from_published("flextok", case.weights(), {**case.config, "image_size": size})


def stride(case: Case) -> int:
    return 2 ** (len(case.config["vae_block_out_channels"]) - 1)


def cells(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c h w -> b (h w) c")


def latents(found: Tensor, like: Tensor) -> Tensor:
    return rearrange(found, "b (h w) c -> b c h w", h=like.shape[-2])


def value(check: Check, name: str, default: float) -> float:
    """A plain argument, kept as a tensor or as a parameter."""
    found = check.inputs.get(name, check.params.get(name, default))
    return found.item() if isinstance(found, Tensor) else found


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    return {"tokens": tokenizer(case, check.inputs["images"]).encode(check.inputs["images"])}


def embed(case: Case, check: Check) -> dict[str, Tensor]:
    return {"codes": tokenizer(case).embed(check.inputs["tokens"])}


def denoise(case: Case, check: Check) -> dict[str, Tensor]:
    x, tokens, present = check.inputs["x_t"], check.inputs["tokens"], None
    if "lengths" in check.inputs:
        present = torch.arange(tokens.shape[1]) < check.inputs["lengths"][:, None]
    found = tokenizer(case, x, stride(case)).velocity(cells(x), check.inputs["t"], tokens, present)
    return {"velocity": latents(found, x)}


def denoise_null(case: Case, check: Check) -> dict[str, Tensor]:
    x = check.inputs["x_t"]
    found = tokenizer(case, x, stride(case)).velocity(cells(x), check.inputs["t"], None)
    return {"velocity": latents(found, x)}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    noise, tokens, present = check.inputs["noise"], check.inputs["tokens"], None
    if "lengths" in check.inputs:
        present = torch.arange(tokens.shape[1]) < check.inputs["lengths"][:, None]
    model = tokenizer(case, noise, stride(case))
    found = model.flow(
        tokens,
        cells(noise),
        present=present,
        steps=int(value(check, "num_steps", 25)),
        guidance=value(check, "guidance_scale", 1.0),
        projected=bool(value(check, "norm_guidance", False)),
    )
    return {"images": model.autoencoder.decode(found), "latents": latents(found, noise)}


def apg(case: Case, check: Check) -> dict[str, Tensor]:
    running, guided = 0.0, []
    for conditional, unconditional in zip(check.inputs["cond"], check.inputs["uncond"], strict=True):
        found, running = projected_guidance(conditional, unconditional, value(check, "guidance_scale", 1.0), running)
        guided.append(found)
    return {"guided": torch.stack(guided)}


CALLS = {
    "encode": encode,
    "embed": embed,
    "denoise": denoise,
    "denoise_null": denoise_null,
    "decode": decode,
    "apg": apg,
}
