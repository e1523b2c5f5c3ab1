"""The KL autoencoder of MAR, through from_published. Their latents (B, Z, h, w) are our tokens before or after the scale."""

from torch import Tensor

from tests.goldens import Case, Check
from tokenizers_vis import from_published
from tokenizers_vis.kl import KLTokenizer, patchify, unpatchify


def tokenizer(case: Case, shown: Tensor, cell: int = 1) -> KLTokenizer:
    """For pictures, or latents whose cells are `cell` pixels apart, of the size of `shown`."""
    size = [side * cell for side in shown.shape[-2:]]
    return from_published("kl16-vae", case.weights(), {**case.config, "image_size": size})


def stride(case: Case) -> int:
    return 2 ** (len(case.config["ch_mult"]) - 1)


def encode(case: Case, check: Check) -> dict[str, Tensor]:
    posterior = tokenizer(case, check.inputs["images"]).posterior(check.inputs["images"])
    return {"moments": posterior.parameters, "tokens": posterior.mean, "logvar": posterior.logvar}


def encode_sample(case: Case, check: Check) -> dict[str, Tensor]:
    model = tokenizer(case, check.inputs["images"])
    noise = patchify(check.inputs["noise"], model.patch)
    latents = unpatchify(model.encode(check.inputs["images"], noise=noise), model.patch, model.spec.layout)
    return {"latents": latents, "sample": latents / model.scale}


def kl(case: Case, check: Check) -> dict[str, Tensor]:
    return {"kl": tokenizer(case, check.inputs["images"]).posterior(check.inputs["images"]).kl()}


def decode_scaled(case: Case, check: Check) -> dict[str, Tensor]:
    model = tokenizer(case, check.inputs["latents"], stride(case))
    return {"images": model.decode(patchify(check.inputs["latents"], model.patch))}


def decode(case: Case, check: Check) -> dict[str, Tensor]:
    model = tokenizer(case, check.inputs["tokens"], stride(case))
    return {"images": model.decode(patchify(check.inputs["tokens"] * model.scale, model.patch))}


CALLS = {
    "encode": encode,
    "encode_sample": encode_sample,
    "kl": kl,
    "decode_scaled": decode_scaled,
    "decode": decode,
}
